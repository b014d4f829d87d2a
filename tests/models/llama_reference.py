"""LongMem on a backbone of the Llama family, one lane, head and query at a time, in float64: slow, and plain to read.

It shares no code with the package: it is given weights by name and tokens, and returns logits.
"""

import math
from typing import Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor


class LlamaSetting(NamedTuple):
    """What the reference needs to know besides weights and tokens.

    Attributes:
        heads: Number of query heads.
        kv_heads: Number of KV heads.
        frequencies: Angle of each pair of a head between neighboring positions, (d / 2,).
        magnitude: Factor of rotated queries and keys.
        eps: Number added to the mean square in norms.
        reduction: R.
        memory_layers: m, ascending.
        chunk: C.
        k: K.
        memory: M.
        distance: Distance by which the queries that read the memory are rotated.
        start: Symbol that is read in place of an end-of-sentence at the start of a segment; None for itself.
    """

    heads: int
    kv_heads: int
    frequencies: Sequence[float]
    magnitude: float = 1.0
    eps: float = 1e-5
    reduction: int = 2
    memory_layers: Sequence[int] = (1,)
    chunk: int = 4
    k: int = 8
    memory: int = 64
    distance: int = 0
    start: Optional[int] = None


class LlamaReference:
    """One document read segment by segment.

    Args:
        weights: Tensors by their names in a checkpoint that holds its backbone, without the leading ``decoder.``.
        setting: The rest.
    """

    def __init__(self, weights: Dict[str, Tensor], setting: LlamaSetting):
        self.w = {name: value.double() for name, value in weights.items() if value.is_floating_point()}
        self.s, self.group = setting, setting.heads // setting.kv_heads
        # Per memory layer and KV head, (key, value) of every token so far.
        self.past: Dict[int, List[List]] = {m: [[] for _ in range(setting.kv_heads)] for m in setting.memory_layers}

    def read(self, tokens: List[int]) -> Tensor:
        """Logits (T, V) of the next segment, which is then written into the memory."""
        tokens = [int(token) for token in tokens]
        if tokens[0] == 2 and self.s.start is not None:
            tokens[0] = self.s.start
        x = self.w["backbone.decoder.embed_tokens.weight"][torch.tensor(tokens)]
        hidden, number, R, remembered = [x], 0, self.s.reduction, {}
        while f"backbone.decoder.layers.{number}.up_proj.weight" in self.w:
            name = f"backbone.decoder.layers.{number}."
            if number in self.s.memory_layers:
                remembered[number] = self.projections(name, hidden[-1])[1:]
            hidden.append(self.layer(name, hidden[-1]))
            number += 1
        x, layer_read = hidden[0], {m // R: m for m in self.s.memory_layers}
        for j in range(number // R):
            skip = hidden[R * (j + 1)] - hidden[R * j]
            x = self.layer(f"layers.{j}.", x, layer_read.get(j)) + skip
        for m, (keys, values) in remembered.items():
            for past, key, value in zip(self.past[m], keys, values):
                past += zip(key, value)
        return self.norm("layer_norm.", x) @ self.w["backbone.decoder.output_projection.weight"].T

    def layer(self, name: str, x: Tensor, reads: Optional[int] = None) -> Tensor:
        queries, keys, values = self.projections(name, x)
        outputs = []
        for h, q in enumerate(queries):
            k, v = keys[h // self.group], values[h // self.group]
            outputs.append(torch.stack([self.attend(name, h, t, q, k, v, reads) for t in range(len(x))]))
        x = x + self.linear(f"{name}self_attn.out_proj.", torch.cat(outputs, dim=1))
        normed = self.norm(f"{name}feed_forward_norm.", x)
        gate, up = (self.linear(f"{name}{part}_proj.", normed) for part in ("gate", "up"))
        return x + self.linear(f"{name}down_proj.", gate / (1 + torch.exp(-gate)) * up)

    def projections(self, name: str, x: Tensor):
        """Queries, keys and values of each head, (T, d) each, without position."""
        normed = self.norm(f"{name}self_attn_norm.", x)
        parts = []
        for letter, heads in (("q", self.s.heads), ("k", self.s.kv_heads), ("v", self.s.kv_heads)):
            y = self.linear(f"{name}self_attn.{letter}_proj.", normed)
            split = y.split(y.size(1) // heads, dim=1)
            if f"{name}self_attn.{letter}_norm.weight" in self.w:
                split = [self.norm(f"{name}self_attn.{letter}_norm.", head) for head in split]
            parts.append(split)
        return parts

    def attend(self, name: str, h: int, t: int, q: Tensor, k: Tensor, v: Tensor, reads: Optional[int]) -> Tensor:
        scale = self.s.magnitude**2 / math.sqrt(q.size(1))
        scores = [self.turn(q[t], t) @ self.turn(k[s], s) * scale for s in range(t + 1)]
        local = torch.softmax(torch.stack(scores), dim=0) @ v[: t + 1]
        past = [] if reads is None else self.past[reads][h // self.group]
        chunks = [past[i : i + self.s.chunk] for i in range(0, len(past) - self.s.chunk + 1, self.s.chunk)]
        chunks = chunks[-(self.s.memory // self.s.chunk) :]
        if not chunks:
            return local
        query = self.turn(q[t], self.s.distance)
        means = [sum(key.float() for key, _ in chunk) / self.s.chunk for chunk in chunks]
        best = sorted(range(len(chunks)), key=lambda i: -float(means[i] @ query.float()))[: self.s.k // self.s.chunk]
        keys, values = (torch.stack(x) for x in zip(*(token for i in best for token in chunks[i])))
        memory = torch.softmax(keys @ query * scale, dim=0) @ values
        gate = torch.sigmoid(32 * self.w[f"{name}self_attn.gate_bias"][h])
        return (1 - gate) * local + gate * memory

    def turn(self, x: Tensor, position: int) -> Tensor:
        half = len(x) // 2
        angles = position * torch.tensor([float(frequency) for frequency in self.s.frequencies], dtype=torch.float64)
        turned = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([turned.real, turned.imag])

    def linear(self, name: str, x: Tensor) -> Tensor:
        y = x @ self.w[f"{name}weight"].T
        return y + self.w[f"{name}bias"] if f"{name}bias" in self.w else y

    def norm(self, name: str, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=1, keepdim=True) + self.s.eps).sqrt() * self.w[f"{name}weight"]

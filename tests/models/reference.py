"""LongMem as docs/method.md describes it, one lane, head and query at a time, in float64: slow, and plain to read.

It shares no code with the package: it is given weights by name and tokens, and returns logits.
"""

import math
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from longmem_fairseq.modules.sliding_window import SINKS


class Setting(NamedTuple):
    """What the reference needs to know besides weights and tokens."""

    heads: int
    activation: Callable[[Tensor], Tensor]
    positions: str  # "learned", "sinusoidal", "alibi" or "none"
    reduction: int  # R
    memory_layers: Sequence[int]  # m, ascending
    chunk: int  # C
    k: int  # K
    memory: int  # M
    padding: int
    scaled: bool = True  # embeddings times sqrt(D)
    carry: int = 0  # tokens of a carried window


class Reference:
    """One document read segment by segment.

    Args:
        weights: names as in a checkpoint that holds its backbone, without the leading ``decoder.``.
        setting: the rest.
    """

    def __init__(self, weights: Dict[str, Tensor], setting: Setting):
        self.w = {name: value.double() for name, value in weights.items() if value.is_floating_point()}
        self.s = setting
        numbers = [int(name.split(".")[3]) for name in self.w if name.startswith("backbone.decoder.layers.")]
        self.N = 1 + max(numbers)
        self.D = self.w["backbone.decoder.layers.0.fc1.weight"].size(1)
        # Per memory layer and head, (key, value) of every token so far.
        self.past: Dict[int, List[List]] = {m: [[] for _ in range(setting.heads)] for m in setting.memory_layers}
        self.tokens: List[int] = []  # so far
        self.kept: Dict[str, List] = {}  # by layer, per head, (key, value) of every token so far

    def read(self, tokens: List[int]) -> Tensor:
        """Logits (T, V) of the next segment, which is then remembered."""
        again = 0  # tokens that are encoded again
        if self.s.positions in ("learned", "sinusoidal"):
            again = min(self.s.carry, len(self.tokens))
        elif self.s.carry and not self.kept:
            self.kept = {"": []}
        self.tokens += tokens
        tokens = self.tokens[-again - len(tokens) :]
        hidden, remembered = self.backbone(tokens)
        R = self.s.reduction
        layer_read = {m // R: m for m in self.s.memory_layers}
        x = hidden[0]
        for j in range(self.N // R):
            residual = hidden[R * (j + 1)] - hidden[R * j]
            x = self.layer(f"layers.{j}.", x, layer_read.get(j), first=again) + residual
        x = x[again:]
        if "layer_norm.weight" in self.w:
            x = self.norm("layer_norm.", x)
        if "backbone.decoder.project_out_dim.weight" in self.w:
            x = x @ self.w["backbone.decoder.project_out_dim.weight"].T
        for m, (keys, values) in remembered.items():
            for h in range(self.s.heads):
                self.past[m][h] += zip(keys[h][again:], values[h][again:])
        return x @ self.w["backbone.decoder.output_projection.weight"].T

    def backbone(self, tokens: List[int]):
        """h_0 to h_N, (T, D) each, and each memory layer's keys and values, per head (T, d)."""
        embedding = self.w["backbone.decoder.embed_tokens.weight"]
        x = torch.stack([embedding[token] for token in tokens]) * (math.sqrt(self.D) if self.s.scaled else 1.0)
        if "backbone.decoder.project_in_dim.weight" in self.w:
            x = x @ self.w["backbone.decoder.project_in_dim.weight"].T
        x = x + torch.stack([self.position(i) for i in range(len(tokens))])
        if "backbone.decoder.layernorm_embedding.weight" in self.w:
            x = self.norm("backbone.decoder.layernorm_embedding.", x)
        hidden, remembered = [x], {}
        for i in range(self.N):
            if i in self.s.memory_layers:
                name = f"backbone.decoder.layers.{i}."
                normed = self.norm(name + "self_attn_layer_norm.", x)
                remembered[i] = [self.heads(self.linear(f"{name}self_attn.{p}_proj.", normed)) for p in "kv"]
            x = self.layer(f"backbone.decoder.layers.{i}.", x)
            hidden.append(x)
        return hidden, remembered

    def position(self, i: int) -> Tensor:
        if self.s.positions == "learned":
            return self.w["backbone.decoder.embed_positions.weight"][self.s.padding + 1 + i]
        if self.s.positions == "sinusoidal":
            number, half = self.s.padding + 1 + i, self.D // 2
            angles = [number * math.exp(-math.log(10000) * j / (half - 1)) for j in range(half)]
            return torch.tensor([math.sin(a) for a in angles] + [math.cos(a) for a in angles], dtype=torch.float64)
        return torch.zeros(self.D, dtype=torch.float64)

    def layer(self, name: str, x: Tensor, reads: Optional[int] = None, first: int = 0) -> Tensor:
        """A pre-norm layer; from the token ``first`` on it also reads the memory of the backbone layer ``reads``."""
        normed = self.norm(name + "self_attn_layer_norm.", x)
        q, k, v = (self.heads(self.linear(f"{name}self_attn.{p}_proj.", normed)) for p in "qkv")
        before = 0
        if self.kept:  # each token attends to the tokens before it, whichever segment they were in
            kept = self.kept.get(name, [(x.new_zeros(0, y.size(1)), x.new_zeros(0, y.size(1))) for y in k])
            before = len(kept[0][0])
            k, v = ([torch.cat([old[i], new]) for old, new in zip(kept, y)] for i, y in enumerate((k, v)))
            self.kept[name] = list(zip(k, v))
        out = []
        for h in range(self.s.heads):
            rows = []
            for t in range(len(x)):
                end = before + t + 1
                begin = max(0, end - 1 - self.s.carry) if self.kept else 0
                seen = [i for i in range(end) if i >= begin or i < SINKS]
                far = min(before + t, self.s.carry + SINKS)  # of the first token, whose distance stops growing
                distances = [far - i if self.kept and i < SINKS else before + t - i for i in seen]
                local = self.local(h, q[h][t], k[h][seen], v[h][seen], torch.tensor(distances))
                memory = None if reads is None or t < first else self.remembered(self.past[reads][h], q[h][t])
                if memory is not None:
                    gate = self.gate(name + "self_attn.gate_", h, q[h][t])
                    local = (1 - gate) * local + gate * memory
                rows.append(local)
            out.append(torch.stack(rows))
        x = x + self.linear(name + "self_attn.out_proj.", torch.cat(out, dim=1))
        normed = self.norm(name + "final_layer_norm.", x)
        return x + self.linear(name + "fc2.", self.s.activation(self.linear(name + "fc1.", normed)))

    def gate(self, name: str, h: int, q: Tensor) -> Tensor:
        """The memory's share in the output of a head."""
        g = self.w[name + "bias"][h]
        if name + "weight" in self.w:
            g = g + self.w[name + "weight"][h] @ q / math.sqrt(len(q))
        return torch.sigmoid(32 * g)

    def local(self, h: int, q: Tensor, keys: Tensor, values: Tensor, distances: Tensor) -> Tensor:
        """Attention of a token to those at some distances before it."""
        scores = keys @ q / math.sqrt(len(q))
        if self.s.positions == "alibi":
            scores = scores - slopes(self.s.heads)[h] * distances
        return torch.softmax(scores, dim=0) @ values

    def remembered(self, past: List, q: Tensor):
        """Attention to the K/C chunks whose mean key has the largest product with q, by float32; None without any."""
        C = self.s.chunk
        whole = len(past) // C
        chunks = [past[i * C : i * C + C] for i in range(whole)][-(self.s.memory // C) :]
        if not chunks:
            return None
        scores = []
        for chunk in chunks:
            mean = sum(key.float() for key, _ in chunk) / C
            scores.append((mean @ q.float()).item())
        best = sorted(range(len(chunks)), key=lambda i: -scores[i])[: self.s.k // C]
        tokens = [token for i in best for token in chunks[i]]
        keys, values = (torch.stack(x) for x in zip(*tokens))
        return torch.softmax(keys @ q / math.sqrt(len(q)), dim=0) @ values

    def heads(self, x: Tensor):
        return x.split(self.D // self.s.heads, dim=1)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.w[name + "weight"].T + self.w[name + "bias"]

    def norm(self, name: str, x: Tensor) -> Tensor:
        mean, variance = x.mean(dim=1, keepdim=True), x.var(dim=1, correction=0, keepdim=True)
        return (x - mean) / torch.sqrt(variance + 1e-5) * self.w[name + "weight"] + self.w[name + "bias"]


def slopes(heads: int) -> List[float]:
    """ALiBi: 2^(-8i/H), for H no power of two those of the next lower, and every other one of the next higher."""
    power = 1
    while 2 * power <= heads:
        power *= 2
    lower = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    higher = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1)]
    return lower + higher[::2][: heads - power]

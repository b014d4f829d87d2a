"""The released LongMem written down slowly in NumPy, and random checkpoints in its files' format.

Independent of the package: plain loops over rows, heads and queries, after the published description. Where fewer
chunks are held than a query may read, only those are read.
"""

import math
from argparse import Namespace
from pathlib import Path
from typing import Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from fairseq.dataclass.configs import FairseqConfig
from omegaconf import OmegaConf

SIDE, COPY = "decoder.layers.", "decoder.pretrained_model."


class Shape(NamedTuple):
    """What a checkpoint is made for; the names are those of the files' settings."""

    width: int = 24
    heads: int = 4
    side_layers: int = 2
    reduction: int = 2
    retrieval_layer: int = 3
    chunk_size: int = 4
    k: int = 8
    memory_size: int = 64
    vocabulary: int = 30


def random_weights(shape: Shape, seed: int = 0) -> Tuple[Dict[str, torch.Tensor], Dict[str, torch.Tensor]]:
    """Weights of a backbone and of a side network, under the names of the released files."""
    generator = torch.Generator().manual_seed(seed)
    D, V = shape.width, shape.vocabulary

    def normal(*size, std=0.3, mean=0.0):
        return torch.randn(*size, generator=generator) * std + mean

    backbone = {"decoder.model.transformer.wte.weight": normal(V, D, std=1.0)}
    for i in range(shape.side_layers * shape.reduction):
        prefix = f"decoder.model.transformer.h.{i}."
        backbone[prefix + "ln_1.weight"], backbone[prefix + "ln_1.bias"] = normal(D, mean=1.0), normal(D)
        for name in ("q", "k", "v", "out"):
            backbone[f"{prefix}attn.{name}_proj.weight"] = normal(D, D)
        backbone[prefix + "mlp.fc_in.weight"], backbone[prefix + "mlp.fc_in.bias"] = normal(4 * D, D), normal(4 * D)
        backbone[prefix + "mlp.fc_out.weight"], backbone[prefix + "mlp.fc_out.bias"] = normal(D, 4 * D), normal(D)
    for name in ("weight", "bias"):
        backbone[f"decoder.model.transformer.ln_f.{name}"] = normal(D, mean=float(name == "weight"))
    backbone["decoder.model.lm_head.weight"], backbone["decoder.model.lm_head.bias"] = normal(V, D), normal(V)

    side = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_tokens.weight": backbone["decoder.model.transformer.wte.weight"],
        "decoder.output_projection.weight": backbone["decoder.model.lm_head.weight"],
    }
    for j in range(shape.side_layers):
        prefix = f"{SIDE}{j}."
        if j == shape.retrieval_layer // shape.reduction:
            side[prefix + "self_attn.memory_bias"] = normal(shape.heads, std=1.0)
        for name in ("q", "k", "v", "out"):
            side[f"{prefix}self_attn.{name}_proj.weight"] = normal(D, D)
        side[prefix + "fc1.weight"], side[prefix + "fc1.bias"] = normal(4 * D, D), normal(4 * D)
        side[prefix + "fc2.weight"], side[prefix + "fc2.bias"] = normal(D, 4 * D), normal(D)
        side[prefix + "ln_1.weight"], side[prefix + "ln_1.bias"] = normal(D, mean=1.0), normal(D)
    side["decoder.layer_norm.weight"], side["decoder.layer_norm.bias"] = normal(D, mean=1.0), normal(D)
    side.update({COPY + key: value for key, value in backbone.items()})
    return backbone, side


def side_settings(shape: Shape) -> dict:
    return {
        "_name": "transformer_lm_sidenet_gpt2_small",
        "activation_fn": "gelu",
        "dropout": 0.1,
        "attention_dropout": 0.1,
        "decoder_embed_dim": shape.width,
        "decoder_ffn_embed_dim": 4 * shape.width,
        "decoder_layers": shape.side_layers,
        "decoder_attention_heads": shape.heads,
        "decoder_normalize_before": True,
        "no_decoder_final_norm": False,
        "layer_reduction_factor": shape.reduction,
        "reload_ptm_layer": True,
        "retrieval_layer_index": shape.retrieval_layer,
        "chunk_size": shape.chunk_size,
        "k": shape.k,
        "memory_size": shape.memory_size,
        "use_external_memory": True,
        "use_gpu_to_search": True,
        "pretrained_model_path": "/home/author/models/newgpt.pt",
        "gpt_encoder_path": "/home/author/bpe",
        "tokens_per_sample": 1024,
        "no_scale_embedding": False,
        "no_token_positional_embeddings": True,
        "share_decoder_input_output_embed": True,
        "decoder_layers_to_keep": None,
    }


def backbone_settings(shape: Shape) -> Namespace:
    return Namespace(
        _name="newgpt-small",
        arch="newgpt-small",
        newgpt_mode="alibi",
        embed_dim=shape.width,
        num_attention_heads=shape.heads,
        num_layers=shape.side_layers * shape.reduction,
        dropout=0.1,
        attention_dropout=0.1,
        tokens_per_sample=1024,
        retrieval_layer_index=shape.retrieval_layer,
        max_target_positions=None,
        gpt_dict_path="/home/author/dict.txt",
        task="gpt_pretraining",
    )


def save(path: Path, weights: dict, settings) -> Path:
    """Write a checkpoint in the released files' format."""
    cfg = OmegaConf.to_container(OmegaConf.structured(FairseqConfig()), enum_to_str=True)
    cfg.update(model=settings, task={"_name": "language_modeling", "data": "/home/author/data"})
    state = {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"lr": 0.0002},
                "num_updates": 0,
            }
        ],
        "task_state": {},
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0, "shuffle": True}, "val_loss": None},
    }
    torch.save(state, path)
    return path


class Chunk(NamedTuple):
    keys: np.ndarray  # (H, C, d)
    values: np.ndarray
    means: np.ndarray  # (H, d)


class Reference:
    """The released model with its memory, called segment by segment.

    Attributes:
        memory: chunks held, oldest first.
        retrieved: of the last segment, for each row, head and query the scores of all chunks held.
    """

    def __init__(self, side: Dict[str, torch.Tensor], shape: Shape, half: bool = True):
        self.weights = {key: value.double().numpy() for key, value in side.items()}
        self.shape, self.half = shape, half
        self.memory: List[Chunk] = []
        self.scores: Dict[Tuple[int, int, int], np.ndarray] = {}

    def __call__(self, tokens: np.ndarray, read_only: bool = False) -> np.ndarray:
        """Logits (B, T, V) of tokens (B, T)."""
        s, self.scores = self.shape, {}
        rows = [self._encode(row) for row in tokens]
        logits = np.stack([self._side_network(row, hidden) for row, (hidden, _, _) in enumerate(rows)])
        if not read_only:
            keys = np.concatenate([keys for _, keys, _ in rows])  # (B * T, D)
            values = np.concatenate([values for _, _, values in rows])
            n, capacity = len(keys) // s.chunk_size, s.memory_size // s.chunk_size
            if len(self.memory) + n >= capacity:
                del self.memory[: 2 * len(keys) // s.chunk_size]
            for i in range(n):
                self.memory.append(self._chunk(*(x[i * s.chunk_size : (i + 1) * s.chunk_size] for x in (keys, values))))
            del self.memory[:-capacity]  # of a batch larger than the memory, at which the released code fails
        return logits

    def _chunk(self, keys: np.ndarray, values: np.ndarray) -> Chunk:
        """A chunk of keys and values (C, D)."""
        keys, values = (x.reshape(len(x), self.shape.heads, -1).transpose(1, 0, 2) for x in (keys, values))  # (H, C, d)
        means = keys.mean(axis=1)
        return Chunk(*(x.astype(np.float16) if self.half else x for x in (keys, values)), means)

    def _encode(self, tokens: np.ndarray) -> Tuple[List[np.ndarray], np.ndarray, np.ndarray]:
        """Hidden states h_0 to h_N (T, D) of one row, and keys and values of the memory layer (T, D)."""
        base = COPY + "decoder.model.transformer."
        hidden = [self.weights[base + "wte.weight"][tokens]]
        N = self.shape.side_layers * self.shape.reduction
        for i in range(N):
            x, prefix = hidden[-1], f"{base}h.{i}."
            normalized = self._norm(x, prefix + "ln_1", 1e-6)
            q, k, v = (normalized @ self.weights[f"{prefix}attn.{name}_proj.weight"].T for name in "qkv")
            if i == self.shape.retrieval_layer:
                keys, values = k, v
            attended = self._local(q, k, v) @ self.weights[prefix + "attn.out_proj.weight"].T
            inner = self._linear(normalized, prefix + "mlp.fc_in")
            inner = 0.5 * inner * (1 + np.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
            hidden.append(x + attended + self._linear(inner, prefix + "mlp.fc_out"))
        hidden[N] = self._norm(hidden[N], base + "ln_f", 1e-6)
        return hidden, keys, values

    def _side_network(self, row: int, hidden: List[np.ndarray]) -> np.ndarray:
        s, x = self.shape, hidden[0]
        for j in range(s.side_layers):
            prefix = f"{SIDE}{j}."
            normalized = self._norm(x, prefix + "ln_1", 1e-5)
            q, k, v = (normalized @ self.weights[f"{prefix}self_attn.{name}_proj.weight"].T for name in "qkv")
            attended = self._local(q, k, v)
            if j == s.retrieval_layer // s.reduction and self.memory:
                gate = 1 / (1 + np.exp(-self.weights[prefix + "self_attn.memory_bias"]))
                gate = np.repeat(gate, s.width // s.heads)
                attended = (1 - gate) * attended + gate * self._read(row, q)
            attended = attended @ self.weights[prefix + "self_attn.out_proj.weight"].T
            inner = self._linear(normalized, prefix + "fc1")
            inner = inner * np.vectorize(lambda z: 0.5 * (1 + math.erf(z / math.sqrt(2))))(inner)
            skip = hidden[s.reduction * (j + 1)] - hidden[s.reduction * j]
            x = x + attended + self._linear(inner, prefix + "fc2") + skip
        x = self._norm(x, "decoder.layer_norm", 1e-5)
        return self._linear(x, COPY + "decoder.model.lm_head")

    def _local(self, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        """Causal attention with ALiBi, (T, D) each."""
        out, d = np.zeros_like(q), self.shape.width // self.shape.heads
        for head, slope in enumerate(self._slopes()):
            at = slice(head * d, (head + 1) * d)
            for t in range(len(q)):
                scores = k[: t + 1, at] @ q[t, at] / math.sqrt(d) - slope * np.arange(t, -1, -1)
                out[t, at] = _softmax(scores) @ v[: t + 1, at]
        return out

    def _slopes(self) -> List[float]:
        H = self.shape.heads
        power = 1
        while power * 2 <= H:
            power *= 2
        slopes = [2 ** (-8 * i / power) for i in range(1, power + 1)]
        finer = [2 ** (-8 * i / (2 * power)) for i in range(1, 2 * power + 1)]
        return (slopes + finer[::2])[:H]

    def _read(self, row: int, q: np.ndarray) -> np.ndarray:
        """Memory attention of queries (T, D), (T, D)."""
        s, out, d = self.shape, np.zeros_like(q), self.shape.width // self.shape.heads
        for head in range(s.heads):
            for t in range(len(q)):
                query = q[t, head * d : (head + 1) * d]
                scores = np.array([chunk.means[head] @ query for chunk in self.memory])
                self.scores[row, head, t] = scores
                best = np.argsort(-scores, kind="stable")[: s.k // s.chunk_size]
                keys = np.concatenate([self.memory[i].keys[head] for i in best]).astype(np.float64)
                values = np.concatenate([self.memory[i].values[head] for i in best]).astype(np.float64)
                out[t, head * d : (head + 1) * d] = _softmax(keys @ query / math.sqrt(d)) @ values
        return out

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.weights[name + ".weight"].T + self.weights[name + ".bias"]

    def _norm(self, x: np.ndarray, name: str, eps: float) -> np.ndarray:
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        return (x - mean) / np.sqrt(variance + eps) * self.weights[name + ".weight"] + self.weights[name + ".bias"]


def _softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max())
    return weights / weights.sum()

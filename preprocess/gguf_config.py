"""The content of a config.json from the metadata of a GGUF file.

Legend: d width of a head.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longmem_fairseq.modules.rotary import RotaryPositions
from preprocess.errors import InputError
from preprocess.gguf_metadata import GgufMetadata
from preprocess.huggingface_weights import Config

# Architectures of llama.cpp by their names in ``general.architecture``; each is also a model_type of Hugging Face.
ARCHITECTURES = ("llama", "qwen2", "qwen3")

# What llama_lm cannot express, by the setting of the architecture that tells.
_REFUSED = {
    "expert_count": "a mixture of experts",
    "attention.kv_lora_rank": "multi-head latent attention",
    "attention.scale": "a scale of the attention",
    "attention.clamp_kqv": "a bound of queries, keys and values",
    "attention.max_alibi_bias": "a linear bias of the attention",
    "attn_logit_softcapping": "a bound of the attention's logits",
    "final_logit_softcapping": "a bound of the logits",
    "logit_scale": "a scale of the logits",
    "embedding_scale": "a scale of the embeddings",
    "residual_scale": "a scale of the residual stream",
}
_SCALINGS = ("none", "linear", "yarn")
# Settings of YaRN, and the value with which transformers and llama.cpp compute the same.
_YARN = {"attn_factor": 1.0, "yarn_ext_factor": 1.0, "yarn_attn_factor": 1.0, "yarn_log_multiplier": 0.0}
# Windows, in tokens, that a model with Llama 3's scaling may have been trained with first; Llama 3's is 8,192.
_FIRST_WINDOWS = (8192, *(2**power for power in range(5, 21)))


def check_model(metadata: GgufMetadata) -> None:
    """Refuse what is not a model of an architecture that ``llama_lm`` can express.

    Args:
        metadata: Metadata of the file.

    Raises:
        InputError: The file holds something else; the message names it and what is supported.
    """
    if metadata.get("general.type", "model") != "model":
        raise metadata.refuse("general.type", ["model"])
    if metadata.require("general.architecture") not in ARCHITECTURES:
        raise metadata.refuse("general.architecture", ARCHITECTURES)
    prefix = metadata.require("general.architecture")
    for name, feature in _REFUSED.items():
        value = metadata.get(f"{prefix}.{name}")
        if value:
            raise InputError(f"{metadata.path}: {prefix}.{name}={_decimal(value)}: {feature} is not supported")


def huggingface_config(
    metadata: GgufMetadata, tensors: Collection[str], vocabulary: int, factors: Tensor | None
) -> Config:
    """Translate the metadata of a model to the content of a config.json.

    Args:
        metadata: Metadata of the file, which :func:`check_model` accepts.
        tensors: Names of the file's tensors.
        vocabulary: Number of rows of the embedding.
        factors: Divisor of each rotary frequency (``rope_freqs.weight``), shape (d / 2,), float32; None for none.

    Raises:
        InputError: A value is missing, or the model cannot be expressed.
    """
    settings = _Settings(metadata)
    width, heads = settings.number("embedding_length"), settings.number("attention.head_count")
    head_dim = settings.number("attention.key_length", width // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if settings.number(name, head_dim) != head_dim:
            raise InputError(
                f"{metadata.path}: {settings.prefix}.{name}={settings.number(name)} is not supported: heads of this "
                f"model are {head_dim} wide, and llama_lm rotates whole heads and reads values as wide as keys"
            )
    theta = _decimal(settings.number("rope.freq_base", 10000.0))
    config = {
        "model_type": settings.prefix,
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": settings.number("feed_forward_length"),
        "num_hidden_layers": settings.number("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": settings.number("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": _decimal(settings.number("attention.layer_norm_rms_epsilon")),
        "rope_theta": theta,
        "rope_scaling": _scaling(settings, head_dim, theta, factors),
        "max_position_embeddings": settings.number("context_length"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if settings.prefix == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in tensors
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    window = settings.number("attention.sliding_window", 0)
    if window:
        # llama.cpp knows Mistral as llama
        kind = {"model_type": "mistral"} if settings.prefix == "llama" else {"use_sliding_window": True}
        config.update(kind, sliding_window=window)
    return config


class _Settings:
    """The settings of the model's architecture, ``llama.block_count`` for instance.

    Args:
        metadata: Metadata of the file.
    """

    def __init__(self, metadata: GgufMetadata):
        self.metadata = metadata
        self.prefix = metadata.require("general.architecture")

    def number(self, name: str, default: Any = None) -> Any:
        """Return a setting, which must be the same in all layers; without a default it must be there."""
        name = f"{self.prefix}.{name}"
        value = self.metadata.require(name) if default is None else self.metadata.get(name, default)
        if not isinstance(value, list):
            return value
        if len(set(value)) != 1:
            raise InputError(
                f"{self.metadata.path}: {name} differs between layers, from {min(value)} to {max(value)}, which is not "
                "supported"
            )
        return value[0]


def _scaling(settings: _Settings, head_dim: int, theta: float, factors: Tensor | None) -> Config | None:
    """Return the scaling of the rotary frequencies under Hugging Face's names, None for none."""
    name = "rope.scaling.type"
    kind = settings.number(name, "none")
    if kind not in _SCALINGS:
        raise settings.metadata.refuse(f"{settings.prefix}.{name}", [*_SCALINGS, "Llama 3's (rope_freqs.weight)"])
    if factors is not None and (factors != 1).any():
        if kind != "none":
            raise InputError(
                f"{settings.metadata.path}: {settings.prefix}.{name}={kind} together with rope_freqs.weight is not "
                "supported"
            )
        return _llama3(settings, head_dim, theta, factors)
    if kind == "none":
        factor = settings.number("rope.scale_linear", 1.0)  # of the first GGUF files
        return None if factor == 1 else {"rope_type": "linear", "factor": _decimal(factor)}
    scaling = {"rope_type": kind, "factor": _decimal(settings.number("rope.scaling.factor"))}
    return scaling if kind == "linear" else {**scaling, **_yarn(settings)}


def _yarn(settings: _Settings) -> Config:
    """Return the parameters of YaRN but its factor."""
    for name, usual in _YARN.items():
        value = settings.number(f"rope.scaling.{name}", usual)
        if value != usual:
            raise InputError(
                f"{settings.metadata.path}: {settings.prefix}.rope.scaling.{name}={_decimal(value)} is not supported; "
                f"supported is {usual}"
            )
    bounds = {name: settings.number(f"rope.scaling.yarn_{name}", 0.0) for name in ("beta_fast", "beta_slow")}
    window = settings.number("rope.scaling.original_context_length")
    return {
        "original_max_position_embeddings": window,
        **{name: _decimal(value) for name, value in bounds.items() if value},
    }


def _llama3(settings: _Settings, head_dim: int, theta: float, factors: Tensor) -> Config:
    """Return the parameters of Llama 3's scaling that divide the frequencies by these factors.

    llama.cpp keeps only the factors. That frequencies pass from one to the other between 1 and 4 turns in the first
    window is common to all models that were published with this scaling.
    """
    base = RotaryPositions(head_dim, theta).frequencies
    scaling = {
        "rope_type": "llama3",
        "factor": _decimal(factors.max().item()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    first = settings.number("rope.scaling.original_context_length", _FIRST_WINDOWS[0])
    for window in (first, *_FIRST_WINDOWS):
        scaling["original_max_position_embeddings"] = window
        frequencies = RotaryPositions(head_dim, theta, scaling).frequencies
        if factors.shape == base.shape and torch.allclose(base / frequencies, factors, rtol=1e-5, atol=0):
            return scaling
    raise InputError(
        f"{settings.metadata.path}: rope_freqs.weight is not a scaling of Llama 3's kind, which has factors from 1 to "
        f"{scaling['factor']} for the {head_dim // 2} frequencies of a head: no other scaling by factors is supported"
    )


def _decimal(value: Any) -> Any:
    """Return the shortest decimal number that is stored as this float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value))) if isinstance(value, float) and math.isfinite(value) else value

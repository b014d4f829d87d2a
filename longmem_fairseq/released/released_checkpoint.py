"""Checkpoints of the released LongMem: reading them safely, and translating their settings and names of weights.

A backbone has ``decoder.model.transformer.*`` and
``decoder.model.lm_head.*``; a side network ``decoder.layers.*``, ``decoder.layer_norm.*``, the gate
``decoder.layers.<s>.self_attn.memory_bias`` and, below ``decoder.pretrained_model.``, a copy of its whole backbone.
"""

import re
from argparse import Namespace
from typing import Any, Dict, MutableMapping, Optional, Tuple

import torch
from fairseq.utils import safe_getattr
from torch import Tensor

from ..safe_load import load_safely, settings

COPY = "decoder.pretrained_model."  # the backbone inside a side network's checkpoint
# Settings in which the released side network differs from its backbone (see LongMemConfig).
SIDE_NETWORK = {"side_activation_fn": "gelu", "side_layer_norm_eps": 1e-5, "normalize_last_hidden": True}
_BACKBONE_EPS = 1e-6
_KEPT = (
    "k",
    "chunk_size",
    "memory_size",
    "retrieval_layer_index",
    "layer_reduction_factor",
    "use_external_memory",
    "dropout",
    "attention_dropout",
    "pretrained_model_path",
)


def read_checkpoint(path: str) -> Tuple[Namespace, Dict[str, Tensor]]:
    """Read the settings and weights of a checkpoint, under the names in the file.

    Args:
        path: Path of the checkpoint.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is not a checkpoint, or holds anything but tensors and plain data.
    """
    try:
        state = load_safely(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict) or not state.get("cfg"):
        raise ValueError(f"{path} is not a checkpoint of the released LongMem: it lacks model or cfg")
    return settings(state), dict(state["model"])


def is_released_side_network(weights: MutableMapping[str, Tensor]) -> bool:
    return any(key.startswith(COPY) or key.endswith(".self_attn.memory_bias") for key in weights)


def released_backbone(cfg: Any, weights: Dict[str, Tensor]) -> Optional[Tuple[Namespace, Dict[str, Tensor]]]:
    """Return settings and weights of a released backbone, or of its copy in a side network's file.

    Args:
        cfg: Settings in the checkpoint.
        weights: Tensors of the checkpoint by name.

    Returns:
        Settings of a ``parallel_lm`` and its weights, ``decoder.*``; None where the file is not of this format.
    """
    if any(key.startswith(COPY) for key in weights):
        weights = {key[len(COPY) :]: x for key, x in weights.items() if key.startswith(COPY)}
        sizes = copied_backbone_settings(cfg)
    elif "decoder.model.transformer.wte.weight" in weights:
        weights = dict(weights)
        sizes = backbone_settings(cfg)
    else:
        return None
    rename_backbone(weights, "decoder.")
    return Namespace(_name="parallel_lm", **sizes), weights


def backbone_settings(cfg: Any) -> Dict[str, Any]:
    """Translate the settings of a released backbone to those of ``parallel_lm``.

    Args:
        cfg: Settings in the checkpoint.

    Returns:
        The settings; empty where ``cfg`` does not describe a released backbone.

    Raises:
        ValueError: Its positions are not ALiBi's.
    """
    mode = safe_getattr(cfg, "newgpt_mode", None)
    if mode is None:
        return {}
    if mode != "alibi":
        raise ValueError(f"newgpt_mode={mode} is not supported: positions of a released backbone must be alibi")
    return _backbone(cfg.num_layers, cfg.embed_dim, 4 * cfg.embed_dim, cfg.num_attention_heads)


def _backbone(layers: int, width: int, ffn: int, heads: int) -> Dict[str, Any]:
    return {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": ffn,
        "decoder_attention_heads": heads,
        "decoder_normalize_before": True,
        "activation_fn": "gelu_accurate",
        "layer_norm_eps": _BACKBONE_EPS,
    }


def is_released_side_settings(cfg: Any) -> bool:
    """Return whether these are settings of a released side network, which contain sizes of layers."""
    return safe_getattr(cfg, "decoder_layers", None) is not None


def side_network_settings(cfg: Any) -> Dict[str, Any]:
    """Translate the settings of a released side network to those of ``longmem_lm``, without those of its backbone.

    Args:
        cfg: Settings in the checkpoint.

    Raises:
        ValueError: The side network has layers that ``longmem_lm`` cannot express.
    """
    if not safe_getattr(cfg, "decoder_normalize_before", True) or safe_getattr(cfg, "no_decoder_final_norm", False):
        raise ValueError("a released side network without pre-norm layers and final LayerNorm is not supported")
    kept = {name: safe_getattr(cfg, name, None) for name in _KEPT}
    kept = {name: value for name, value in kept.items() if value is not None}
    return {**kept, **SIDE_NETWORK, "side_activation_fn": cfg.activation_fn, "reload_ptm_layer": False}


def copied_backbone_settings(cfg: Any) -> Dict[str, Any]:
    """Return the settings of ``parallel_lm`` for the backbone that a released side network was trained on."""
    return _backbone(
        cfg.decoder_layers * cfg.layer_reduction_factor,
        cfg.decoder_embed_dim,
        4 * cfg.decoder_embed_dim,
        cfg.decoder_attention_heads,
    )


_BACKBONE_NAMES = (
    (r"model\.transformer\.wte\.", "embed_tokens."),
    (r"model\.transformer\.h\.(\d+)\.ln_1\.", r"layers.\1.ln_1."),
    (r"model\.transformer\.h\.(\d+)\.attn\.([qkv]|out)_proj\.", r"layers.\1.self_attn.\2_proj."),
    (r"model\.transformer\.h\.(\d+)\.mlp\.fc_in\.", r"layers.\1.fc1."),
    (r"model\.transformer\.h\.(\d+)\.mlp\.fc_out\.", r"layers.\1.fc2."),
    (r"model\.transformer\.ln_f\.", "layer_norm."),
    (r"model\.lm_head\.", "output_projection."),
)


def rename_backbone(weights: MutableMapping[str, Tensor], prefix: str) -> None:
    """Give the weights of a released backbone their names in ``parallel_lm``, in place; others stay.

    Args:
        weights: Tensors by name.
        prefix: Prefix of the backbone's names.
    """
    any_renamed = False
    for key in [key for key in weights if key.startswith(prefix + "model.")]:
        for pattern, name in _BACKBONE_NAMES:
            renamed, matched = re.subn("^" + re.escape(prefix) + pattern, prefix + name, key)
            if matched:
                weights[renamed] = weights.pop(key)
                any_renamed = True
                break
    if any_renamed:
        weights[prefix + "version"] = torch.tensor([3.0])


def rename_side_network(weights: MutableMapping[str, Tensor], backbone_prefix: str) -> None:
    """Give the weights of a released side network and of its backbone's copy their names in ``longmem_lm``, in place.

    Args:
        weights: Tensors by name.
        backbone_prefix: Prefix that the names of the backbone's weights get.
    """
    # Copies of the backbone's own tensors, and the version of fairseq's decoder.
    for name in ("embed_tokens.weight", "output_projection.weight", "output_projection.bias", "version"):
        weights.pop("decoder." + name, None)
    for key in [key for key in weights if key.startswith(COPY)]:
        weights[backbone_prefix + key[len(COPY + "decoder.") :]] = weights.pop(key)
    for key in [key for key in weights if key.endswith(".self_attn.memory_bias")]:
        weights[key[: -len("memory_bias")] + "memory_gate"] = weights.pop(key)
    rename_backbone(weights, backbone_prefix)

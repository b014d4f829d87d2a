"""A backbone from its checkpoint: which language models of fairseq can be one; how their files are read and checked.

The frozen module itself is in :mod:`longmem_fairseq.backbones.base`.
"""

import json
import logging
import os
from types import SimpleNamespace
from typing import Any, Dict, Tuple

import torch
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf
from torch import Tensor, nn

from ..data.manifest import dictionary_fingerprint
from ..released import released_checkpoint
from ..safe_load import load_safely, settings
from .base import Backbone, BackboneError, EncodedSegment, backbone_fingerprint

__all__ = [
    "NAME_IT",
    "Backbone",
    "BackboneError",
    "EncodedSegment",
    "backbone_config",
    "backbone_fingerprint",
    "build_backbone",
    "load_backbone",
    "read_backbone",
]

logger = logging.getLogger(__name__)

# fairseq's commands other than fairseq-train have no options of models.
NAME_IT = "with --pretrained-model-path (in evaluation: --model-overrides \"{'pretrained_model_path': '...'}\")"

# Of a stock model's configuration, what decides which function it computes. Everything else (dropout, checkpointing,
# options of training) may differ between two files of the same backbone.
_CONFIG_FIELDS = (
    "activation_fn",
    "decoder_embed_dim",
    "decoder_input_dim",
    "decoder_output_dim",
    "decoder_ffn_embed_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_learned_pos",
    "decoder_normalize_before",
    "no_decoder_final_norm",
    "no_token_positional_embeddings",
    "no_scale_embedding",
    "layernorm_embedding",
    "share_decoder_input_output_embed",
    "max_target_positions",
    "scale_fc",
    "scale_attn",
    "scale_heads",
    "scale_resids",
)

_REFUSED = {
    "adaptive_input": "adaptive inputs",
    "adaptive_softmax_cutoff": "an adaptive softmax",
    "character_embeddings": "character embeddings",
    "decoder_layers_to_keep": "layers pruned away (LayerDrop)",
    "decoder_layerdrop": "LayerDrop",
    "base_layers": "BASE layers",
    "quant_noise_pq": "product quantisation",
    "quant_noise_scalar": "scalar quantisation",
    "decoder_xformers_att_config": "xFormers attention",
}


def backbone_config(cfg: Any, dictionary_size: int) -> Dict[str, Any]:
    """What rebuilds a backbone, from the ``cfg.model`` of its checkpoint, as plain JSON types.

    Raises:
        BackboneError: where the model is not a pre-norm decoder-only transformer that can be a backbone.
    """
    name = safe_getattr(cfg, "_name", None) or safe_getattr(cfg, "arch", None)
    model = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY.get(name)
    if model is None or not issubclass(model, TransformerLanguageModel):
        raise BackboneError(
            f"the model is a {name}: a backbone must be a decoder-only transformer_lm (or alibi_lm) of fairseq"
        )
    for option, what in _REFUSED.items():
        if safe_getattr(cfg, option, None):
            raise BackboneError(f"it has {what} ({option}={safe_getattr(cfg, option)}): a backbone must have none")
    if not safe_getattr(cfg, "decoder_normalize_before", False):
        raise BackboneError(
            "its layers are post-norm (decoder_normalize_before=False): the side network's residual connections need "
            "a pre-norm backbone"
        )
    config = {field: safe_getattr(cfg, field, None) for field in _CONFIG_FIELDS}
    if config["max_target_positions"] is None:
        config["max_target_positions"] = safe_getattr(cfg, "tokens_per_sample", 1024)
    config["model"] = next(key for key, value in MODEL_REGISTRY.items() if value is model)
    config["vocabulary"] = dictionary_size
    if safe_getattr(cfg, "layer_norm_eps", None) is not None:  # only models of this package can vary it
        config["layer_norm_eps"] = cfg.layer_norm_eps
    return json.loads(json.dumps(config, default=str))


def build_backbone(config: Dict[str, Any], dictionary, memory_layer: int) -> Backbone:
    """An untrained backbone from :func:`backbone_config`'s description, to load weights into."""
    if config["vocabulary"] != len(dictionary):
        raise BackboneError(
            f"the backbone knows {config['vocabulary']} symbols and the dictionary of the data has {len(dictionary)}: "
            "preprocess the data with the backbone's dict.txt"
        )
    if not 0 <= memory_layer < config["decoder_layers"]:
        raise BackboneError(
            f"--retrieval-layer-index {memory_layer} is outside the backbone, whose layers are 0 to "
            f"{config['decoder_layers'] - 1}"
        )
    model = MODEL_REGISTRY[config["model"]]
    cfg = OmegaConf.structured(model.__dataclass())  # fields that the backbone does not decide keep their defaults
    OmegaConf.set_struct(cfg, False)
    args = SimpleNamespace(**{key: None if OmegaConf.is_interpolation(cfg, key) else cfg[key] for key in cfg})
    vars(args).update({key: value for key, value in config.items() if key not in ("model", "vocabulary")})
    args.tokens_per_sample = args.max_target_positions
    args.dropout = args.attention_dropout = args.activation_dropout = args.relu_dropout = 0.0
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    return Backbone(model.build_model(args, task).decoder, memory_layer, config)


def load_backbone(path: str, dictionary, memory_layer: int) -> Backbone:
    """Read a backbone from a fairseq checkpoint.

    Args:
        path: checkpoint of a ``transformer_lm`` or ``alibi_lm``, or of a ``longmem_lm`` that holds its backbone.
        dictionary: of the data.
        memory_layer: m.

    Raises:
        BackboneError: where the file is missing, unreadable, no possible backbone, or of another dictionary.
    """
    state = _read_checkpoint(path)
    try:
        config, weights = _describe(state)
        backbone = build_backbone(config, dictionary, memory_layer)
        _check_dictionary(state, dictionary)
        _load_decoder(backbone.decoder, weights)
    except ValueError as error:
        raise BackboneError(f"{path} cannot be the backbone: {error}") from error
    backbone.fingerprint = backbone_fingerprint(backbone)
    logger.info(
        "backbone %s: %s, %d layers of width %d, %d heads, %d symbols",
        path,
        config["model"],
        config["decoder_layers"],
        config["decoder_embed_dim"],
        config["decoder_attention_heads"],
        config["vocabulary"],
    )
    return backbone


def read_backbone(path: str) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Configuration (see :func:`backbone_config`) and decoder weights of a backbone's checkpoint, as they are there.

    Raises:
        BackboneError: where the file is missing, unreadable or no possible backbone.
    """
    state = _read_checkpoint(path)
    try:
        return _describe(state)
    except ValueError as error:
        raise BackboneError(f"{path} cannot be a backbone: {error}") from error


def _read_checkpoint(path: str) -> Dict[str, Any]:
    """The contents of a checkpoint, in which nothing but tensors and plain data is let in."""
    if not os.path.isfile(path):
        what = "is a directory" if os.path.isdir(path) else "does not exist"
        raise BackboneError(f"the backbone {path} {what}: name its checkpoint {NAME_IT}")
    try:
        state = load_safely(path)
    except ValueError as error:
        raise BackboneError(f"the backbone {path} is no readable fairseq checkpoint: {error}") from error
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("model"), dict)
        or not (state.get("cfg") or state.get("args"))
    ):
        raise BackboneError(
            f"the backbone {path} is no fairseq checkpoint: it lacks the weights (model) or what they mean (cfg)"
        )
    return state


def _describe(state: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Configuration (see :func:`backbone_config`) and decoder weights of a checkpoint."""
    cfg = settings(state)
    released = released_checkpoint.own_backbone(cfg, state["model"])
    cfg, model = released or (cfg, state["model"])
    description, prefix = safe_getattr(cfg, "backbone_config", None), "decoder."
    if description:  # of a longmem_lm
        prefix = "decoder.backbone.decoder."
    weights = {key[len(prefix) :]: value for key, value in model.items() if key.startswith(prefix)}
    if description and not weights:
        raise BackboneError("it is a longmem_lm saved without --save-backbone: name the checkpoint of its backbone")
    if description:
        return json.loads(description), weights
    embedding = weights.get("embed_tokens.weight")
    return backbone_config(cfg, 0 if embedding is None else embedding.size(0)), weights


def _check_dictionary(state: Dict[str, Any], dictionary) -> None:
    """Compare the dictionary that the backbone was trained with, where its checkpoint tells, with the data's."""
    theirs = (state.get("task_state") or {}).get("dictionary_sha256")
    ours = dictionary_fingerprint(dictionary.symbols)
    if theirs is not None and theirs != ours:
        raise BackboneError(
            f"it was trained with another dictionary of {len(dictionary)} symbols (SHA-256 {theirs[:12]}...) than the "
            f"data's dict.txt ({ours[:12]}...): preprocess the data with the backbone's dict.txt"
        )


def _load_decoder(decoder: nn.Module, weights: Dict[str, Tensor]) -> None:
    """Load a decoder's weights, after fairseq's own upgrade of older state dicts."""
    weights = {f"decoder.{key}": value for key, value in weights.items()}
    for name, value in weights.items():
        if not value.is_floating_point():
            raise BackboneError(f"its weights are quantised ({name} is {value.dtype}): give its original weights")
    if "decoder.layer_norm.weight" in weights:
        # fairseq takes a missing version for a model of 2018 and silently drops its final LayerNorm.
        weights.setdefault("decoder.version", torch.tensor([3.0]))
    decoder.upgrade_state_dict_named(weights, "decoder")
    holder = nn.Module()
    holder.decoder = decoder
    try:
        missing, unexpected = holder.load_state_dict(weights, strict=False)
    except RuntimeError as error:  # names every tensor of another shape, one a line
        first = str(error).splitlines()[1].strip()
        raise BackboneError(f"its weights do not fit its configuration: {first}") from error
    for names, what in ((missing, "are missing"), (unexpected, "are left over")):
        if names:
            raise BackboneError(f"its weights do not fit its configuration: {len(names)} {what}, such as {names[0]}")

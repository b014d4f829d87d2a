"""Reading a backbone from a checkpoint: a language model's own, or one that a LongMem model was saved with."""

import logging
import os
from typing import Any, Dict, Sequence, Tuple

import torch
from fairseq.models import ARCH_MODEL_REGISTRY, MODEL_REGISTRY
from fairseq.utils import safe_getattr
from torch import Tensor

from ..data.manifest import dictionary_fingerprint
from ..files import parse_json, printable
from ..modules.mixed_precision import compute_products_in
from ..safe_load import load_safely, refuse_adapter, settings
from .base import Backbone, BackboneError, backbone_family
from .checkpoint_formats import checkpoint_formats
from .fingerprint import backbone_fingerprint

logger = logging.getLogger(__name__)

# How a user names a backbone: fairseq's commands other than fairseq-train do not have options of models.
HOW_TO_NAME = "with --pretrained-model-path (in evaluation: --model-overrides \"{'pretrained_model_path': '...'}\")"

_IN_LONGMEM = "decoder.backbone."  # prefix of a backbone's weights in a LongMem checkpoint


def describe_backbone(cfg: Any, vocabulary: int) -> Dict[str, Any]:
    """Return the description of a backbone.

    Args:
        cfg: Configuration of the language model as its checkpoint holds it (``cfg.model``).
        vocabulary: Number of symbols in its dictionary.

    Returns:
        Plain JSON types from which :func:`build_backbone` makes the model again.

    Raises:
        BackboneError: The model cannot be a backbone.
    """
    name = safe_getattr(cfg, "_name", None) or safe_getattr(cfg, "arch", None)
    family = backbone_family(name)
    config = family.describe(cfg, vocabulary)
    return {**config, "model": _registered_name(name), "vocabulary": vocabulary}


def _registered_name(name: str) -> str:
    """Return the name of the model that a model or an architecture name stands for."""
    model_class = ARCH_MODEL_REGISTRY.get(name) or MODEL_REGISTRY[name]
    return next(key for key, value in MODEL_REGISTRY.items() if value is model_class)


def build_backbone(config: Dict[str, Any], dictionary, memory_layers: Sequence[int] = (0,)) -> Backbone:
    """Build a backbone with random weights from its description.

    Args:
        config: Description, as :func:`describe_backbone` returns it.
        dictionary: fairseq dictionary of the data.
        memory_layers: Numbers of the layers whose keys and values are written into the memory, counted from 0.

    Raises:
        BackboneError: The dictionary does not fit, or there is no such layer.
    """
    if not isinstance(config, dict) or not isinstance(config.get("model"), str):
        raise BackboneError("its description does not name a model: write the checkpoint again")
    if config.get("vocabulary") != len(dictionary):
        raise BackboneError(
            f"the backbone has {config.get('vocabulary')} symbols and the dictionary of the data has "
            f"{len(dictionary)}: preprocess the data with the backbone's dict.txt"
        )
    family = backbone_family(config["model"])
    try:
        backbone = family.build(config, dictionary)
    except ValueError:
        raise
    except Exception as error:  # a malformed description makes fairseq's decoders raise anything
        raise BackboneError(f"its description does not make a {config['model']} ({error!r}): write it again") from error
    backbone.select_memory_layers(memory_layers)
    return backbone


def load_backbone(
    path: str, dictionary, memory_layers: Sequence[int] = (0,), dtype: torch.dtype = torch.float32
) -> Backbone:
    """Load a backbone from a checkpoint.

    Args:
        path: Path of a checkpoint of a language model of a registered family, or of a ``longmem_lm`` that holds its
            backbone.
        dictionary: fairseq dictionary of the data.
        memory_layers: Numbers of the layers whose keys and values are written into the memory, counted from 0.
        dtype: Precision of the weights and of the products with them; everything else is float32.

    Raises:
        BackboneError: The file is missing or unreadable, its model cannot be a backbone, or it was trained with
            another dictionary.
    """
    state = _read_checkpoint(path)
    try:
        config, weights = _describe(state)
        with torch.device("meta" if backbone_family(config["model"]).builds_on_meta else "cpu"):
            backbone = build_backbone(config, dictionary, memory_layers)
        _check_dictionary(state, dictionary)
        backbone.load_weights(weights, dtype)
    except ValueError as error:
        raise BackboneError(f"{path} cannot be the backbone: {error}") from error
    if dtype == torch.float32:
        backbone.fingerprint = backbone_fingerprint(backbone)
    else:
        original = backbone.upgrade_weights(weights)
        backbone.fingerprint = backbone_fingerprint(backbone, {name: original[name] for name in backbone.state_dict()})
        compute_products_in(backbone, dtype)
    logger.info(
        "backbone %s: %s, %d layers of width %d, %d heads, %d symbols",
        printable(path),
        config["model"],
        backbone.num_layers,
        backbone.width,
        backbone.num_heads,
        backbone.vocabulary,
    )
    return backbone


def read_backbone(path: str) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Read the description and the weights of a backbone without building it.

    Args:
        path: Path of a checkpoint, as for :func:`load_backbone`.

    Returns:
        The description, and the tensors by their names in the checkpoint, ``decoder.*``.

    Raises:
        BackboneError: The file is missing or unreadable, or its model cannot be a backbone.
    """
    state = _read_checkpoint(path)
    try:
        return _describe(state)
    except ValueError as error:
        raise BackboneError(f"{path} cannot be a backbone: {error}") from error


def _read_checkpoint(path: str) -> Dict[str, Any]:
    """Return the contents of a checkpoint, which may hold only tensors and plain data."""
    try:
        refuse_adapter(path)
    except ValueError as error:
        raise BackboneError(str(error)) from error
    if not os.path.isfile(path):
        problem = "is a directory" if os.path.isdir(path) else "does not exist"
        raise BackboneError(f"the backbone {path} {problem}: name its checkpoint {HOW_TO_NAME}")
    try:
        state = load_safely(path)
    except ValueError as error:
        raise BackboneError(f"the backbone {path} is not a readable fairseq checkpoint: {error}") from error
    is_checkpoint = isinstance(state, dict) and isinstance(state.get("model"), dict)
    if not is_checkpoint or not (state.get("cfg") or state.get("args")):
        raise BackboneError(
            f"the backbone {path} is not a fairseq checkpoint: it lacks the weights (model) or their configuration "
            "(cfg)"
        )
    return state


def _describe(state: Dict[str, Any]) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Return the description and the weights, ``decoder.*``, of the backbone in a checkpoint."""
    cfg, model = settings(state), state["model"]
    for checkpoint_format in checkpoint_formats():
        backbone = checkpoint_format.read_backbone(cfg, model)
        if backbone is not None:
            cfg, model = backbone
            break
    description = safe_getattr(cfg, "backbone_config", None)
    if description:  # of a longmem_lm
        weights = {name[len(_IN_LONGMEM) :]: x for name, x in model.items() if name.startswith(_IN_LONGMEM)}
        if not weights:
            raise BackboneError("it is a longmem_lm saved without --save-backbone: name the checkpoint of its backbone")
        return parse_json(description), weights
    weights = {name: x for name, x in model.items() if name.startswith("decoder.")}
    embedding = weights.get("decoder.embed_tokens.weight")
    return describe_backbone(cfg, 0 if embedding is None else embedding.size(0)), weights


def _check_dictionary(state: Dict[str, Any], dictionary) -> None:
    """Compare the dictionary that the backbone was trained with, where its checkpoint names it, with the data's."""
    trained = (state.get("task_state") or {}).get("dictionary_sha256")
    current = dictionary_fingerprint(dictionary.symbols)
    if trained is not None and trained != current:
        raise BackboneError(
            f"it was trained with another dictionary of {len(dictionary)} symbols (SHA-256 {trained[:12]}...) than the "
            f"data's dict.txt ({current[:12]}...): preprocess the data with the backbone's dict.txt"
        )

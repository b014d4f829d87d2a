"""The released LongMem in Python.

    from longmem_fairseq.released.released_model import load_released

    model = load_released("sidenet.pt")           # or load_released("sidenet.pt", memory_dtype="float32")
    for tokens in segments:                       # each (B, T), consecutive
        logits, extra = model(tokens)             # reads what came before, then writes this segment
        extra["memory"].retrieved                 # chunks that were read (B, H, T, K / C); 0 is the oldest one held
        extra["inner_states"]                     # x_0 ... x_{N/R} of the side network, each (T, B, D)
    logits, _ = model(tokens, read_only=True)     # reads without writing
    keys, values, means = model.memory_contents() # (H, n, C, d), (H, n, C, d), (H, n, d), oldest first
    model.reset_memory()

Such a model computes the same as the released code, with one memory for all rows (see
:mod:`longmem_fairseq.released.shared_memory`); ``memory_scope="document"`` gives each row its own.
"""

import argparse
import json
import os
from typing import Any, Dict, Optional, Tuple

from fairseq.data import Dictionary
from torch import Tensor

from ..backbones.loading import describe_backbone, read_backbone
from ..models.longmem_config import LongMemConfig
from ..models.longmem_decoder import LongMemDecoder
from ..models.longmem_lm import LongMemModel
from ..models.model_directory import read_directory
from ..modules.memory_attention import naive_memory_attention
from ..modules.self_attention import SelfAttention
from . import released_checkpoint

# Settings with which a model gives the released code's numbers.
_AS_RELEASED = {"memory_scope": "shared", "memory_dtype": "float16"}


def load_released(
    side_network_path: str,
    backbone_path: Optional[str] = None,
    dictionary: Optional[Dictionary] = None,
    exact: bool = True,
    **overrides: Any,
) -> LongMemModel:
    """Load a released side network with its backbone, to be called segment by segment.

    Args:
        side_network_path: Path of the side network's checkpoint, or of the directory it was converted to.
        backbone_path: Path of the backbone's checkpoint; by default the copy in the side network's checkpoint is used.
            Where both exist, they must be the same.
        dictionary: fairseq dictionary of the tokens; by default one of the right size with fairseq's special symbols.
        exact: Whether attention is computed step by step as in the released code, so that results are rounded alike.
            If false, fused attention is used, which is faster, needs less memory, and differs in the last digits.
        overrides: Settings of :class:`LongMemConfig` in place of the checkpoint's, such as ``memory_dtype="float32"``
            (float16 by default, as in the released code), ``memory_size``, ``k``, ``chunk_size``,
            ``memory_search="torch"`` or ``memory_scope="document"``.

    Returns:
        The model in evaluation mode, on the CPU. ``model(tokens)`` of tokens (B, T), int64, returns logits (B, T, V)
        and a dictionary; it reads the memory, and the next call finds the segment in it.

    Raises:
        ValueError: A file is not of the released format, or holds code; an override is unknown, or settings
            contradict each other.
        FileNotFoundError: A file does not exist.
    """
    known = {name for name in LongMemConfig.__dataclass_fields__ if not name.startswith("_")}
    unknown = sorted(set(overrides) - known)
    if unknown:
        raise ValueError(f"unknown setting {', '.join(unknown)}: the settings are {', '.join(sorted(known))}")
    settings, backbone, weights = _read(side_network_path)
    cfg = argparse.Namespace(**{**settings, **_AS_RELEASED, **overrides})
    if backbone_path is not None:
        cfg.pretrained_model_path = backbone_path
        backbone = read_backbone(backbone_path)[0]
    elif backbone is None:
        raise ValueError(f"{side_network_path} does not hold its backbone: name the backbone's file with backbone_path")
    else:
        cfg.save_backbone, cfg.backbone_config = True, json.dumps(backbone)
    dictionary = dictionary or _dictionary(backbone["vocabulary"])
    model = LongMemModel.build_model(
        cfg, argparse.Namespace(source_dictionary=dictionary, target_dictionary=dictionary)
    )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # lists every tensor, one a line
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"the weights in {side_network_path} do not fit its settings: {first}") from error
    model.decoder.stateful = True
    if exact:
        compute_by_steps(model.decoder)
    return model.eval()


def compute_by_steps(decoder: LongMemDecoder) -> None:
    """Compute all attention of a decoder step by step: slower, and rounded as in the released code."""
    decoder.memory_factory.attention = naive_memory_attention
    for module in decoder.modules():
        if isinstance(module, SelfAttention):
            module.fused = False


def _read(path: str) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]], Dict[str, Tensor]]:
    """Return settings of a side network, the description of its backbone (None if it is not there), and weights."""
    if os.path.isdir(path):
        return read_directory(path)
    cfg, weights = released_checkpoint.read_checkpoint(path)
    if not released_checkpoint.is_released_side_network(weights):
        raise ValueError(f"{path} does not hold a side network of the released LongMem")
    backbone = released_checkpoint.released_backbone(cfg, weights)
    description = None
    if backbone is not None:
        description = describe_backbone(backbone[0], backbone[1]["decoder.embed_tokens.weight"].size(0))
    return released_checkpoint.side_network_settings(cfg), description, weights


def _dictionary(symbols: int) -> Dictionary:
    """Return a dictionary of this size: fairseq's special symbols, and numbers."""
    dictionary = Dictionary()
    for number in range(symbols - len(dictionary)):
        dictionary.add_symbol(str(number))
    return dictionary

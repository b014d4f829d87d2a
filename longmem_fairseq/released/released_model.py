"""The released LongMem in Python, and its names for ``--arch``.

    from longmem_fairseq.released.released_model import load_released

    model = load_released("sidenet.pt")           # or load_released("sidenet.pt", memory_dtype="float32")
    for tokens in segments:                       # each (B, T), consecutive
        logits, extra = model(tokens)             # reads what came before, then remembers this segment
        extra["memory"].retrieved                 # chunks that were read (B, H, T, K / C), 0 is the oldest held
        extra["inner_states"]                     # x_0 ... x_{N/R} of the side network, each (T, B, D)
    logits, _ = model(tokens, read_only=True)     # reads without remembering
    keys, values, means = model.memory_contents() # (H, n, C, d), (H, n, C, d), (H, n, d), oldest first
    model.reset_memory()

Such a model computes what the released code does, with one memory for all rows (see
:mod:`longmem_fairseq.released.shared_memory`); ``memory_scope="document"`` gives each row its own.
"""

import argparse
import json
import os
from typing import Any, Dict, Optional, Tuple

import torch
from fairseq.data import Dictionary
from fairseq.models import register_model_architecture
from fairseq.utils import safe_getattr
from torch import Tensor

from ..backbones.loading import backbone_config, backbone_fingerprint, read_backbone
from ..models.longmem_lm import LongMemConfig, LongMemModel, longmem_gpt2_medium
from ..models.model_directory import read_directory
from ..safe_load import ALLOWED
from . import released_checkpoint

# fairseq reads the files of --path itself; settings of released backbones lie there in a Namespace.
torch.serialization.add_safe_globals(ALLOWED)

# Of a model that is to give the released code's numbers.
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
        side_network_path: checkpoint of the side network, or the directory it was converted to.
        backbone_path: checkpoint of the backbone; by default the copy inside the side network's file is taken. Where
            there are both, they must be the same.
        dictionary: of the tokens; by default one of the right size with fairseq's special symbols.
        exact: compute step by step as the released code does, so that results are rounded alike; off, by fused
            attention, which is faster, needs less memory, and differs in the last digits.
        overrides: settings of :class:`LongMemConfig` in place of the checkpoint's, such as ``memory_dtype="float32"``
            (held in float16 by default, as in the released code), ``memory_size``, ``k``, ``chunk_size``,
            ``memory_search="torch"`` or ``memory_scope="document"``.

    Returns:
        The model in evaluation mode, on the CPU. ``model(tokens)`` of tokens (B, T), int64, returns logits (B, T, V)
        and a dictionary; it reads the memory, and with the next call the segment is part of it.

    Raises:
        ValueError: where a file is none of the released format, or holds code; where an override is unknown, or
            settings contradict each other.
        FileNotFoundError: where a file does not exist.
    """
    unknown = sorted(set(overrides) - _settings())
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such setting; there are {', '.join(sorted(_settings()))}")
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
    except RuntimeError as error:  # names every tensor, one a line
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"the weights in {side_network_path} do not fit its settings: {first}") from error
    backbone = model.decoder.backbone
    backbone.fingerprint = backbone_fingerprint(backbone)
    model.decoder.backbone_fingerprint.copy_(torch.tensor(list(bytes.fromhex(backbone.fingerprint))))
    model.decoder.stateful = True
    if exact:
        model.decoder.use_released_attention()
    return model.eval()


def _read(path: str) -> Tuple[Dict[str, Any], Optional[Dict[str, Any]], Dict[str, Tensor]]:
    """Settings of a side network, description of its backbone (None if it is not there), and weights."""
    if os.path.isdir(path):
        return read_directory(path)
    theirs, weights = released_checkpoint.read_checkpoint(path)
    if not released_checkpoint.is_released_side_network(weights):
        raise ValueError(f"{path} holds no side network of the released LongMem")
    copied = released_checkpoint.own_backbone(theirs, weights)
    if copied is not None:
        copied = backbone_config(copied[0], copied[1]["decoder.embed_tokens.weight"].size(0))
    return released_checkpoint.side_network_settings(theirs), copied, weights


def _settings() -> set:
    return {name for name in LongMemConfig.__dataclass_fields__ if not name.startswith("_")}


def _dictionary(symbols: int) -> Dictionary:
    """A dictionary of this size: fairseq's special symbols, and numbers."""
    dictionary = Dictionary()
    for number in range(symbols - len(dictionary)):
        dictionary.add_symbol(str(number))
    return dictionary


@register_model_architecture("longmem_lm", "longmem_released")
def longmem_released(cfg):
    """A side network like the released one, for its backbone (parallel layers, 24 of them) and its checkpoints."""
    for name, value in released_checkpoint.SIDE_NETWORK.items():
        setattr(cfg, name, safe_getattr(cfg, name, None) or value)
    longmem_gpt2_medium(cfg)


# What the released checkpoints and training scripts call it; the sizes behind these names are the backbone's.
for _name in ("_gpt2_small", "_gpt2_tiny", "_gpt2_base", "_gpt2_medium", "_gpt2_big", "_gpt", "_big"):
    register_model_architecture("longmem_lm", "transformer_lm_sidenet" + _name)(longmem_released)

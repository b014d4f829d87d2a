"""A LongMem model as plain files: no code, no optimizer, no paths.

``config.json`` holds the settings of the model and of its backbone, ``side_network.safetensors`` and
``backbone.safetensors`` the weights.
"""

import json
import os
from typing import Any, Dict, Tuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CONFIG, SIDE_NETWORK, BACKBONE = "config.json", "side_network.safetensors", "backbone.safetensors"
FORMAT = {"format": "longmem", "version": 1}

_BACKBONE_WEIGHTS = "decoder.backbone."
# Settings that say what the model is; others are of the data, the machine or a run.
_SETTINGS = (
    "use_external_memory",
    "memory_size",
    "k",
    "chunk_size",
    "retrieval_layer_index",
    "layer_reduction_factor",
    "dropout",
    "attention_dropout",
    "side_activation_fn",
    "side_layer_norm_eps",
    "normalize_last_hidden",
)


def write_directory(model, directory: str) -> None:
    """Write a ``longmem_lm`` with its backbone; ``config.json`` comes last, and without it nothing is read.

    Args:
        model: a :class:`longmem_fairseq.models.longmem_lm.LongMemModel`.
        directory: made if need be; files of these names are replaced.
    """
    os.makedirs(directory, exist_ok=True)
    weights = nn.Module.state_dict(model)  # the model's own leaves its backbone out
    parts: Dict[str, Dict[str, Tensor]] = {SIDE_NETWORK: {}, BACKBONE: {}}
    for name, tensor in weights.items():
        part = BACKBONE if name.startswith(_BACKBONE_WEIGHTS) else SIDE_NETWORK
        parts[part][name] = tensor.detach().cpu().contiguous()
    for name, part in parts.items():
        _replace(os.path.join(directory, name), lambda path, part=part: save_file(part, path, {"format": "pt"}))
    settings = {name: getattr(model.cfg, name) for name in _SETTINGS}
    config = {**FORMAT, "settings": settings, "backbone": model.decoder.backbone.config}
    _replace(os.path.join(directory, CONFIG), lambda path: _write_json(path, config))


def read_directory(directory: str) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, Tensor]]:
    """Settings of the model, description of its backbone, and all weights, by the names in ``longmem_lm``.

    Raises:
        FileNotFoundError: where one of the files is missing.
        ValueError: where one is not what it should be.
    """
    path = os.path.join(directory, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or {name: config.get(name) for name in FORMAT} != FORMAT:
        raise ValueError(f"{path} is not of this format: it must say {json.dumps(FORMAT)[1:-1]}")
    weights: Dict[str, Tensor] = {}
    for name in (SIDE_NETWORK, BACKBONE):
        try:
            weights.update(load_file(os.path.join(directory, name)))
        except SafetensorError as error:
            raise ValueError(f"{os.path.join(directory, name)} cannot be read: {error}") from error
    return config["settings"], config["backbone"], weights


def _replace(path: str, write) -> None:
    """Let ``write`` fill a file under a temporary name, and put it in place when it is whole."""
    part = path + ".part"
    try:
        write(part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)


def _write_json(path: str, content: Any) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=2)

"""A LongMem model as a directory of plain files: no code, no optimizer, no paths.

``config.json`` has the settings of the model, the description of its backbone and the SHA-256 of the files of weights,
``side_network.safetensors`` and ``backbone.safetensors``. A backbone file may also be one that
``preprocess/convert_safetensors.py`` made of a language model; with ``dict.txt`` and the tokenizer's files beside them,
the directory is all that ``LongMem.from_pretrained`` needs.
"""

import copy
import hashlib
import json
import os
from typing import Any, Dict, Optional, Tuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..backbones.fingerprint import backbone_fingerprint
from ..files import write_json, write_whole
from ..memory.container import crc32

CONFIG, SIDE_NETWORK, BACKBONE = "config.json", "side_network.safetensors", "backbone.safetensors"
FORMAT = {"format": "longmem", "version": 1}

_BACKBONE_PREFIX = "decoder.backbone."
# Settings that decide what the model is; others are of the data, the machine or a run.
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


def is_model_directory(path: str) -> bool:
    """Return whether a path is a directory with a model's ``config.json``."""
    return os.path.isfile(os.path.join(path, CONFIG))


def write_directory(model, directory: str, half: bool = False, tokens_per_sample: int = None) -> None:
    """Write a ``longmem_lm`` with its backbone; ``config.json`` comes last, and without it nothing is read.

    Args:
        model: A :class:`longmem_fairseq.models.longmem_lm.LongMemModel`.
        directory: Path of the directory, which is created if needed; files of these names are replaced.
        half: Whether weights are written in half precision.
        tokens_per_sample: Number of tokens in a segment that the model was trained with; None leaves it out.
    """
    os.makedirs(directory, exist_ok=True)
    weights = nn.Module.state_dict(model)  # the model's own leaves its backbone out
    parts: Dict[str, Dict[str, Tensor]] = {SIDE_NETWORK: {}, BACKBONE: {}}
    for name, tensor in weights.items():
        part = BACKBONE if name.startswith(_BACKBONE_PREFIX) else SIDE_NETWORK
        tensor = tensor.half() if half and tensor.is_floating_point() else tensor
        parts[part][name] = tensor.detach().cpu().contiguous().clone()  # safetensors refuses shared storage
    for name, part in parts.items():
        write_whole(os.path.join(directory, name), lambda path, part=part: save_file(part, path, {"format": "pt"}))
    backbone = copy.deepcopy(model.decoder.backbone).half() if half else model.decoder.backbone
    settings = {name: getattr(model.cfg, name) for name in _SETTINGS}
    settings["backbone_fingerprint"] = backbone_fingerprint(backbone)
    if tokens_per_sample is not None:
        settings["tokens_per_sample"] = tokens_per_sample
    digests = {name: _sha256(os.path.join(directory, name)) for name in parts}
    config = {**FORMAT, "settings": settings, "backbone": model.decoder.backbone.config, "sha256": digests}
    write_json(os.path.join(directory, CONFIG), config)


def read_directory(directory: str) -> Tuple[Dict[str, Any], Dict[str, Any], Dict[str, Tensor]]:
    """Read what :func:`write_directory` wrote.

    Args:
        directory: Path of the directory.

    Returns:
        Settings of the model, the description of its backbone, and all weights in float32 by their names in
        ``longmem_lm``.

    Raises:
        FileNotFoundError: One of the files is missing.
        ValueError: A file does not have the format, or was changed since it was written. Directories without the
            SHA-256 of their files, as earlier versions wrote them, are read without this comparison.
    """
    path = os.path.join(directory, CONFIG)
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or {name: config.get(name) for name in FORMAT} != FORMAT:
        raise ValueError(f"{path} does not have this format: it must contain {json.dumps(FORMAT)[1:-1]}")
    for name in ("settings", "backbone"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f'{path} lacks the object "{name}": write the directory again')
    digests = config.get("sha256") or {}
    weights: Dict[str, Tensor] = {}
    for name in (SIDE_NETWORK, BACKBONE):
        weights.update(_read_weights(os.path.join(directory, name), digests.get(name)))
    weights.pop("decoder.backbone_fingerprint", None)  # in older directories, as a tensor
    return config["settings"], config["backbone"], weights


def _read_weights(path: str, digest: Optional[str]) -> Dict[str, Tensor]:
    """Return the tensors of a file in float32, those of a language model under their names in ``longmem_lm``."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist: the directory of a model needs it")
    if digest is not None and digest != _sha256(path):
        raise ValueError(
            f"{path} is not as it was written, its SHA-256 differs from the one in {CONFIG}: copy it again, or take "
            '"sha256" out of that file if the change was meant'
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if "crc32" in header and header["crc32"] != crc32(header, weights):
        raise ValueError(f"{path} is not as it was written, its checksum (crc32) differs: convert it again")
    weights = {name: x.float() if x.is_floating_point() else x for name, x in weights.items()}
    if header.get("format") == "fairseq":  # a language model by itself, with tied matrices written once
        for name, other in json.loads(header["tied"]).items():
            weights[name] = weights[other]
        weights = {_BACKBONE_PREFIX + name: x for name, x in weights.items()}
    return weights


def _sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

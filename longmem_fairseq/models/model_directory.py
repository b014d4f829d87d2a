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

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ..backbones.fingerprint import backbone_fingerprint
from ..files import parse_json, read_json, write_json
from ..memory.container import crc32
from ..safe_load import refuse_adapter
from ..tensor_files import read_tensors, write_tensors
from .longmem_config import LongMemConfig
from .memory_layers import parse_memory_layers

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
    "token_memory",
    "token_memory_k",
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
        write_tensors(os.path.join(directory, name), part, {"format": "pt"})
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
        config = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(config, dict) or {name: config.get(name) for name in FORMAT} != FORMAT:
        raise ValueError(f"{path} does not have this format: it must contain {json.dumps(FORMAT)[1:-1]}")
    for name in ("settings", "backbone"):
        if not isinstance(config.get(name), dict):
            raise ValueError(f'{path} is malformed: "{name}" is not an object: write the directory again')
    _check_settings(path, config["settings"])
    digests = _digests(path, config)
    weights: Dict[str, Tensor] = {}
    for name in (SIDE_NETWORK, BACKBONE):
        weights.update(_read_weights(os.path.join(directory, name), digests.get(name)))
    weights.pop("decoder.backbone_fingerprint", None)  # in older directories, as a tensor
    return config["settings"], config["backbone"], weights


def load_weights(model: nn.Module, directory: str, weights: Dict[str, Tensor]) -> None:
    """Load the weights of a directory into the model that it describes.

    Args:
        model: The model.
        directory: Path of the directory, for messages.
        weights: All weights by their names.

    Raises:
        ValueError: They are not those of this model.
    """
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:  # lists every tensor, one a line
        first = str(error).splitlines()[1].strip()
        raise ValueError(f"the weights in {directory} do not fit its {CONFIG}: {first}") from error


def read_language_model(path: str) -> Tuple[Dict[str, Any], Dict[str, Tensor]]:
    """Read a safetensors file of a fairseq language model.

    Args:
        path: Path of a file that ``preprocess/convert_safetensors.py`` made.

    Returns:
        Settings of the model, and its weights in float32.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is not such a file.
    """
    refuse_adapter(path)
    header, weights = read_tensors(path)
    if header.get("format") != "fairseq":
        raise ValueError(f"{path} was not written by preprocess.convert_safetensors: its header has no fairseq model")
    if "crc32" in header and header["crc32"] != crc32(header, weights):  # files of earlier versions have none
        raise ValueError(f"{path} is not as it was written: its checksum (crc32) differs")
    try:
        settings, tied = (parse_json(header[name]) for name in ("model", "tied"))
        weights.update({name: weights[other] for name, other in tied.items()})
        complete = isinstance(settings, dict)
    except (AttributeError, KeyError, TypeError, ValueError):
        complete = False
    if not complete:
        raise ValueError(f"{path} is malformed: its header does not describe a model and its tied weights")
    return settings, _in_float32(weights)


def _digests(path: str, config: Dict[str, Any]) -> Dict[str, str]:
    """Return the SHA-256 of each file that a ``config.json`` names; earlier versions wrote none."""
    digests = config.get("sha256", {})
    if not isinstance(digests, dict):
        raise ValueError(f'{path} is malformed: "sha256" is not an object: write the directory again')
    return digests


def _check_settings(path: str, settings: Dict[str, Any]) -> None:
    """Refuse settings that the model does not have, or of another type."""
    known = OmegaConf.structured(LongMemConfig())
    known.tokens_per_sample = 1  # the task's: a number
    for name, value in settings.items():
        try:
            if name not in (*_SETTINGS, "backbone_fingerprint", "tokens_per_sample"):
                raise ValueError("it is unknown")
            if name == "retrieval_layer_index" and value is not None:
                parse_memory_layers(value)
            known[name] = value
        except (OmegaConfBaseException, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f'{path} is malformed: setting "{name}": {reason}') from error
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise ValueError(f'{path} is malformed: setting "{name}": {value} is not a number')
    if known.tokens_per_sample < 1:
        raise ValueError(f'{path} is malformed: setting "tokens_per_sample": {known.tokens_per_sample} is less than 1')


def _in_float32(weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
    return {name: x.float() if x.is_floating_point() else x for name, x in weights.items()}


def _read_weights(path: str, digest: Optional[str]) -> Dict[str, Tensor]:
    """Return the tensors of a file in float32, those of a language model under their names in ``longmem_lm``."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path} does not exist: the directory of a model needs it")
    if digest is not None and digest != _sha256(path):
        raise ValueError(
            f"{path} is not as it was written, its SHA-256 differs from the one in {CONFIG}: copy it again, or take "
            '"sha256" out of that file if the change was meant'
        )
    header, weights = read_tensors(path)
    if header.get("format") == "fairseq":  # a language model by itself, with tied matrices written once
        return {_BACKBONE_PREFIX + name: x for name, x in read_language_model(path)[1].items()}
    return _in_float32(weights)


def _sha256(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()

"""Loading a LongMem model with its task: from a checkpoint, or from a model directory."""

import argparse
import json
import os
from enum import Enum
from typing import Any, Dict, NamedTuple, Optional, Union

import torch
from fairseq import checkpoint_utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import overwrite_args_by_name
from omegaconf import OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from ..models.longmem_config import LongMemConfig
from ..models.longmem_lm import LongMemModel
from ..models.model_directory import BACKBONE, CONFIG, is_model_directory, load_weights, read_directory
from ..safe_load import allow_plain_data, refuse_adapter
from .checkpoints import read_checkpoint
from .longmem_language_modeling import LongMemLanguageModelingTask
from .options import LongMemLanguageModelingConfig
from .saved_settings import suggestion

TASK = "longmem_language_modeling"
CHECKPOINTS = ("checkpoint_best.pt", "checkpoint_last.pt", "model.pt")


class Pretrained(NamedTuple):
    """A model that was loaded.

    Attributes:
        model: The model, in evaluation mode, on its device.
        task: The task that it was built for.
        data: Directory of its dictionary.
    """

    model: LongMemModel
    task: LongMemLanguageModelingTask
    data: str


def load_pretrained(
    path: str, data: Optional[str], device: Union[str, torch.device, None], settings: Dict[str, Any]
) -> Pretrained:
    """Load a checkpoint or a model directory; arguments are those of ``LongMem.from_pretrained``.

    Raises:
        ValueError: The checkpoint is damaged, of another model, or holds code; a setting does not fit; the device is
            not available.
        FileNotFoundError: The checkpoint or the dictionary is missing.
    """
    chosen, settings = choose_device(device), _typed(settings)
    refuse_adapter(path)
    if is_model_directory(path):
        data = find_data(data, os.path.join(path, "config.json"), None)
        model, task = _load_directory(path, data, settings)
    else:
        model, task, data = _load_checkpoint(find_checkpoint(path), data, settings)
    return Pretrained(model.to(chosen).eval(), task, data)


def choose_device(device: Union[str, torch.device, None]) -> torch.device:
    """Return a device that is available.

    Args:
        device: Device, or None for a GPU if there is one.

    Raises:
        ValueError: It is not available.
    """
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):  # whatever this build of PyTorch raises
        gpus = torch.cuda.device_count()
        others = ", ".join(["'cpu'", *(f"'cuda:{number}'" for number in range(gpus))])
        raise ValueError(
            f"device={str(device)!r} is not available, since PyTorch has {gpus} GPUs here: choose {others}, or leave "
            "it out"
        ) from None


def _typed(settings: Dict[str, Any]) -> Dict[str, Any]:
    """Return settings in the types of their options.

    Raises:
        ValueError: A value does not have its option's type, or is not one of its choices.
    """
    typed = dict(settings)
    for config in (LongMemConfig, LongMemLanguageModelingConfig):
        options = OmegaConf.structured(config())
        for name in settings.keys() & config.__dataclass_fields__.keys():
            try:
                options[name] = settings[name]
            except OmegaConfBaseException as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"the setting {name}={settings[name]!r} does not fit: {reason}") from None
            if not isinstance(options[name], Enum) and not OmegaConf.is_config(options[name]):
                typed[name] = options[name]
    return typed


def _load_checkpoint(checkpoint: str, data: Optional[str], settings: dict):
    """Return the model of a checkpoint, its task, and the directory of its dictionary."""
    state = read_state(checkpoint)
    cfg, name = state["cfg"], state["cfg"]["model"]["_name"]
    with open_dict(cfg):
        # The task may be another one, as in a released checkpoint, or lack an option that was added later.
        cfg["task"] = _task_settings(cfg["task"])
        cfg["task"]["fp16"] = False  # an option of the training, not of this call
    _check_names(checkpoint, settings, {*cfg["model"], *cfg["task"]})
    data = find_data(data, checkpoint, cfg["task"].get("data"))
    with open_dict(cfg):
        # Each setting goes wherever the configuration has it, as with --model-overrides.
        overwrite_args_by_name(cfg, {"data": data, **settings})
    models, _, task = checkpoint_utils.load_model_ensemble_and_task([checkpoint], state=state)
    if not isinstance(models[0], LongMemModel):
        raise ValueError(f"{checkpoint} is a {name}, which does not have a memory: name a checkpoint of longmem_lm")
    return models[0], task, data


def _load_directory(directory: str, data: str, settings: dict):
    """Return the model of a model directory and its task."""
    saved, backbone, weights = read_directory(directory)
    task_settings = OmegaConf.structured(LongMemLanguageModelingConfig())
    _check_names(directory, settings, {*LongMemConfig.__dataclass_fields__, *task_settings})
    values = {
        **_task_settings({}),
        **{key: value for key, value in {**saved, **settings}.items() if key in task_settings},
    }
    task_args = OmegaConf.create({**values, "data": data, "path": directory, "fp16": False})
    task = LongMemLanguageModelingTask(task_args, Dictionary.load(os.path.join(data, "dict.txt")))
    trained_on = saved.pop("backbone_fingerprint", None)
    cfg = argparse.Namespace(
        _name="longmem_lm",
        **{**saved, **settings},
        save_backbone=True,
        backbone_config=json.dumps(backbone),
        reload_ptm_layer=False,
        memory_scope=str(task_args.memory_scope),
    )
    try:
        model = task.build_model(cfg, from_checkpoint=True)
    except ValueError:
        raise
    except Exception as error:  # a malformed description makes modules raise anything
        raise ValueError(f"{directory} does not describe a model that can be built: {error}") from error
    load_weights(model, directory, weights)
    fingerprint = model.decoder.backbone.fingerprint
    if trained_on not in (None, fingerprint):
        raise ValueError(
            f"{os.path.join(directory, BACKBONE)} is not the backbone that the model was trained on: it has "
            f"fingerprint {fingerprint[:12]}, and {CONFIG} names {str(trained_on)[:12]}"
        )
    return model, task


def _check_names(path: str, settings: dict, known: set) -> None:
    for name in settings:
        if name not in known:
            raise ValueError(f"{path} does not have the setting {name}: {suggestion(name, known)}")


def _task_settings(settings) -> dict:
    """Return the settings of a language modeling task as those of this package's task."""
    defaults = OmegaConf.to_container(OmegaConf.structured(LongMemLanguageModelingConfig()), enum_to_str=True)
    shared = {name: value for name, value in settings.items() if name in defaults and name != "data_no_shuffle"}
    return {**defaults, **shared, "_name": TASK}


def read_state(checkpoint: str) -> dict:
    """Return the content of a checkpoint, after a comparison of its checksums.

    Args:
        checkpoint: Path of the checkpoint.

    Raises:
        ValueError: The file is damaged, holds code, or lacks the configuration of its model.
    """
    allow_plain_data()
    read_checkpoint(checkpoint)
    state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
    if not state.get("cfg"):
        raise ValueError(f"{checkpoint} is not a checkpoint of fairseq 0.11 or later: it lacks its configuration")
    return state


def find_checkpoint(path: str) -> str:
    """Return the path of a checkpoint.

    Args:
        path: Path of a checkpoint, or of a directory that contains one of :data:`CHECKPOINTS`.

    Raises:
        FileNotFoundError: There is no checkpoint.
    """
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise FileNotFoundError(f"no checkpoint: {path} does not exist")
    for name in CHECKPOINTS:
        if os.path.isfile(os.path.join(path, name)):
            return os.path.join(path, name)
    raise FileNotFoundError(f"no checkpoint: {path} has none of {', '.join(CHECKPOINTS)}")


def find_data(data: Optional[str], checkpoint: str, trained_on: Optional[str]) -> str:
    """Return the directory of a model's dictionary.

    Args:
        data: Directory that the user named, or None.
        checkpoint: Path of the checkpoint, whose directory is looked into.
        trained_on: Directory of the data that the model was trained on, which is looked into last.

    Raises:
        FileNotFoundError: No directory contains ``dict.txt``.
    """
    places = [data] if data is not None else [os.path.dirname(os.path.abspath(checkpoint)), trained_on]
    for place in filter(None, places):
        if os.path.isfile(os.path.join(place, "dict.txt")):
            return place
    nowhere = " nor in ".join(filter(None, places))
    raise FileNotFoundError(f"no dictionary: dict.txt is not in {nowhere}: name its directory with data=")

"""Writing files whole, and checkpoints as fairseq-train writes them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a file under a temporary name, and put it in place when it is whole."""
    part = path.with_name(path.name + ".part")
    try:
        write(part)
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_checkpoint(
    path: Path, model: dict[str, Any], task: dict[str, Any], weights: dict[str, Tensor], task_state: dict[str, Any]
) -> None:
    """Write a model as a checkpoint that fairseq's commands read.

    Args:
        path: of the file.
        model, task: their settings, plain data; ``_name`` says which. What the task leaves open gets its default.
        weights: the model's state dict.
        task_state: what the task keeps, such as the dictionary's fingerprint.
    """
    from fairseq.dataclass.configs import FairseqConfig
    from fairseq.tasks import TASK_DATACLASS_REGISTRY

    cfg = _plain(FairseqConfig())  # the task's settings refer to other sections
    cfg.update(model=model, task={**_plain(TASK_DATACLASS_REGISTRY[task["_name"]]()), **task})
    state = {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        # What fairseq expects to find in any checkpoint.
        "optimizer_history": [
            {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "task_state": task_state,
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None},
    }
    write_whole(path, lambda part: torch.save(state, part))


def _plain(settings: Any) -> dict[str, Any]:
    """A dataclass of settings as a dictionary."""
    return OmegaConf.to_container(OmegaConf.structured(settings), resolve=False, enum_to_str=True)

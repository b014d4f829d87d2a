"""Writing checkpoints in the format of fairseq-train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from fairseq.dataclass.configs import FairseqConfig
from fairseq.tasks import TASK_DATACLASS_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from longmem_fairseq.files import write_whole


def write_checkpoint(
    path: Path, model: dict[str, Any], task: dict[str, Any], weights: dict[str, Tensor], task_state: dict[str, Any]
) -> None:
    """Write a model as a checkpoint that fairseq's commands read.

    Args:
        path: Path of the checkpoint.
        model: Settings of the model, plain data; ``_name`` is its registered name.
        task: Settings of the task, plain data; ``_name`` is its registered name. Others have their defaults.
        weights: State dict of the model.
        task_state: State of the task, such as the dictionary's fingerprint.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """
    cfg = _plain(FairseqConfig())  # the task's settings refer to other sections
    cfg.update(model=model, task={**_plain(TASK_DATACLASS_REGISTRY[task["_name"]]()), **task})
    state = {
        "args": None,
        "cfg": cfg,
        "model": weights,
        "criterion": None,
        # fairseq requires these entries in every checkpoint
        "optimizer_history": [
            {"criterion_name": "none", "optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}
        ],
        "task_state": task_state,
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}, "val_loss": None},
    }

    def write(temporary: str) -> None:
        with open(temporary, "wb") as file:  # given a path, torch would write its name into the file
            try:
                torch.save(state, file)
            except RuntimeError as error:  # so torch ends where a write has failed, whose error has the reason
                if isinstance(error.__context__, OSError):
                    raise error.__context__ from None
                raise

    write_whole(path, write)


def _plain(settings: Any) -> dict[str, Any]:
    """Turn a dataclass of settings into a dictionary."""
    return OmegaConf.to_container(OmegaConf.structured(settings), resolve=False, enum_to_str=True)

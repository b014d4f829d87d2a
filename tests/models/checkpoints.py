"""Checkpoints of models that were built in this process, saved and loaded as fairseq's commands do."""

from types import SimpleNamespace

import torch
from fairseq import checkpoint_utils
from fairseq.models import MODEL_REGISTRY
from omegaconf import OmegaConf


def save(built, path, **changes):
    """Write the checkpoint that fairseq's trainer would write of a built model; changes of ``cfg.model``."""
    cfg = OmegaConf.to_container(built.cfg, resolve=True, enum_to_str=True)
    cfg["model"].update(changes)
    state = {
        "args": None,
        "cfg": cfg,
        "model": built.model.state_dict(),
        "criterion": None,
        "optimizer_history": [
            {"optimizer_name": "FairseqAdam", "lr_scheduler_state": {"best": None}, "num_updates": 1}
        ],
        "task_state": built.task.state_dict(),
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, path)
    return str(path)


def load(path, **overrides):
    """The model of a checkpoint, as fairseq's commands and users in Python load it."""
    return checkpoint_utils.load_model_ensemble_and_task([str(path)], overrides)[0][0].eval()


def load_stock(path, dictionary):
    """A language model of fairseq from its checkpoint, in evaluation mode, as fairseq's commands build it."""
    task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
    task.load_state_dict = lambda state: None
    task.build_model = lambda cfg, from_checkpoint=False: MODEL_REGISTRY[cfg._name].build_model(cfg, task)
    return checkpoint_utils.load_model_ensemble_and_task([str(path)], task=task)[0][0].eval()

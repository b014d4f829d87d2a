"""Checks before fairseq-train builds anything: its checkpoint, its data, and the memory to continue with."""

from typing import Optional, Tuple

from fairseq import utils
from fairseq.data import Dictionary

from ..data.directories import open_split
from .checkpoints import Restored, prepare_restore
from .memory_snapshots import MemorySnapshots, snapshots_of_training


def prepare_training(cfg, dictionary: Dictionary) -> Tuple[Optional[Restored], Optional[MemorySnapshots]]:
    """Check the checkpoint that training continues from and the data of all epochs.

    Args:
        cfg: Configuration of the task.
        dictionary: Dictionary of the data.

    Returns:
        The checkpoint that training continues from, or None if it starts from scratch; and the snapshots of the memory,
        or None if none are written or read.

    Raises:
        ValueError: An option, the checkpoint or the data cannot be used.
        FileNotFoundError: The checkpoint or the data does not exist.
    """
    paths = utils.split_paths(cfg.data)
    if len(paths) > 1:  # the data of an epoch days from now is checked today
        open_split(paths, cfg.train_subset, dictionary, combine=True)
    restored = prepare_restore(cfg.restore_file, cfg.save_dir, cfg.finetune_from_model, dictionary)
    return restored, snapshots_of_training(cfg, restored)

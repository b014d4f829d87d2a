"""Checks before a checkpoint is read (it exists, is whole, has this dictionary) or written (the disk has room)."""

import argparse
import collections
import glob
import logging
import os
import shutil
import typing
from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import omegaconf
import torch
from fairseq.data import Dictionary
from fairseq.distributed import utils as distributed_utils

from ..data.manifest import dictionary_fingerprint
from ..files import printable, remove_tree, write_whole
from ..safe_load import load_safely, settings

logger = logging.getLogger(__name__)

LAST = "checkpoint_last.pt"  # fairseq's default of --restore-file; it may be missing

# Names of what a killed process leaves: fairseq's files of checkpoints, and the directories of write_whole.
_UNFINISHED = (
    "checkpoint*.pt.tmp",
    "checkpoint*.pt.part",
    "memory_epoch*.safetensors.part",
)


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read."""


@dataclass(frozen=True)
class Restored:
    """The checkpoint that training continues from, and its place in the data.

    Attributes:
        path: Path of the checkpoint.
        epoch: Number of the epoch that training continues, from 1.
        batches: Number of batches of this epoch that each rank has read; 0 at its start.
        backbone: Fingerprint of the backbone that the checkpoint was trained on, in hexadecimal; None where its
            settings do not have it.
    """

    path: str
    epoch: int
    batches: int
    backbone: Optional[str] = None


def prepare_restore(
    restore_file: str, save_dir: str, finetune_from_model: Optional[str], dictionary: Dictionary
) -> Optional[Restored]:
    """Check the checkpoint that fairseq-train is about to load, before anything is built.

    fairseq writes a checkpoint whole or not at all, but ``checkpoint_last.pt`` is mostly a copy of one, and a copy is
    truncated where the process is killed or the disk is full. It is then copied again from the newest whole checkpoint.

    Args:
        restore_file: Value of ``--restore-file``.
        save_dir: Value of ``--save-dir``.
        finetune_from_model: Value of ``--finetune-from-model``, or None.
        dictionary: Dictionary of the data.

    Returns:
        The checkpoint and its place in the data, or None if training starts from scratch.

    Raises:
        FileNotFoundError: The user named a checkpoint that does not exist (fairseq itself would start from scratch).
        DamagedCheckpoint: The checkpoint cannot be read, and there is no other.
        ValueError: The checkpoint was made with another dictionary.
    """
    distributed = torch.distributed.is_initialized()
    if distributed:
        _allow_broadcast()
    last = os.path.join(save_dir, LAST)
    if restore_file != LAST:
        if not os.path.isfile(restore_file):
            raise FileNotFoundError(
                f"--restore-file {restore_file} does not exist: name an existing checkpoint, or leave the option out "
                f"to continue from {last} or start from scratch"
            )
        path = restore_file
    elif os.path.isfile(last):
        path = last
    else:
        path = finetune_from_model
    if not distributed or torch.distributed.get_rank() == 0:
        _remove_unfinished(save_dir)
        if path == last:
            _repair(last)
    if distributed:
        torch.distributed.barrier()
    if path is None:
        return None
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--finetune-from-model {path} does not exist")
    try:
        state = read_checkpoint(path)
    except DamagedCheckpoint as error:
        raise DamagedCheckpoint(
            f"{error}: continue from another one with --restore-file, or move it away to start from scratch"
        ) from error
    check_dictionary(state.get("task_state") or {}, dictionary, path)
    place = _place_of(state) if path in (last, restore_file) else (1, 0)
    has_settings = state.get("cfg") or state.get("args")
    return Restored(path, *place, getattr(settings(state), "backbone_fingerprint", None) if has_settings else None)


def place_in(checkpoint: str) -> Optional[Tuple[int, int]]:
    """Read at which place in the data a checkpoint was written; its tensors stay on disk.

    Args:
        checkpoint: Path of the checkpoint.

    Returns:
        Epoch and batch, or None if the file cannot be read.
    """
    try:
        return _place_of(load_safely(checkpoint, mapped=True, checked=False))
    except (ValueError, OSError, AttributeError):  # the last: it does not hold what a checkpoint does
        return None


def _place_of(state: Dict[str, Any]) -> Tuple[int, int]:
    place = (state.get("extra_state") or {}).get("train_iterator") or {}
    return place.get("epoch", 1), place.get("iterations_in_epoch", 0)


def check_space(save_dir: str) -> None:
    """Refuse to start a checkpoint where the disk has no room for one of the size of the last.

    Args:
        save_dir: Path of the directory of the checkpoints.

    Raises:
        OSError: There is too little room; nothing was written yet, and the last checkpoint is as it was.
    """
    last = os.path.join(save_dir, LAST)
    if os.path.isfile(last):
        needed, free = os.path.getsize(last), shutil.disk_usage(save_dir).free
        if free < needed:
            raise OSError(
                f"the disk of --save-dir {save_dir} has {free / 1e6:,.1f} MB left, but a checkpoint needs "
                f"{needed / 1e6:,.1f} MB: make room and start the same command again, which continues from {last}"
            )


def check_dictionary(state: Dict[str, Any], dictionary: Dictionary, checkpoint: str) -> None:
    """Refuse a checkpoint that was made with another dictionary.

    Args:
        state: The checkpoint's ``task_state``.
        dictionary: Dictionary of the data.
        checkpoint: Name of the checkpoint, for the message.

    Raises:
        ValueError: The dictionaries differ.
    """
    saved = state.get("dictionary_sha256")
    current = dictionary_fingerprint(dictionary.symbols)
    if saved is not None and saved != current:
        raise ValueError(
            f"{checkpoint} was made with another dictionary ({state.get('dictionary_size')} symbols, SHA-256 "
            f"{saved[:12]}...) than the data's dict.txt ({len(dictionary)} symbols, {current[:12]}...): "
            "binarize the data with the dictionary of the checkpoint"
        )


def read_checkpoint(path: str) -> Dict[str, Any]:
    """Read a checkpoint and compare its checksums; its tensors stay on disk.

    Args:
        path: Path of the checkpoint.

    Returns:
        The checkpoint's content.

    Raises:
        DamagedCheckpoint: The file is truncated or was changed.
    """
    try:
        return load_safely(path, mapped=True)
    except (ValueError, OSError) as error:
        raise DamagedCheckpoint(f"checkpoint {path} cannot be read ({error})") from error


def _remove_unfinished(save_dir: str) -> None:
    """Remove the files of runs that ended while they wrote a checkpoint or a snapshot of the memory."""
    for pattern in _UNFINISHED:
        for path in glob.glob(os.path.join(glob.escape(save_dir), pattern)):
            logger.info(f"{printable(path)} was never finished, and is removed")
            remove_tree(path)


def _repair(last: str) -> None:
    """Replace a damaged ``checkpoint_last.pt`` by the newest whole checkpoint beside it, if there is one."""
    try:
        read_checkpoint(last)
        return
    except DamagedCheckpoint as error:
        damage = error
    newest, updates = None, -1
    for path in glob.glob(os.path.join(glob.escape(os.path.dirname(last)), "checkpoint*.pt")):
        try:
            state = read_checkpoint(path)
        except DamagedCheckpoint:
            continue
        if state["optimizer_history"][-1]["num_updates"] > updates:
            newest, updates = path, state["optimizer_history"][-1]["num_updates"]
    if newest is not None:
        logger.warning(printable(f"{damage}; it is made again from {newest} of update {updates}"))
        write_whole(last, lambda temporary: shutil.copyfile(newest, temporary))


def _allow_broadcast() -> None:
    """Let ranks other than the first read a checkpoint that the first sends to them.

    fairseq sends a pickle, and reads it with torch's safe loader, which refuses its own configuration.
    """
    torch.serialization.add_safe_globals(
        [
            argparse.Namespace,
            collections.defaultdict,
            distributed_utils._TensorPlaceholder,  # noqa: SLF001  (fairseq's, in every broadcast)
            omegaconf.DictConfig,
            omegaconf.ListConfig,
            omegaconf.base.ContainerMetadata,
            omegaconf.base.Metadata,
            omegaconf.nodes.AnyNode,
            typing.Any,
            *(dict, list, int, float, str, bool),
        ]
    )

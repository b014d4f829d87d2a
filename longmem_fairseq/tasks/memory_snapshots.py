"""Snapshots of the training memory beside fairseq's checkpoints, read instead of encoding the past again.

A snapshot belongs to a place in the data (a batch of an epoch), and so to all checkpoints of that place, whatever they
are called. At the start of an epoch memories are empty, and none is written.

Hooks into fairseq: fairseq-train calls nothing of a task on every rank before a checkpoint. But before it writes one,
each rank calls the optimizer's ``consolidate_state_dict`` if there is one: optimizers whose state is spread over the
ranks gather it there. So :func:`before_each_checkpoint` puts such a method on the torch optimizer's instance; a method
of the optimizer's class is called after it.
"""

import glob
import logging
import os
import re
import shutil
import sys
import time
from typing import Any, Callable, Dict, Optional, Tuple

import torch

from ..data.lane_iterator import LaneIterator
from ..files import printable
from ..memory.container import SnapshotError
from ..memory.policies import memory_policy
from ..memory.training_snapshot import load_training_memory, save_training_memory
from .checkpoints import Restored, place_in
from .generator import backbone_identity

logger = logging.getLogger(__name__)

_NAME = "memory_epoch{epoch}_batch{batches}.rank{rank}of{ranks}.safetensors"
_PATTERN = re.compile(r"memory_epoch(\d+)_batch(\d+)\.rank\d+of\d+\.safetensors")


def snapshot_path(directory: str, epoch: int, batches: int, rank: int, ranks: int) -> str:
    """Name the file of a snapshot.

    Args:
        directory: Path of the directory of the checkpoints.
        epoch: Number of the epoch, from 1.
        batches: Number of batches of the epoch that the rank has read.
        rank: Number of the rank.
        ranks: Number of ranks.

    Returns:
        The path.
    """
    return os.path.join(directory, _NAME.format(epoch=epoch, batches=batches, rank=rank, ranks=ranks))


def before_each_checkpoint(optimizer, act: Callable[[], None]) -> None:
    """Call a function on every rank before fairseq-train writes a checkpoint.

    Calling this again with the same function has no effect.

    Args:
        optimizer: fairseq's optimizer; the torch optimizer in it gets a method ``consolidate_state_dict``.
        act: Function to call while all ranks wait for each other. It is not called where fairseq saves the rest of a
            run that failed, since the other ranks do not take part.
    """
    inner = optimizer.optimizer
    gather = getattr(inner, "consolidate_state_dict", None)
    if getattr(gather, "act", None) == act:
        return

    def consolidate_state_dict(*args, **kwargs) -> None:
        if sys.exc_info()[0] is None:
            act()
        if gather is not None:
            gather(*args, **kwargs)

    consolidate_state_dict.act = act
    inner.consolidate_state_dict = consolidate_state_dict


def snapshots_of_training(cfg, restored: Optional[Restored]) -> Optional["MemorySnapshots"]:
    """Decide whether a training saves its memory with each checkpoint, and whether it continues from a snapshot.

    Args:
        cfg: Configuration of the task: ``memory_snapshot``, ``resume_memory`` and the options of training.
        restored: Checkpoint that training continues from, or None.

    Returns:
        The snapshots, or None if none are written or read.

    Raises:
        ValueError: Not every rank can act before a checkpoint (see :func:`before_each_checkpoint`).
    """
    if cfg.memory_snapshot and cfg.no_save_optimizer_state:
        raise ValueError(
            "--memory-snapshot and --no-save-optimizer-state exclude each other: a training that cannot be "
            "continued needs no memory; leave one out"
        )
    if cfg.memory_snapshot and str(cfg.ddp_backend) == "fully_sharded":
        raise ValueError(
            "--memory-snapshot does not work with --ddp-backend fully_sharded, which gathers state in its own way: "
            "choose another, or leave --memory-snapshot out and continue by replay"
        )
    if restored is not None and (restored.batches == 0 or cfg.reset_dataloader):
        restored = None  # at the start of an epoch all memories are empty
    resume = str(cfg.resume_memory or ("snapshot" if cfg.memory_snapshot else "replay"))
    if restored is not None and resume == "replay":
        if memory_policy(cfg.memory_scope).shares_memory:
            logger.warning(
                "a memory that all lanes share is rebuilt from the last batches alone, and may hold some more or "
                "fewer of them than before; a snapshot (--memory-snapshot) is exact"
            )
        restored = None
    if cfg.memory_snapshot or restored is not None:
        return MemorySnapshots(cfg.save_dir, restored)
    return None


class MemorySnapshots:
    """Write, read and remove the snapshots of a training.

    Args:
        directory: Path of the directory of the checkpoints, ``--save-dir``.
        restored: Checkpoint that training continues from, if its snapshot is to be read; otherwise None.

    Attributes:
        restored: As above; None once the snapshot was read.
    """

    def __init__(self, directory: str, restored: Optional[Restored] = None):
        self.directory, self.restored = directory, restored
        self._places: Dict[str, Tuple[Any, Optional[Tuple[int, int]]]] = {}  # identity of the file and place, by path

    def save(self, model, iterator: LaneIterator) -> None:
        """Write this rank's memory as it is between two batches, and wait for the other ranks.

        Args:
            model: The model that is trained.
            iterator: Iterator over the epoch that is being read.

        Raises:
            OSError: A rank cannot write; no checkpoint is started then, and the others stay as they are.
        """
        if iterator.end_of_epoch() or not model.memory_tokens:
            return
        start = time.time()
        path = _path(self.directory, iterator, iterator.iterations_in_epoch)
        failure = None
        try:
            os.makedirs(self.directory, exist_ok=True)
            memory, window = (
                model.decoder.lane_state.memories.get(training=True),
                model.decoder.lane_state.windows.get(training=True),
            )
            _check_space(self.directory, sum(part.nbytes for part in (memory, window) if part))
            place = _place(model, iterator, iterator.iterations_in_epoch)
            size = save_training_memory(path, memory, place, window)
        except OSError as error:
            failure = error
        if not _all_ranks(failure is None, model.decoder.device):
            if failure is None:
                raise OSError(f"another rank could not write its memory to {self.directory}: its log says why")
            raise OSError(
                f"{failure}: make room and start the same command again, or leave out --memory-snapshot"
            ) from failure
        logger.info("memory saved to %s: %.1f MiB in %.1f s", printable(path), size / 2**20, time.time() - start)

    def expect(self, model) -> None:
        """Refuse at the start what could not be saved or read later.

        Args:
            model: The model that is trained.

        Raises:
            ValueError: The model has no memory.
            SnapshotError: The snapshot to continue from does not exist.
        """
        if not hasattr(model, "memory_tokens"):
            raise ValueError(
                "--memory-snapshot is for models that have a memory, and this model has none: leave it out"
            )
        if not model.memory_tokens:
            logger.info("--memory-snapshot has no effect while the memory is off")
            self.restored = None
        if self.restored is None:
            return
        directory = os.path.dirname(self.restored.path)
        rank, ranks = 0, 1
        if torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        path = snapshot_path(directory, self.restored.epoch, self.restored.batches, rank, ranks)
        if not os.path.isfile(path):
            raise SnapshotError(
                f"{self.restored.path} stopped at batch {self.restored.batches} of epoch {self.restored.epoch}, and "
                f"there is no snapshot of the memory at that place, {path}: {_REPLAY}"
            )

    @torch.no_grad()
    def load(self, sample: Dict[str, Any], model, iterator: LaneIterator, autocast: bool = False) -> None:
        """Restore the memory of the checkpoint, before the first batch; later calls have no effect.

        Args:
            sample: The first batch, on the model's device.
            model: The model that is trained, in training mode.
            iterator: Iterator that the batch comes from.
            autocast: If true, the model runs under CUDA's automatic mixed precision (``--amp``).

        Raises:
            SnapshotError: The snapshot is damaged, or belongs to another place, backbone or setting.
        """
        restored, self.restored = self.restored, None
        if restored is None:
            return
        segments = sample["net_input"]["segments"]
        rows = model.needs_replay(segments)
        if not rows.any():
            return
        start = time.time()
        path = _path(os.path.dirname(restored.path), iterator, restored.batches)
        try:
            tokens = sample["net_input"]["src_tokens"]
            with torch.autocast("cuda", enabled=autocast), model.autocast(tokens):
                memory, window = model.decoder.lane_state.allocate(tokens, segments.n_lanes)
            load_training_memory(path, memory, _place(model, iterator, restored.batches), window)
        except SnapshotError as error:
            raise SnapshotError(f"{error}: {_REPLAY}") from error
        if model.needs_replay(segments).any():
            raise SnapshotError(f"the memory in {path} does not reach the batch that comes next: {_REPLAY}")
        logger.info("memory of %d lanes read from %s in %.1f s", rows.sum(), printable(path), time.time() - start)

    def remove_unused(self) -> None:
        """Remove the snapshots of places at which there is no checkpoint any more."""
        places = {}
        for path in self._files("memory_epoch*.safetensors"):
            match = _PATTERN.fullmatch(os.path.basename(path))
            if match:
                places[path] = int(match[1]), int(match[2])
        if not places:
            return
        used = {self._checkpoint_place(path) for path in self._files("checkpoint*.pt")}
        for path, place in places.items():
            if place not in used:
                os.remove(path)

    def _files(self, pattern: str):
        return glob.glob(os.path.join(glob.escape(self.directory), pattern))

    def _checkpoint_place(self, checkpoint: str) -> Optional[Tuple[int, int]]:
        """Return epoch and batch of a checkpoint, which is read once unless the file changes."""
        status = os.stat(checkpoint)
        identity = status.st_ino, status.st_mtime_ns, status.st_size
        if self._places.get(checkpoint, (None,))[0] != identity:
            self._places[checkpoint] = identity, place_in(checkpoint)
        return self._places[checkpoint][1]


_REPLAY = "to continue nonetheless, encode the tokens before it again with --resume-memory replay"


def _path(directory: str, iterator: LaneIterator, batches: int) -> str:
    return snapshot_path(directory, iterator.epoch, batches, iterator.shard_id, iterator.dataset.n_ranks)


def _place(model, iterator: LaneIterator, batches: int) -> Dict[str, Any]:
    """Describe what a snapshot must match: the place in the data, the lanes, and the source of keys and values."""
    backbone, layer = backbone_identity(model.decoder)
    carried = model.decoder.lane_state.windows.size
    return {
        "epoch": iterator.epoch,
        "batch": batches,
        "rank": iterator.shard_id,
        **iterator.layout(),
        "backbone (--pretrained-model-path)": backbone[:12],
        "--retrieval-layer-index": layer,
        **({"--carry-window": carried} if carried else {}),
    }


def _check_space(directory: str, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"the disk of --save-dir {directory} has {free / 1e6:,.1f} MB left, but a snapshot of the memory needs up "
            f"to {needed / 1e6:,.1f} MB"
        )


def _all_ranks(fine: bool, device: torch.device) -> bool:
    """Return whether all ranks are fine; each waits for the others."""
    if not torch.distributed.is_initialized():
        return fine
    flag = torch.tensor(int(fine), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)

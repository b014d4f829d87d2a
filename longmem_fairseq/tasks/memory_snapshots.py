"""Snapshots of the training memory beside fairseq's checkpoints, read instead of encoding the past again.

A snapshot belongs to a place in the data (a batch of an epoch), and so to all checkpoints of that place, whatever they
are called. At the start of an epoch memories are empty, and none is written.
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
from ..memory.memory_file import SnapshotError
from ..memory.training_snapshot import load_training_memory, save_training_memory
from .checkpoints import Restored, place_in
from .generator import backbone_identity

logger = logging.getLogger(__name__)

_NAME = "memory_epoch{epoch}_batch{batches}.rank{rank}of{ranks}.safetensors"
_PATTERN = re.compile(r"memory_epoch(\d+)_batch(\d+)\.rank\d+of\d+\.safetensors")


def snapshot_path(directory: str, epoch: int, batches: int, rank: int, ranks: int) -> str:
    """Where the memory of a rank lies that has read so many batches of an epoch."""
    return os.path.join(directory, _NAME.format(epoch=epoch, batches=batches, rank=rank, ranks=ranks))


def before_each_checkpoint(optimizer, act: Callable[[], None]) -> None:
    """Have ``act`` called on every rank before fairseq-train writes a checkpoint.

    Ranks other than the first are not told that one is due. What all of them do is to ask an optimizer whose state is
    spread over the ranks to gather it (``consolidate_state_dict``); so the optimizer is given that method.

    Args:
        optimizer: fairseq's.
        act: called while all ranks wait for each other; not where fairseq saves what is left of a run that failed.
    """
    inner = optimizer.optimizer
    own = getattr(inner, "consolidate_state_dict", None)
    if getattr(own, "act", None) == act:
        return

    def consolidate_state_dict(*args, **kwargs) -> None:
        if sys.exc_info()[0] is None:
            act()
        if own is not None:
            own(*args, **kwargs)

    consolidate_state_dict.act = act
    inner.consolidate_state_dict = consolidate_state_dict


class MemorySnapshots:
    """Writes, reads and removes the snapshots of a training.

    Args:
        directory: ``--save-dir``.
        restored: the checkpoint that training continues from, if its snapshot is to be read.
    """

    def __init__(self, directory: str, restored: Optional[Restored] = None):
        self.directory, self.restored = directory, restored
        self._places: Dict[str, Tuple[Any, Optional[Tuple[int, int]]]] = {}  # of checkpoints, by what the file was

    def save(self, model, iterator: LaneIterator) -> None:
        """Write this rank's memory as it is between two batches, and wait for the other ranks.

        Raises:
            OSError: a rank cannot write; no checkpoint is begun then, and those that there are stay as they are.
        """
        if iterator.end_of_epoch() or not model.memory_tokens:
            return
        began = time.time()
        path = _path(self.directory, iterator, iterator.iterations_in_epoch)
        failure = None
        try:
            os.makedirs(self.directory, exist_ok=True)
            _check_space(self.directory, model.decoder.memories.get(True))
            about = _about(model, iterator, iterator.iterations_in_epoch)
            size = save_training_memory(path, model.decoder.memories.get(True), about)
        except OSError as error:
            failure = error
        if not _all_ranks(failure is None, model.decoder.device):
            if failure is None:
                raise OSError(f"another rank could not write its memory to {self.directory}: its log says why")
            raise OSError(
                f"{failure}: make room and start the same command again, or leave out --memory-snapshot"
            ) from failure
        logger.info("memory saved to %s: %.1f MiB in %.1f s", path, size / 2**20, time.time() - began)

    def expect(self, model) -> None:
        """Refuse at the start what could not be saved or read later.

        Raises:
            ValueError: the model has no memory.
            SnapshotError: the snapshot to continue from is not there.
        """
        if not hasattr(model, "memory_tokens"):
            raise ValueError("--memory-snapshot is for models that have a memory, and this one has none: leave it out")
        if not model.memory_tokens:
            logger.info("--memory-snapshot has no effect while the memory is off")
            self.restored = None
        if self.restored is None:
            return
        directory = os.path.dirname(self.restored.path)
        several = torch.distributed.is_initialized()
        rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if several else (0, 1)
        path = snapshot_path(directory, self.restored.epoch, self.restored.batches, rank, ranks)
        if not os.path.isfile(path):
            raise SnapshotError(
                f"{self.restored.path} stopped at batch {self.restored.batches} of epoch {self.restored.epoch}, and "
                f"there is no snapshot of the memory at that place, {path}: {_REPLAY}"
            )

    @torch.no_grad()
    def load(self, sample: Dict[str, Any], model, iterator: LaneIterator, autocast: bool = False) -> None:
        """Let the memory be what it was at the checkpoint; called before the first batch, and without effect after it.

        Args:
            sample: that batch, on the model's device.
            model: what is trained, in training.
            iterator: which the batch comes from.
            autocast: as for :func:`longmem_fairseq.tasks.replay.replay`.

        Raises:
            SnapshotError: the snapshot is damaged, or of another place, backbone or setting.
        """
        restored, self.restored = self.restored, None
        if restored is None:
            return
        segments = sample["net_input"]["segments"]
        rows = model.needs_replay(segments)
        if not rows.any():
            return
        began = time.time()
        path = _path(os.path.dirname(restored.path), iterator, restored.batches)
        try:
            with torch.autocast("cuda", enabled=autocast):  # a token says in which precision memory is kept
                like = model.decoder.backbone.encode_for_memory(sample["net_input"]["src_tokens"][:, :1]).keys
            memory = model.decoder.memories.allocate(True, segments.n_lanes, like)
            load_training_memory(path, memory, _about(model, iterator, restored.batches))
        except SnapshotError as error:
            raise SnapshotError(f"{error}: {_REPLAY}") from error
        if model.needs_replay(segments).any():
            raise SnapshotError(f"the memory in {path} does not reach the batch that comes next: {_REPLAY}")
        logger.info("memory of %d lanes read from %s in %.1f s", rows.sum(), path, time.time() - began)

    def remove_unused(self) -> None:
        """Remove the snapshots of places at which no checkpoint is any more."""
        found = {path: _PATTERN.fullmatch(os.path.basename(path)) for path in self._files("memory_epoch*.safetensors")}
        found = {path: tuple(map(int, match.groups())) for path, match in found.items() if match}
        used = {self._place(path) for path in self._files("checkpoint*.pt")} if found else set()
        for path, place in found.items():
            if place not in used:
                os.remove(path)

    def _files(self, pattern: str):
        return glob.glob(os.path.join(glob.escape(self.directory), pattern))

    def _place(self, checkpoint: str) -> Optional[Tuple[int, int]]:
        """Epoch and batch of a checkpoint; read once, unless the file changes."""
        status = os.stat(checkpoint)
        identity = status.st_ino, status.st_mtime_ns, status.st_size
        if self._places.get(checkpoint, (None,))[0] != identity:
            self._places[checkpoint] = identity, place_in(checkpoint)
        return self._places[checkpoint][1]


_REPLAY = "to continue nonetheless, encode the tokens before it again with --resume-memory replay"


def _path(directory: str, iterator: LaneIterator, batches: int) -> str:
    return snapshot_path(directory, iterator.epoch, batches, iterator.shard_id, iterator.dataset.n_ranks)


def _about(model, iterator: LaneIterator, batches: int) -> Dict[str, Any]:
    """What a snapshot must match: the place in the data, how the lanes lie, and whose keys and values these are."""
    backbone, layer = backbone_identity(model.decoder)
    return {
        "epoch": iterator.epoch,
        "batch": batches,
        "rank": iterator.shard_id,
        **iterator.layout(),
        "backbone (--pretrained-model-path)": backbone[:12],
        "--retrieval-layer-index": layer,
    }


def _check_space(directory: str, memory) -> None:
    needed, free = 0 if memory is None else memory.bank.nbytes, shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"the disk of --save-dir {directory} has {free / 1e6:,.1f} MB left, but a snapshot of the memory needs up "
            f"to {needed / 1e6:,.1f} MB"
        )


def _all_ranks(fine: bool, device: torch.device) -> bool:
    """Whether all ranks are fine; each waits for the others."""
    if not torch.distributed.is_initialized():
        return fine
    flag = torch.tensor(int(fine), device=device)
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag)

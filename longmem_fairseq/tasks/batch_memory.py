"""The model's memory before each batch of training and validation: in place, restored from a snapshot, or replayed.

A batch continues the streams of its lanes. In an epoch that is read in order the memory always ends where the batch
starts; after a resume, or after a batch that failed, it does not.
"""

import weakref
from typing import Any, Callable, Dict, Optional, Tuple

from fairseq.optim.amp_optimizer import AMPOptimizer

from ..data.lane_dataset import LaneDataset
from ..data.lane_iterator import LaneIterator
from .memory_snapshots import MemorySnapshots, before_each_checkpoint
from .replay import replay_past


class BatchMemory:
    """Bring a model's memory to the start of each batch, and save it with each checkpoint.

    Args:
        cfg: Configuration of the task: ``train_subset`` and ``memory_snapshot``.

    Attributes:
        model: The model that is trained, without the wrapper of distributed training; None before it is built.
        snapshots: Snapshots of the training; None if none are written or read.
    """

    def __init__(self, cfg):
        self.cfg = cfg
        self.snapshots: Optional[MemorySnapshots] = None
        self.model = None
        self._lanes: Dict[Tuple[str, bool], LaneDataset] = {}  # by split, and whether it is read in training
        self._epoch: Callable[[], Optional[LaneIterator]] = lambda: None  # epoch of training that is being read

    def start_epoch(self, epoch: LaneIterator, training: bool) -> None:
        """Record the lanes of an epoch; validation may read the same split in other lanes than training does.

        Args:
            epoch: Iterator over the epoch.
            training: Whether the epoch is one of training.
        """
        self._lanes[epoch.dataset.documents.split, training] = epoch.dataset
        if training and epoch.dataset.documents.split == self.cfg.train_subset:
            self._epoch = weakref.ref(epoch)

    def before_training(self, sample: Dict[str, Any], model, optimizer) -> None:
        """Bring the memory of training to the start of a batch.

        Args:
            sample: The batch.
            model: The model in training mode, with the wrapper of distributed training if there is one.
            optimizer: fairseq's optimizer.
        """
        if "segments" not in sample["net_input"]:
            return
        autocast = isinstance(optimizer, AMPOptimizer)
        if self.snapshots is not None:
            self.snapshots.load(sample, self.model, self._epoch(), autocast)
            if self.cfg.memory_snapshot:
                before_each_checkpoint(optimizer, self._save)
        replay_past(sample, model, self._lanes_of(sample["split"], training=True), autocast)

    def before_validation(self, sample: Dict[str, Any], model) -> None:
        """Bring the memory of evaluation, which is another one, to the start of a batch.

        Args:
            sample: The batch.
            model: The model in evaluation mode.
        """
        if "segments" in sample["net_input"]:
            replay_past(sample, model, self._lanes_of(sample["split"], training=False))

    def after_checkpoint(self) -> None:
        """Remove snapshots whose checkpoints are gone."""
        if self.cfg.memory_snapshot:
            self.snapshots.remove_unused()

    def _save(self) -> None:
        self.snapshots.save(self.model, self._epoch())

    def _lanes_of(self, split: str, training: bool) -> LaneDataset:
        return self._lanes[(split, training) if (split, training) in self._lanes else (split, not training)]

"""fairseq's epoch iterator over lanes: it never shuffles batches, and resumes only where the lanes are the same."""

from typing import Any, Callable, Dict, Optional

import torch
from fairseq.data.iterators import CountingIterator, EpochBatchIterator
from torch.utils.data import DataLoader

from .lane_dataset import LaneDataset


def _batches_of_epoch(dataset: LaneDataset, epoch: int):
    dataset.set_epoch(epoch)
    return dataset.batches()


class LaneIterator(EpochBatchIterator):
    """Iterate over one rank's batches in order; the iterator's state also records the layout of the lanes.

    Args:
        dataset: Segments to read; its ``n_ranks`` shards are read by as many ranks.
        rank: Number of this rank.
        epoch: Number of the epoch to start with, from 1.
        num_workers: Number of processes that read; 0 reads in this one.
        buffer_size: Number of batches that the workers read ahead.
        on_epoch: Function called at the start of each epoch with this iterator, and whether the epoch is one of
            training.
    """

    def __init__(
        self,
        dataset: LaneDataset,
        rank: int,
        epoch: int = 1,
        num_workers: int = 0,
        buffer_size: int = 0,
        on_epoch: Optional[Callable[["LaneIterator", bool], None]] = None,
    ):
        super().__init__(
            dataset=dataset,
            collate_fn=dataset.collater,
            batch_sampler=_batches_of_epoch,
            num_shards=dataset.n_ranks,
            shard_id=rank,
            num_workers=num_workers,
            epoch=epoch,
            buffer_size=buffer_size,
            disable_shuffling=True,
        )
        self._on_epoch = on_epoch

    def next_epoch_itr(
        self, shuffle: bool = True, fix_batches_to_gpus: bool = False, set_dataset_epoch: bool = True
    ) -> CountingIterator:
        """Start the next epoch.

        Args:
            shuffle: Ignored; lanes are never shuffled.
            fix_batches_to_gpus: Ignored.
            set_dataset_epoch: Whether the epoch is one of training; fairseq passes False for validation.

        Returns:
            Iterator over this rank's batches.
        """
        batches = super().next_epoch_itr(shuffle, fix_batches_to_gpus, set_dataset_epoch)
        if self._on_epoch is not None:
            self._on_epoch(self, set_dataset_epoch)
        return batches

    def _get_iterator_for_epoch(
        self, epoch: int, shuffle: bool, fix_batches_to_gpus: bool = False, offset: int = 0
    ) -> Optional[CountingIterator]:
        """Iterate over this rank's batches from number ``offset`` on.

        Unlike fairseq's own, the loader holds no reference back to this object: in such a cycle it is destroyed in an
        order that leaves its workers waiting, which costs five seconds for each worker at every validation.
        """
        self.dataset.set_epoch(epoch)  # before the workers copy the dataset
        batches = self.frozen_batches[self.shard_id :: self.num_shards][offset:]
        if offset > 0 and not batches:
            return None
        loader = DataLoader(
            self.dataset,
            batch_sampler=batches,
            collate_fn=self.collate_fn,
            num_workers=self.num_workers,
            prefetch_factor=max(2, -(-self.buffer_size // self.num_workers)) if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        return CountingIterator(loader, start=offset)

    def layout(self) -> Dict[str, Any]:
        """Describe all that decides which token is where in an epoch.

        Returns:
            Values of plain JSON types by the options that set them.
        """
        data = self.dataset
        return {
            "documents": len(data.documents),
            "tokens": data.documents.tokens,
            "lanes per rank (--batch-size, --max-tokens)": data.n_lanes,
            "ranks (--distributed-world-size)": data.n_ranks,
            "--tokens-per-sample": data.T,
            "--memory-scope": data.scope,
            "--seed (or --data-no-shuffle)": data.seed,
        }

    def state_dict(self) -> Dict[str, Any]:
        """Return fairseq's state of the iterator, and the layout of the lanes."""
        return {**super().state_dict(), "lanes": self.layout()}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Continue where another iterator stopped.

        Args:
            state_dict: State of that iterator, as :meth:`state_dict` returns it.

        Raises:
            ValueError: It stopped within an epoch, and its lanes had another layout.
        """
        if state_dict.get("iterations_in_epoch", 0) > 0:
            saved, current = state_dict.get("lanes"), self.layout()
            if saved is None:
                raise ValueError(
                    "the checkpoint stopped within an epoch of another task, which has no lanes of documents: add "
                    "--reset-dataloader to start the epoch again"
                )
            changed = [
                f"{name} was {saved.get(name)} and is {value}"
                for name, value in current.items()
                if saved.get(name) != value
            ]
            if changed:
                raise ValueError(
                    f"the checkpoint stopped within an epoch of other lanes ({'; '.join(changed)}): set these as they "
                    "were, or add --reset-dataloader to start the epoch again"
                )
        if state_dict["epoch"] != self.epoch:
            self._frozen_batches = None  # of another epoch
        super().load_state_dict(state_dict)

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
    """Yields this rank's batches in order; its state also says how the lanes lay.

    Args:
        dataset: the segments; ``dataset.n_ranks`` shards are read by as many ranks.
        rank: which of them this is.
        epoch: the epoch to begin with, from 1.
        num_workers: processes that read; 0 reads in this one.
        buffer_size: batches that the workers read ahead.
        begins: told whenever an epoch begins, with this object and whether it is one of training.
    """

    def __init__(
        self,
        dataset: LaneDataset,
        rank: int,
        epoch: int = 1,
        num_workers: int = 0,
        buffer_size: int = 0,
        begins: Optional[Callable[["LaneIterator", bool], None]] = None,
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
        self._begins = begins

    def next_epoch_itr(
        self, shuffle: bool = True, fix_batches_to_gpus: bool = False, set_dataset_epoch: bool = True
    ) -> CountingIterator:
        """Batches of the next epoch; fairseq asks for those of a validation with ``set_dataset_epoch`` off."""
        batches = super().next_epoch_itr(shuffle, fix_batches_to_gpus, set_dataset_epoch)
        if self._begins is not None:
            self._begins(self, set_dataset_epoch)
        return batches

    def _get_iterator_for_epoch(
        self, epoch: int, shuffle: bool, fix_batches_to_gpus: bool = False, offset: int = 0
    ) -> Optional[CountingIterator]:
        """Batches of this rank from the ``offset``-th on.

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
        """All that decides which token stands where in an epoch, and the option that sets it."""
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
        return {**super().state_dict(), "lanes": self.layout()}

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Continue where another iterator stopped.

        Raises:
            ValueError: it stopped amid an epoch, and its lanes lay otherwise than these.
        """
        if state_dict.get("iterations_in_epoch", 0) > 0:
            saved, here = state_dict.get("lanes"), self.layout()
            if saved is None:
                raise ValueError(
                    "the checkpoint stopped amid an epoch of another task, so its place in the data means nothing to "
                    "lanes of documents: add --reset-dataloader to begin the epoch anew"
                )
            changed = [
                f"{name} was {saved.get(name)} and is {now}" for name, now in here.items() if saved.get(name) != now
            ]
            if changed:
                raise ValueError(
                    f"the checkpoint stopped amid an epoch in which the lanes lay otherwise ({'; '.join(changed)}): "
                    "set these as they were, or add --reset-dataloader to begin the epoch anew"
                )
        if state_dict["epoch"] != self.epoch:
            self._frozen_batches = None  # of another epoch
        super().load_state_dict(state_dict)

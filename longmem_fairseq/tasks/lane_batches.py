"""Batches of documents on lanes, by the options of fairseq's commands."""

import logging
from typing import Callable, Dict, Optional, Tuple

from ..data.document_dataset import DocumentDataset
from ..data.lane_dataset import LaneDataset
from ..data.lane_iterator import LaneIterator
from ..memory.policies import memory_policy

logger = logging.getLogger(__name__)


class LaneBatches:
    """Make iterators over the documents of splits, and log a split's lanes when they change.

    Args:
        cfg: Configuration of the task.
        bos: Id of the source token before a document's first token.
        on_epoch: Function that each iterator calls at the start of an epoch, see :class:`LaneIterator`.
    """

    def __init__(self, cfg, bos: int, on_epoch: Callable[[LaneIterator, bool], None]):
        self.cfg, self.bos, self.on_epoch = cfg, bos, on_epoch
        self._layouts: Dict[str, Tuple[int, int]] = {}  # lanes and steps that were logged, by split

    def iterator(
        self,
        documents: DocumentDataset,
        max_tokens: Optional[int] = None,
        max_sentences: Optional[int] = None,
        seed: int = 1,
        num_shards: int = 1,
        shard_id: int = 0,
        num_workers: int = 0,
        epoch: int = 1,
        data_buffer_size: int = 0,
        skip_remainder_batch: bool = False,
        with_segments: bool = True,
        context: int = 0,
        **ignored,
    ) -> LaneIterator:
        """Lay documents on as many lanes as the batches of all ranks have rows.

        Args:
            documents: Documents of a split; there are no more lanes than documents.
            max_tokens: Number of tokens of a padded batch, ``--max-tokens``, or None for no limit.
            max_sentences: Number of rows of a batch, ``--batch-size``, or None for no limit.
            seed: Seed of the order of the documents, unless ``--data-no-shuffle`` keeps it.
            num_shards: Number of ranks.
            shard_id: Number of this rank.
            num_workers: Number of processes that read.
            epoch: Number of the epoch to start with, from 1.
            data_buffer_size: Number of batches that the workers read ahead.
            skip_remainder_batch: Whether ``--skip-remainder-batch`` is set, which is refused.
            with_segments: If true, batches name the lane and place of each row.
            context: Number of a window's tokens that are read again from the segment before.
            ignored: Other options of fairseq's iterators, which have no meaning for lanes.

        Returns:
            The iterator.

        Raises:
            ValueError: ``--skip-remainder-batch`` is set, or the context does not fit the other options.
        """
        policy = memory_policy(self.cfg.memory_scope)
        if context and with_segments:
            raise ValueError(
                f"--context-window {context} is not supported by a model with a memory, which carries the context from "
                "segment to segment: leave it out, or carry a window with --model-overrides \"{'carry_window': N}\""
            )
        if context and policy.joins_documents:
            raise ValueError(
                f"--context-window {context} is a document's own past, which --memory-scope {policy.name} joins with "
                "others: leave one of them out"
            )
        if context >= self.cfg.tokens_per_sample:
            raise ValueError(
                f"--context-window {context} leaves no new token in the window of --tokens-per-sample "
                f"{self.cfg.tokens_per_sample}: lower it"
            )
        if skip_remainder_batch:
            raise ValueError(
                "--skip-remainder-batch would drop tokens, but every token of a document is read: leave it out"
            )
        limits = [-(-len(documents) // num_shards)]
        if max_sentences is not None:
            limits.append(max_sentences)
        if max_tokens is not None:
            limits.append(max(1, max_tokens // self.cfg.tokens_per_sample))
        lanes = LaneDataset(
            documents,
            min(limits),
            num_shards,
            self.cfg.tokens_per_sample - context,
            self.bos,
            joins_documents=policy.joins_documents,
            shares_memory=policy.shares_memory,
            scope=policy.name,
            seed=None if self.cfg.data_no_shuffle else seed,
            with_segments=with_segments,
            context=context,
        )
        lanes.set_epoch(epoch)
        self._log(lanes)
        return LaneIterator(lanes, shard_id, epoch, num_workers, data_buffer_size, self.on_epoch)

    def _log(self, lanes: LaneDataset) -> None:
        split, layout = lanes.documents.split, (lanes.n_lanes, lanes.steps)
        if self._layouts.get(split) != layout:
            self._layouts[split] = layout
            logger.info(
                "%s: %d lanes on each of %d ranks, %s batches of up to %d tokens a lane",
                split,
                lanes.n_lanes,
                lanes.n_ranks,
                f"{lanes.steps:,}",
                lanes.T,
            )

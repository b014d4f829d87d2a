"""Batches of segments for fairseq: row i of a rank's batch t + 1 continues row i of its batch t.

Legend: L lanes of all ranks together, R ranks, B rows of a batch, T tokens of a segment. Lane g is row g // R of the
memory of rank g % R, so that few documents spread over all ranks. Segment ``step`` of lane g has the index
``step * L + g``.
"""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import FairseqDataset

from .document_dataset import DocumentDataset
from .lanes import Lane, lay_documents
from .segments import Segments


class LaneDataset(FairseqDataset):
    """Documents laid on lanes, cut into segments.

    Args:
        documents: Documents to read.
        n_lanes: Number of lanes of each rank.
        n_ranks: Number of ranks, R.
        tokens_per_sample: Number of tokens of a segment, T.
        bos: Id of the source token before a document's first token (fairseq's language models use end-of-sentence).
        joins_documents: If true, all documents of a lane are one stream; otherwise each is a stream.
        shares_memory: If true, one memory holds the streams of all lanes of a rank; otherwise each lane has its own.
        scope: Name of the memory's scope, which checkpoints record (see :meth:`LaneIterator.layout`).
        seed: Seed of the order of the documents, together with the epoch; None keeps their order.
        with_segments: If true, put :class:`Segments` into ``net_input``, which only models with a memory accept.
        context: Number of the document's tokens before a segment that are read again in front of it and are no targets;
            only where documents are not joined.

    Attributes:
        lanes: Lanes of all ranks in the current epoch, L of them.
        steps: Number of batches of each rank in the current epoch.
        T: Number of tokens of a segment.

    Raises:
        ValueError: There is not at least one lane, rank and token.
    """

    def __init__(
        self,
        documents: DocumentDataset,
        n_lanes: int,
        n_ranks: int,
        tokens_per_sample: int,
        bos: int,
        *,
        joins_documents: bool = False,
        shares_memory: bool = False,
        scope: str = "document",
        seed: Optional[int] = None,
        with_segments: bool = True,
        context: int = 0,
    ):
        super().__init__()
        if min(n_lanes, n_ranks, tokens_per_sample) < 1:
            raise ValueError(
                f"{n_lanes} lanes on each of {n_ranks} ranks with segments of {tokens_per_sample} tokens: "
                "--batch-size and --tokens-per-sample must be at least 1"
            )
        self.documents, self.n_lanes, self.n_ranks, self.T = documents, n_lanes, n_ranks, tokens_per_sample
        self.joins_documents, self.shares_memory, self.scope = joins_documents, shares_memory, scope
        self.bos, self.pad, self.seed, self.with_segments = bos, documents.pad, seed, with_segments
        self.context = context
        self.epoch: Optional[int] = None
        self.set_epoch(1)

    @property
    def total_lanes(self) -> int:
        """Number of lanes of all ranks, L."""
        return self.n_lanes * self.n_ranks

    def set_epoch(self, epoch: int) -> None:
        """Lay the documents for an epoch, the same every time for the same epoch.

        Args:
            epoch: Number of the epoch, from 1.
        """
        if epoch == self.epoch:
            return
        self.epoch = epoch
        sizes = self.documents.sizes
        costs = sizes if self.joins_documents else -(-sizes // self.T)
        # Seeds are small numbers: this keeps the epochs of one seed apart from those of the next.
        seed = None if self.seed is None else self.seed * 1_000_003 + epoch
        self.lanes: List[Lane] = [
            Lane(laid, sizes[laid], self.T, self.joins_documents, stream=epoch * self.total_lanes + lane)
            for lane, laid in enumerate(lay_documents(costs, self.total_lanes, seed))
        ]
        self.steps = max(map(len, self.lanes))
        self._full_steps = min(map(len, self.lanes))  # number of first steps in which no lane has ended

    def __len__(self) -> int:
        return self.steps * self.total_lanes

    def batch(self, step: int, rank: int) -> Sequence[int]:
        """List the segments of a rank's batch.

        Args:
            step: Number of the batch in the epoch, from 0.
            rank: Number of the rank.

        Returns:
            Indices of the segments; lanes that have ended are left out, so it may be empty.
        """
        first, stride = step * self.total_lanes, self.n_ranks
        if step < self._full_steps:
            return range(first + rank, first + self.total_lanes, stride)
        return [first + g for g in range(rank, self.total_lanes, stride) if step < len(self.lanes[g])]

    def batches(self) -> List[Sequence[int]]:
        """List all batches of an epoch in fairseq's order: step 0 of each rank, step 1 of each rank..."""
        return [self.batch(step, rank) for step in range(self.steps) for rank in range(self.n_ranks)]

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """Read one segment.

        Args:
            index: Index of the segment.

        Returns:
            ``id``, ``source`` and ``target`` (shape (length,), int64), the number of ``context`` tokens in front, whose
            targets are padding, ``lane``, ``stream``, ``start`` in the stream, and ``pieces``, the parts of documents
            in the segment.
        """
        step, g = divmod(int(index), self.total_lanes)
        lane = self.lanes[g]
        stream, start, length = lane.segment(step)
        pieces = lane.pieces(step)
        context = min(self.context, start)
        source, target = (np.empty(context + length, dtype=np.int64) for _ in range(2))
        at = 0
        for piece in pieces:
            n = context + len(piece)
            first = piece.start - context
            before = min(first, 1)  # the token before what is read, unless that starts its document
            tokens = self.documents.read(piece.document, first - before, piece.stop)
            target[at : at + n] = tokens[before:]
            source[at] = tokens[0] if before else self.bos
            source[at + 1 : at + n] = tokens[before:-1]
            at += n
        target[:context] = self.pad
        return {
            "id": int(index),
            "source": source,
            "target": target,
            "context": context,
            "lane": g // self.n_ranks,
            "stream": stream,
            "start": start,
            "pieces": pieces,
        }

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """Put segments together in B rows, padded at the end to the longest.

        Args:
            samples: Segments as :meth:`__getitem__` returns them.

        Returns:
            ``id`` (B,), ``nsentences``, ``ntokens``, ``net_input`` with ``src_tokens`` (B, T), ``src_lengths`` (B,) and
            ``segments``, ``target`` (B, T), ``pieces`` (the parts of documents in each row), ``split``, and with a
            context ``start_indices``, where the targets of each row begin; or ``{}`` if there are no segments.
        """
        if not samples:
            return {}
        lengths = np.array([len(sample["target"]) for sample in samples])
        tokens = np.full((2, len(samples), lengths.max()), self.pad, dtype=np.int64)  # (2, B, T)
        for row, sample in enumerate(samples):
            tokens[0, row, : lengths[row]] = sample["source"]
            tokens[1, row, : lengths[row]] = sample["target"]
        net_input = {"src_tokens": torch.from_numpy(tokens[0]), "src_lengths": torch.from_numpy(lengths)}
        if self.with_segments:
            lanes, streams, starts = ([sample[name] for sample in samples] for name in ("lane", "stream", "start"))
            net_input["segments"] = Segments(lanes, streams, starts, lengths, self.n_lanes)
        contexts = [sample["context"] for sample in samples]
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": int(lengths.sum()) - sum(contexts),
            **({"start_indices": contexts} if self.context else {}),
            "net_input": net_input,
            "target": torch.from_numpy(tokens[1]),
            "pieces": [sample["pieces"] for sample in samples],
            "split": self.documents.split,
        }

    def history(self, sample: Dict[str, Any], tokens: int) -> List[Sequence[int]]:
        """List the batches that must be encoded again to rebuild the memory of a batch's rows, oldest first.

        Batches are whole, because a row's numbers may depend in the last bit on the batch it was computed in.

        Args:
            sample: A collated batch of this dataset.
            tokens: Number of tokens that a memory can hold.

        Returns:
            Indices of the segments of each batch.
        """
        step, rank = int(sample["id"][0]) // self.total_lanes, int(sample["id"][0]) % self.n_ranks
        longest = int(sample["net_input"]["segments"].starts.max())
        if not self.shares_memory:
            # Before a row's start in its stream all segments are full.
            first = step - -(-min(longest, tokens) // self.T)
            return [self.batch(t, rank) for t in range(first, step)]
        begin, first, held = step - -(-longest // self.T), step, 0
        while first > begin and held < tokens:  # a memory of all lanes is full after fewer steps
            first -= 1
            held += sum(self.lanes[i % self.total_lanes].segment(first)[2] for i in self.batch(first, rank))
        return [self.batch(t, rank) for t in range(first, step)]

    def rank_tokens(self, rank: int) -> int:
        """Count the tokens that a rank reads in an epoch.

        Args:
            rank: Number of the rank.
        """
        return sum(int(lane.stream_tokens.sum()) for lane in self.lanes[rank :: self.n_ranks])

    def num_tokens(self, index: int) -> int:
        step, g = divmod(int(index), self.total_lanes)
        return self.lanes[g].segment(step)[2]

    def size(self, index: int) -> int:
        return self.num_tokens(index)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return False  # each epoch has its own order

"""Batches of segments for fairseq: row i of a rank's batch t + 1 continues row i of its batch t.

Legend: L lanes of all ranks together, R ranks, B rows of a batch, T tokens of a segment. Lane g is row g // R of rank
g % R's memory, so that few documents spread over all ranks. Segment ``step`` of lane g has the index ``step * L + g``.
"""

from typing import Any, Dict, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import FairseqDataset

from .document_dataset import DocumentDataset
from .lanes import Lane, lay_documents
from .segments import Segments

SCOPES = ("document", "stream", "shared")


class LaneDataset(FairseqDataset):
    """Documents laid on lanes, cut into segments.

    Args:
        documents: what is read.
        n_lanes: lanes of each rank.
        n_ranks: R.
        tokens_per_sample: T.
        bos: the source token before a document's first (fairseq's language models use end-of-sentence).
        scope: ``document``, or one of ``stream`` and ``shared``, where all documents of a lane are one stream.
        seed: of the order of the documents, together with the epoch; ``None`` keeps their order.
        with_segments: put :class:`Segments` into ``net_input`` (off for models without a memory).

    Attributes:
        steps: batches of each rank in the current epoch.
    """

    def __init__(
        self,
        documents: DocumentDataset,
        n_lanes: int,
        n_ranks: int,
        tokens_per_sample: int,
        bos: int,
        scope: str = "document",
        seed: Optional[int] = None,
        with_segments: bool = True,
    ):
        super().__init__()
        if scope not in SCOPES:
            raise ValueError(f"--memory-scope {scope} is none of {', '.join(SCOPES)}")
        if min(n_lanes, n_ranks, tokens_per_sample) < 1:
            raise ValueError(
                f"{n_lanes} lanes on each of {n_ranks} ranks with segments of {tokens_per_sample} tokens: "
                "--batch-size and --tokens-per-sample must be at least 1"
            )
        self.documents, self.n_lanes, self.n_ranks, self.T = documents, n_lanes, n_ranks, tokens_per_sample
        self.bos, self.pad, self.scope, self.seed = bos, documents.pad, scope, seed
        self.with_segments = with_segments
        self.epoch: Optional[int] = None
        self.set_epoch(1)

    @property
    def total_lanes(self) -> int:
        return self.n_lanes * self.n_ranks  # L

    def set_epoch(self, epoch: int) -> None:
        """Lay the documents for an epoch (the same every time for the same epoch)."""
        if epoch == self.epoch:
            return
        self.epoch = epoch
        sizes, joined = self.documents.sizes, self.scope != "document"
        costs = sizes if joined else -(-sizes // self.T)
        # seeds are small numbers: keep the epochs of one seed apart from those of the next
        seed = None if self.seed is None else self.seed * 1_000_003 + epoch
        self.lanes: List[Lane] = [
            Lane(laid, sizes[laid], self.T, joined, stream=epoch * self.total_lanes + lane)
            for lane, laid in enumerate(lay_documents(costs, self.total_lanes, seed))
        ]
        self.steps = max(map(len, self.lanes))
        self._full_steps = min(map(len, self.lanes))  # in these no lane has ended

    def __len__(self) -> int:
        return self.steps * self.total_lanes

    def batch(self, step: int, rank: int) -> Sequence[int]:
        """Indices of a rank's batch; lanes that have ended are left out, so it may be empty."""
        first, stride = step * self.total_lanes, self.n_ranks
        if step < self._full_steps:
            return range(first + rank, first + self.total_lanes, stride)
        return [first + g for g in range(rank, self.total_lanes, stride) if step < len(self.lanes[g])]

    def batches(self) -> List[Sequence[int]]:
        """All batches of an epoch in fairseq's order: step 0 of each rank, step 1 of each rank..."""
        return [self.batch(step, rank) for step in range(self.steps) for rank in range(self.n_ranks)]

    def __getitem__(self, index: int) -> Dict[str, Any]:
        """One segment: source and target (shape (length,), int64), its lane and its place in the stream."""
        step, g = divmod(int(index), self.total_lanes)
        lane = self.lanes[g]
        stream, start, length = lane.segment(step)
        pieces = lane.pieces(step)
        source, target = np.empty(length, dtype=np.int64), np.empty(length, dtype=np.int64)
        at = 0
        for piece in pieces:
            n = piece.stop - piece.start
            before = min(piece.start, 1)  # the token before the piece, if it has one in its document
            tokens = self.documents.read(piece.document, piece.start - before, piece.stop)
            target[at : at + n] = tokens[before:]
            source[at] = tokens[0] if before else self.bos
            source[at + 1 : at + n] = tokens[before:-1]
            at += n
        return {
            "id": int(index),
            "source": source,
            "target": target,
            "lane": g // self.n_ranks,
            "stream": stream,
            "start": start,
            "pieces": pieces,
        }

    def collater(self, samples: List[Dict[str, Any]]) -> Dict[str, Any]:
        """Put segments together; B rows, padded at the end to the longest.

        Returns:
            ``id`` (B,), ``nsentences``, ``ntokens``, ``net_input`` with ``src_tokens`` (B, T), ``src_lengths`` (B,) and
            ``segments``, ``target`` (B, T), ``pieces`` (of each row, the parts of documents it holds), ``split``; or
            ``{}`` if there are no segments.
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
        return {
            "id": torch.tensor([sample["id"] for sample in samples]),
            "nsentences": len(samples),
            "ntokens": int(lengths.sum()),
            "net_input": net_input,
            "target": torch.from_numpy(tokens[1]),
            "pieces": [sample["pieces"] for sample in samples],
            "split": self.documents.split,
        }

    def history(self, sample: Dict[str, Any], tokens: int) -> List[Sequence[int]]:
        """The batches before a batch that its rows need to have their memory again, oldest first.

        Whole batches, as they were, because a row's numbers may depend in the last bit on the batch it was computed in.

        Args:
            sample: a collated batch of this dataset.
            tokens: how many tokens a memory can hold.
        """
        step, rank = int(sample["id"][0]) // self.total_lanes, int(sample["id"][0]) % self.n_ranks
        starts = sample["net_input"]["segments"].starts
        if self.scope == "shared":  # one memory for all lanes: it is full after fewer steps
            first, held = step, 0
            begin = step - -(-int(starts.max()) // self.T)
            while first > begin and held < tokens:
                first -= 1
                held += sum(self.lanes[i % self.total_lanes].segment(first)[2] for i in self.batch(first, rank))
        else:
            # before a row's start in its stream all segments are full
            first = step - -(-min(int(starts.max()), tokens) // self.T)
        return [self.batch(t, rank) for t in range(first, step)]

    def rank_tokens(self, rank: int) -> int:
        """Tokens that a rank reads in an epoch."""
        return sum(int(lane.stream_tokens.sum()) for lane in self.lanes[rank :: self.n_ranks])

    def num_tokens(self, index: int) -> int:
        step, g = divmod(int(index), self.total_lanes)
        return self.lanes[g].segment(step)[2]

    def size(self, index: int) -> int:
        return self.num_tokens(index)

    @property
    def can_reuse_epoch_itr_across_epochs(self) -> bool:
        return False  # each epoch has its own order

"""Documents on lanes: which lane reads which document when, so that every token is a target exactly once.

Legend: L lanes of all ranks together, T tokens of a segment.

A *stream* is what one memory may hold: a document, or with ``--memory-scope stream`` all documents of a lane one after
the other. Segments are cut from streams: T tokens each, fewer in a stream's last one.
"""

import heapq
from dataclasses import dataclass
from typing import List, Optional, Tuple

import numpy as np


def lay_documents(costs: np.ndarray, n_lanes: int, seed: Optional[int]) -> List[np.ndarray]:
    """Distribute documents over lanes so that the lanes end at nearly the same time.

    Without a seed documents stay in their order, each on the lane that is free first. With a seed the longest are laid
    first (roughly: costs are blurred by a factor of up to two, so that epochs differ), because a long document that is
    laid last would be read alone; then each lane's documents are shuffled.

    Args:
        costs: Time that each document takes on its lane, shape (documents,).
        n_lanes: Number of lanes, L.
        seed: Seed of the shuffle; None keeps the order.

    Returns:
        Numbers of the documents of each lane, in the order in which it reads them; L arrays of int64.
    """
    rng = None if seed is None else np.random.default_rng(seed)
    order = np.arange(len(costs)) if rng is None else np.argsort(-costs * rng.uniform(1, 2, len(costs)), kind="stable")
    lanes: List[List[int]] = [[] for _ in range(n_lanes)]
    free = [(0, lane) for lane in range(n_lanes)]
    for document in order.tolist():
        load, lane = free[0]
        lanes[lane].append(document)
        heapq.heapreplace(free, (load + int(costs[document]), lane))
    laid = [np.array(lane, dtype=np.int64) for lane in lanes]
    return laid if rng is None else [rng.permutation(lane) for lane in laid]


@dataclass(frozen=True)
class Piece:
    """A part of one document in a segment.

    Attributes:
        document: Number of the document.
        start: Position of the part's first token in the document.
        stop: Position behind its last token.
    """

    document: int
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start


class Lane:
    """The documents, streams and segments of one lane in one epoch.

    Args:
        documents: Numbers of the lane's documents in order, shape (n,).
        sizes: Length of each of them in tokens, shape (n,).
        tokens_per_sample: Number of tokens of a segment, T.
        joined: If true, all documents are one stream; otherwise each is a stream.
        stream: Number of that one stream.

    Attributes:
        stream_tokens: Length of each stream in tokens, shape (streams,).
    """

    def __init__(self, documents: np.ndarray, sizes: np.ndarray, tokens_per_sample: int, joined: bool, stream: int):
        self.documents, self.T, self.joined, self.stream = documents, tokens_per_sample, joined, stream
        self.ends = np.cumsum(sizes)  # tokens of the lane up to the end of each document
        per_stream = sizes.sum(keepdims=True) if joined and len(sizes) else sizes
        self.stream_tokens = per_stream
        self.segment_ends = np.cumsum(-(-per_stream // tokens_per_sample))  # segments up to the end of each stream

    def __len__(self) -> int:
        """Return the number of segments of the lane."""
        return int(self.segment_ends[-1]) if len(self.segment_ends) else 0

    def segment(self, step: int) -> Tuple[int, int, int]:
        """Locate a segment.

        Args:
            step: Number of the segment, from 0.

        Returns:
            Number of its stream, its start within the stream, and its length, both in tokens.
        """
        s = int(np.searchsorted(self.segment_ends, step, side="right"))
        first = int(self.segment_ends[s - 1]) if s else 0
        start = (step - first) * self.T
        length = min(self.T, int(self.stream_tokens[s]) - start)
        return (self.stream if self.joined else int(self.documents[s])), start, length

    def pieces(self, step: int) -> List[Piece]:
        """List the parts of documents that make up a segment.

        Args:
            step: Number of the segment, from 0.

        Returns:
            Parts in reading order; one, unless documents are joined.
        """
        stream, start, length = self.segment(step)
        if not self.joined:
            return [Piece(stream, start, start + length)]
        pieces, position, stop = [], start, start + length  # in a joined lane, a stream's tokens are the lane's
        d = int(np.searchsorted(self.ends, position, side="right"))
        while position < stop:
            begin = int(self.ends[d - 1]) if d else 0
            end = min(stop, int(self.ends[d]))
            pieces.append(Piece(int(self.documents[d]), position - begin, end - begin))
            position, d = end, d + 1
        return pieces

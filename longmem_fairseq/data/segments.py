"""The place of each row of a batch: which lane's stream it continues, and where in that stream.

Legend: B rows of a batch.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segments:
    """The place of each row of a batch in the stream of its lane.

    A *lane* is a row of the memory bank; a *stream* is what one memory may hold (a document, or with ``--memory-scope
    stream`` all documents of a lane). The arrays stay on the host as NumPy: the memory bank's bookkeeping is host work,
    and reading these numbers back from a GPU would stall it at every step.

    Attributes:
        lanes: Row of the memory bank for each row of the batch, shape (B,), int64, no value twice.
        streams: Number of the stream that each row continues, shape (B,), int64.
        starts: Number of tokens of that stream before this segment, shape (B,), int64; 0 starts an empty memory.
        lengths: Number of tokens in each row, shape (B,), int64, >= 1; padding follows them.
        n_lanes: Number of rows that the memory bank needs.

    Raises:
        ValueError: The arrays contradict each other.
    """

    lanes: np.ndarray
    streams: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    n_lanes: int

    def __post_init__(self):
        for name in ("lanes", "streams", "starts", "lengths"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.int64))
        shapes = {getattr(self, name).shape for name in ("lanes", "streams", "starts", "lengths")}
        if len(shapes) != 1 or self.lanes.ndim != 1:
            raise ValueError(f"the arrays of a batch of segments differ in shape: {sorted(shapes)}")
        if len(self.lanes) and (self.lanes.min() < 0 or self.lanes.max() >= self.n_lanes):
            raise ValueError(f"lanes {self.lanes.tolist()} do not fit a memory bank of {self.n_lanes} lanes")
        if len(np.unique(self.lanes)) != len(self.lanes):
            raise ValueError(f"a lane is twice in one batch: {self.lanes.tolist()}")
        if len(self.lengths) and self.lengths.min() < 1:
            raise ValueError("a segment without tokens")

    @property
    def ends(self) -> np.ndarray:
        """Number of tokens of the stream up to the end of this segment, shape (B,), int64."""
        return self.starts + self.lengths

    def __len__(self) -> int:
        return len(self.lanes)

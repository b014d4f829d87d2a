"""What the rows of a batch are: which lane's stream each belongs to, and where in it."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Segments:
    """The place of each row of a batch in the stream of its lane.

    A *lane* is a row of the memory bank; a *stream* is what one memory may hold (a document, unless
    ``--memory-scope stream``). The arrays stay on the host as numpy: the memory bank's bookkeeping is host work, and
    reading these numbers back from a GPU would stall it at every step.

    Attributes:
        lanes: rows of the memory bank, shape (B,), int64, no value twice.
        streams: which stream each row continues, shape (B,), int64.
        starts: tokens of that stream before this segment, shape (B,), int64; 0 starts a new memory.
        lengths: real tokens in each row, shape (B,), int64, >= 1; what follows them is padding.
        n_lanes: rows that the memory bank needs in all.
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
            raise ValueError(f"a lane stands twice in one batch: {self.lanes.tolist()}")
        if len(self.lengths) and self.lengths.min() < 1:
            raise ValueError("a segment without tokens")

    @property
    def ends(self) -> np.ndarray:
        """Tokens of the stream up to and including this segment, shape (B,), int64."""
        return self.starts + self.lengths

    def __len__(self) -> int:
        return len(self.lanes)

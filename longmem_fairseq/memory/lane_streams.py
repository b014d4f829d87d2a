"""Streams of tokens, one in each lane: which one a lane is in, how far it is read, and what is held back.

Writes are held back until the lane's next segment comes. So a batch that is run twice (gradient overflow, out of
memory, a dummy batch) finds its lanes as they were the first time, and only tokens that training has passed are stored.

Legend: B rows of a batch, T tokens of a segment.
"""

from abc import ABC, abstractmethod
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
from torch import Tensor

from ..data.segments import Segments

_PLACES = ("lanes", "streams", "starts", "lengths", "n_lanes")  # fields of Segments


class MemoryOutOfStep(RuntimeError):
    """A segment does not continue what its lane's memory holds."""


class LaneStreams(ABC):
    """Bookkeeping of the streams in a number of lanes; what is stored of them is left to derived classes.

    Args:
        lanes: Number of lanes.

    Attributes:
        streams: Stream that each lane is in, shape (lanes,), int64; -1 before the first.
        stream_ends: Number of tokens of that stream that are stored, shape (lanes,), int64.
    """

    writes_batches_whole = False  # whether a batch of which any row comes again is held back with all its rows

    def __init__(self, lanes: int):
        self.streams = np.full(lanes, -1, dtype=np.int64)
        self.stream_ends = np.zeros(lanes, dtype=np.int64)
        self._pending: Optional[Tuple[Segments, Any]] = None

    @property
    def lanes(self) -> Optional[int]:
        """Number of lanes that a batch may have; None for any number."""
        return len(self.streams)

    def start_stream(self, lane: int, stream: int, position: int) -> None:
        """Let a stream start in a lane; a derived class also empties what it stores of the lane.

        Args:
            lane: Number of the lane.
            stream: Identity of the stream.
            position: Number of tokens of the stream that were skipped.
        """
        self.streams[lane], self.stream_ends[lane] = stream, position

    @abstractmethod
    def store(self, segments: Segments, written: Any, rows: List[int]) -> None:
        """Store some rows of a batch.

        Args:
            segments: Places of the batch's rows.
            written: What was passed to :meth:`hold_back`.
            rows: Numbers of the rows.
        """

    @abstractmethod
    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
        """Return what is stored and what is held back, bit by bit: tensors by name, and the rest as JSON types."""

    @abstractmethod
    def restore(self, tensors: Dict[str, Tensor], places: Dict[str, Any]) -> None:
        """Replace the content by that of other streams of the same sizes and precision.

        Args:
            tensors: Tensors of their :meth:`state`.
            places: The rest of their state.

        Raises:
            ValueError: The sizes differ.
        """

    def enter(self, segments: Segments) -> None:
        """Bring each lane to the start of its segment.

        Args:
            segments: Places of the batch's rows.

        Raises:
            MemoryOutOfStep: A segment does not start where its lane's stream ends.
        """
        behind = self.needs_replay(segments)
        if behind.any():
            row = int(np.flatnonzero(behind)[0])
            lane = int(segments.lanes[row])
            raise MemoryOutOfStep(
                f"lane {lane} received token {segments.starts[row]} of stream {segments.streams[row]}, but its memory "
                f"is at token {self.stream_ends[lane]} of stream {self.streams[lane]}: segments must come in order"
            )
        self._settle(segments)
        for row in np.flatnonzero(segments.starts == 0):
            self.start_stream(int(segments.lanes[row]), int(segments.streams[row]), 0)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Return which rows' lanes are not where their segment starts, shape (B,), bool; never those at a start."""
        at_start = (self.streams[segments.lanes] == segments.streams) & (
            self.stream_ends[segments.lanes] == segments.starts
        )
        if self._pending is not None:
            pending, _ = self._pending
            ends = {(lane, s): e for lane, s, e in zip(pending.lanes, pending.streams, pending.ends)}
            for row, key in enumerate(zip(segments.lanes, segments.streams)):
                at_start[row] |= ends.get(key, -1) == segments.starts[row]
        return (segments.starts > 0) & ~at_start

    def ends(self, lanes: np.ndarray) -> np.ndarray:
        """Return the number of tokens that each lane's stream has so far, those held back included.

        Args:
            lanes: Numbers of lanes, shape (B,), int64.
        """
        ends = self.stream_ends.copy()
        if self._pending is not None:
            ends[self._pending[0].lanes] = self._pending[0].ends
        return ends[lanes]

    def restart(self, segments: Segments) -> None:
        """Empty the lanes of a batch and let each stream start where its segment does, for replay."""
        self._settle(segments)
        for row, lane in enumerate(segments.lanes):
            self.start_stream(int(lane), int(segments.streams[row]), int(segments.starts[row]))

    def hold_back(self, segments: Segments, written: Any) -> None:
        """Store a batch as soon as its lanes continue.

        Args:
            segments: Places of the rows.
            written: What :meth:`store` takes.
        """
        self._settle(segments)
        self._pending = segments, written

    def flush(self) -> None:
        """Store what is held back."""
        self._settle(None)

    def reset(self) -> None:
        """Forget everything."""
        self._pending = None
        for lane in range(len(self.streams)):
            self.start_stream(lane, -1, 0)

    def places(self) -> Dict[str, Any]:
        """Return the places of the streams and of what is held back, plain JSON types."""
        pending = None
        if self._pending is not None:
            pending = {name: np.asarray(getattr(self._pending[0], name)).tolist() for name in _PLACES}
        return {"streams": self.streams.tolist(), "ends": self.stream_ends.tolist(), "pending": pending}

    def restore_places(self, places: Dict[str, Any], written: Any) -> None:
        """Replace the places of the streams by those of others.

        Args:
            places: What their :meth:`places` returned.
            written: What they held back, as :meth:`store` takes it; ignored where they held nothing back.
        """
        self.streams, self.stream_ends = (np.array(places[name], dtype=np.int64) for name in ("streams", "ends"))
        self._pending = None if places["pending"] is None else (Segments(**places["pending"]), written)

    def _settle(self, coming: Optional[Segments]) -> None:
        """Store what is held back, except for lanes to which the same segment comes again."""
        if self._pending is None:
            return
        (segments, written), self._pending = self._pending, None
        coming_places = set() if coming is None else set(_row_places(coming))
        rows = [row for row, place in enumerate(_row_places(segments)) if place not in coming_places]
        if self.writes_batches_whole and len(rows) < len(segments):
            return
        self.store(segments, written, rows)
        self.stream_ends[segments.lanes[rows]] = segments.ends[rows]


def _row_places(segments: Segments) -> List[Tuple[int, int, int]]:
    return list(zip(segments.lanes.tolist(), segments.streams.tolist(), segments.starts.tolist()))


def next_segments(streams: Optional[LaneStreams], tokens: Tensor, pad: int) -> Segments:
    """Return the place of a batch that continues the lanes 0 to B - 1 where the batch before it ended.

    Args:
        streams: Streams of the lanes; None before the first batch.
        tokens: Token ids, shape (B, T), int64; padding only follows a row's tokens.
        pad: Id of the padding symbol.

    Raises:
        ValueError: There are fewer lanes.
    """
    B, T = tokens.shape
    if streams is not None and streams.lanes is not None and B > streams.lanes:
        raise ValueError(f"{B} rows do not continue the {streams.lanes} lanes of the memory: call reset_memory()")
    lanes, zeros = np.arange(B), np.zeros(B, dtype=np.int64)
    real = tokens.cpu().numpy() != pad
    lengths = T - np.argmax(real[:, ::-1], axis=1)  # up to the last token that is not padding
    return Segments(lanes, zeros, zeros if streams is None else streams.ends(lanes), lengths, B)

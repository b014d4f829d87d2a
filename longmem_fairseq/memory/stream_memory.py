"""The memory of one split: a bank, its search, and the stream that each lane is in.

Writes are held back until the lane's next segment comes. So a batch that is run twice (gradient overflow, out of
memory, a dummy batch) finds the memory as it was the first time, and only tokens that training has passed are written.

Legend: B rows of a batch, H_kv key/value heads, T tokens of a segment, d width of a head.
"""

from dataclasses import dataclass
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from .bank import MemoryBank
from .policies import MemoryPolicy, register_memory_policy
from .reader import ChunkReader, MemoryReader, chunk_ages, tables_to_read

_PLACES = ("lanes", "streams", "starts", "lengths", "n_lanes")  # fields of Segments


class MemoryOutOfStep(RuntimeError):
    """A segment does not continue what its lane's memory holds."""


@dataclass
class PendingWrite:
    """Keys and values of a batch that are written when its lanes continue.

    Attributes:
        segments: Places of the rows.
        keys: Keys, shape (B, H_kv, T, d).
        values: Values, shape (B, H_kv, T, d).
    """

    segments: Segments
    keys: Tensor
    values: Tensor


class StreamMemory:
    """Streams of tokens in a bank, one lane each (``--memory-scope document`` and ``stream``).

    For each batch: ``reader = memory.open(segments)``, attention calls ``reader(q, scaling)``, then
    ``memory.write(segments, keys, values)``.

    A memory policy derives from this class and overrides :meth:`reader`, :meth:`start_stream` and :meth:`store`.

    Args:
        bank: Bank that stores keys and values.
        chunk_reader: Search and attention of the readers.
        keep_reads: Whether a backward pass may come after later batches were written.

    Attributes:
        streams: Stream that each lane is in, shape (lanes,), int64; -1 before the first.
        stream_ends: Number of tokens of that stream in the bank, shape (lanes,), int64.
        base: Bank of one lane whose content every stream starts with; None for an empty memory.
    """

    writes_batches_whole = False  # whether a batch of which any row comes again is held back with all its rows

    def __init__(self, bank: MemoryBank, chunk_reader: ChunkReader, keep_reads: bool = False):
        self.bank, self.chunk_reader, self.keep_reads = bank, chunk_reader, keep_reads
        self.streams = np.full(bank.lanes, -1, dtype=np.int64)
        self.stream_ends = np.zeros(bank.lanes, dtype=np.int64)
        self.base: Optional[MemoryBank] = None
        self._pending: Optional[PendingWrite] = None

    # What a policy may override ----------------------------------------------------------------------------------

    @property
    def lanes(self) -> Optional[int]:
        """Number of lanes that a batch may have; None for any number."""
        return self.bank.lanes

    def reader(self, segments: Segments) -> MemoryReader:
        """Return what the rows of a batch read from; every lane is at the start of its segment."""
        return StreamReader(self.bank, self.chunk_reader, segments, self.keep_reads)

    def start_stream(self, lane: int, stream: int, position: int) -> None:
        """Empty a lane and let a stream start in it.

        Args:
            lane: Number of the lane.
            stream: Identity of the stream.
            position: Number of tokens of the stream that were skipped.
        """
        self.bank.reset(lane, position)
        self.streams[lane], self.stream_ends[lane] = stream, position

    def store(self, pending: PendingWrite, rows: List[int]) -> None:
        """Write some rows of a batch into the bank.

        Args:
            pending: Keys and values of the batch.
            rows: Numbers of the rows.
        """
        for row in rows:
            lane, length = int(pending.segments.lanes[row]), int(pending.segments.lengths[row])
            self.bank.append(lane, pending.keys[row, :, :length], pending.values[row, :, :length])

    # What all policies share -------------------------------------------------------------------------------------

    def open(self, segments: Segments) -> MemoryReader:
        """Bring each lane to the start of its segment and return what attention reads from.

        Args:
            segments: Places of the batch's rows.

        Raises:
            MemoryOutOfStep: A segment does not start where its lane's memory ends.
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
            if self.base is not None:
                self.bank.load(int(segments.lanes[row]), self.base)
        return self.reader(segments)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Return which rows' lanes are not where their segment starts, shape (B,), bool; never those at a start."""
        at_start = (self.streams[segments.lanes] == segments.streams) & (
            self.stream_ends[segments.lanes] == segments.starts
        )
        if self._pending is not None:
            pending = self._pending.segments
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
            ends[self._pending.segments.lanes] = self._pending.segments.ends
        return ends[lanes]

    def restart(self, segments: Segments) -> None:
        """Empty the lanes of a batch and let each stream start where its segment does, for replay."""
        self._settle(segments)
        for row, lane in enumerate(segments.lanes):
            self.start_stream(int(lane), int(segments.streams[row]), int(segments.starts[row]))

    def write(self, segments: Segments, keys: Tensor, values: Tensor) -> None:
        """Write a batch's keys and values as soon as its lanes continue.

        Args:
            segments: Places of the rows.
            keys: Keys, shape (B, H_kv, T, d).
            values: Values, shape (B, H_kv, T, d).
        """
        self._settle(segments)
        self._pending = PendingWrite(segments, keys.detach(), values.detach())

    def flush(self) -> None:
        """Write what is held back."""
        self._settle(None)

    def reset(self) -> None:
        """Forget everything."""
        self._pending = None
        for lane in range(len(self.streams)):
            self.start_stream(lane, -1, 0)

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
        """Return what is stored and what is held back, bit by bit: tensors by name, and the rest as JSON types."""
        tensors, counters = self.bank.state()
        places = {
            "bank": counters,
            "streams": self.streams.tolist(),
            "ends": self.stream_ends.tolist(),
            "pending": None,
        }
        if self._pending is not None:
            segments = self._pending.segments
            tensors.update({"pending.keys": self._pending.keys, "pending.values": self._pending.values})
            places["pending"] = {name: np.asarray(getattr(segments, name)).tolist() for name in _PLACES}
        return tensors, places

    def restore(self, tensors: Dict[str, Tensor], places: Dict[str, Any]) -> None:
        """Replace the content by that of another memory.

        Args:
            tensors: Tensors of its :meth:`state`; its bank had this one's sizes and precision.
            places: The rest of its state.
        """
        self.bank.restore(tensors, places["bank"])
        self.streams, self.stream_ends = (np.array(places[name], dtype=np.int64) for name in ("streams", "ends"))
        self._pending = None
        if places["pending"] is not None:
            device = self.bank.keys.device
            keys, values = (tensors[f"pending.{name}"].to(device, copy=True) for name in ("keys", "values"))
            self._pending = PendingWrite(Segments(**places["pending"]), keys, values)

    def _settle(self, coming: Optional[Segments]) -> None:
        """Write what is held back, except for lanes to which the same segment comes again."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        coming_places = set() if coming is None else set(_places(coming))
        rows = [row for row, place in enumerate(_places(pending.segments)) if place not in coming_places]
        if self.writes_batches_whole and len(rows) < len(pending.segments):
            return
        self.store(pending, rows)
        self.stream_ends[pending.segments.lanes[rows]] = pending.segments.ends[rows]


def _places(segments: Segments) -> List[Tuple[int, int, int]]:
    return list(zip(segments.lanes.tolist(), segments.streams.tolist(), segments.starts.tolist()))


class StreamReader(MemoryReader):
    """What one batch reads, each row from its own lane.

    The slots are kept, so that a second call for the same batch (recomputation of activations in the backward pass)
    reads the same chunks without another search.

    Args:
        bank: Bank of the memory.
        chunk_reader: Search and attention.
        segments: Places of the batch's rows.
        keep_reads: Whether a backward pass may come after later batches were written.
    """

    def __init__(self, bank: MemoryBank, chunk_reader: ChunkReader, segments: Segments, keep_reads: bool = False):
        super().__init__()
        self.bank, self.chunk_reader, self.segments, self.keep_reads = bank, chunk_reader, segments, keep_reads
        self.slots: Optional[Tensor] = None  # (B, H, T, n)
        self._held, self._written = bank.held[segments.lanes], bank.written[segments.lanes]
        self._positions = bank.position[segments.lanes]

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        if not self._held.any():
            return torch.zeros_like(q), q.new_zeros(q.size(0), dtype=torch.bool)
        bank, lanes = self.bank, self.segments.lanes
        if self.slots is None:
            self.slots = self.chunk_reader.find(bank, lanes, q)
            self.recall = self.chunk_reader.search.recall
            self.observe(bank, lanes, q, self.slots, scaling)
        rows = _to(q.device, lanes)
        keys, values = tables_to_read(bank, q, self.keep_reads)
        z = self.chunk_reader.attend(keys, values, rows, q, self.slots, scaling)
        return z, None if self._held.all() else _to(q.device, self._held > 0)

    @property
    def retrieved(self) -> Optional[Tensor]:
        if self.slots is None:
            return None
        written, held = (_to(self.slots.device, x) for x in (self._written, self._held))
        return chunk_ages(self.slots, written, held, self.bank.chunks, self.chunk_reader.chunks_per_query)

    @property
    def fill(self) -> float:
        return float(self._held.mean() / self.bank.chunks)

    def distance(self) -> Tuple[Tensor, Tensor]:
        if self.slots is None:
            return super().distance()
        slots, C = self.slots, self.bank.chunk_size
        starts, lengths = (_to(slots.device, x).view(-1, 1, 1, 1) for x in (self._positions, self.segments.lengths))
        t = torch.arange(slots.size(2), device=slots.device).view(1, 1, -1, 1)
        middle = self.bank.chunk_numbers(self.segments.lanes, slots) * C + (C - 1) / 2
        read = (slots >= 0) & (t < lengths)
        return ((starts + t - middle) * read).sum(dtype=torch.float32), read.sum(dtype=torch.float32)


def _to(device: torch.device, x: np.ndarray) -> Tensor:
    return torch.from_numpy(x).to(device, non_blocking=True)


register_memory_policy(MemoryPolicy("document", StreamMemory))
register_memory_policy(MemoryPolicy("stream", StreamMemory, joins_documents=True))

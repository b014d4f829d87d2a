"""The memory of one split: a bank, its search, and which stream each lane is in.

Writes are held back until the next segment of the lane comes. So a batch that is run twice (gradient overflow, out of
memory, a dummy batch) finds the memory as it was the first time, and only tokens that training has gone past are ever
remembered.
"""

from dataclasses import dataclass
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from .bank import MemoryBank
from .search.base import SearchFunction


class MemoryOutOfStep(RuntimeError):
    """A segment does not continue what its lane's memory holds."""


@dataclass
class _Pending:
    segments: Segments
    keys: Tensor  # (B, H, T, d)
    values: Tensor


_PLACES = ("lanes", "streams", "starts", "lengths", "n_lanes")  # of a segment


class Memory:
    """Streams of tokens remembered in a bank.

    For each batch: ``reader = memory.open(segments)``, attention calls ``reader(q, scaling)``, then
    ``memory.write(segments, keys, values)``.

    Args:
        bank: where keys and values lie.
        search: finds chunks in it.
        attention: reads them (see :func:`longmem_fairseq.modules.joint_attention.memory_attention`).
        chunks_per_query: how many chunks each query and head reads, k / chunk_size.
    """

    def __init__(self, bank: MemoryBank, search: SearchFunction, attention, chunks_per_query: int):
        self.bank, self.search, self.attention, self.chunks_per_query = bank, search, attention, chunks_per_query
        self._stream = np.full(bank.lanes, -1, dtype=np.int64)
        self._end = np.zeros(bank.lanes, dtype=np.int64)  # tokens of the stream that the bank was given
        self._pending: Optional[_Pending] = None

    @property
    def lanes(self) -> Optional[int]:
        """Lanes of a batch that it has room for; None for any number."""
        return self.bank.lanes

    def open(self, segments: Segments) -> "MemoryReader":
        """Bring each lane to the start of its segment and return what attention reads from.

        Raises:
            MemoryOutOfStep: where a segment starts elsewhere than its lane's memory ends.
        """
        self._advance(segments)
        return MemoryReader(self, segments)

    def _advance(self, segments: Segments) -> None:
        needs_replay = self.needs_replay(segments)
        if needs_replay.any():
            row = int(np.flatnonzero(needs_replay)[0])
            lane = int(segments.lanes[row])
            raise MemoryOutOfStep(
                f"lane {lane} got token {segments.starts[row]} of stream {segments.streams[row]}, but its memory is at "
                f"token {self._end[lane]} of stream {self._stream[lane]}: segments must come in order"
            )
        self._settle(segments)
        for row in np.flatnonzero(segments.starts == 0):
            self._reset(int(segments.lanes[row]), int(segments.streams[row]), 0)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        """Rows whose lane is not at the segment's start, shape (B,), bool; never those that start a stream."""
        stream, end = self._stream[segments.lanes], self._end[segments.lanes].copy()
        at_start = (stream == segments.streams) & (end == segments.starts)
        if self._pending is not None:
            pending = self._pending.segments
            ends = {(lane, s): e for lane, s, e in zip(pending.lanes, pending.streams, pending.ends)}
            for row, key in enumerate(zip(segments.lanes, segments.streams)):
                at_start[row] |= ends.get(key, -1) == segments.starts[row]
        return (segments.starts > 0) & ~at_start

    def ends(self, lanes: np.ndarray) -> np.ndarray:
        """Tokens of its stream that each lane was given, also those held back, shape of ``lanes``."""
        ends = self._end.copy()
        if self._pending is not None:
            ends[self._pending.segments.lanes] = self._pending.segments.ends
        return ends[lanes]

    def join(self, segments: Segments) -> None:
        """Empty the lanes of these segments and let each stream begin where its segment starts (replay)."""
        self._settle(segments)
        for row, lane in enumerate(segments.lanes):
            self._reset(int(lane), int(segments.streams[row]), int(segments.starts[row]))

    def write(self, segments: Segments, keys: Tensor, values: Tensor) -> None:
        """Remember the segments' keys and values, (B, H, T, d), once the lanes go on."""
        self._settle(segments)
        self._pending = _Pending(segments, keys.detach(), values.detach())

    def flush(self) -> None:
        """Write what is held back."""
        self._settle(None)

    def reset(self) -> None:
        """Forget everything."""
        self._pending = None
        for lane in range(self.bank.lanes):
            self._reset(lane, -1, 0)

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
        """What is remembered and what is held back, bit by bit: tensors by name, and the rest as JSON can hold it."""
        tensors, counters = self.bank.state()
        places = {"bank": counters, "streams": self._stream.tolist(), "ends": self._end.tolist(), "pending": None}
        if self._pending is not None:
            segments = self._pending.segments
            tensors.update({"pending.keys": self._pending.keys, "pending.values": self._pending.values})
            places["pending"] = {name: np.asarray(getattr(segments, name)).tolist() for name in _PLACES}
        return tensors, places

    def restore(self, tensors: Dict[str, Tensor], places: Dict[str, Any]) -> None:
        """Be what another memory was whose :meth:`state` this is; its bank has this one's sizes and precision."""
        self.bank.restore(tensors, places["bank"])
        self._stream, self._end = (np.array(places[name], dtype=np.int64) for name in ("streams", "ends"))
        self._pending = None
        if places["pending"] is not None:
            device = self.bank.keys.device
            keys, values = (tensors[f"pending.{name}"].to(device, copy=True) for name in ("keys", "values"))
            self._pending = _Pending(Segments(**places["pending"]), keys, values)

    def _reset(self, lane: int, stream: int, position: int) -> None:
        self.bank.reset(lane, position)
        self._stream[lane], self._end[lane] = stream, position

    def _settle(self, coming: Optional[Segments]) -> None:
        """Write what is held back, except for lanes to which the same segment comes again."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        again = set()
        if coming is not None:
            again = set(zip(coming.lanes.tolist(), coming.streams.tolist(), coming.starts.tolist()))
        held = pending.segments
        for row, lane in enumerate(held.lanes.tolist()):
            if (lane, int(held.streams[row]), int(held.starts[row])) in again:
                continue
            length = int(held.lengths[row])
            self.bank.append(lane, pending.keys[row, :, :length], pending.values[row, :, :length])
            self._end[lane] = held.ends[row]


def recall_of(search: SearchFunction) -> Optional[Tuple[float, float]]:
    """Of the last search by an approximate index, where it was compared with exact search: chunks found that exact
    search finds too, and chunks looked for; otherwise None."""
    return getattr(search, "recall", None)


class MemoryReader:
    """What one batch reads: called with the queries, it searches and attends.

    The found slots are kept, so that a second call for the same batch (recomputation of activations in the backward
    pass) reads the same chunks without another search.
    """

    def __init__(self, memory: Memory, segments: Segments):
        self.memory, self.segments = memory, segments
        self.slots: Optional[Tensor] = None  # (B, H, T, n)
        self.recall: Optional[Tuple[float, float]] = None  # see recall_of
        held = memory.bank.held[segments.lanes]
        self._held = held
        self._starts = segments.starts

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        """Read for queries (B, H, T, d): (Z of the same shape, which rows have a memory (B,) or None for all)."""
        bank, lanes = self.memory.bank, self.segments.lanes
        if not self._held.any():
            return torch.zeros_like(q), q.new_zeros(q.size(0), dtype=torch.bool)
        if self.slots is None:
            n = min(self.memory.chunks_per_query, int(self._held.max()))
            with torch.no_grad():
                self.slots = self.memory.search(bank, lanes, q.detach(), n)
            self.recall = recall_of(self.memory.search)
        rows = torch.from_numpy(lanes).to(q.device, non_blocking=True)
        z = self.memory.attention(q, bank.keys, bank.values, rows, self.slots, scaling)
        present = None
        if not self._held.all():
            present = torch.from_numpy(self._held > 0).to(q.device, non_blocking=True)
        return z, present

    @property
    def fill(self) -> float:
        """Mean share of the memory in use over the batch's lanes, 0 to 1."""
        return float(self._held.mean() / self.memory.bank.chunks)

    def distance(self) -> Tuple[Tensor, Tensor]:
        """Sum over all reads of the tokens between a query and the chunk it reads, and the number of reads.

        Two float32 scalars on the queries' device; zero where nothing was read.
        """
        if self.slots is None:
            zero = torch.zeros(())
            return zero, zero
        bank, lanes = self.memory.bank, self.segments.lanes
        T = self.slots.size(2)
        starts = torch.from_numpy(self._starts).to(self.slots.device, non_blocking=True).view(-1, 1, 1, 1)
        lengths = torch.from_numpy(self.segments.lengths).to(self.slots.device, non_blocking=True).view(-1, 1, 1, 1)
        t = torch.arange(T, device=self.slots.device).view(1, 1, -1, 1)
        middle = bank.chunk_numbers(lanes, self.slots) * bank.chunk_size + (bank.chunk_size - 1) / 2
        read = (self.slots >= 0) & (t < lengths)
        return ((starts + t - middle) * read).sum(dtype=torch.float32), read.sum(dtype=torch.float32)

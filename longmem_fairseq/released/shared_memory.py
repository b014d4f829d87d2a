"""One memory for all rows of a batch, as the released LongMem keeps it (METHOD: "The released model ... differs").

It knows no documents: whatever any row read is found by every row, until all of them start anew. It exists so that
released checkpoints give the numbers of the code they were made with; :class:`Memory` keeps streams apart.

Legend: B rows of a batch, H heads, T tokens of a segment, d width of a head, C tokens of a chunk, n chunks read.
"""

from typing import Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..memory.stream_memory import Memory, recall_of


class SharedMemory(Memory):
    """A memory of one lane that all rows of a batch read and write.

    The rows of a batch are laid end to end and cut into chunks; tokens left over are dropped. With n new chunks, where
    ``held + n >= capacity``, as many of the oldest chunks leave as twice the batch's tokens make, so that the memory is
    full only where a single batch fills it. A batch in which every row starts a stream empties it.

    What is held depends on how full the memory was when its first batch came: rebuilt from the last batches of a
    stream, it may hold one batch more or less than if it had read them all.

    Arguments as for :class:`Memory`; the bank has one lane.

    Args:
        keep_reads: let a backward pass find what its batch read also after later batches were written, at the price of
            a copy of the bank for each batch; otherwise PyTorch refuses such a backward pass.
    """

    def __init__(self, bank, search, attention, chunks_per_query: int, keep_reads: bool = False):
        if bank.lanes != 1:
            raise ValueError(f"a shared memory lies in one lane, not in {bank.lanes}")
        super().__init__(bank, search, attention, chunks_per_query)
        self.keep_reads = keep_reads

    @property
    def lanes(self) -> None:
        return None

    def open(self, segments: Segments) -> "SharedReader":
        """As :meth:`Memory.open`."""
        self._advance(segments)
        if (segments.starts == 0).all():
            self.bank.reset(0)
        return SharedReader(self, segments)

    def needs_replay(self, segments: Segments) -> np.ndarray:
        self._make_room(segments.lanes)
        return super().needs_replay(segments)

    def ends(self, lanes: np.ndarray) -> np.ndarray:
        self._make_room(lanes)
        return super().ends(lanes)

    def join(self, segments: Segments) -> None:
        self._make_room(segments.lanes)
        super().join(segments)
        self.bank.reset(0)

    def reset(self) -> None:
        super().reset()
        self._stream, self._end = self._stream[:0], self._end[:0]
        self.bank.reset(0)

    def _make_room(self, lanes: np.ndarray) -> None:
        """Let the places of streams be known for these lanes."""
        more = max(0, int(lanes.max(initial=-1)) + 1 - len(self._stream))
        self._stream, self._end = np.pad(self._stream, (0, more), constant_values=-1), np.pad(self._end, (0, more))

    def _reset(self, lane: int, stream: int, position: int) -> None:
        self._stream[lane], self._end[lane] = stream, position

    def _settle(self, coming: Optional[Segments]) -> None:
        """Write the batch that is held back, unless it comes again."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        held = pending.segments
        if coming is not None:
            places = set(zip(coming.lanes.tolist(), coming.streams.tolist(), coming.starts.tolist()))
            if places.intersection(zip(held.lanes.tolist(), held.streams.tolist(), held.starts.tolist())):
                return
        keys, values = (_end_to_end(x, held.lengths) for x in (pending.keys, pending.values))
        tokens, size = keys.size(1), self.bank.chunk_size
        chunks = tokens // size
        if self.bank.held[0] + chunks >= self.bank.chunks:
            self.bank.evict(0, 2 * tokens // size)
        self.bank.append(0, keys[:, : chunks * size], values[:, : chunks * size])
        self._end[held.lanes] = held.ends


class SharedReader:
    """What one batch reads of a shared memory; called as :class:`longmem_fairseq.memory.stream_memory.MemoryReader` is.

    Keys and values are read in the queries' precision, whatever they are held in.
    """

    def __init__(self, memory: SharedMemory, segments: Segments):
        self.memory, self.segments = memory, segments
        self.slots: Optional[Tensor] = None  # (1, H, B * T, n), the rows end to end
        self.recall: Optional[Tuple[float, float]] = None  # see recall_of
        self._held = int(memory.bank.held[0])
        self._oldest = int(memory.bank.written[0]) - self._held

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        """Read for queries (B, H, T, d): (Z of the same shape, which rows have a memory (B,) or None for all)."""
        B, H, T, d = q.shape
        if self._held == 0:
            return torch.zeros_like(q), q.new_zeros(B, dtype=torch.bool)
        bank, lane = self.memory.bank, np.zeros(1, dtype=np.int64)
        rows = q.transpose(0, 1).reshape(1, H, B * T, d)
        if self.slots is None:
            n = min(self.memory.chunks_per_query, self._held)
            with torch.no_grad():
                self.slots = self.memory.search(bank, lane, rows.detach(), n)
            self.recall = recall_of(self.memory.search)
        copy = self.memory.keep_reads and q.requires_grad and torch.is_grad_enabled()
        keys, values = (table.to(q.dtype, copy=copy) for table in (bank.keys, bank.values))
        z = self.memory.attention(rows, keys, values, self.slots.new_zeros(1), self.slots, scaling)
        return z.view(H, B, T, d).transpose(0, 1), None

    @property
    def retrieved(self) -> Optional[Tensor]:
        """Chunks that were read, best first, (B, H, T, K / C), int64: 0 is the oldest chunk held, -1 is none.

        None where the memory was empty.
        """
        if self.slots is None:
            return None
        B, (_, H, _, n) = len(self.segments), self.slots.shape
        age = (self.slots - self._oldest) % self.memory.bank.chunks
        age = age.masked_fill(self.slots < 0, -1).view(H, B, -1, n).transpose(0, 1)  # (B, H, T, n)
        return torch.nn.functional.pad(age, (0, self.memory.chunks_per_query - n), value=-1)

    @property
    def fill(self) -> float:
        """Share of the memory in use, 0 to 1."""
        return self._held / self.memory.bank.chunks

    def distance(self) -> Tuple[Tensor, Tensor]:
        """Sum of the distances of what was read, and their number: none, since the streams' tokens are mixed."""
        return torch.zeros(()), torch.zeros(())


def _end_to_end(x: Tensor, lengths: np.ndarray) -> Tensor:
    """The rows' real tokens one row after the other, (B, H, T, d) -> (H, tokens, d)."""
    return torch.cat([row[:, :length] for row, length in zip(x, lengths.tolist())], dim=1)

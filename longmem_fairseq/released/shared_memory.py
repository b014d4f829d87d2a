"""One memory for all rows of a batch, as the released LongMem keeps it (docs/method.md, "The released model").

It does not separate documents: whatever any row read is found by every row, until all of them start again. It exists so
that released checkpoints give the numbers of the code they were made with;
:class:`longmem_fairseq.memory.stream_memory.StreamMemory` keeps streams apart.

Legend: B rows of a batch, H heads, T tokens of a segment, d width of a head, C tokens of a chunk, n chunks read.
"""

from typing import List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..memory.bank import MemoryBank
from ..memory.policies import MemoryPolicy, register_memory_policy
from ..memory.reader import ChunkReader, MemoryReader, chunk_ages, tables_to_read
from ..memory.stream_memory import StreamMemory, WrittenSegments

_LANE = np.zeros(1, dtype=np.int64)  # the only lane of the bank


class SharedMemory(StreamMemory):
    """A memory of one lane that all rows of a batch read and write (``--memory-scope shared``).

    The rows of a batch are put end to end and cut into chunks; tokens left over are dropped. With n new chunks, where
    ``held + n >= capacity``, as many of the oldest chunks are evicted as twice the batch's tokens make, so that the
    memory is full only where a single batch fills it. A batch in which every row starts a stream empties it.

    What is held depends on how full the memory was when its first batch came: rebuilt from the last batches of a
    stream, it may hold one batch more or less than if it had read them all.

    Args:
        bank: Bank of one lane.
        chunk_reader: Search and attention of the readers.
        keep_reads: Whether a backward pass may come after later batches were written.
    """

    writes_batches_whole = True

    def __init__(self, bank: MemoryBank, chunk_reader: ChunkReader, keep_reads: bool = False):
        if bank.lanes != 1:
            raise ValueError(f"a shared memory needs a bank of one lane, not of {bank.lanes}")
        super().__init__(bank, chunk_reader, keep_reads)

    @property
    def lanes(self) -> None:
        return None

    def open(self, segments: Segments) -> "SharedReader":
        reader = super().open(segments)
        if not (segments.starts == 0).all():
            return reader
        self.bank.reset(0)
        return self.reader(segments, layer=0)

    def reader(self, segments: Segments, layer: int) -> "SharedReader":
        return SharedReader(self.bank, self.chunk_reader, len(segments), self.keep_reads)

    def start_stream(self, lane: int, stream: int, position: int) -> None:
        """Note the stream of a lane; :meth:`open` empties the bank where all rows start one."""
        self.streams[lane], self.stream_ends[lane] = stream, position

    def store(self, segments: Segments, written: WrittenSegments, rows: List[int]) -> None:
        keys, values = (_end_to_end(x, segments.lengths) for x in written)
        tokens, size = keys.size(1), self.bank.chunk_size
        chunks = tokens // size
        if self.bank.held[0] + chunks >= self.bank.chunks:
            self.bank.evict(0, 2 * tokens // size)
        self.bank.append(0, keys[:, : chunks * size], values[:, : chunks * size])

    def needs_replay(self, segments: Segments) -> np.ndarray:
        self._add_lanes(segments.lanes)
        return super().needs_replay(segments)

    def ends(self, lanes: np.ndarray) -> np.ndarray:
        self._add_lanes(lanes)
        return super().ends(lanes)

    def restart(self, segments: Segments) -> None:
        self._add_lanes(segments.lanes)
        super().restart(segments)
        self.bank.reset(0)

    def reset(self) -> None:
        super().reset()
        self.streams, self.stream_ends = self.streams[:0], self.stream_ends[:0]
        self.bank.reset(0)

    def _add_lanes(self, lanes: np.ndarray) -> None:
        """Add the places of streams for lanes that were not used so far."""
        more = max(0, int(lanes.max(initial=-1)) + 1 - len(self.streams))
        self.streams = np.pad(self.streams, (0, more), constant_values=-1)
        self.stream_ends = np.pad(self.stream_ends, (0, more))


class SharedReader(MemoryReader):
    """What one batch reads from a shared memory, all rows end to end.

    Keys and values are read in the queries' precision, whatever they are held in.

    Args:
        bank: Bank of one lane.
        chunk_reader: Search and attention.
        rows: Number of rows of the batch, B.
        keep_reads: Whether a backward pass may come after later batches were written.
    """

    def __init__(self, bank: MemoryBank, chunk_reader: ChunkReader, rows: int, keep_reads: bool = False):
        super().__init__()
        self.bank, self.chunk_reader, self.rows, self.keep_reads = bank, chunk_reader, rows, keep_reads
        self.slots: Optional[Tensor] = None  # (1, H, B * T, n)
        self._held, self._places = bank.held, None

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        B, H, T, d = q.shape
        if self._held[0] == 0:
            return torch.zeros_like(q), q.new_zeros(B, dtype=torch.bool)
        queries = q.transpose(0, 1).reshape(1, H, B * T, d)
        if self.slots is None:
            self._places = self.bank.places(_LANE, q.device)
            self.slots = self.chunk_reader.find(self.bank, _LANE, queries)
            self.recall = self.chunk_reader.search.recall
            self.observe(self.bank, _LANE, queries, self.slots, scaling)
        keys, values = (x.to(q.dtype) for x in tables_to_read(self.bank, q, self.keep_reads))
        z = self.chunk_reader.attend(keys, values, self.slots.new_zeros(1), queries, self.slots, scaling)
        return z.view(H, B, T, d).transpose(0, 1), None

    @property
    def retrieved(self) -> Optional[Tensor]:
        if self.slots is None:
            return None
        _, H, _, n = self.slots.shape
        slots = self.slots.view(H, self.rows, -1, n).transpose(0, 1)  # (B, H, T, n)
        columns = self.chunk_reader.chunks_per_query
        return chunk_ages(slots, self._places.written, self._places.held, self.bank.chunks, columns)

    @property
    def fill(self) -> float:
        return float(self._held[0] / self.bank.chunks)


def _end_to_end(x: Tensor, lengths: np.ndarray) -> Tensor:
    """Return the rows' real tokens one row after the other, (B, H, T, d) -> (H, tokens, d)."""
    return torch.cat([row[:, :length] for row, length in zip(x, lengths.tolist())], dim=1)


register_memory_policy(MemoryPolicy("shared", SharedMemory, joins_documents=True, shares_memory=True, exact_means=True))

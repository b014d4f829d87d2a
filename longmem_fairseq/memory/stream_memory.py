"""The memory of one split: a bank, its search, and the stream that each lane is in.

Legend: B rows of a batch, H_kv key/value heads of all memory layers, T tokens of a segment, d width of a head.
"""

from typing import Any, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..data.segments import Segments
from ..modules.staging import staged
from ..modules.token_mixture import TokenReads
from .bank import MemoryBank
from .lane_streams import LaneStreams
from .layered_reader import join_layers
from .placement import Placement
from .policies import MemoryPolicy, register_memory_policy
from .reader import BatchReader, ChunkReader, MemoryReader, chunk_ages, tables_to_read
from .ring import RingPlaces, chunk_numbers
from .search.base import SearchBackend
from .token_bank import TokenStates
from .token_streams import TokenStreams

_TOKEN_MEMORY = "token_memory."  # prefix of the names of its tensors


class WrittenSegments(NamedTuple):
    """What a batch writes into the memory.

    Attributes:
        keys: Keys, shape (B, H_kv, T, d).
        values: Values, shape (B, H_kv, T, d).
    """

    keys: Tensor
    values: Tensor


class StreamMemory(LaneStreams):
    """Streams of tokens in a bank, one lane each (``--memory-scope document`` and ``stream``).

    For each batch: ``reader = memory.open(segments)``, attention calls ``reader.of_layer(i)(q, scaling)`` for each
    memory layer i, then ``memory.write(segments, keys, values)``.

    A memory policy derives from this class and overrides :meth:`reader`, :meth:`start_stream` and :meth:`store`. The
    token memory, if there is one, has the same streams, whatever a policy does.

    Args:
        bank: Bank that stores keys and values.
        chunk_reader: Search and attention of the readers.
        keep_reads: Whether a backward pass may come after later batches were written.

    Attributes:
        base: Bank of one lane whose content every stream starts with; None for an empty memory.
        token_streams: Token memory of the same streams; None without one.
    """

    def __init__(self, bank: MemoryBank, chunk_reader: ChunkReader, keep_reads: bool = False):
        super().__init__(bank.lanes)
        self.bank, self.chunk_reader, self.keep_reads = bank, chunk_reader, keep_reads
        self.base: Optional[MemoryBank] = None
        self.token_streams: Optional[TokenStreams] = None

    # What a policy may override ----------------------------------------------------------------------------------

    def reader(self, segments: Segments, layer: int) -> MemoryReader:
        """Return what the rows of a batch read from one memory layer; every lane is at the start of its segment."""
        return StreamReader(self.bank, self.chunk_reader, segments, self.keep_reads, layer)

    def start_stream(self, lane: int, stream: int, position: int) -> None:
        super().start_stream(lane, stream, position)
        self.bank.reset(lane, position)

    def store(self, segments: Segments, written: WrittenSegments, rows: List[int]) -> None:
        lengths = np.zeros_like(segments.lengths)
        lengths[rows] = segments.lengths[rows]
        self.bank.append_rows(segments.lanes, written.keys, written.values, lengths)

    # What all policies share -------------------------------------------------------------------------------------

    def open(self, segments: Segments) -> BatchReader:
        """Bring each lane to the start of its segment and return what attention reads from.

        Args:
            segments: Places of the batch's rows.

        Raises:
            MemoryOutOfStep: A segment does not start where its lane's memory ends.
        """
        self.enter(segments)
        if self.token_streams is not None:
            self.token_streams.enter(segments)
        if self.base is not None:
            for row in np.flatnonzero(segments.starts == 0):
                self._load_base(int(segments.lanes[row]))
        return join_layers([self.reader(segments, layer) for layer in range(self.bank.layers)])

    def read_tokens(self, segments: Segments, states: Optional[TokenStates]) -> Optional[TokenReads]:
        """Return what a batch's tokens read from the token memory, once it is open; None without one.

        Args:
            segments: Places of the rows.
            states: Tokens of the batch and their hidden states.
        """
        return None if self.token_streams is None else self.token_streams.read(segments, states)

    def restart(self, segments: Segments) -> None:
        super().restart(segments)
        if self.token_streams is not None:
            self.token_streams.restart(segments)

    def write(self, segments: Segments, keys: Tensor, values: Tensor, states: Optional[TokenStates] = None) -> None:
        """Write a batch's keys and values as soon as its lanes continue.

        Args:
            segments: Places of the rows.
            keys: Keys, shape (B, H_kv, T, d).
            values: Values, shape (B, H_kv, T, d).
            states: Tokens and their hidden states for the token memory; None without one.
        """
        self.hold_back(segments, WrittenSegments(keys.detach(), values.detach()))
        if self.token_streams is not None:
            self.token_streams.hold_back(segments, states)

    def flush(self) -> None:
        super().flush()
        if self.token_streams is not None:
            self.token_streams.flush()

    def reset(self) -> None:
        super().reset()
        if self.token_streams is not None:
            self.token_streams.reset()

    @property
    def nbytes(self) -> int:
        """Number of bytes of the banks."""
        return self.bank.nbytes + (0 if self.token_streams is None else self.token_streams.bank.nbytes)

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, Any]]:
        tensors, counters = self.bank.state()
        if self._pending is not None:
            written = self._pending[1]
            tensors.update({"pending.keys": written.keys, "pending.values": written.values})
        state = {"bank": counters, **self.places()}
        if self.token_streams is not None:
            states, state["token_streams"] = self.token_streams.state()
            tensors.update((_TOKEN_MEMORY + name, x) for name, x in states.items())
        return tensors, state

    def restore(self, tensors: Dict[str, Tensor], places: Dict[str, Any]) -> None:
        self.bank.restore(tensors, places["bank"])
        written = None
        if places["pending"] is not None:
            device = self.bank.keys.device
            written = WrittenSegments(
                *(tensors[f"pending.{name}"].to(device, copy=True) for name in ("keys", "values"))
            )
        self.restore_places(places, written)
        if self.token_streams is not None:
            states = {name[len(_TOKEN_MEMORY) :]: x for name, x in tensors.items() if name.startswith(_TOKEN_MEMORY)}
            self.token_streams.restore(states, places["token_streams"])

    def _load_base(self, lane: int) -> None:
        self.bank.load(lane, self.base)
        if self.token_streams is not None:
            self.token_streams.bank.load(lane, self.base.token_bank)


class StreamReader(MemoryReader):
    """What one batch reads from one memory layer, each row from its own lane.

    The slots are kept, so that a second call for the same batch (recomputation of activations in the backward pass)
    reads the same chunks without another search.

    Args:
        bank: Bank of the memory.
        chunk_reader: Search and attention.
        segments: Places of the batch's rows.
        keep_reads: Whether a backward pass may come after later batches were written.
        layer: Number of the memory layer, counted from 0 among the memory layers.
    """

    def __init__(
        self,
        bank: MemoryBank,
        chunk_reader: ChunkReader,
        segments: Segments,
        keep_reads: bool = False,
        layer: int = 0,
    ):
        super().__init__(layer)
        self.bank, self.lanes = bank.by_layer(), segments.lanes * bank.layers + layer
        self.chunk_reader, self.segments, self.keep_reads = chunk_reader, segments, keep_reads
        self.slots: Optional[Tensor] = None  # (B, H, T, n)
        self._held, self._places = self.bank.held[self.lanes], None

    def places(self, device: torch.device) -> RingPlaces:
        """Return where the rings of the rows' lanes are when the batch is read, for a device."""
        if self._places is None:
            self._places = self.bank.places(self.lanes, device)
        return self._places

    # What a CUDA graph of the step needs -------------------------------------------------------------------------

    def why_not_static(self) -> Optional[str]:
        if self.on_read is not None:
            return "what is read is observed"
        return why_not_static(self.bank.placement, self.chunk_reader.search)

    @property
    def reads(self) -> bool:
        """Whether some row's lane holds a chunk; a graph contains the search or does not."""
        return bool(self._held.any())

    def bind(self, places: RingPlaces) -> None:
        """Read what the lanes hold from tensors at other addresses, and forget what was found."""
        self._places, self.slots = places, None
        self.bank.set_places(self.lanes, places)

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        if not self._held.any():  # on the host: nothing waits for the device
            return torch.zeros_like(q), q.new_zeros(q.size(0), dtype=torch.bool)
        bank, lanes, places = self.bank, self.lanes, self.places(q.device)
        if self.slots is None:
            self.slots = self.chunk_reader.find(bank, lanes, q)
            self.recall = self.chunk_reader.search.recall
            self.observe(bank, lanes, q, self.slots, scaling)
        keys, values = tables_to_read(bank, q, self.keep_reads)
        return self.chunk_reader.attend(keys, values, places.lanes, q, self.slots, scaling), places.held > 0

    @property
    def retrieved(self) -> Optional[Tensor]:
        if self.slots is None:
            return None
        places = self.places(self.slots.device)
        columns = self.chunk_reader.chunks_per_query
        return chunk_ages(self.slots, places.written, places.held, self.bank.chunks, columns)

    @property
    def fill(self) -> float:
        return float(self._held.mean() / self.bank.chunks)

    def distance(self) -> Tuple[Tensor, Tensor]:
        if self.slots is None:
            return super().distance()
        slots, C, places = self.slots, self.bank.chunk_size, self.places(self.slots.device)
        starts, lengths = (x.view(-1, 1, 1, 1) for x in (places.positions, staged(self.segments.lengths, slots.device)))
        t = torch.arange(slots.size(2), device=slots.device).view(1, 1, -1, 1)
        middle = chunk_numbers(places.written, slots, self.bank.chunks) * C + (C - 1) / 2
        read = (slots >= 0) & (t < lengths)
        return ((starts + t - middle) * read).sum(dtype=torch.float32), read.sum(dtype=torch.float32)


def why_not_static(placement: Placement, search: SearchBackend) -> Optional[str]:
    """Return the reason why a CUDA graph cannot contain the reading of a memory, as a clause; None if it can.

    Args:
        placement: Placement of the memory.
        search: Search of the memory.
    """
    if placement.tokens != placement.means:
        return f"the memory is in {placement}"
    return None if search.static else f"the search by {search.name} depends on what the memory holds"


register_memory_policy(MemoryPolicy("document", StreamMemory))
register_memory_policy(MemoryPolicy("stream", StreamMemory, joins_documents=True))

"""The memory bank: keys and values of past tokens, in chunks, per lane and head (docs/method.md, "One step").

Legend: L lanes, H key/value heads of all memory layers, n memory layers, N chunks that a lane holds, C tokens of a
chunk, d width of a head, T tokens of a segment.
"""

import copy
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..modules.staging import staged
from .placement import Placement
from .ring import RingPlaces, SegmentChunks, chunk_numbers, replace_rows
from .token_bank import TokenBank


class MemoryBank:
    """A ring buffer of chunked keys and values for each lane, allocated once.

    Chunk i of a stream (its tokens i*C to i*C + C - 1) is always stored in slot i mod N, so what a lane holds depends
    only on the tokens it was given, not on when writing began. The newest chunk overwrites the oldest, and eviction
    costs nothing. Tokens that do not fill a chunk yet wait in a tail and join the next segment's.

    The bank takes ``L * H * N * (2 * C * d * bytes(dtype) + 4 * d)`` bytes, plus one chunk a lane for the tail.

    Args:
        lanes: Number of lanes, L.
        heads: Number of key/value heads, H: those of all memory layers, the lowest layer's first.
        head_dim: Width of a head, d.
        memory_size: Number of tokens that a lane holds, rounded down to whole chunks: N = memory_size // chunk_size.
        chunk_size: Number of tokens in a chunk, C.
        dtype: Precision of keys and values; the chunk means that are searched are always float32.
        device: Device of the bank, where there is no ``placement``.
        exact_means: Whether keys are averaged before they are rounded to ``dtype``, as the released LongMem does.
            Otherwise the stored keys are averaged, so that it does not matter which chunks a segment's end cut in two.
        placement: Devices and files of the buffers; None for ``device``.
        layers: Number of memory layers, n.

    Attributes:
        keys: Keys, shape (L, H, N, C, d).
        values: Values, shape (L, H, N, C, d).
        means: Mean key of each chunk, shape (L, H, N, d), float32.
        tail: Keys and values of tokens that do not fill a chunk yet, shape (2, L, H, C, d).
        first: Number of the first chunk that each lane was given since its reset, shape (L,), int64.
        written: One past the number of the last chunk of each lane, shape (L,), int64.
        position: Number of tokens of each lane's stream so far, shape (L,), int64.
        resets: Number of resets of each lane, shape (L,), int64: while it stays the same, no chunk changes.
        indices: Indices of the lanes of :meth:`by_layer` that are searched approximately (see
            :class:`longmem_fairseq.memory.search.index.IndexSearch`).
        token_bank: Bank of the token memory of the same text, for a bank of one stream outside training; None without
            one.

    Raises:
        ValueError: The bank has no room for a chunk, or a chunk has no token.
        OSError: The disk has no room for its files.
    """

    def __init__(
        self,
        lanes: int,
        heads: int,
        head_dim: int,
        memory_size: int,
        chunk_size: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device = torch.device("cpu"),
        exact_means: bool = False,
        placement: Optional[Placement] = None,
        layers: int = 1,
    ):
        if chunk_size < 1:
            raise ValueError(f"--chunk-size {chunk_size}: a chunk has at least one token")
        if memory_size < chunk_size:
            raise ValueError(
                f"a memory of {memory_size} tokens has no room for a chunk of {chunk_size}: raise --memory-size, or "
                "lower --chunk-size"
            )
        self.lanes, self.heads, self.head_dim, self.chunk_size = lanes, heads, head_dim, chunk_size
        self.layers = layers
        self.chunks = memory_size // chunk_size
        self.placement = placement = placement or Placement(device, device)
        shape = (lanes, heads, self.chunks, chunk_size, head_dim)
        self.keys = placement.new_tokens(shape, dtype)
        self.values = placement.new_tokens(shape, dtype)
        self.means = placement.new_means((lanes, heads, self.chunks, head_dim))
        tail = torch.float32 if exact_means else dtype
        self.tail = torch.zeros(2, lanes, heads, chunk_size, head_dim, dtype=tail, device=placement.tokens)
        self.first = np.zeros(lanes, dtype=np.int64)
        self.written = np.zeros(lanes, dtype=np.int64)
        self.position = np.zeros(lanes, dtype=np.int64)
        self.resets = np.zeros(lanes, dtype=np.int64)
        self.indices: Dict = {}
        self.token_bank: Optional[TokenBank] = None
        self._places: Optional[Tuple[np.ndarray, RingPlaces]] = None  # and the numbers that were copied

    @property
    def held(self) -> np.ndarray:
        """Number of chunks that each lane holds, shape (L,), int64."""
        return np.minimum(self.written - self.first, self.chunks)

    @property
    def nbytes(self) -> int:
        """Number of bytes of the buffers."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.means, self.tail))

    def by_layer(self) -> "MemoryBank":
        """Return the bank as search and attention read it: memory layer i of lane l is lane l * n + i.

        It shares the buffers, and has counters of its own: it is only read, and before this bank is written again.
        """
        n = self.layers
        if n == 1:
            return self
        bank = object.__new__(MemoryBank)
        vars(bank).update(vars(self), lanes=self.lanes * n, heads=self.heads // n, layers=1)
        for name in ("keys", "values", "means"):
            buffer = getattr(self, name)
            setattr(bank, name, buffer.view(bank.lanes, bank.heads, *buffer.shape[2:]))
        bank.tail = self.tail.view(2, bank.lanes, bank.heads, *self.tail.shape[3:])
        for name in ("first", "written", "position", "resets"):
            setattr(bank, name, np.repeat(getattr(self, name), n))
        return bank

    def reset(self, lane: int, position: int = 0) -> None:
        """Empty a lane.

        Args:
            lane: Number of the lane.
            position: Number of the stream's next token. If that is inside a chunk, the rest of the chunk is left out.
        """
        self.first[lane] = self.written[lane] = -(-position // self.chunk_size)
        self.position[lane] = position
        self.resets[lane] += 1

    def load(self, lane: int, other: "MemoryBank") -> None:
        """Replace the content of a lane by that of a bank of one lane.

        Args:
            lane: Number of the lane.
            other: Bank of the same sizes and precision.
        """
        for name in ("keys", "values", "means"):
            for begin, end in other.spans(0):
                getattr(self, name)[lane, :, begin:end] = getattr(other, name)[0, :, begin:end]
        self.tail[:, lane] = other.tail[:, 0]
        for name in ("first", "written", "position"):
            getattr(self, name)[lane] = getattr(other, name)[0]
        self.resets[lane] += 1

    def evict(self, lane: int, chunks: int) -> None:
        """Evict the oldest chunks of a lane before the bank is full; all of them where it holds fewer.

        Args:
            lane: Number of the lane.
            chunks: Number of chunks to evict.
        """
        oldest = self.written[lane] - self.held[lane]
        self.first[lane] = min(oldest + chunks, self.written[lane])

    def append(self, lane: int, keys: Tensor, values: Tensor) -> None:
        """Write tokens into a lane.

        Args:
            lane: Number of the lane.
            keys: Keys, shape (H, T, d), any floating dtype.
            values: Values, shape (H, T, d), any floating dtype.
        """
        self.append_rows(np.array([lane]), keys[None], values[None], np.array([keys.size(1)]))

    def append_rows(self, lanes: np.ndarray, keys: Tensor, values: Tensor, lengths: np.ndarray) -> None:
        """Write the first tokens of each row of a batch into a lane.

        Args:
            lanes: Lane of each row, none twice, shape (B,), int64.
            keys: Keys, shape (B, H, T, d), any floating dtype.
            values: Values, shape (B, H, T, d), any floating dtype.
            lengths: Number of tokens of each row that are written, at most T, shape (B,), int64.
        """
        T, C = keys.size(2), self.chunk_size
        if not len(lanes) or not T:
            return
        written, position = self.written[lanes], self.position[lanes]
        skipped = np.clip(written * C - position, 0, lengths)
        waiting = np.maximum(0, position - written * C)
        total = waiting + lengths - skipped
        plan = staged(np.stack([lanes, written, waiting, skipped, total]), self.tail.device)
        chunks = SegmentChunks(plan, T, C, self.chunks)
        whole = bool((total // C >= min(-(-T // C), self.chunks)).all())
        tails = self.tail.index_select(1, chunks.lanes)  # (2, B, H, C, d)
        tokens = [torch.cat([tail, x.to(tail)], dim=2) for tail, x in zip(tails, (keys, values))]
        new, rows = [chunks.take(x) for x in tokens], chunks.rows(self.heads)
        means = new[0].float().mean(dim=3)  # (B, H, J, d)
        for buffer, x in zip((self.keys, self.values, self.means), (*new, means)):
            replace_rows(buffer, rows, x, chunks.present, whole)
        if (total % C).any():
            rests = [chunks.take_rest(x, tail) for x, tail in zip(tokens, tails)]
            self.tail.index_copy_(1, chunks.lanes, torch.stack(rests))
        self.position[lanes] += lengths
        self.written[lanes] += total // C

    def places(self, lanes: np.ndarray, device: torch.device) -> RingPlaces:
        """Return where the rings of some lanes are, for the device: copied once, however often a batch asks.

        Args:
            lanes: Lane of each row, shape (B,), int64.
            device: Device of the copy.
        """
        values = self._place_values(lanes)
        known, places = self._places or (None, None)
        if places is None or places.packed.device != device or not np.array_equal(known, values):
            self._places = values, RingPlaces(staged(values, device))
        return self._places[1]

    def set_places(self, lanes: np.ndarray, places: RingPlaces) -> None:
        """Let :meth:`places` return other tensors with the same numbers, at addresses that a CUDA graph reads."""
        self._places = self._place_values(lanes), places

    def _place_values(self, lanes: np.ndarray) -> np.ndarray:
        return np.stack([lanes, self.held[lanes], self.written[lanes], self.position[lanes]])

    def contents(self, lane: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Return a copy of the n chunks of a lane, oldest first.

        Args:
            lane: Number of the lane.

        Returns:
            Keys and values (H, n, C, d), and mean keys (H, n, d).
        """
        oldest, newest = int(self.written[lane] - self.held[lane]), int(self.written[lane])
        slots = torch.arange(oldest, newest) % self.chunks
        return tuple(x[lane][:, slots.to(x.device)] for x in (self.keys, self.values, self.means))

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, List[int]]]:
        """Return all that the bank holds, bit by bit: tensors by name, without those of empty lanes, and counters."""
        tensors = {"tail": self.tail}
        for lane in np.flatnonzero(self.held).tolist():
            tensors.update((f"{name}.{lane}", x) for name, x in zip(("keys", "values", "means"), self.contents(lane)))
        return tensors, {name: getattr(self, name).tolist() for name in ("first", "written", "position")}

    def restore(self, tensors: Dict[str, Tensor], counters: Dict[str, List[int]]) -> None:
        """Replace the content by that of another bank.

        Args:
            tensors: Tensors of its :meth:`state`; it had the same sizes and precision, on any device.
            counters: Counters of its state.
        """
        self.tail.copy_(tensors["tail"])
        for name, values in counters.items():
            getattr(self, name)[:] = values
        self.resets += 1
        for lane in np.flatnonzero(self.held).tolist():
            oldest, newest = int(self.written[lane] - self.held[lane]), int(self.written[lane])
            slots = torch.arange(oldest, newest) % self.chunks
            for name in ("keys", "values", "means"):
                buffer = getattr(self, name)
                buffer[lane][:, slots.to(buffer.device)] = tensors[f"{name}.{lane}"].to(buffer.device)

    def __deepcopy__(self, memo) -> "MemoryBank":
        """Return a bank that holds the same, placed in the same way; only slots that hold chunks are copied."""
        other = MemoryBank(
            self.lanes,
            self.heads,
            self.head_dim,
            self.chunks * self.chunk_size,
            self.chunk_size,
            self.keys.dtype,
            exact_means=self.tail.dtype != self.keys.dtype,
            placement=self.placement,
            layers=self.layers,
        )
        other.tail = self.tail.clone()
        for name in ("first", "written", "position", "resets"):
            setattr(other, name, getattr(self, name).copy())
        for lane in range(self.lanes):
            for begin, end in self.spans(lane):
                for name in ("keys", "values", "means"):
                    getattr(other, name)[lane, :, begin:end] = getattr(self, name)[lane, :, begin:end]
        other.indices = copy.deepcopy(self.indices, memo)
        other.token_bank = copy.deepcopy(self.token_bank, memo)
        return other

    def __reduce__(self):
        """Pickle what the bank holds, without its indices and empty slots."""
        sizes = (self.lanes, self.heads, self.head_dim, self.chunks * self.chunk_size, self.chunk_size)
        exact_means = self.tail.dtype != self.keys.dtype
        state = self.state()
        return _restored, (sizes, self.keys.dtype, exact_means, self.placement, self.layers, *state, self.token_bank)

    def tokens(self, lane: int, dtype: Optional[torch.dtype] = None) -> Tuple[Tensor, Tensor]:
        """Return a copy of all tokens of a lane, oldest first, those that do not fill a chunk yet included.

        Args:
            lane: Number of the lane.
            dtype: Precision of the copy; None for the bank's.

        Returns:
            Keys and values, shape (H, tokens, d).
        """
        C, held = self.chunk_size, int(self.held[lane])
        waiting = max(0, int(self.position[lane]) - int(self.written[lane]) * C)
        begin = (int(self.written[lane]) - held) % self.chunks
        first = min(held, self.chunks - begin)  # chunks before the ring closes
        copies = []
        for buffer, tail in zip((self.keys, self.values), self.tail):
            x = buffer.new_empty(self.heads, held * C + waiting, self.head_dim, dtype=dtype or buffer.dtype)
            x[:, : first * C].copy_(buffer[lane, :, begin : begin + first].flatten(1, 2))
            x[:, first * C : held * C].copy_(buffer[lane, :, : held - first].flatten(1, 2))
            x[:, held * C :].copy_(tail[lane, :, :waiting])
            copies.append(x)
        return tuple(copies)

    def spans(self, lane: int) -> Tuple[Tuple[int, int], ...]:
        """Return the slots of a lane that hold chunks, as one or two (begin, end) ranges; () for an empty lane."""
        held = int(self.held[lane])
        if held in (0, self.chunks):
            return ((0, held),) if held else ()
        begin = int(self.written[lane] - held) % self.chunks
        if begin + held <= self.chunks:
            return ((begin, begin + held),)
        return ((0, begin + held - self.chunks), (begin, self.chunks))

    def chunk_numbers(self, lanes: np.ndarray, slots: Tensor) -> Tensor:
        """Return the number of the chunk in each slot, counted from its stream's start.

        Args:
            lanes: Lane of each row, shape (B,), int64.
            slots: Slots, shape (B, ...), int64.
        """
        return chunk_numbers(staged(self.written[lanes], slots.device), slots, self.chunks)


def _restored(sizes, dtype, exact_means, placement, layers, tensors, counters, token_bank) -> MemoryBank:
    """Return a bank that was pickled."""
    bank = MemoryBank(*sizes, dtype, exact_means=exact_means, placement=placement, layers=layers)
    bank.restore(tensors, counters)
    bank.token_bank = token_bank
    return bank

"""The memory bank: keys and values of past tokens, in chunks, per lane and head (METHOD: "One step", 3 and 5).

Legend: L lanes, H heads, N chunks that a lane holds, C tokens of a chunk, d width of a head, T tokens of a segment.
"""

import copy
from typing import Dict, List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from .placement import Placement


class MemoryBank:
    """A ring buffer of chunked keys and values for each lane, allocated once.

    Chunk i of a stream (its tokens i*C to i*C + C - 1) always lies in slot i mod N, so what a lane holds depends only
    on the tokens it was given, not on when writing began; the newest chunk overwrites the oldest, and eviction costs
    nothing. Tokens that do not fill a chunk yet wait in a tail and join the next segment's.

    It holds ``L * H * N * (2 * C * d * bytes(dtype) + 4 * d)`` bytes, plus one chunk a lane for the tail.

    Args:
        lanes: L.
        heads: H.
        head_dim: d.
        memory_size: tokens that a lane holds; rounded down to whole chunks, N = memory_size // chunk_size.
        chunk_size: C.
        dtype: of keys and values; the chunk means that are searched are always float32.
        device: where the bank lies, if ``placement`` does not say it.
        exact_means: average keys before they are rounded to ``dtype``, as the released LongMem does; otherwise what is
            held decides, so that it does not matter which chunks a segment's end cut in two.
        placement: where keys and values, and where the chunk means lie.

    Attributes:
        keys, values: shape (L, H, N, C, d).
        means: mean key of each chunk, shape (L, H, N, d), float32.
        first, written: number of the first chunk a lane was given since its reset, and one past the last, shape (L,).
        resets: how often each lane began anew, shape (L,): as long as it stays the same, a chunk is what it was.
        indices: of lanes that are searched by an index (see :class:`longmem_fairseq.memory.search.index.IndexSearch`).

    Raises:
        ValueError: it would hold no chunk.
        OSError: there is no room for its files.
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
    ):
        if chunk_size < 1 or memory_size < chunk_size:
            raise ValueError(
                f"a memory of {memory_size} tokens holds no chunk of {chunk_size}: raise --memory-size or lower "
                "--chunk-size"
            )
        self.lanes, self.heads, self.head_dim, self.chunk_size = lanes, heads, head_dim, chunk_size
        self.chunks = memory_size // chunk_size
        self.placement = placement = placement or Placement(device, device)
        shape = (lanes, heads, self.chunks, chunk_size, head_dim)
        self.keys = placement.new_tokens(shape, dtype)
        self.values = placement.new_tokens(shape, dtype)
        self.means = placement.new_means((lanes, heads, self.chunks, head_dim))
        tail = torch.float32 if exact_means else dtype
        self._tail = torch.zeros(2, lanes, heads, chunk_size, head_dim, dtype=tail, device=placement.tokens)
        self.first = np.zeros(lanes, dtype=np.int64)
        self.written = np.zeros(lanes, dtype=np.int64)
        self.position = np.zeros(lanes, dtype=np.int64)  # tokens of the stream that were given or skipped
        self.resets = np.zeros(lanes, dtype=np.int64)
        self.indices: Dict = {}

    @property
    def held(self) -> np.ndarray:
        """Chunks that each lane holds, shape (L,)."""
        return np.minimum(self.written - self.first, self.chunks)

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values, self.means, self._tail))

    def reset(self, lane: int, position: int = 0) -> None:
        """Forget all of a lane, whose next token is number ``position`` of its stream.

        Where a stream is joined amid a chunk, the rest of that chunk is left out.
        """
        self.first[lane] = self.written[lane] = -(-position // self.chunk_size)
        self.position[lane] = position
        self.resets[lane] += 1

    def evict(self, lane: int, chunks: int) -> None:
        """Let the oldest chunks of a lane go before they must; all of them where it holds fewer."""
        oldest = self.written[lane] - self.held[lane]
        self.first[lane] = min(oldest + chunks, self.written[lane])

    def append(self, lane: int, keys: Tensor, values: Tensor) -> None:
        """Add tokens to a lane: keys and values of shape (H, T, d), any floating dtype."""
        C, N, T = self.chunk_size, self.chunks, keys.size(1)
        skip = min(T, max(0, int(self.written[lane]) * C - int(self.position[lane])))
        waiting = max(0, int(self.position[lane]) - int(self.written[lane]) * C)
        self.position[lane] += T
        new = torch.stack([keys[:, skip:], values[:, skip:]]).to(self._tail)  # (2, H, T, d)
        if waiting:
            new = torch.cat([self._tail[:, lane, :, :waiting], new], dim=2)
        chunks, rest = divmod(new.size(2), C)
        if rest:
            self._tail[:, lane, :, :rest] = new[:, :, chunks * C :]
        if not chunks:
            return
        kept = min(chunks, N)  # of a segment longer than the memory only the end can stay
        begin = int(self.written[lane]) + chunks - kept
        new = new[:, :, (chunks - kept) * C : chunks * C].reshape(2, self.heads, kept, C, self.head_dim)
        means = new[0].float().mean(dim=2)  # (H, kept, d)
        slot, done = begin % N, 0
        while done < kept:  # once, or twice where the ring closes
            n = min(kept - done, N - slot)
            self.keys[lane, :, slot : slot + n] = new[0, :, done : done + n]
            self.values[lane, :, slot : slot + n] = new[1, :, done : done + n]
            self.means[lane, :, slot : slot + n] = means[:, done : done + n]
            slot, done = 0, done + n
        self.written[lane] += chunks

    def contents(self, lane: int) -> Tuple[Tensor, Tensor, Tensor]:
        """A copy of what a lane holds, oldest chunk first: keys and values (H, n, C, d), mean keys (H, n, d)."""
        oldest, newest = int(self.written[lane] - self.held[lane]), int(self.written[lane])
        slots = torch.arange(oldest, newest) % self.chunks
        return tuple(x[lane][:, slots.to(x.device)] for x in (self.keys, self.values, self.means))

    def state(self) -> Tuple[Dict[str, Tensor], Dict[str, List[int]]]:
        """All that the bank holds, bit by bit: tensors by name, those of empty lanes left out, and counters (L,)."""
        tensors = {"tail": self._tail}
        for lane in np.flatnonzero(self.held).tolist():
            tensors.update((f"{name}.{lane}", x) for name, x in zip(("keys", "values", "means"), self.contents(lane)))
        return tensors, {name: getattr(self, name).tolist() for name in ("first", "written", "position")}

    def restore(self, tensors: Dict[str, Tensor], counters: Dict[str, List[int]]) -> None:
        """Hold what :meth:`state` gave of a bank of the same sizes and precision, on any device."""
        self._tail.copy_(tensors["tail"])
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
        """A bank that holds the same, placed in the same way; what was overwritten or never written is not copied."""
        other = MemoryBank(
            self.lanes,
            self.heads,
            self.head_dim,
            self.chunks * self.chunk_size,
            self.chunk_size,
            self.keys.dtype,
            exact_means=self._tail.dtype != self.keys.dtype,
            placement=self.placement,
        )
        other._tail = self._tail.clone()
        for name in ("first", "written", "position", "resets"):
            setattr(other, name, getattr(self, name).copy())
        for lane in range(self.lanes):
            for begin, end in self.spans(lane):
                for name in ("keys", "values", "means"):
                    getattr(other, name)[lane, :, begin:end] = getattr(self, name)[lane, :, begin:end]
        other.indices = copy.deepcopy(self.indices, memo)
        return other

    def tokens(self, lane: int, dtype: Optional[torch.dtype] = None) -> Tuple[Tensor, Tensor]:
        """A copy of all that a lane was given and still has, oldest token first: keys and values (H, tokens, d).

        It ends with the tokens that do not fill a chunk yet, and so with the lane's last one. By default it has the
        bank's precision.
        """
        C, held = self.chunk_size, int(self.held[lane])
        waiting = max(0, int(self.position[lane]) - int(self.written[lane]) * C)
        begin = (int(self.written[lane]) - held) % self.chunks
        first = min(held, self.chunks - begin)  # chunks before the ring closes
        found = []
        for buffer, tail in zip((self.keys, self.values), self._tail):
            x = buffer.new_empty(self.heads, held * C + waiting, self.head_dim, dtype=dtype or buffer.dtype)
            x[:, : first * C].copy_(buffer[lane, :, begin : begin + first].flatten(1, 2))
            x[:, first * C : held * C].copy_(buffer[lane, :, : held - first].flatten(1, 2))
            x[:, held * C :].copy_(tail[lane, :, :waiting])
            found.append(x)
        return tuple(found)

    def spans(self, lane: int) -> Tuple[Tuple[int, int], ...]:
        """Slots that hold chunks, as one or two (begin, end) ranges; none where the lane is empty."""
        held = int(self.held[lane])
        if held in (0, self.chunks):
            return ((0, held),) if held else ()
        begin = int(self.written[lane] - held) % self.chunks
        if begin + held <= self.chunks:
            return ((begin, begin + held),)
        return ((0, begin + held - self.chunks), (begin, self.chunks))

    def chunk_numbers(self, lanes: np.ndarray, slots: Tensor) -> Tensor:
        """The chunk (counted from its stream's start) that lies in each slot; slots (B, ...) of lanes (B,)."""
        newest = torch.from_numpy(self.written[lanes] - 1).to(slots.device, non_blocking=True)
        newest = newest.view(-1, *([1] * (slots.dim() - 1)))
        return newest - (newest - slots) % self.chunks

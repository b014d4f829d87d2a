"""Exact search on CUDA by Triton kernels (``triton_kernels.py``): the bank is read in place, and no score is written.

Legend: B rows of a batch, H KV heads, T queries of a KV head, d width of a head, N slots of the bank, n chunks to find,
P = B * H pairs of a row and a head, G slots of a block, S blocks of a span.
"""

import itertools
import math
import os
from typing import Iterator, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ...modules.triton_support import missing_triton
from ..bank import MemoryBank
from .base import SearchBackend, register_search

# Bytes of the bounds that are kept at a time: one number for each query and block.
_BYTES = 1 << 29
# Slots of a block. A query reads the keys of somewhat more than n blocks, and one bound of every block: of large lanes,
# the bounds take longer.
_BLOCK, _LARGE_BLOCK, _LARGE_LANE = 8, 16, 1 << 16
_SPAN = 64  # blocks of a span
_WIDEST = 128  # columns that are multiplied at once
_LARGE = 160 * 1024  # bytes of shared memory from which on tiles are large (A100, H100)


@register_search("triton")
class TritonSearch(SearchBackend):
    """Exact search by fused kernels; see :class:`SearchBackend`.

    Scores are those of float32. Of two chunks with equal scores, that with the lower slot comes first; if more chunks
    share the lowest score than there are places left, any of them may be found.
    """

    static = True

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        if device.type != "cuda":
            return f"it searches the memory of a GPU, but the memory is on {device}"
        return missing_triton()

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        places = bank.places(lanes, bank.means.device)
        oldest = (places.written - places.held) % bank.chunks
        return search_ring(bank.means, places.lanes, oldest, places.held, queries.detach(), n)


def search_ring(means: Tensor, lanes: Tensor, begins: Tensor, held: Tensor, queries: Tensor, n: int) -> Tensor:
    """Find the best chunks of ring buffers. Nothing is read back by the host.

    Args:
        means: Mean keys, shape (L, H, N, d), float32, contiguous.
        lanes: Lane of each row, shape (B,), int64.
        begins: Slot of the oldest chunk that each row's lane holds, shape (B,), int64.
        held: Number of chunks that each row's lane holds, shape (B,), int64; they follow each other, and slot 0 follows
            the last slot.
        queries: Queries, shape (B, H, T, d), any floating dtype.
        n: Number of chunks to find.

    Returns:
        Slots, best first, shape (B, H, T, n), int64; -1 where a lane holds fewer chunks.
    """
    B, H, T, d = queries.shape
    slots = torch.empty(B, H, T, n, dtype=torch.int64, device=queries.device)
    if slots.numel():
        with torch.cuda.device_of(queries):  # Triton launches on the current device
            _Launch(means, (lanes, begins, held), queries, slots).run()
    return slots


class _Launch:
    """One search: sizes that its kernels share, and their launches.

    Args:
        means: Mean keys, shape (L, H, N, d).
        ring: Lane of each row, its first slot that holds a chunk and the number of slots that do, each of shape (B,).
        queries: Queries, shape (B, H, T, d).
        slots: Slots that are found, shape (B, H, T, n), which are written.
    """

    def __init__(self, means: Tensor, ring: Tuple[Tensor, Tensor, Tensor], queries: Tensor, slots: Tensor):
        import triton  # Triton is optional, here and below

        B, self.H, self.T, d = queries.shape
        self.P, self.N, self.n = B * self.H, means.size(2), slots.size(3)
        self.keys, self.slots = (means, *ring), slots
        self.queries = queries if queries.stride(-1) == 1 else queries.contiguous()
        self.G = _BLOCK if self.N <= _LARGE_LANE else _LARGE_BLOCK
        self.blocks, self.spans = triton.cdiv(self.N, self.G), triton.cdiv(self.N, self.G * _SPAN)
        self.width = {"d": d, "D": max(16, triton.next_power_of_2(d))}
        self.emulated = os.environ.get("TRITON_INTERPRET") == "1"

    def run(self) -> None:
        """Launch the kernels."""
        scaled, reaches = self._scale_queries()
        lengths = self._measure_keys()
        # The first pair and the number of pairs, the first query and the number of queries of a part.
        for part in _parts(self.P, self.T, self.blocks):
            rows = part[1] * part[3]
            bounds, tops = self._new(rows, self.blocks), self._new(rows, self.spans)
            self._bound_blocks(part, scaled, reaches, lengths, bounds, tops)
            self._select_chunks(part, scaled, bounds, tops)

    def _new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.queries.device)

    def _scale_queries(self) -> Tuple[Tensor, Tensor]:
        """Return scaled queries (P * T, d), and what times the length of a key bounds its product's error, (P * T,)."""
        import triton

        from .triton_kernels import scale_queries

        d, rows, total = self.width["d"], max(1, 2048 // self.width["D"]), self.P * self.T
        scaled, reaches = self._new(total, d), self._new(total)
        sizes = *self.queries.stride()[:3], self.H, self.T, total
        shrink = 2.0 ** -(4 + math.ceil(math.log2(d)))
        scale_queries[(triton.cdiv(total, rows),)](
            self.queries, scaled, reaches, *sizes, _error(d), **self.width, SHRINK=shrink, ROWS=rows
        )
        return scaled, reaches

    def _measure_keys(self) -> Tensor:
        """Return the largest root mean square of the keys of each block, shape (P, blocks)."""
        import triton

        from .triton_kernels import measure_keys

        rows, lengths = max(self.G, 4096 // self.width["D"]), self._new(self.P, self.blocks)
        measure_keys[(triton.cdiv(self.N, rows), self.P)](
            *self.keys, lengths, self.H, self.N, **self.width, G=self.G, ROWS=rows
        )
        return lengths

    def _bound_blocks(
        self, part: Tuple[int, ...], scaled: Tensor, reaches: Tensor, lengths: Tensor, bounds: Tensor, tops: Tensor
    ) -> None:
        import triton

        from .triton_kernels import bound_blocks

        first, pairs, begin, count = part
        narrow = self.width["D"] <= _WIDEST
        block_t, block_n = _tiles(count, min(self.width["D"], _WIDEST), scaled.device)
        bound_blocks[(triton.cdiv(count, block_t), self.spans, pairs)](
            *(scaled, reaches, *self.keys, lengths, bounds, tops),
            *(first, self.H, self.T, begin, count, self.N),
            **self.width,
            D_STEP=min(self.width["D"], _WIDEST),
            G=self.G,
            S=_SPAN,
            BLOCK_T=block_t,
            BLOCK_N=block_n,
            EMULATED=self.emulated,
            num_warps=8 if block_t == 128 else 4,
            num_stages=2 if narrow else 1,
            maxnreg=128 if narrow else None,  # so that a multiprocessor runs two programs at a time
        )

    def _select_chunks(self, part: Tuple[int, ...], scaled: Tensor, bounds: Tensor, tops: Tensor) -> None:
        import triton

        from .triton_kernels import select_chunks

        first, pairs, begin, count = part
        together = 256 if self.emulated else 1  # the interpreter takes as long for one query as for many
        select_chunks[(triton.cdiv(pairs * count, together),)](
            *(scaled, *self.keys, bounds, tops, self.slots),
            *(first, self.H, self.T, begin, count, pairs * count, self.N, self.n),
            **self.width,
            G=self.G,
            S=_SPAN,
            SP=triton.next_power_of_2(self.spans),
            NP=triton.next_power_of_2(self.n),
            ROWS=together,
            num_warps=1,
        )


def _error(d: int) -> float:
    """Return the error of a product in units of |q| * |k|, at most: of TF32, and of sums in float32."""
    return 1.01 * 2.0**-9 + (d + 16) * 2.0**-21


def _tiles(T: int, width: int, device: torch.device) -> Tuple[int, int]:
    """Return the numbers of queries and of slots that are multiplied at once, as far as shared memory suffices."""
    large = device.type != "cuda" or torch.cuda.get_device_properties(device).shared_memory_per_block_optin >= _LARGE
    block_t, block_n = (128, min(128, 8192 // width)) if large else (64, min(64, 4096 // width))
    while block_t > 16 and block_t >= 2 * T:
        block_t //= 2
    return block_t, block_n


def _parts(P: int, T: int, blocks: int) -> Iterator[Tuple[int, int, int, int]]:
    """Yield parts that are searched at once: first pair, number of pairs, first query, number of queries."""
    queries = max(1, _BYTES // (4 * blocks))
    pairs, count = max(1, min(P, queries // T)), min(T, queries)
    for first, begin in itertools.product(range(0, P, pairs), range(0, T, count)):
        yield first, min(pairs, P - first), begin, min(count, T - begin)

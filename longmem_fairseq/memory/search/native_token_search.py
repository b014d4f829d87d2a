"""Exact search of token memories on the CPU by the compiled kernel (native_tokens.cpp).

Legend: B rows of a batch, T queries of a row, D width of a hidden state, n entries to find.
"""

import itertools
from typing import Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .kernel import Kernel, KernelUnavailable, in_threads
from .token_search import Table, TokenSearch

# A row with fewer queries is shared among threads by its entries.
FEWEST_QUERIES = 32
WIDEST = 8192
_FEWEST_ENTRIES = 1024  # of a thread
_TOGETHER = 64  # entries whose integers are stored together, at most

# Integers of a row's entries (entries, D), and their scales (2, entries).
Buffers = Tuple[Optional[Tensor], Optional[Tensor]]


class NativeTokenSearch(TokenSearch):
    """Exact search by the compiled kernel, over PyTorch's number of threads; see :class:`.TokenSearch`.

    Entries are returned in the order of the table; of equal ones the oldest are found.

    Args:
        instructions: Set of processor instructions to use, see :class:`.Kernel`; None for the fastest.
            Results are the same but for the rounding of sums.
    """

    name = "native"

    def __init__(self, instructions: Optional[str] = None):
        self.instructions = instructions
        self._buffers: Buffers = (None, None)

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, width: int) -> Optional[str]:
        if device.type != "cpu":
            return f"it searches main memory, but the token memory is on {device}"
        if dtype != torch.float16:
            return f"it searches numbers in float16, but the token memory holds {str(dtype).split('.')[-1]}"
        if width > WIDEST:
            return f"it searches hidden states of width {WIDEST:,} or less, and this is {width:,}"
        try:
            Kernel()
        except KernelUnavailable as error:
            return str(error)
        return None

    def __call__(self, tables: Sequence[Table], queries: Tensor, n: int, causal: bool) -> Tuple[Tensor, Tensor]:
        kernel, (B, T, _) = Kernel(self.instructions), queries.shape
        queries = queries.contiguous()
        rows = [_Entries(kernel, table) for table in tables]
        scores, numbers = queries.new_empty(B, T, n), queries.new_empty(B, T, n, dtype=torch.int64)
        threads = torch.get_num_threads()
        shares = -(-threads // max(1, B))  # of each row
        if T < FEWEST_QUERIES and shares > 1 and not causal:
            return _search_in_parts(rows, queries, n, shares)

        def search(piece: Tuple[int, slice]) -> None:
            row, part = piece
            entries = rows[row]
            readable = np.full(T, entries.count) - (T - np.arange(T) if causal else 0)
            entries.search(queries[row, part], readable[part], scores[row, part], numbers[row, part])

        if shares == 1:
            in_threads(search, ((row, slice(0, T)) for row in range(B)))
            return scores, numbers
        step = max(FEWEST_QUERIES, -(-T // shares))
        for row, entries in enumerate(rows):
            if step < T and entries.count > 2 * n:
                self._buffers = entries.quantize(self._buffers, threads)
            in_threads(search, [(row, slice(begin, begin + step)) for begin in range(0, T, step)])
        return scores, numbers


class _Entries:
    """The entries of one row.

    Args:
        kernel: Kernel that searches them.
        table: Their hidden states.

    Attributes:
        count: Number of entries.
    """

    def __init__(self, kernel: Kernel, table: Table):
        self.kernel, self.pieces = kernel, [piece.contiguous() for piece in table]
        self.count = sum(map(len, self.pieces))
        self._pointers = np.array([piece.data_ptr() for piece in self.pieces])
        self._sizes = np.array([len(piece) for piece in self.pieces])
        self._quantized: Buffers = (None, None)

    def quantize(self, buffers: Buffers, threads: int) -> Buffers:
        """Convert all entries to integers, in several threads, before others search them.

        Args:
            buffers: Buffers of an earlier search, which are used again where they are large enough.
            threads: Number of threads.

        Returns:
            The buffers that now hold the integers.
        """
        width = self.pieces[0].size(1)
        rows = -(-self.count // _TOGETHER) * _TOGETHER
        integers, scales = buffers
        if integers is None or integers.size(0) < rows or integers.size(1) != -(-width // 16) * 16:
            integers = torch.empty(rows, -(-width // 16) * 16, dtype=torch.uint8)
            scales = torch.empty(2, rows)
        self._quantized = integers, scales
        step = -(-rows // threads // _TOGETHER) * _TOGETHER

        def quantize(begin: int) -> None:
            end = min(begin + step, self.count)
            self.kernel.quantize_tokens(*self._table(width), begin, end, *self._arrays())

        in_threads(quantize, range(0, self.count, step))
        return self._quantized

    def search(self, queries: Tensor, readable: np.ndarray, scores: Tensor, numbers: Tensor) -> None:
        """Search the first entries, ``readable`` for each query; write what is found."""
        readable = np.ascontiguousarray(readable)
        self.kernel.search_tokens(
            queries.data_ptr(),
            len(queries),
            *self._table(queries.size(1)),
            readable.ctypes.data,
            scores.size(1),
            *self._arrays(),
            scores.data_ptr(),
            numbers.data_ptr(),
        )

    def part(self, begin: int, end: int) -> "_Entries":
        """Return the entries ``begin`` to ``end - 1``."""
        pieces, first = [], 0
        for piece in self.pieces:
            pieces.append(piece[max(0, begin - first) : max(0, end - first)])
            first += len(piece)
        return _Entries(self.kernel, pieces)

    def _table(self, width: int) -> Tuple[int, int, int, int]:
        return self._pointers.ctypes.data, self._sizes.ctypes.data, len(self.pieces), width

    def _arrays(self) -> Tuple[int, int, int]:
        integers, scales = self._quantized
        return (0, 0, 0) if integers is None else (integers.data_ptr(), scales.data_ptr(), scales.size(1))


def _search_in_parts(rows: Sequence[_Entries], queries: Tensor, n: int, shares: int) -> Tuple[Tensor, Tensor]:
    """Search the entries of each row in several parts, one a thread, for all its queries (B, T, D)."""
    B, T, _ = queries.shape
    scores = queries.new_full((B, T, shares, n), float("-inf"))
    numbers = scores.new_full(scores.shape, -1, dtype=torch.int64)

    def search(piece: Tuple[int, int]) -> None:
        row, share = piece
        step = max(_FEWEST_ENTRIES, -(-rows[row].count // shares))
        part = rows[row].part(share * step, (share + 1) * step)
        best, places = queries.new_empty(T, n), queries.new_empty(T, n, dtype=torch.int64)
        part.search(queries[row], np.full(T, part.count), best, places)
        scores[row, :, share] = best
        numbers[row, :, share] = torch.where(places < 0, places, places + share * step)

    in_threads(search, itertools.product(range(B), range(shares)))
    # A stable order, so that of equal entries the oldest are found.
    best = scores.flatten(2).sort(dim=2, descending=True, stable=True).indices[:, :, :n].sort(dim=2).values
    return scores.flatten(2).gather(2, best), numbers.flatten(2).gather(2, best)

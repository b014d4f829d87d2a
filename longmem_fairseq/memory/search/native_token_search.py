"""Exact search of token memories on the CPU by the compiled kernel (native_tokens.cpp).

Legend: B rows of a batch, T queries of a row, D width of a hidden state, n entries to find.
"""

import itertools
from typing import List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .kernel import Kernel, KernelUnavailable, in_threads
from .token_search import Table, TokenSearch

# A row with fewer queries is shared among threads by its entries, as each thread converts all that it searches.
FEWEST_QUERIES = 32
WIDEST = 8192
_FEWEST_ENTRIES = 1024  # of a thread


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
        kernel = Kernel(self.instructions)
        B, T, _ = queries.shape
        queries = queries.contiguous()
        tables = [[piece.contiguous() for piece in table] for table in tables]
        shares = -(-torch.get_num_threads() // max(1, B))  # threads for each row
        if T < FEWEST_QUERIES and shares > 1 and not causal:
            return _search_in_parts(kernel, tables, queries, n, shares)
        scores, numbers = queries.new_empty(B, T, n), queries.new_empty(B, T, n, dtype=torch.int64)
        step = max(FEWEST_QUERIES, -(-T // shares))

        def search(piece: Tuple[int, int]) -> None:
            row, begin = piece
            part = slice(begin, begin + step)
            entries = sum(map(len, tables[row]))
            readable = np.full(T, entries) - (T - np.arange(T) if causal else 0)
            _search(kernel, tables[row], queries[row, part], readable[part], scores[row, part], numbers[row, part])

        in_threads(search, itertools.product(range(B), range(0, T, step)))
        return scores, numbers


def _search(
    kernel: Kernel, table: Table, queries: Tensor, readable: np.ndarray, scores: Tensor, numbers: Tensor
) -> None:
    """Search the first entries of a table, ``readable`` for each query; write what is found."""
    pointers = np.array([piece.data_ptr() for piece in table])
    sizes = np.array([len(piece) for piece in table])
    readable = np.ascontiguousarray(readable)
    kernel.search_tokens(
        queries.data_ptr(),
        *queries.shape,
        pointers.ctypes.data,
        sizes.ctypes.data,
        len(table),
        readable.ctypes.data,
        scores.size(1),
        scores.data_ptr(),
        numbers.data_ptr(),
    )


def _search_in_parts(
    kernel: Kernel, tables: Sequence[Table], queries: Tensor, n: int, shares: int
) -> Tuple[Tensor, Tensor]:
    """Search each table in several parts, one a thread, for all its queries; arguments as for a search."""
    B, T, _ = queries.shape
    scores = queries.new_full((B, T, shares, n), float("-inf"))
    numbers = scores.new_full(scores.shape, -1, dtype=torch.int64)

    def search(piece: Tuple[int, int]) -> None:
        row, share = piece
        entries = sum(map(len, tables[row]))
        step = max(_FEWEST_ENTRIES, -(-entries // shares))
        part = _part(tables[row], share * step, (share + 1) * step)
        held = sum(map(len, part))
        best, places = queries.new_empty(T, n), queries.new_empty(T, n, dtype=torch.int64)
        _search(kernel, part, queries[row], np.full(T, held), best, places)
        scores[row, :, share] = best
        numbers[row, :, share] = torch.where(places < 0, places, places + share * step)

    in_threads(search, itertools.product(range(B), range(shares)))
    # A stable order, so that of equal entries the oldest are found.
    best = scores.flatten(2).sort(dim=2, descending=True, stable=True).indices[:, :, :n].sort(dim=2).values
    return scores.flatten(2).gather(2, best), numbers.flatten(2).gather(2, best)


def _part(table: Table, begin: int, end: int) -> List[Tensor]:
    """Return the entries ``begin`` to ``end - 1`` of a table, in pieces."""
    pieces, first = [], 0
    for piece in table:
        pieces.append(piece[max(0, begin - first) : max(0, end - first)])
        first += len(piece)
    return pieces

"""Exact search by matrix product and top-k in PyTorch, on any device.

Legend: B rows of a batch, H KV heads, T queries of a KV head, d width of a head, N slots of the bank, n chunks to find.
"""

import itertools
from typing import Dict, Iterator, Tuple

import numpy as np
import torch
from torch import Tensor

from ..bank import MemoryBank
from ..ring import RingPlaces
from .base import SearchBackend, register_search
from .scaling import scale_queries

# Scores that are held at a time, in elements (256 MiB of float32).
SCORES_PER_BLOCK = 1 << 26
# Heads and lanes are scored together only as far as this many queries of each fit into a block: a block of few queries
# spends its time reading the chunks.
_QUERIES_PER_BLOCK = 256
# Columns whose maximum represents them in the first level of the selection.
_COLUMNS = 64


@register_search("torch")
class TorchSearch(SearchBackend):
    """Exact search by matrix product and top-k; see :class:`SearchBackend`.

    On the CPU only the slots that lanes fill are scored. On a GPU all slots are, and those that are empty are masked,
    so that its work has the same sizes in every step and it need not be told by the host which they are.
    """

    static = True

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        if queries.device.type == "cpu":
            return search_filled(bank, lanes, queries, n)
        return search_masked(bank, bank.places(lanes, queries.device), queries, n)


def search_filled(bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
    """Search the slots that lanes fill, as the host knows them; see :class:`SearchBackend`."""
    B, H, T, _ = queries.shape
    slots = queries.new_full((B, H, T, n), -1, dtype=torch.int64)
    for spans, rows in rows_by_spans(bank, lanes).items():
        low, high = spans[0][0], spans[-1][1]
        means = _take(bank.means, lanes[rows])[:, :, low:high]  # (b, H, N, d)
        of_rows = _take(queries, rows)  # (b, H, T, d)
        held = min(n, sum(end - begin for begin, end in spans))
        for i, h, t in _blocks(len(rows), H, T, high - low):
            block = scale_queries(of_rows[i, h, t].float())
            scores = block @ means[i, h].transpose(-1, -2)  # (., ., t, N)
            if len(spans) == 2:
                scores[..., spans[0][1] - low : spans[1][0] - low] = float("-inf")
            best = top_indices(scores, held) + low
            for row, of_row in zip(rows[i].tolist(), best):
                slots[row, h, t, :held] = of_row
    return slots


def search_masked(bank: MemoryBank, places: RingPlaces, queries: Tensor, n: int) -> Tensor:
    """Search all slots, as the device knows which of them are filled; see :class:`SearchBackend`.

    Args:
        bank: Memory bank to search.
        places: Places of the rows' rings.
        queries: Queries, shape (B, H, T, d).
        n: Number of chunks to find.
    """
    (B, H, T, _), N = queries.shape, bank.chunks
    oldest = (places.written - places.held)[:, None]  # (B, 1)
    held, best_n = places.held[:, None], min(n, N)
    empty = (torch.arange(N, device=queries.device) - oldest) % N >= held  # (B, N)
    slots = queries.new_full((B, H, T, n), -1, dtype=torch.int64)
    for i, h, t in _blocks(B, H, T, N):
        means = bank.means[:, h].index_select(0, places.lanes[i])  # (., ., N, d)
        scores = scale_queries(queries[i, h, t].float()) @ means.transpose(-1, -2)  # (., ., t, N)
        best = top_indices(scores.masked_fill_(empty[i, None, None], float("-inf")), best_n)
        ages = (best - oldest[i, None, None]) % N
        slots[i, h, t, :best_n] = best.masked_fill(ages >= held[i, None, None], -1)
    return slots


def _blocks(rows: int, heads: int, queries: int, slots: int) -> Iterator[Tuple[slice, slice, slice]]:
    """Cut rows, heads and queries into blocks whose scores of all slots are held at a time."""
    together = max(1, SCORES_PER_BLOCK // (slots * min(queries, _QUERIES_PER_BLOCK)))  # lanes * heads
    by_head, by_row = min(heads, together), max(1, min(rows, together // heads))
    step = max(1, SCORES_PER_BLOCK // (by_row * by_head * slots))
    for i, h, t in itertools.product(range(0, rows, by_row), range(0, heads, by_head), range(0, queries, step)):
        yield slice(i, i + by_row), slice(h, h + by_head), slice(t, t + step)


def top_indices(scores: Tensor, n: int) -> Tensor:
    """Return the columns of the n largest scores, largest first; equal scores in any order.

    Over many columns it is several times as fast as ``topk``, and as exact: each of the n largest scores is in one of
    the n blocks of columns with the largest maxima, so the columns of these blocks are enough to choose from.

    Args:
        scores: Scores, shape (..., N), any floating dtype.
        n: Number of columns to return, at most N.

    Returns:
        Columns, shape (..., n), int64.
    """
    N = scores.size(-1)
    blocks = N // _COLUMNS
    if blocks < 4 * n:  # the columns of n blocks would be most of all columns
        return scores.topk(n, dim=-1).indices
    whole = blocks * _COLUMNS
    maxima = scores[..., :whole].unflatten(-1, (blocks, _COLUMNS)).amax(dim=-1)  # (..., N / 64)
    if whole < N:
        maxima = torch.cat([maxima, scores[..., whole:].amax(dim=-1, keepdim=True)], dim=-1)
    first = maxima.topk(n, dim=-1).indices * _COLUMNS
    columns = (first[..., None] + torch.arange(_COLUMNS, device=scores.device)).flatten(-2)  # (..., 64 n)
    if whole < N:
        candidates = scores.gather(-1, columns.clamp(max=N - 1)).masked_fill(columns >= N, float("-inf"))
    else:
        candidates = scores.gather(-1, columns)
    return columns.gather(-1, candidates.topk(n, dim=-1).indices)


def rows_by_spans(bank: MemoryBank, lanes: np.ndarray) -> Dict[Tuple[Tuple[int, int], ...], np.ndarray]:
    """Group the rows of a batch by the slots that their lanes fill, so that a group is searched together.

    Args:
        bank: Memory bank to search.
        lanes: Lane of the bank for each row of the batch, shape (B,), int64.

    Returns:
        The rows of each group by its spans (see ``MemoryBank.spans``). Rows with an empty memory are in no group.
    """
    groups = {}
    for row, lane in enumerate(lanes):
        spans = bank.spans(int(lane))
        if spans:
            groups.setdefault(spans, []).append(row)
    return {spans: np.array(rows) for spans, rows in groups.items()}


def _take(x: Tensor, rows: np.ndarray) -> Tensor:
    """Return x[rows], without a copy where the rows are consecutive."""
    begin = int(rows[0])
    if np.array_equal(rows, np.arange(begin, begin + len(rows))):
        return x[begin : begin + len(rows)]
    return x[torch.from_numpy(rows).to(x.device, non_blocking=True)]

"""Approximate search by faiss indices of the chunks' mean keys, which reports its recall.

Legend: B rows of a batch, H KV heads, T queries of a KV head, d width of a head, N slots of the bank, n chunks to find.
"""

import logging
from typing import List, Optional

import numpy as np
import torch
from torch import Tensor

from ...modules.row_products import row_products
from ..bank import MemoryBank
from .base import SearchBackend
from .index_spec import IndexSpec
from .lane_index import LaneIndex
from .scaling import scale_queries

logger = logging.getLogger(__name__)

_COMPARED = 32  # queries of each row and head that are compared with exact search


class IndexSearch(SearchBackend):
    """Search by the indices that a bank's lanes have, see :class:`SearchBackend` and ``MemoryBank.indices``.

    Indices are in main memory, and so must the bank's mean keys be.

    Args:
        spec: Index to build for each lane and head.
        exact: Exact search of lanes that hold too few chunks for an index, and of a sample of queries to measure the
            recall. It also searches the inverted lists of the indices, where it can.
        every: Number of searches per comparison with exact search; 0 for no comparison.
    """

    name = "index"

    def __init__(self, spec: IndexSpec, exact: SearchBackend, every: int = 50):
        self.spec, self.exact, self.every = spec, exact, every
        self.recall = None
        # For the log: comparisons so far, and their hits and totals.
        self._searches, self._hits, self._total, self._compared = 0, 0.0, 0.0, 0
        self._logged_exact = False

    @classmethod
    def unavailable(cls, device: torch.device) -> Optional[str]:
        return None if device.type == "cpu" else f"an index is in main memory, but the memory is on {device}"

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        device = queries.device
        queries = scale_queries(queries.detach().to(bank.means.device, torch.float32)).contiguous()
        slots = queries.new_full((*queries.shape[:3], n), -1, dtype=torch.int64)
        indices = {row: self._index(bank, lane) for row, lane in enumerate(lanes.tolist())}
        exact_rows = [row for row, index in indices.items() if index is None]
        if exact_rows:
            slots[exact_rows] = self.exact(bank, lanes[exact_rows], queries[exact_rows], n)
        indexed = {row: index for row, index in indices.items() if index is not None}
        for row, index in indexed.items():
            numbers = torch.from_numpy(index.search(queries[row].numpy(), self.spec.candidates(n), self.exact))
            best = torch.where(numbers < 0, numbers, numbers % bank.chunks)
            if self.spec.coded:
                best = best_candidates(bank.means[lanes[row]], queries[row], best, n)
            slots[row] = best
        self.recall = None
        if indexed:
            if self.every and self._searches % self.every == 0:
                self._compare(bank, lanes, queries, slots, list(indexed))
            self._searches += 1
        return slots.to(device)

    def _index(self, bank: MemoryBank, lane: int) -> Optional[LaneIndex]:
        """Return the index of a lane, in step with it; None where the lane holds too few chunks."""
        index = bank.indices.get(lane)
        if index is None or index.spec != self.spec:
            index = bank.indices[lane] = LaneIndex(self.spec)
        if index.follow(bank, lane):
            return index
        if bank.held[lane] and not self._logged_exact:
            self._logged_exact = True
            logger.info(
                "search is exact until a lane of the memory holds %s chunks, on which %s is then trained",
                f"{self.spec.needed:,}",
                self.spec,
            )
        return None

    def _compare(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, slots: Tensor, rows: List[int]) -> None:
        """Set the recall of a sample of these rows' queries, and log the recall so far now and then."""
        T, n = queries.size(2), slots.size(3)
        sample = torch.linspace(0, T - 1, min(T, _COMPARED)).round().long()
        hits = total = 0.0
        for row in rows:
            means, sampled = bank.means[lanes[row]], queries[row : row + 1, :, sample]
            exact = self.exact(bank, lanes[row : row + 1], sampled, n)[0]  # (H, t, n)
            scores = [chunk_scores(means, sampled[0], x) for x in (slots[row][:, sample], exact)]
            hits += count_hits(*scores)
            total += float((exact >= 0).sum())
        self.recall = (hits, total)
        self._hits, self._total, self._compared = self._hits + hits, self._total + total, self._compared + 1
        if self._compared & (self._compared - 1) == 0:  # 1, 2, 4...: seen at once, and not in every line of a log
            logger.info(
                "%s finds %.1f %% of what exact search finds (%d searches compared)",
                self.spec,
                100 * self._hits / self._total,
                self._compared,
            )


def count_hits(scores: Tensor, exact: Tensor) -> float:
    """Count the chunks that a search has in common with exact search, by their scores.

    Chunks whose scores equal the lowest exact score are interchangeable, but only as many of them are hits as exact
    search returned.

    Args:
        scores: Scores of the chunks that the search returned, shape (..., n); -inf for none.
        exact: Scores of the chunks that exact search returned, shape (..., n); -inf for none.

    Returns:
        Number of hits over all queries.
    """
    lowest = exact.masked_fill(exact == float("-inf"), float("inf")).amin(dim=-1, keepdim=True)
    tolerance = 1e-5 * lowest.abs()
    above, exact_above = ((x > lowest + tolerance).sum(dim=-1) for x in (scores, exact))
    at_least, exact_at_least = ((x >= lowest - tolerance).sum(dim=-1) for x in (scores, exact))
    return float((above + torch.minimum(at_least - above, exact_at_least - exact_above)).sum())


def best_candidates(means: Tensor, queries: Tensor, candidates: Tensor, n: int) -> Tensor:
    """Return the n candidates with the largest inner products, best first, shape (H, T, n), int64.

    Args:
        means: Mean keys of a lane, shape (H, N, d), float32.
        queries: Queries, shape (H, T, d), float32.
        candidates: Slots of the candidates, shape (H, T, at least n), int64; -1 for none.
        n: Number of slots to return.
    """
    scores = chunk_scores(means, queries, candidates)
    return candidates.gather(-1, scores.topk(n, dim=-1).indices)


def chunk_scores(means: Tensor, queries: Tensor, slots: Tensor) -> Tensor:
    """Return the inner products of queries with chunks, shape (H, T, n), float32; -inf where there is no chunk.

    Args:
        means: Mean keys of a lane, shape (H, N, d), float32.
        queries: Queries, shape (H, T, d), float32.
        slots: Slots of each query's chunks, shape (H, T, n), int64; -1 for none.
    """
    H, N, d = means.shape
    rows = slots.clamp(min=0) + torch.arange(H)[:, None, None] * N
    products = row_products(queries.reshape(-1, d), means.reshape(-1, d), rows.flatten(0, 1)).view(slots.shape)
    return products.masked_fill(slots < 0, float("-inf"))

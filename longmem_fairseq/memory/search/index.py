"""Approximate search: faiss indices of the chunk means, kept in step with what a bank holds.

A lane's indices follow its bank when they are searched: chunks that were written since are added, those that left are
taken out, so that a search costs what changed and not what is held. What a chunk of a stream is never changes, so a
chunk's number says whether an index has it.

Legend: B rows of a batch, H heads, T queries, d width of a head, N chunks that a lane holds, n chunks wanted.
"""

import copy
import logging
import time
from typing import List, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ...modules.row_products import row_products
from ..bank import MemoryBank
from .base import SearchFunction
from .index_spec import IndexSpec, innermost
from .native import native_list_search, native_search, suits

logger = logging.getLogger(__name__)

_COMPARED = 32  # queries of each row and head that are compared
_ADDED = 1 << 16  # chunks that are copied at a time to be added


class LaneIndex:
    """The indices of one lane, one a head, over chunks ``begin`` to ``end - 1`` of its stream.

    Indices with inverted lists know a chunk by its number less ``base``. Others number what they are given
    themselves, from 0, which is the same number; what left them stays in them, hidden, until they are built anew.

    They are built anew, and trained on what is held then, when as many chunks have left as the lane holds: a constant
    cost for each chunk, on average. Without it an index would keep the clusters of what was forgotten long ago, or
    grow without limit.
    """

    def __init__(self, spec: IndexSpec):
        self.spec = spec
        self.heads: List = []
        self.resets = -1  # of the bank, see MemoryBank.resets
        self.base = self.begin = self.end = 0

    def follow(self, bank: MemoryBank, lane: int) -> bool:
        """Be in step with a lane; False where it does not hold enough to be searched like this."""
        end = int(bank.written[lane])
        begin = end - int(bank.held[lane])
        if self.resets != bank.resets[lane] or begin >= self.end:
            self.heads, self.resets = [], int(bank.resets[lane])
        if not self.heads:
            if end - begin < self.spec.needed:
                return False
            self._build(bank, lane, begin, end)
        elif begin - self.base >= bank.chunks:
            self._build(bank, lane, begin, end)
        else:
            self._forget(begin)
            self._add(bank, lane, end)
        return True

    def search(self, queries: np.ndarray, n: int, native: bool) -> np.ndarray:
        """Numbers of the chunks found, best first, for queries (H, T, d) float32: (H, T, n) int64, -1 for none.

        ``native``: by the native kernel, where that is possible and faster.
        """
        if native and self.is_native(queries.shape[1]):
            found = native_list_search(self.heads, queries, n)
        else:
            parameters = self._hide_what_left()
            found = np.stack([index.search(x, n, params=parameters)[1] for index, x in zip(self.heads, queries)])
        return np.where(found < 0, -1, found + self.base)

    def is_native(self, queries: int) -> bool:
        """Whether the native kernel can look into these lists, and is the faster way for so many queries of a head."""
        return self.spec.removes and not self.spec.coded and suits(queries, self.spec.width)

    def __deepcopy__(self, memo) -> "LaneIndex":
        import faiss

        other = copy.copy(self)
        other.heads = [faiss.clone_index(index) for index in self.heads]
        return other

    def _build(self, bank: MemoryBank, lane: int, begin: int, end: int) -> None:
        began = time.perf_counter()
        self.heads, self.base, self.begin, self.end = [], begin, begin, begin
        for head in range(bank.heads):
            index = self.spec.build()
            if not index.is_trained:
                index.train(_means(bank, lane, slice(head, head + 1), begin, end)[0])
            self.heads.append(index)
        self._add(bank, lane, end)
        logger.debug(
            "lane %d: %s made of %d chunks in %.1f s", lane, self.spec, end - begin, time.perf_counter() - began
        )

    def _add(self, bank: MemoryBank, lane: int, end: int) -> None:
        for begin in range(self.end, end, _ADDED):
            stop = min(end, begin + _ADDED)
            numbers = np.arange(begin - self.base, stop - self.base)
            for index, x in zip(self.heads, _means(bank, lane, slice(None), begin, stop)):
                index.add_with_ids(x, numbers) if self.spec.removes else index.add(x)
        self.end = end

    def _forget(self, begin: int) -> None:
        if self.spec.removes and begin > self.begin:
            import faiss

            numbers = np.arange(self.begin - self.base, begin - self.base)
            selector = faiss.IDSelectorArray(len(numbers), faiss.swig_ptr(numbers))  # holds no copy of the numbers
            for index in self.heads:
                index.remove_ids(selector)
        self.begin = begin

    def _hide_what_left(self):
        """Parameters of a search among the chunks that are still held; None where an index has no others."""
        if self.spec.removes or self.begin == self.base:
            return None
        import faiss

        selector = faiss.IDSelectorRange(self.begin - self.base, self.end - self.base)
        graph = innermost(faiss, self.heads[0]).hnsw
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=graph.efSearch)
        if isinstance(self.heads[0], faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters


class IndexSearch:
    """Search by the indices of a bank; called as :func:`longmem_fairseq.memory.search.base.torch_search` is.

    A lane that does not hold enough to train an index yet is searched exactly. The indices lie on the CPU, with the
    bank: they are in ``bank.indices``, so that what copies a bank copies them.

    Args:
        spec: of the indices.
        exact: search of lanes without an index, and what the index is compared with; the native search also looks
            into the lists of indices of whole keys in inverted lists (``IVFn,Flat``).
        every: one of so many searches is compared with exact search; 0 for none.

    Attributes:
        recall: of the last search, if it was compared: chunks found that exact search finds too, and chunks that were
            looked for; of equal scores any will do. None otherwise.
    """

    def __init__(self, spec: IndexSpec, exact: SearchFunction, every: int = 50):
        self.spec, self.exact, self.every = spec, exact, every
        self.recall: Optional[Tuple[float, float]] = None
        self._searches, self._hits, self._wanted, self._compared = 0, 0.0, 0.0, 0
        self._told = False

    def __call__(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, n: int) -> Tensor:
        """Slots, best first, shape (B, H, T, n), int64, on the queries' device; -1 where fewer are found."""
        queries, asked = queries.detach().to(bank.means.device, torch.float32).contiguous(), queries.device
        slots = queries.new_full((*queries.shape[:3], n), -1, dtype=torch.int64)
        indices = {row: self._index(bank, lane) for row, lane in enumerate(lanes.tolist())}
        exactly = [row for row, index in indices.items() if index is None]
        if exactly:
            slots[exactly] = self.exact(bank, lanes[exactly], queries[exactly], n)
        indexed = {row: index for row, index in indices.items() if index is not None}
        native = self.exact is native_search
        for row, index in indexed.items():
            numbers = torch.from_numpy(index.search(queries[row].numpy(), self.spec.candidates(n), native))
            found = torch.where(numbers < 0, numbers, numbers % bank.chunks)
            slots[row] = best_of(bank.means[lanes[row]], queries[row], found, n) if self.spec.coded else found
        self.recall = None
        if indexed:
            if self.every and self._searches % self.every == 0:
                self._compare(bank, lanes, queries, slots, list(indexed))
            self._searches += 1
        return slots.to(asked)

    def _index(self, bank: MemoryBank, lane: int) -> Optional[LaneIndex]:
        """The index of a lane, in step with it; None where it does not hold enough yet."""
        index = bank.indices.get(lane)
        if index is None or index.spec != self.spec:
            index = bank.indices[lane] = LaneIndex(self.spec)
        if index.follow(bank, lane):
            return index
        if bank.held[lane] and not self._told:
            self._told = True
            logger.info(
                "search is exact until a lane of the memory holds %s chunks, on which %s is then trained",
                f"{self.spec.needed:,}",
                self.spec,
            )
        return None

    def _compare(self, bank: MemoryBank, lanes: np.ndarray, queries: Tensor, slots: Tensor, rows: List[int]) -> None:
        """Count, for some queries of these rows, what exact search finds too."""
        T, n = queries.size(2), slots.size(3)
        some = torch.linspace(0, T - 1, min(T, _COMPARED)).round().long()
        hits = wanted = 0.0
        for row in rows:
            means, asked = bank.means[lanes[row]], queries[row : row + 1, :, some]
            best = self.exact(bank, lanes[row : row + 1], asked, n)[0]  # (H, t, n)
            found = (slots[row][:, some], best)
            mine, exact = (chunk_products(means, asked[0], x).masked_fill(x < 0, float("-inf")) for x in found)
            hits += found_too(mine, exact)
            wanted += float((best >= 0).sum())
        self.recall = (hits, wanted)
        self._hits, self._wanted, self._compared = self._hits + hits, self._wanted + wanted, self._compared + 1
        if self._compared & (self._compared - 1) == 0:  # 1, 2, 4...: seen at once, and not in every line of a log
            logger.info(
                "%s finds %.1f %% of what exact search finds (%d searches compared)",
                self.spec,
                100 * self._hits / self._wanted,
                self._compared,
            )


def found_too(mine: Tensor, exact: Tensor) -> float:
    """How many of the exact results were found, by scores, both (..., n), -inf for none.

    Of those whose scores equal the lowest of the exact ones any will do, but only as many as exact search took.
    """
    lowest = exact.masked_fill(exact == float("-inf"), float("inf")).amin(dim=-1, keepdim=True)
    near = 1e-5 * lowest.abs()
    mine_above, exact_above = ((x > lowest + near).sum(dim=-1) for x in (mine, exact))
    mine_at, exact_at = ((x >= lowest - near).sum(dim=-1) - (x > lowest + near).sum(dim=-1) for x in (mine, exact))
    return float((mine_above + torch.minimum(mine_at, exact_at)).sum())


def best_of(means: Tensor, queries: Tensor, slots: Tensor, n: int) -> Tensor:
    """The n of some chunks with the largest inner products, best first.

    Args:
        means: of a lane, shape (H, N, d), float32.
        queries: shape (H, T, d), float32.
        slots: candidates, shape (H, T, at least n), int64; -1 for none.
    """
    scores = chunk_products(means, queries, slots).masked_fill(slots < 0, float("-inf"))
    return slots.gather(-1, scores.topk(n, dim=-1).indices)


def chunk_products(means: Tensor, queries: Tensor, slots: Tensor) -> Tensor:
    """Inner products of queries (H, T, d) with chunks (H, T, m) of means (H, N, d), shape (H, T, m), float32."""
    H, N, d = means.shape
    rows = slots.clamp(min=0) + torch.arange(H)[:, None, None] * N
    return row_products(queries.reshape(-1, d), means.reshape(-1, d), rows.flatten(0, 1)).view(slots.shape)


def _means(bank: MemoryBank, lane: int, heads: slice, begin: int, end: int) -> np.ndarray:
    """Mean keys of chunks begin to end - 1 of a lane, shape (heads, end - begin, d), float32."""
    slots = torch.arange(begin, end, device=bank.means.device) % bank.chunks
    return bank.means[lane, heads][:, slots].contiguous().numpy()

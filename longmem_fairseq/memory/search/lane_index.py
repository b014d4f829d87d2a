"""The faiss indices of one lane of a bank, kept in step with what the lane holds.

A lane's indices follow its bank when they are searched: chunks written since the last search are added, evicted chunks
are removed, so that a search costs what changed and not what is held. A chunk of a stream never changes, so a chunk's
number in its stream is enough to know whether an index has it.

Legend: H KV heads, T queries of a KV head, d width of a head, n chunks to find.
"""

import copy
import logging
import time
from typing import List, Optional

import numpy as np
import torch

from ..bank import MemoryBank
from .base import ListSearch, SearchBackend
from .index_spec import IndexSpec, innermost

logger = logging.getLogger(__name__)

_ADDED = 1 << 16  # chunks that are copied at a time to be added


class LaneIndex:
    """The indices of one lane, one per KV head, over chunks ``begin`` to ``end - 1`` of its stream.

    Indices with inverted lists know a chunk by its number minus ``base``. Other indices number the chunks themselves,
    from 0, which is the same number; an evicted chunk stays in them, hidden, until they are rebuilt.

    Indices are rebuilt, and trained on the chunks held then, when as many chunks were evicted as the lane holds: a
    constant cost per chunk, on average. Otherwise an index would keep the clusters of chunks that were evicted long
    ago, or grow without limit.

    Args:
        spec: Index to build for each head.
    """

    def __init__(self, spec: IndexSpec):
        self.spec = spec
        self.heads: List = []
        self.resets = -1  # of the lane, see MemoryBank.resets
        self.base = self.begin = self.end = 0

    def follow(self, bank: MemoryBank, lane: int) -> bool:
        """Add and remove what the lane has gained and lost since the last call.

        Args:
            bank: Memory bank that the lane belongs to.
            lane: Number of the lane.

        Returns:
            Whether the lane can be searched by its indices: false while it holds too few chunks to train them.
        """
        end = int(bank.written[lane])
        begin = end - int(bank.held[lane])
        if self.resets != bank.resets[lane] or begin >= self.end:
            self.heads, self.resets = [], int(bank.resets[lane])
        if not self.heads:
            if end - begin < self.spec.needed:
                return False
            self.build(bank, lane, begin, end)
        elif begin - self.base >= bank.chunks:
            self.build(bank, lane, begin, end)
        else:
            self.remove(begin)
            self.add(bank, lane, end)
        return True

    def search(self, queries: np.ndarray, n: int, backend: SearchBackend) -> np.ndarray:
        """Search the indices.

        Args:
            queries: Queries, shape (H, T, d), float32.
            n: Number of chunks to find.
            backend: Backend that searches inverted lists, where it can; faiss does otherwise.

        Returns:
            Numbers of the chunks in the stream, best first, shape (H, T, n), int64; -1 where fewer are found.
        """
        search_lists = self.list_search(backend, queries.shape[1])
        if search_lists is not None:
            ids = search_lists(self.heads, queries, n)
        else:
            parameters = self._hide_evicted()
            ids = np.stack([index.search(x, n, params=parameters)[1] for index, x in zip(self.heads, queries)])
        return np.where(ids < 0, -1, ids + self.base)

    def list_search(self, backend: SearchBackend, queries: int) -> Optional[ListSearch]:
        """Return a backend's function that searches these indices faster than faiss does, or None.

        Args:
            backend: Search backend.
            queries: Number of queries of each head.
        """
        whole_keys = self.spec.removes and not self.spec.coded
        return backend.list_search(queries, self.spec.width) if whole_keys else None

    def build(self, bank: MemoryBank, lane: int, begin: int, end: int) -> None:
        """Build the indices of chunks ``begin`` to ``end - 1`` of a lane, trained on these chunks.

        Args:
            bank: Memory bank that the lane belongs to.
            lane: Number of the lane.
            begin: Number of the first chunk in the stream.
            end: Number of the last chunk plus one.
        """
        start = time.perf_counter()
        self.heads, self.base, self.begin, self.end = [], begin, begin, begin
        for head in range(bank.heads):
            index = self.spec.build()
            if not index.is_trained:
                index.train(_means(bank, lane, slice(head, head + 1), begin, end)[0])
            self.heads.append(index)
        self.add(bank, lane, end)
        seconds = time.perf_counter() - start
        logger.debug("lane %d: %s built from %d chunks in %.1f s", lane, self.spec, end - begin, seconds)

    def add(self, bank: MemoryBank, lane: int, end: int) -> None:
        """Add the chunks of a lane up to ``end - 1``.

        Args:
            bank: Memory bank that the lane belongs to.
            lane: Number of the lane.
            end: Number of the last chunk to add plus one.
        """
        for begin in range(self.end, end, _ADDED):
            stop = min(end, begin + _ADDED)
            ids = np.arange(begin - self.base, stop - self.base)
            for index, x in zip(self.heads, _means(bank, lane, slice(None), begin, stop)):
                if self.spec.removes:
                    index.add_with_ids(x, ids)
                else:
                    index.add(x)
        self.end = end

    def remove(self, begin: int) -> None:
        """Remove, or hide, the chunks before ``begin``.

        Args:
            begin: Number of the oldest chunk that the lane still holds.
        """
        if self.spec.removes and begin > self.begin:
            import faiss

            ids = np.arange(self.begin - self.base, begin - self.base)
            selector = faiss.IDSelectorArray(len(ids), faiss.swig_ptr(ids))  # does not copy the ids
            for index in self.heads:
                index.remove_ids(selector)
        self.begin = begin

    def __deepcopy__(self, memo) -> "LaneIndex":
        import faiss

        other = copy.copy(self)
        other.heads = [faiss.clone_index(index) for index in self.heads]
        return other

    def _hide_evicted(self):
        """Return parameters of a search among the chunks still held; None where an index has no other chunks."""
        if self.spec.removes or self.begin == self.base:
            return None
        import faiss

        selector = faiss.IDSelectorRange(self.begin - self.base, self.end - self.base)
        graph = innermost(faiss, self.heads[0]).hnsw
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=graph.efSearch)
        if isinstance(self.heads[0], faiss.IndexPreTransform):
            parameters = faiss.SearchParametersPreTransform(index_params=parameters)
        return parameters


def _means(bank: MemoryBank, lane: int, heads: slice, begin: int, end: int) -> np.ndarray:
    """Return mean keys of chunks begin to end - 1 of a lane, shape (heads, end - begin, d), float32."""
    slots = torch.arange(begin, end, device=bank.means.device) % bank.chunks
    return bank.means[lane, heads][:, slots].contiguous().numpy()

"""Reading a memory: the contract between attention and whatever holds keys and values, and what all readers share.

Legend: B rows of a batch, H query heads, H_kv key/value heads, T queries of a row, d width of a head, L lanes of a
bank, n chunks that were searched for, C tokens of a chunk.
"""

from abc import ABC, abstractmethod
from typing import Callable, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from ..modules.memory_attention import MemoryAttention
from ..modules.query_groups import group_queries, ungroup
from .bank import MemoryBank
from .search.base import SearchBackend


class ReadEvent(NamedTuple):
    """What one call of a reader searched for and found, for observers.

    Attributes:
        bank: Bank that was read.
        lanes: Lane of the bank for each row, shape (B,), int64, on the CPU.
        queries: Queries, shape (B, H, T, d), without gradient.
        slots: Slots that were found, best first, shape (B, H, T, n), int64; -1 for none.
        scaling: Factor of the scores.
        layer: Number of the memory layer that was read, counted from 0 among the memory layers.
    """

    bank: MemoryBank
    lanes: np.ndarray
    queries: Tensor
    slots: Tensor
    scaling: float
    layer: int = 0


Observer = Callable[[ReadEvent], None]


class ChunkReader:
    """Searches banks and attends to the chunks that were found, for query heads in groups of any size.

    Args:
        search: Search backend that finds the best chunks.
        attention: Function that attends to them (see
            :func:`longmem_fairseq.modules.memory_attention.memory_attention`).
        chunks_per_query: Number of chunks that each query and head reads, k / C.
    """

    def __init__(self, search: SearchBackend, attention: MemoryAttention, chunks_per_query: int):
        self.search, self.attention, self.chunks_per_query = search, attention, chunks_per_query

    @torch.no_grad()
    def find(self, bank: MemoryBank, lanes: np.ndarray, q: Tensor) -> Tensor:
        """Find the best chunks for each query.

        Args:
            bank: Bank to search.
            lanes: Lane of the bank for each row, shape (B,), int64.
            q: Queries, shape (B, H, T, d).

        Returns:
            Slots, best first, shape (B, H, T, n), int64; -1 where a lane holds fewer chunks. The number n depends on
            the sizes alone and not on what is held, so that a step has the same shapes wherever a stream is.
        """
        n = min(self.chunks_per_query, bank.chunks)
        with torch.autocast(q.device.type, enabled=False):  # it would round the products to half precision
            slots = self.search(bank, lanes, group_queries(q.detach(), bank.heads), n)
        return ungroup(slots, q.size(1))

    def attend(self, keys: Tensor, values: Tensor, lanes: Tensor, q: Tensor, slots: Tensor, scaling: float) -> Tensor:
        """Attend to the chunks in slots.

        Args:
            keys: Keys of a bank, shape (L, H_kv, N, C, d).
            values: Values of a bank, of the same shape.
            lanes: Lane of the bank for each row, shape (B,), int64, on the queries' device.
            q: Queries, shape (B, H, T, d).
            slots: Slots to read, shape (B, H, T, n), int64; -1 reads nothing.
            scaling: Factor of the scores.

        Returns:
            Z, shape (B, H, T, d).
        """
        q, slots, heads = group_queries(q, keys.size(1)), group_queries(slots, keys.size(1)), q.size(1)
        return ungroup(self.attention(q, keys, values, lanes, slots, scaling), heads)


class BatchReader(ABC):
    """What one batch reads from: a :class:`MemoryReader` for each memory layer, and figures of what was read.

    Attributes:
        recall: Chunks that the last search shares with exact search, and chunks that were searched for, where an
            approximate index was compared; None otherwise.
    """

    recall: Optional[Tuple[float, float]]

    @property
    @abstractmethod
    def readers(self) -> "List[MemoryReader]":
        """The reader of each memory layer, the lowest layer's first."""

    def of_layer(self, number: int) -> "MemoryReader":
        """Return the reader of a memory layer, counted from 0 among the memory layers."""
        return self.readers[number]

    @property
    @abstractmethod
    def retrieved(self) -> Optional[Tensor]:
        """Chunks that were read, best first, shape (B, H, T, k / C), int64: 0 is the oldest chunk held, -1 is none.

        None before anything was read. H counts the heads of all reading layers, those of the lowest layer first.
        """

    @property
    @abstractmethod
    def fill(self) -> float:
        """Mean share of the memory in use over the rows, 0 to 1."""

    def distance(self) -> Tuple[Tensor, Tensor]:
        """Return the sum over all reads of the tokens between a query and the chunk it reads, and the number of reads.

        Two float32 scalars; zero where distances are not known.
        """
        return torch.zeros(()), torch.zeros(())


class MemoryReader(BatchReader):
    """What one batch reads from one memory layer: attention calls it with the queries of a layer.

    Args:
        layer: Number of the memory layer, counted from 0 among the memory layers.

    Attributes:
        on_read: Function that is called with a :class:`ReadEvent` after each reading; None for none.
    """

    def __init__(self, layer: int = 0):
        self.layer = layer
        self.recall = None
        self.on_read: Optional[Observer] = None

    @property
    def readers(self) -> "List[MemoryReader]":
        return [self]

    def of_layer(self, number: int) -> "MemoryReader":
        return self

    def why_not_static(self) -> Optional[str]:
        """Return the reason why a CUDA graph cannot contain a reading, as a clause; None if it can.

        A reader that can also has the methods of :class:`longmem_fairseq.memory.stream_memory.StreamReader` for it.
        """
        return "the memory is not one ring for each row"

    @abstractmethod
    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        """Search for the queries and attend to what is found.

        Args:
            q: Queries without position, shape (B, H, T, d).
            scaling: Factor of the scores, 1 / sqrt(d).

        Returns:
            Z, shape (B, H, T, d), zero where nothing can be read; and which rows can read something, shape (B,), bool,
            or None where all can.
        """

    def observe(self, bank: MemoryBank, lanes: np.ndarray, q: Tensor, slots: Tensor, scaling: float) -> None:
        """Call the observer, if there is one; arguments are those of :class:`ReadEvent`."""
        if self.on_read is not None:
            self.on_read(ReadEvent(bank, lanes, q.detach(), slots, scaling, self.layer))


def tables_to_read(bank: MemoryBank, q: Tensor, keep: bool) -> Tuple[Tensor, Tensor]:
    """Return a bank's keys and values for attention.

    Args:
        bank: Bank to read.
        q: Queries.
        keep: Whether the backward pass may come after the bank was written again. The tables are then copied where
            there is a gradient; without a copy PyTorch refuses such a backward pass.
    """
    if keep and q.requires_grad and torch.is_grad_enabled():
        return bank.keys.clone(), bank.values.clone()
    return bank.keys, bank.values


def chunk_ages(slots: Tensor, written: Tensor, held: Tensor, chunks: int, columns: int) -> Tensor:
    """Number the chunks in slots by their age.

    Args:
        slots: Slots, shape (B, H, T, n), int64; -1 for none.
        written: Number of chunks that were written into each row's lane, shape (B,), int64.
        held: Number of chunks that each row's lane holds, shape (B,), int64.
        chunks: Number of slots of a lane.
        columns: Number of columns of the result, at least n.

    Returns:
        Shape (B, H, T, columns), int64: 0 for the oldest chunk that the lane holds, -1 for none.
    """
    oldest = (written - held).view(-1, 1, 1, 1)
    ages = ((slots - oldest) % chunks).masked_fill(slots < 0, -1)
    return torch.nn.functional.pad(ages, (0, columns - slots.size(3)), value=-1)

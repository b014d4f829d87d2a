"""The memories of generation: hypotheses share one until they remember different things.

Legend: B rows of a batch, H heads, T tokens, d width of a head, R rows that share a memory, n chunks read per query.
"""

import copy
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from .bank import MemoryBank
from .search.base import SearchFunction


class MemoryBranches:
    """Which memory each row of a batch reads: copied only where rows that share one are given different tokens.

    Reordering rows, as beam search does at every step, moves references and copies nothing.

    Args:
        rows: number of rows.
        new_bank: makes an empty bank of one lane.
        search: finds chunks in a bank.
        attention: reads them (see :func:`longmem_fairseq.modules.joint_attention.memory_attention`).
        chunks_per_query: how many chunks each query and head reads, k / chunk_size.
        base: a bank of one lane that every row begins with; it is only read.

    Attributes:
        banks: the bank of each row; None where it has nothing to read yet.
        watch: called with (rows, bank, queries (1, H, R * T, d), slots (1, H, R * T, n), scaling) after each reading,
            for those who want to see what is read; the queries of the rows stand end to end.
    """

    def __init__(
        self,
        rows: int,
        new_bank: Callable[[], MemoryBank],
        search: SearchFunction,
        attention: Callable,
        chunks_per_query: int,
        base: Optional[MemoryBank] = None,
    ):
        self.new_bank, self.base = new_bank, base
        self.search, self.attention, self.chunks_per_query = search, attention, chunks_per_query
        self.banks: List[Optional[MemoryBank]] = [base] * rows
        self.watch: Optional[Callable] = None

    def reorder(self, order: Sequence[int]) -> None:
        """Row i becomes what row ``order[i]`` was; rows may be left out or repeated."""
        self.banks = [self.banks[row] for row in order]

    def write(self, rows: Sequence[int], tokens: Tensor, keys: Tensor, values: Tensor) -> None:
        """Remember the same number of tokens for each of some rows.

        Args:
            rows: which rows, none twice.
            tokens: what their keys and values were computed from, shape (b, T): rows that share a memory and are given
                the same tokens go on sharing it.
            keys, values: shape (b, H, T, d).
        """
        groups: Dict[Tuple, List[int]] = {}
        for i, (row, own) in enumerate(zip(rows, tokens.tolist())):
            groups.setdefault((id(self.banks[row]), *own), []).append(i)
        for members in groups.values():
            ours = {rows[i] for i in members}
            bank = self.banks[rows[members[0]]]
            if bank is None:
                bank = self.new_bank()
            elif bank is self.base or any(other is bank for row, other in enumerate(self.banks) if row not in ours):
                bank = copy.deepcopy(bank)
            bank.append(0, keys[members[0]], values[members[0]])
            for row in ours:
                self.banks[row] = bank

    def reader(self, rows: Optional[Sequence[int]] = None) -> "BranchReader":
        """What attention reads from for some rows, by default all."""
        return BranchReader(self, self.banks if rows is None else [self.banks[row] for row in rows])


class BranchReader:
    """What one batch reads: called with the queries, it searches and attends, once for each memory."""

    def __init__(self, branches: MemoryBranches, banks: Sequence[Optional[MemoryBank]]):
        self.branches = branches
        self._rows: Dict[int, List[int]] = {}
        self._banks: Dict[int, MemoryBank] = {}
        for row, bank in enumerate(banks):
            if bank is not None and bank.held[0]:
                self._rows.setdefault(id(bank), []).append(row)
                self._banks[id(bank)] = bank

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        """Read for queries (B, H, T, d): (Z of the same shape, which rows have a memory (B,) or None for all)."""
        B, H, T, d = q.shape
        z, present = torch.zeros_like(q), torch.zeros(B, dtype=torch.bool)
        lane = np.zeros(1, dtype=np.int64)
        for key, rows in self._rows.items():
            bank, R = self._banks[key], len(rows)
            own = q if R == B else q[torch.tensor(rows, device=q.device)]
            own = own.transpose(0, 1).reshape(1, H, R * T, d)  # the rows' queries end to end
            n = min(self.branches.chunks_per_query, int(bank.held[0]))
            slots = self.branches.search(bank, lane, own.detach(), n)  # (1, H, R * T, n)
            found = self.branches.attention(own, bank.keys, bank.values, slots.new_zeros(1), slots, scaling)
            z[rows] = found.view(H, R, T, d).transpose(0, 1)
            present[rows] = True
            if self.branches.watch is not None:
                self.branches.watch(rows, bank, own.detach(), slots, scaling)
        return z, None if present.all() else present.to(q.device)

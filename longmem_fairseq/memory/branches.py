"""The memories of generation: hypotheses share one until they write different tokens.

Legend: B rows of a batch, H query heads, H_kv key/value heads of all memory layers, T tokens, d width of a head, R rows
that share a bank.
"""

import copy
from typing import Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from ..modules.staging import staged
from ..modules.token_mixture import TokenReads
from .bank import MemoryBank
from .layered_reader import join_layers
from .reader import BatchReader, ChunkReader, MemoryReader, Observer, chunk_ages
from .ring import RingPlaces
from .token_bank import HALF, Past, TokenBank, TokenStates
from .token_reader import TokenReader


class MemoryBranches:
    """Which bank each row of a batch reads; a bank is copied only where rows that share it write different tokens.

    Reordering rows, as beam search does at every step, moves references and copies nothing.

    Args:
        rows: Number of rows, B.
        new_bank: Function that makes an empty bank of one lane.
        chunk_reader: Search and attention.
        base: Bank of one lane that every row starts with, which is only read; None for an empty memory.
        layers: Number of memory layers.
        token_reader: What reads the token memory; None without one.
        token_dtype: Precision of the hidden states in the token memory.

    Attributes:
        banks: Bank of each row; None where there is nothing to read yet.
        on_read: Observer of all readers (see :class:`longmem_fairseq.memory.reader.MemoryReader`).
    """

    def __init__(
        self,
        rows: int,
        new_bank: Callable[[], MemoryBank],
        chunk_reader: ChunkReader,
        base: Optional[MemoryBank] = None,
        layers: int = 1,
        token_reader: Optional[TokenReader] = None,
        token_dtype: torch.dtype = HALF,
    ):
        self.new_bank, self.chunk_reader, self.base, self.layers = new_bank, chunk_reader, base, layers
        self.token_reader, self.token_dtype = token_reader, token_dtype
        self.banks: List[Optional[MemoryBank]] = [base] * rows
        self.on_read: Optional[Observer] = None
        self._pasts: Dict[int, Tuple[TokenBank, int, Past]] = {}  # of the last step, by the identity of their bank

    def reorder(self, order: Sequence[int]) -> None:
        """Make row i what row ``order[i]`` was; rows may be dropped or repeated."""
        self.banks = [self.banks[row] for row in order]

    def write(
        self, rows: Sequence[int], tokens: Tensor, keys: Tensor, values: Tensor, hidden: Optional[Tensor] = None
    ) -> None:
        """Write the same number of tokens for each of some rows.

        Args:
            rows: Numbers of the rows, b of them, none twice.
            tokens: Token ids that the keys and values belong to, shape (b, T), int64. Rows that share a bank and write
                the same tokens continue to share it.
            keys: Keys, shape (b, H_kv, T, d).
            values: Values, shape (b, H_kv, T, d).
            hidden: Hidden states for the token memory, shape (b, T, D); None without one.
        """
        groups: Dict[Tuple, List[int]] = {}
        for i, (row, row_tokens) in enumerate(zip(rows, tokens.tolist())):
            groups.setdefault((id(self.banks[row]), *row_tokens), []).append(i)
        for members in groups.values():
            writers = {rows[i] for i in members}
            bank = self.banks[rows[members[0]]]
            if bank is None:
                bank = self.new_bank()
            elif bank is self.base or any(other is bank for row, other in enumerate(self.banks) if row not in writers):
                bank = copy.deepcopy(bank)
            bank.append(0, keys[members[0]], values[members[0]])
            if self.token_reader is not None:
                bank.token_bank.append(0, hidden[members[0]], tokens[members[0]])
            for row in writers:
                self.banks[row] = bank

    def reader(self, rows: Optional[Sequence[int]] = None) -> BatchReader:
        """Return what attention reads from for some rows, by default all."""
        banks = self.banks if rows is None else [self.banks[row] for row in rows]
        readers = [BranchReader(banks, self.chunk_reader, layer) for layer in range(self.layers)]
        for reader in readers:
            reader.on_read = self.on_read
        return join_layers(readers)

    def read_segments(self, states: TokenStates) -> Optional[TokenReads]:
        """Let every token of a segment of each row read the row's token memory; None without one."""
        if self.token_reader is None:
            return None
        return self.token_reader.read_segments([_past(bank, states) for bank in self.banks], states)

    def read_windows(self, states: TokenStates, lengths: Tensor) -> Optional[TokenReads]:
        """Let the last token of each row's window read the row's token memory; None without one.

        Args:
            states: Tokens of the windows, at the right ends of the rows.
            lengths: Number of tokens in each row's window, at least 1, shape (B,), int64.
        """
        if self.token_reader is None:
            return None
        rows: Dict[int, List[int]] = {}
        for row, bank in enumerate(self.banks):
            rows.setdefault(id(bank and bank.token_bank), []).append(row)
        groups, pasts = [], {}
        for key, members in rows.items():
            bank = self.banks[members[0]]
            if bank is not None:
                pasts[key] = self._prepared(bank.token_bank)
            groups.append((members, _past(None, states) if bank is None else pasts[key][-1]))
        self._pasts = pasts
        return self.token_reader.read_windows(groups, states, lengths)

    def _prepared(self, bank: TokenBank) -> Tuple[TokenBank, int, Past]:
        """Return a bank, its position, and its content in the form that is the fastest to search at every step."""
        kept, position = self._pasts.get(id(bank)), int(bank.position[0])
        if kept is not None and kept[:2] == (bank, position):
            return kept
        hidden, tokens = bank.past(0)
        return bank, position, Past(tuple(map(self.token_reader.search.prepare, hidden)), tokens)


def _past(bank: Optional[MemoryBank], states: TokenStates) -> Past:
    return Past((), states.tokens[0, :0]) if bank is None else bank.token_bank.past(0)


class BranchReader(MemoryReader):
    """What one batch reads from one memory layer, each row from a bank that it may share.

    Every bank is searched once for all its rows.

    Args:
        banks: Bank of each row, or None.
        chunk_reader: Search and attention.
        layer: Number of the memory layer, counted from 0 among the memory layers.
    """

    def __init__(self, banks: Sequence[Optional[MemoryBank]], chunk_reader: ChunkReader, layer: int = 0):
        super().__init__(layer)
        self.banks, self.chunk_reader = banks, chunk_reader
        self._lanes = np.full(1, layer)  # of each bank by layer: a bank has one lane
        self._rows: Dict[int, List[int]] = {}  # by the identity of their bank
        self._reads: List[Tuple[List[int], Tensor, RingPlaces, int]] = []
        for row, bank in enumerate(banks):
            if bank is not None and bank.held[0]:
                self._rows.setdefault(id(bank), []).append(row)

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        B, H, T, d = q.shape
        z, present = torch.zeros_like(q), np.zeros(B, dtype=bool)
        self._reads = []
        for rows in self._rows.values():
            bank, R = self.banks[rows[0]].by_layer(), len(rows)
            index = None if R == B else staged(np.array(rows), q.device)
            queries = q if index is None else q.index_select(0, index)
            queries = queries.transpose(0, 1).reshape(1, H, R * T, d)  # the rows' queries end to end
            slots = self.chunk_reader.find(bank, self._lanes, queries)  # (1, H, R * T, n)
            self.observe(bank, self._lanes, queries, slots, scaling)
            lane = slots.new_full((1,), self.layer)
            read = self.chunk_reader.attend(bank.keys, bank.values, lane, queries, slots, scaling)
            read = read.view(H, R, T, d).transpose(0, 1)
            z = read if index is None else z.index_copy(0, index, read)
            self._reads.append((rows, slots.view(H, R, T, -1), bank.places(self._lanes, q.device), bank.chunks))
            present[rows] = True
        return z, None if present.all() else staged(present, q.device)

    @property
    def retrieved(self) -> Optional[Tensor]:
        if not self._reads:
            return None
        H, _, T, _ = self._reads[0][1].shape
        columns = self.chunk_reader.chunks_per_query
        retrieved = self._reads[0][1].new_full((len(self.banks), H, T, columns), -1)
        for rows, slots, places, chunks in self._reads:
            ages = chunk_ages(slots.transpose(0, 1), places.written, places.held, chunks, columns)
            retrieved.index_copy_(0, staged(np.array(rows), slots.device), ages)
        return retrieved

    @property
    def fill(self) -> float:
        return sum(0.0 if bank is None else bank.held[0] / bank.chunks for bank in self.banks) / len(self.banks)

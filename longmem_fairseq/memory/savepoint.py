"""A lane of a bank as it was before it is written, so that a write that fails or is interrupted can be taken back.

Legend: H key/value heads, N chunks that a lane holds, C tokens of a chunk, d width of a head, n consecutive slots.
"""

from typing import Optional

import numpy as np
import torch

from .bank import MemoryBank
from .token_bank import TokenBank

_COUNTERS = ("first", "written", "position", "resets")


class Savepoint:
    """A copy of what a write is about to overwrite in one lane: nothing until the lane is full, at most all it holds.

    The copy is stored where the bank is, in a file where that is in one.

    Args:
        bank: Bank that is written.
        lane: Number of the lane.
        tokens: Number of tokens that will be written.
        position: Number of the first of them in a stream that the lane is emptied for; None where they are appended.

    Raises:
        OSError: The disk has no room for the copy.
    """

    def __init__(self, bank: MemoryBank, lane: int, tokens: int, position: Optional[int] = None):
        self.bank, self.lane = bank, lane
        self._counters = {name: int(getattr(bank, name)[lane]) for name in _COUNTERS}
        self._tail = bank.tail[:, lane].clone()
        first, waiting = int(bank.written[lane]), int(bank.position[lane] % bank.chunk_size)
        if position is not None:
            first, waiting = position // bank.chunk_size, 0
        overwritten = first + np.arange(min((waiting + tokens) // bank.chunk_size, bank.chunks))
        held = np.arange(bank.written[lane] - bank.held[lane], bank.written[lane])
        slots = np.intersect1d(overwritten % bank.chunks, held % bank.chunks)
        runs = np.split(slots, np.flatnonzero(np.diff(slots) != 1) + 1) if len(slots) else []
        self._saved = [self._copy(int(run[0]), int(run[-1]) + 1) for run in runs]
        self._tokens = None
        if bank.token_bank is not None:
            self._tokens = _TokenSavepoint(bank.token_bank, lane, tokens, position is not None)

    def _copy(self, begin: int, end: int) -> tuple:
        """Return the place of some slots and copies of their keys, values (H, n, C, d) and means (H, n, d)."""
        bank, lane = self.bank, self.lane
        shape = (bank.heads, end - begin, bank.chunk_size, bank.head_dim)
        copies = [bank.placement.new_tokens(shape, bank.keys.dtype) for _ in range(2)]
        copies.append(bank.placement.new_means((bank.heads, end - begin, bank.head_dim)))
        for copy, buffer in zip(copies, (bank.keys, bank.values, bank.means)):
            copy.copy_(buffer[lane, :, begin:end])
        return begin, end, copies

    def restore(self) -> None:
        """Take back what was written since; a restoration that was interrupted can be repeated."""
        bank, lane = self.bank, self.lane
        for begin, end, copies in self._saved:
            for copy, buffer in zip(copies, (bank.keys, bank.values, bank.means)):
                buffer[lane, :, begin:end] = copy
        bank.tail[:, lane] = self._tail
        for name, value in self._counters.items():
            getattr(bank, name)[lane] = value
        if self._tokens is not None:
            self._tokens.restore()


class _TokenSavepoint:
    """The same of the bank of a token memory.

    Args:
        bank: Bank that is written.
        lane: Number of the lane.
        tokens: Number of tokens that will be written.
        emptied: Whether the lane is emptied before, so that all that it holds may be overwritten.
    """

    def __init__(self, bank: TokenBank, lane: int, tokens: int, emptied: bool):
        self.bank, self.lane = bank, lane
        self._counters = int(bank.first[lane]), int(bank.position[lane])
        if emptied:
            self._slots = torch.arange(bank.size if bank.held[lane] else 0)
        else:
            written = bank.position[lane] + np.arange(min(tokens, bank.size))
            held = np.arange(bank.position[lane] - bank.held[lane], bank.position[lane])
            self._slots = torch.from_numpy(np.intersect1d(written % bank.size, held % bank.size))
        self._slots = self._slots.to(bank.tokens.device)
        self._saved = bank.hidden[lane, self._slots], bank.tokens[lane, self._slots]  # copies

    def restore(self) -> None:
        bank, lane = self.bank, self.lane
        bank.hidden[lane, self._slots], bank.tokens[lane, self._slots] = self._saved
        bank.first[lane], bank.position[lane] = self._counters

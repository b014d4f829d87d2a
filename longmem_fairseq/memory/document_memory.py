"""Documents in a memory, by name: what generation reads beside a prompt.

Legend: H_kv key/value heads of all memory layers, d width of a head.
"""

import copy
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .bank import MemoryBank
from .savepoint import Savepoint


class MemorizedDocument(NamedTuple):
    """The place of a document in the memory's stream: its tokens ``begin`` to ``end - 1``."""

    name: str
    begin: int
    end: int


class Loan:
    """The right to read a memory as it is now, until the object is gone: writes go into a copy of the bank.

    Attributes:
        bank: Bank of one lane, which is only read.
    """

    def __init__(self, bank: MemoryBank):
        self.bank = bank


class DocumentMemory:
    """Documents in a bank of one lane, in the order in which they were memorized.

    A document is in the memory whole or not at all: where writing or removing one fails or is interrupted, the memory
    holds exactly what it held before, tokens that were evicted included.

    Args:
        bank: Bank of one lane, empty.

    Attributes:
        bank: The bank; another object after a write while the memory is lent.
    """

    def __init__(self, bank: MemoryBank):
        if bank.lanes != 1:
            raise ValueError(f"a memory of documents needs a bank of one lane, not of {bank.lanes}")
        self.bank = bank
        self._documents: List[MemorizedDocument] = []  # never changed in place
        self._loans: "weakref.WeakSet[Loan]" = weakref.WeakSet()

    def __getstate__(self) -> Dict[str, Any]:
        return {"bank": self.bank, "_documents": self.documents}

    def __setstate__(self, state: Dict[str, Any]) -> None:
        vars(self).update(state, _loans=weakref.WeakSet())

    @property
    def end(self) -> int:
        """Number of tokens of the stream so far."""
        return int(self.bank.position[0])

    @property
    def oldest(self) -> int:
        """Number of the oldest token in the memory, counted from the stream's start."""
        return min(self._oldest_key, self._oldest_state)

    @property
    def tokens(self) -> int:
        """Number of tokens in the memory."""
        return self.end - self.oldest

    @property
    def documents(self) -> List[MemorizedDocument]:
        """Documents with tokens in the memory, oldest first; the oldest tokens are evicted when it is full."""
        return [document for document in self._documents if document.end > self.oldest]

    @property
    def _oldest_key(self) -> int:
        """Number of the oldest token of which keys and values are held."""
        return int(self.bank.written[0] - self.bank.held[0]) * self.bank.chunk_size

    @property
    def _oldest_state(self) -> int:
        """Number of the oldest token in the token memory; the stream's end without one."""
        return self.end - (0 if self.bank.token_bank is None else int(self.bank.token_bank.held[0]))

    def require_new(self, name: str) -> None:
        """Refuse a name that a document in the memory has.

        Args:
            name: Name of a document to memorize.

        Raises:
            ValueError: The name is taken.
        """
        if any(document.name == name for document in self.documents):
            raise ValueError(f"the memory has a document {name} already: forget it first, or choose another name")

    def lend(self) -> Loan:
        """Return the memory as it is now, for a reader that takes its time, such as a stream of generated text."""
        loan = Loan(self.bank)
        self._loans.add(loan)
        return loan

    @contextmanager
    def writing(self, name: str, tokens: int) -> Iterator[MemoryBank]:
        """Write a document, whole or not at all.

        Args:
            name: Name of the document.
            tokens: Number of its tokens.

        Yields:
            The bank, to which the block appends the tokens.

        Raises:
            ValueError: The name is taken.
            OSError: The disk has no room for a copy of the tokens that will be evicted.
        """
        self.require_new(name)
        with self._whole_or_not_at_all(tokens):
            begin = self.end
            yield self.bank
            self._documents = [*self.documents, MemorizedDocument(name, begin, self.end)]

    def forget(self, name: str) -> None:
        """Remove a document; the tokens of the others close up.

        Args:
            name: Name of the document.

        Raises:
            ValueError: The memory does not have this document.
        """
        removed = next((document for document in self.documents if document.name == name), None)
        if removed is None:
            names = ", ".join(document.name for document in self.documents) or "nothing"
            raise ValueError(f"the memory does not have a document {name}: it has {names}")
        keys, values = (_without(x, 1, self._oldest_key, removed) for x in self.bank.tokens(0))
        states = None
        if self.bank.token_bank is not None:
            states = tuple(_without(x, 0, self._oldest_state, removed) for x in self.bank.token_bank.contents(0))
        oldest = self.oldest
        length = removed.end - max(removed.begin, oldest)
        kept = []
        for document in self.documents:
            if document.name != name:
                shift = oldest + (length if document.begin >= removed.end else 0)
                kept.append(MemorizedDocument(document.name, document.begin - shift, document.end - shift))
        self.replace(keys, values, kept, states)

    def replace(
        self,
        keys: Tensor,
        values: Tensor,
        documents: Sequence[MemorizedDocument],
        states: Optional[Tuple[Tensor, Tensor]] = None,
    ) -> None:
        """Replace the content of the memory, whole or not at all.

        Keys and hidden states of the last token are the last ones; there may be more of the one than of the other.

        Args:
            keys: Keys, shape (H_kv, tokens, d).
            values: Values, shape (H_kv, tokens, d).
            documents: Places of the documents, counted from the first of these tokens.
            states: Hidden states (tokens, D) and token ids (tokens,) of the token memory; None without one.
        """
        earlier = 0 if states is None else max(0, len(states[1]) - keys.size(1))
        shift = -earlier % self.bank.chunk_size  # chunks start where the keys do
        with self._whole_or_not_at_all(keys.size(1), position=earlier + shift):
            bank = self.bank
            bank.reset(0, earlier + shift)
            bank.append(0, keys, values)
            if states is not None:
                bank.token_bank.replace(0, *states, position=int(bank.position[0]))
            self._documents = [
                MemorizedDocument(name, max(0, begin) + shift, end + shift) for name, begin, end in documents
            ]

    @contextmanager
    def _whole_or_not_at_all(self, tokens: int, position: Optional[int] = None) -> Iterator[None]:
        """Restore the memory where an exception ends the block; arguments are those of :class:`.Savepoint`."""
        documents = self._documents
        if any(loan.bank is self.bank for loan in self._loans):
            self.bank = copy.deepcopy(self.bank)
        savepoint = Savepoint(self.bank, 0, tokens, position)
        try:
            yield
        except BaseException:  # an interruption by the user too
            _finish(savepoint.restore)
            self._documents = documents
            raise


def _without(x: Tensor, dim: int, oldest: int, removed: MemorizedDocument) -> Tensor:
    """Return what is left of the tokens of a dimension, the first of which is number ``oldest``, without a document."""
    begin, end = max(0, removed.begin - oldest), max(0, removed.end - oldest)
    return torch.cat([x.narrow(dim, 0, begin), x.narrow(dim, end, x.size(dim) - end)], dim=dim)


def _finish(function: Callable[[], None]) -> None:
    """Call a function until it was not interrupted."""
    while True:
        try:
            return function()
        except KeyboardInterrupt:
            continue

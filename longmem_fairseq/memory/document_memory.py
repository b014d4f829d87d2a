"""Documents in a memory, by name: what generation reads beside a prompt.

Legend: H_kv key/value heads of all memory layers, d width of a head.
"""

import copy
import weakref
from contextlib import contextmanager
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Sequence

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
        return int(self.bank.written[0] - self.bank.held[0]) * self.bank.chunk_size

    @property
    def tokens(self) -> int:
        """Number of tokens in the memory."""
        return self.end - self.oldest

    @property
    def documents(self) -> List[MemorizedDocument]:
        """Documents with tokens in the memory, oldest first; the oldest tokens are evicted when it is full."""
        return [document for document in self._documents if document.end > self.oldest]

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
        oldest = self.oldest
        begin, end = max(0, removed.begin - oldest), max(0, removed.end - oldest)
        keys, values = self.bank.tokens(0)
        kept = []
        for document in self.documents:
            if document.name != name:
                shift = oldest + (end - begin if document.begin - oldest >= end else 0)
                kept.append(MemorizedDocument(document.name, document.begin - shift, document.end - shift))
        self.replace(
            torch.cat([keys[:, :begin], keys[:, end:]], dim=1),
            torch.cat([values[:, :begin], values[:, end:]], dim=1),
            kept,
        )

    def replace(self, keys: Tensor, values: Tensor, documents: Sequence[MemorizedDocument]) -> None:
        """Replace the content of the memory, whole or not at all.

        Args:
            keys: Keys, shape (H_kv, tokens, d).
            values: Values, shape (H_kv, tokens, d).
            documents: Places of the documents, counted from the first of these tokens.
        """
        with self._whole_or_not_at_all(keys.size(1), emptied=True):
            self.bank.reset(0)
            self.bank.append(0, keys, values)
            self._documents = [MemorizedDocument(name, max(0, begin), end) for name, begin, end in documents]

    @contextmanager
    def _whole_or_not_at_all(self, tokens: int, emptied: bool = False) -> Iterator[None]:
        """Restore the memory where an exception ends the block; arguments are those of :class:`.Savepoint`."""
        documents = self._documents
        if any(loan.bank is self.bank for loan in self._loans):
            self.bank = copy.deepcopy(self.bank)
        savepoint = Savepoint(self.bank, 0, tokens, emptied)
        try:
            yield
        except BaseException:  # an interruption by the user too
            _finish(savepoint.restore)
            self._documents = documents
            raise


def _finish(function: Callable[[], None]) -> None:
    """Call a function until it was not interrupted."""
    while True:
        try:
            return function()
        except KeyboardInterrupt:
            continue

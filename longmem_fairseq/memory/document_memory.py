"""Documents in a memory, by name: what generation reads beside a prompt.

Legend: H_kv key/value heads, d width of a head.
"""

from typing import List, NamedTuple, Sequence

import torch
from torch import Tensor

from .bank import MemoryBank


class MemorizedDocument(NamedTuple):
    """The place of a document in the memory's stream: its tokens ``begin`` to ``end - 1``."""

    name: str
    begin: int
    end: int


class DocumentMemory:
    """Documents in a bank of one lane, in the order in which they were memorized.

    Args:
        bank: Bank of one lane, empty.

    Attributes:
        bank: The bank.
    """

    def __init__(self, bank: MemoryBank):
        if bank.lanes != 1:
            raise ValueError(f"a memory of documents needs a bank of one lane, not of {bank.lanes}")
        self.bank = bank
        self._documents: List[MemorizedDocument] = []

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
        self._documents = [document for document in self._documents if document.end > self.oldest]
        return self._documents

    def require_new(self, name: str) -> None:
        """Refuse a name that a document in the memory has.

        Args:
            name: Name of a document to memorize.

        Raises:
            ValueError: The name is taken.
        """
        if any(document.name == name for document in self.documents):
            raise ValueError(f"the memory has a document {name} already: forget it first, or choose another name")

    def add(self, name: str, begin: int) -> None:
        """Name the tokens that were written since a place of the stream.

        Args:
            name: Name of the document.
            begin: Number of its first token in the stream.
        """
        self._documents.append(MemorizedDocument(name, begin, self.end))

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
        """Replace the content of the memory.

        Args:
            keys: Keys, shape (H_kv, tokens, d).
            values: Values, shape (H_kv, tokens, d).
            documents: Places of the documents, counted from the first of these tokens.
        """
        self.bank.reset(0)
        self.bank.append(0, keys, values)
        self._documents = [MemorizedDocument(name, max(0, begin), end) for name, begin, end in documents]

"""Documents in a memory, by name: what generation reads beside a prompt.

Legend: b segments, H heads, T tokens of a segment, d width of a head.
"""

from typing import Callable, List, NamedTuple, Sequence

import torch
from torch import Tensor

from ..progress import token_bar
from .bank import MemoryBank

_TOKENS_AT_ONCE = 4096  # segments do not see each other, so several are encoded side by side


class Document(NamedTuple):
    """Where a document lies in the memory's stream: its tokens ``begin`` to ``end - 1``."""

    name: str
    begin: int
    end: int


class DocumentMemory:
    """Documents in a memory of one lane, in the order in which they were memorised.

    Args:
        bank: of one lane, empty.

    Attributes:
        documents: those of which anything is left; the oldest give way when the memory is full.
    """

    def __init__(self, bank: MemoryBank):
        if bank.lanes != 1:
            raise ValueError(f"a library lies in one lane, not in {bank.lanes}")
        self.bank = bank
        self._documents: List[Document] = []

    @property
    def end(self) -> int:
        """Tokens of the stream so far."""
        return int(self.bank.position[0])

    @property
    def oldest(self) -> int:
        """Number of the oldest token that the memory still has."""
        return int(self.bank.written[0] - self.bank.held[0]) * self.bank.chunk_size

    @property
    def tokens(self) -> int:
        """How many tokens the memory has."""
        return self.end - self.oldest

    @property
    def documents(self) -> List[Document]:
        return [document for document in self._documents if document.end > self.oldest]

    def memorize(self, name: str, inputs: Tensor, encode: Callable, size: int) -> None:
        """Remember a document.

        Args:
            name: no two documents have the same.
            inputs: its tokens behind an end-of-sentence, shape (length,), int64.
            encode: gives keys and values (b, H, T, d) of tokens (b, T), as :meth:`Backbone.encode_for_memory` does.
            size: T.

        Raises:
            ValueError: there is a document of this name.
        """
        if any(document.name == name for document in self.documents):
            raise ValueError(f"the memory has a document {name} already: forget it first, or choose another name")
        begin, whole = self.end, len(inputs) // size * size
        parts: Sequence[Tensor] = inputs[:whole].view(-1, size).split(max(1, _TOKENS_AT_ONCE // size))
        if whole < len(inputs):
            parts = [*parts, inputs[whole:][None]]
        with token_bar(len(inputs), f"memorising {name}") as progress:
            for part in parts:
                encoded = encode(part)
                for keys, values in zip(encoded.keys, encoded.values):
                    self.bank.append(0, keys, values)
                progress.update(part.numel())
        self._documents.append(Document(name, begin, self.end))

    def forget(self, name: str) -> None:
        """Remove a document; the tokens of the others close up.

        Raises:
            ValueError: there is none of this name.
        """
        found = [document for document in self.documents if document.name == name]
        if not found:
            names = ", ".join(document.name for document in self.documents) or "nothing"
            raise ValueError(f"the memory has no document {name}: it has {names}")
        oldest = self.oldest
        begin, end = (max(0, place - oldest) for place in found[0][1:])
        keys, values = self.bank.tokens(0)
        rest = [document for document in self.documents if document.name != name]
        self.replace(
            torch.cat([keys[:, :begin], keys[:, end:]], dim=1),
            torch.cat([values[:, :begin], values[:, end:]], dim=1),
            [
                Document(own, *(place - oldest - (end - begin if place - oldest >= end else 0) for place in places))
                for own, *places in rest
            ],
        )

    def replace(self, keys: Tensor, values: Tensor, documents: Sequence[Document]) -> None:
        """Have these tokens, keys and values (H, tokens, d), and nothing else; documents count from their start."""
        self.bank.reset(0)
        self.bank.append(0, keys, values)
        self._documents = [Document(name, max(0, begin), end) for name, begin, end in documents]

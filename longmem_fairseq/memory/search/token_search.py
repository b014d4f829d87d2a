"""The contract of a search of token memories.

It finds, for the hidden state of each token, the entries of a lane's token memory with the largest inner products
(docs/method.md, "The token memory").

Legend: B rows of a batch, T queries of a row, D width of a hidden state, m entries of a row, n entries to find.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Optional, Sequence, Tuple

import torch
from torch import Tensor

Table = Sequence[Tensor]  # hidden states of entries, oldest first, in pieces (m_i, D)


class TokenSearch(ABC):
    """A way to find the entries of a token memory whose hidden states have the largest inner products with others.

    Attributes:
        name: Name of the search in the log.
    """

    name: ClassVar[str] = ""

    @classmethod
    def unavailable(cls, device: torch.device, dtype: torch.dtype, width: int) -> Optional[str]:
        """Return the reason, as a clause, why it cannot search a token memory here; None if it can.

        Args:
            device: Device of the hidden states.
            dtype: Precision in which the token memory holds them.
            width: Width of a hidden state, D.
        """
        return None

    def prepare(self, hidden: Tensor) -> Tensor:
        """Return hidden states, of any shape, in the form that is the fastest to search many times."""
        return hidden

    @abstractmethod
    def __call__(self, tables: Sequence[Table], queries: Tensor, n: int, causal: bool) -> Tuple[Tensor, Tensor]:
        """Search the table of each row.

        Args:
            tables: Entries of each row, of length 1 or 0.
            queries: Hidden states of the row's tokens, shape (B, T, D), float32.
            n: Number of entries to find.
            causal: Whether the last T entries of a table are the queries, each of which finds only those before it.

        Returns:
            Products in float32, shape (B, T, n), -inf where there are fewer entries; and the entries' numbers in their
            table, shape (B, T, n), int64, -1 there. They are in any order.
        """

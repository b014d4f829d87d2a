"""The state of reading a text: the tokens so far, in a memory and in a neural cache."""

import copy
from dataclasses import dataclass
from typing import Optional

import torch
from torch import Tensor

from ...memory.bank import MemoryBank
from ...memory.cache import NeuralCache
from ...memory.token_bank import TokenBank


@dataclass
class TextState:
    """A text read up to some point. :meth:`.scorer.Scorer.memorize` advances it; everything else only reads it.

    Attributes:
        last: Last token read, the input that predicts the next one; end-of-sentence at the start of a document. Memory
            and cache do not hold it yet.
        bank: Memory bank of one lane; None for a model without a memory.
        cache: Neural cache; None where no system is mixed with one.
        tokens: Number of tokens read.
    """

    last: int
    bank: Optional[MemoryBank] = None
    cache: Optional[NeuralCache] = None
    tokens: int = 0

    @property
    def token_bank(self) -> Optional[TokenBank]:
        """Bank of the model's token memory; None without one."""
        return self.bank and self.bank.token_bank

    def advance(self, tokens: Tensor) -> Tensor:
        """Count tokens as read; memory and cache are left to the caller.

        Args:
            tokens: Token ids that follow, shape (length,), int64.

        Returns:
            Inputs that predict them: the last token before and all of them but the last, shape (length,), int64.
        """
        if not len(tokens):
            return tokens
        inputs = torch.cat([tokens.new_tensor([self.last]), tokens[:-1]])
        self.last, self.tokens = int(tokens[-1]), self.tokens + len(tokens)
        return inputs

    def copy(self) -> "TextState":
        """Return a copy that shares nothing with this state."""
        return copy.deepcopy(self)

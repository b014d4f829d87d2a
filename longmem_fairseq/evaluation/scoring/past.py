"""What was read before the text that is scored: the memory and the cache of one stream of tokens."""

import copy
from dataclasses import dataclass
from typing import Optional

from ...memory.bank import MemoryBank
from ...memory.cache import NeuralCache


@dataclass
class Past:
    """A stream up to some point. :meth:`.scorer.Scorer.memorize` continues it; everything else only reads it.

    Attributes:
        last: the stream's last token, which predicts the next; end-of-sentence at a document's start. It is in neither
            memory nor cache yet.
        bank: the memory, of one lane; None for a model without one.
        cache: the baseline's; None where it is not asked for.
        tokens: how many tokens were memorised.
    """

    last: int
    bank: Optional[MemoryBank] = None
    cache: Optional[NeuralCache] = None
    tokens: int = 0

    def copy(self) -> "Past":
        """One that goes on by itself."""
        return copy.deepcopy(self)

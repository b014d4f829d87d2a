"""Contexts that do not fit the window are memorized once for all requests whose contexts begin alike.

Legend: T tokens of a segment.
"""

from typing import List, NamedTuple, Optional, Sequence, Tuple

import torch

from ..evaluation.scoring.scorer import Scorer
from ..evaluation.scoring.text_state import TextState

Tokens = Tuple[int, ...]


class Request(NamedTuple):
    """A request, and the start of its context that goes into the memory.

    Attributes:
        start: Token ids of the first input, which is not memorized before another follows, and of the whole segments
            that are memorized behind it.
        key: What else requests that are read together have in common.
        number: Number of the request.
    """

    start: Tokens
    key: Tuple
    number: int


def grouped(requests: Sequence[Request]) -> List[List[Request]]:
    """Return requests sorted, in groups of the same start and key."""
    groups: List[List[Request]] = []
    for request in sorted(requests):
        if groups and groups[-1][0][:2] == request[:2]:
            groups[-1].append(request)
        else:
            groups.append([request])
    return groups


class SharedContexts:
    """Memorizes the starts of sorted contexts, each segment once where neighbors begin alike.

    What is in the memory of a request does not depend on the others.

    Args:
        scorer: Scorer of the system that reads them.
        starts: Starts of the contexts, sorted.
    """

    def __init__(self, scorer: Scorer, starts: Sequence[Tokens]):
        self.scorer, self.starts = scorer, starts
        self._longest = max(map(len, starts), default=0)
        self._kept: Optional[Tuple[Tokens, TextState]] = None  # a start that the next one has in common

    def state(self, place: int, more: int) -> TextState:
        """Return the state behind a start, which the caller only reads.

        Args:
            place: Place of the start; states are requested in this order.
            more: Number of tokens that the caller memorizes behind it in a copy.
        """
        start, shared = self.starts[place], self._shared_with_next(place)
        begin, state = 1, None
        if self._kept is not None and start[: len(self._kept[0])] == self._kept[0]:
            begin, state = len(self._kept[0]), self._kept[1]
        self._kept = None
        if state is None:
            state = self.scorer.new_state(at_most=self._longest + more)
            state.last = start[0]
        if 1 < shared and begin <= shared:  # the next one continues from here
            self._memorize(state, start[begin:shared])
            begin, self._kept = shared, (start[:shared], state)
            state = state.copy() if len(start) > shared else state
        self._memorize(state, start[begin:])
        return state

    def _memorize(self, state: TextState, tokens: Tokens) -> None:
        self.scorer.memorize(state, torch.tensor(tokens, dtype=torch.int64))

    def _shared_with_next(self, place: int) -> int:
        """Return the number of tokens in the first input and the whole segments that a start and the next share."""
        if place + 1 == len(self.starts) or self.starts[place][0] != self.starts[place + 1][0]:
            return 0
        first, second = self.starts[place : place + 2]
        T, limit, shared = self.scorer.size, min(len(first), len(second)), 1
        while shared < limit and first[shared : shared + T] == second[shared : shared + T]:
            shared += T
        return shared

"""Reading a token memory: what each token finds among the entries before it.

Legend: B rows, T tokens of a segment, D width of a hidden state, m tokens of a past, n entries to read.
"""

import functools
import logging
from typing import Callable, List, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules.token_mixture import TokenReads
from .search.base import AUTO
from .search.native_token_search import NativeTokenSearch
from .search.token_search import TokenSearch
from .search.torch_token_search import TorchTokenSearch
from .token_bank import Past, TokenStates

logger = logging.getLogger(__name__)

Group = Tuple[List[int], Past]  # rows that share a past, and that past


def _in_full_precision(function: Callable) -> Callable:
    """Let a search compute without gradients and outside of autocast, which would round its products."""

    @functools.wraps(function)
    def read(*arguments):
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return read


class TokenReader:
    """Let tokens read the token memories of their rows.

    Args:
        search: Search of the entries.
        entries: Number of entries that each token reads, n (``--token-memory-k``).
    """

    def __init__(self, search: TokenSearch, entries: int):
        self.search, self.entries = search, entries

    @_in_full_precision
    def read_segments(self, pasts: Sequence[Past], states: TokenStates) -> TokenReads:
        """Let every token of a segment read its row's past, and the tokens of the segment before it.

        Args:
            pasts: Past of each row.
            states: Tokens of the segments, which no bank holds yet.
        """
        tables = [(*past.hidden, hidden) for past, hidden in zip(pasts, states.hidden)]
        scores, numbers = self.search(tables, states.hidden.float(), self.entries, True)
        followers = torch.empty_like(numbers)
        for row, (past, tokens) in enumerate(zip(pasts, states.tokens)):
            # The last of the row's tokens can never be read. The 0 is what -1 stands for.
            of_entries = torch.cat([past.tokens, tokens, tokens.new_zeros(1)])[1:]
            followers[row] = of_entries[numbers[row]]
        places = torch.arange(states.tokens.size(1), device=numbers.device)
        sizes = torch.stack([(places + len(past.tokens)).float() for past in pasts])
        return TokenReads(scores, followers, sizes)

    @_in_full_precision
    def read_windows(self, groups: Sequence[Group], states: TokenStates, lengths: Tensor) -> TokenReads:
        """Let the last token of each row's window read the row's past, and the tokens of the window before it.

        Args:
            groups: Rows that share a past, and that past; every row is in one of them.
            states: Tokens of the windows, at the right ends of the rows.
            lengths: Number of tokens in each row's window, at least 1, shape (B,), int64.

        Returns:
            Reads of shape (B, 1, ...).
        """
        results: List[Optional[Tuple[Tensor, ...]]] = [None] * len(states.tokens)
        for rows, past in groups:
            index = torch.tensor(rows, device=lengths.device)
            window = TokenStates(states.hidden[index], states.tokens[index])
            for row, read in zip(rows, zip(*self._read_last(past, window, lengths[index]))):
                results[row] = read
        return TokenReads(*(torch.stack(parts)[:, None] for parts in zip(*results)))

    def _read_last(self, past: Past, states: TokenStates, lengths: Tensor) -> Tuple[Tensor, Tensor, Tensor]:
        """Return scores, followers and sizes for the last tokens of windows (R, S) that share a past."""
        hidden, tokens = states.hidden.float(), states.tokens
        R, S = tokens.shape
        left, queries = S - lengths, hidden[:, -1]
        scores = (hidden[:, :-1] @ queries[:, :, None]).squeeze(-1)  # (R, S - 1)
        scores.masked_fill_(torch.arange(S - 1, device=left.device) < left[:, None], float("-inf"))
        followers = tokens[:, 1:]
        m = len(past.tokens)
        if m:
            of_past, numbers = (x[0] for x in self.search([past.hidden], queries[None], self.entries, False))  # (R, n)
            # The last token of the past is followed by the window's first. The 0 is what -1 stands for.
            firsts = tokens.gather(1, left[:, None])
            of_entries = torch.cat([past.tokens[1:].expand(R, -1), firsts, torch.zeros_like(firsts)], dim=1)
            followers = torch.cat([of_entries.gather(1, numbers % (m + 1)), followers], dim=1)
            scores = torch.cat([of_past, scores], dim=1)
        scores, followers = _best(scores, followers, self.entries)
        return scores, followers, (m + lengths - 1).float()


def choose_token_search(name: str, device: torch.device, dtype: torch.dtype, width: int) -> TokenSearch:
    """Make the search of token memories for ``--memory-search``: native where it can run, otherwise by PyTorch.

    Args:
        name: Value of the option; what is neither ``auto`` nor ``native`` selects the search by PyTorch.
        device: Device of the hidden states.
        dtype: Precision in which the token memory holds them.
        width: Width of a hidden state, D.
    """
    if name not in (AUTO, "native"):
        return TorchTokenSearch()
    reason = NativeTokenSearch.unavailable(device, dtype, width)
    if reason is None:
        return NativeTokenSearch()
    _log_choice(reason)
    return TorchTokenSearch()


@functools.lru_cache(maxsize=None)  # once is enough, however many memories are made
def _log_choice(reason: str) -> None:
    logger.info("search of the token memory by torch, as native is not available: %s", reason)


def _best(scores: Tensor, followers: Tensor, n: int) -> Tuple[Tensor, Tensor]:
    """Return the n largest scores (Q, k) and their followers; where there are fewer, -inf and 0."""
    missing = n - scores.size(1)
    if missing > 0:
        scores = F.pad(scores, (0, missing), value=float("-inf"))
        followers = F.pad(followers, (0, missing))
    scores, places = scores.topk(n, dim=1)
    return scores, followers.gather(1, places).masked_fill_(scores == float("-inf"), 0)

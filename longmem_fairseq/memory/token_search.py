"""Exact search of a token memory: the entries whose hidden states are nearest to a query's.

Legend: Q queries, D width of a hidden state, m tokens held, T tokens of a segment, n entries to find, V symbols.
"""

import functools
from typing import Callable, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..modules.token_mixture import TokenReads

SCORES_AT_ONCE = 1 << 24  # elements (64 MiB of float32)


class TokenStates(NamedTuple):
    """Tokens with their hidden states, as a token memory takes them.

    Attributes:
        hidden: Final hidden states as :func:`longmem_fairseq.memory.token_bank.stored` returns them, shape (B, T, D).
        tokens: Token ids that were their inputs, shape (B, T), int64.
    """

    hidden: Tensor
    tokens: Tensor


Past = Tuple[Tensor, Tensor]  # hidden states (m, D) and tokens (m,), oldest first
Found = Tuple[Tensor, Tensor, Tensor]  # the fields of TokenReads, of queries in place of rows


def _in_full_precision(function: Callable) -> Callable:
    """Let a search compute without gradients and outside of autocast, which would round its products."""

    @functools.wraps(function)
    def search(*arguments):
        with torch.no_grad(), torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return function(*arguments)

    return search


def nearest(scores: Tensor, followers: Tensor, sizes: Tensor, n: int) -> Found:
    """Find the n entries with the largest cosine for each query.

    Args:
        scores: Cosines of queries and entries, shape (Q, m), float32; -inf for an entry that a query cannot read.
        followers: Tokens that follow the entries, shape (m,) or (Q, m), int64.
        sizes: Number of entries that each query can read, shape (Q,), float32.
        n: Number of entries to find.

    Returns:
        Cosines, best first, shape (Q, n), float32, -inf where there are fewer; the tokens that followed, shape (Q, n),
        int64; and ``sizes``.
    """
    best, numbers = scores.topk(min(n, scores.size(1)), dim=1)
    tokens = followers[numbers] if followers.dim() == 1 else followers.gather(1, numbers)
    missing = n - best.size(1)
    best = F.pad(best, (0, missing), value=float("-inf"))
    return best, F.pad(tokens, (0, missing)).masked_fill_(best == float("-inf"), 0), sizes


@_in_full_precision
def read_segments(pasts: Sequence[Past], states: TokenStates, n: int) -> TokenReads:
    """Let every token of a segment read its row's past, and the tokens of the segment before it.

    Args:
        pasts: Past of each row.
        states: Tokens of the segments, which no bank holds yet.
        n: Number of entries to read.
    """
    rows = [_read_row(past, hidden, tokens, n) for past, hidden, tokens in zip(pasts, *states)]
    return TokenReads(*(torch.stack(parts) for parts in zip(*rows)))


def _read_row(past: Past, hidden: Tensor, tokens: Tensor, n: int) -> Found:
    """Return what one row's tokens (T,) with hidden states (T, D) find in their past and before them."""
    past_hidden, past_tokens = past
    m, T = past_tokens.size(0), tokens.size(0)
    entries = hidden.new_empty(m + T, hidden.size(1), dtype=torch.float32)  # the last one can never be read
    entries[:m], entries[m:] = past_hidden, hidden
    followers = torch.cat([past_tokens, tokens, tokens[-1:]])[1:]
    places = torch.arange(T, device=tokens.device)
    rows = max(1, SCORES_AT_ONCE // (m + T))
    results: List[Found] = []
    for begin in range(0, T, rows):
        numbers = places[begin : begin + rows]
        scores = entries[m + begin : m + begin + rows] @ entries.T  # (q, m + T)
        scores[:, m:].masked_fill_(places >= numbers[:, None], float("-inf"))
        results.append(nearest(scores, followers, (m + numbers).float(), n))
    return tuple(torch.cat(x) for x in zip(*results))


@_in_full_precision
def read_windows(groups: Sequence[Tuple[List[int], Past]], states: TokenStates, lengths: Tensor, n: int) -> TokenReads:
    """Let the last token of each row's window read the row's past, and the tokens of the window before it.

    Args:
        groups: Rows that share a past, and that past; every row is in one of them.
        states: Tokens of the windows, at the right ends of the rows.
        lengths: Number of tokens in each row's window, at least 1, shape (B,), int64.
        n: Number of entries to read.

    Returns:
        Reads of shape (B, 1, ...).
    """
    results: List[Optional[Found]] = [None] * len(states.tokens)
    for rows, past in groups:
        index = torch.tensor(rows, device=lengths.device)
        window = TokenStates(states.hidden[index], states.tokens[index])
        for row, read in zip(rows, zip(*_read_last(past, window, lengths[index], n))):
            results[row] = read
    return TokenReads(*(torch.stack(parts)[:, None] for parts in zip(*results)))


def _read_last(past: Past, states: TokenStates, lengths: Tensor, n: int) -> Found:
    """Return what the last tokens of windows (R, S) find in the past that they share and before them."""
    (past_hidden, past_tokens), (hidden, tokens) = past, states
    m, S = past_tokens.size(0), tokens.size(1)
    left, hidden = S - lengths, hidden.float()
    queries = hidden[:, -1]
    within = (hidden[:, :-1] @ queries[:, :, None]).squeeze(-1)  # (R, S - 1)
    within.masked_fill_(torch.arange(S - 1, device=left.device) < left[:, None], float("-inf"))
    scores = torch.cat([queries @ past_hidden.float().T, within], dim=1)  # (R, m + S - 1)
    # The last token of the past is followed by the window's first.
    followers = torch.cat([past_tokens[1:].expand(len(tokens), -1), tokens[:, 1:]], dim=1)
    if m:
        first = tokens.gather(1, left[:, None])
        followers = torch.cat([followers[:, : m - 1], first, followers[:, m - 1 :]], dim=1)
    return nearest(scores, followers, (m + lengths - 1).float(), n)

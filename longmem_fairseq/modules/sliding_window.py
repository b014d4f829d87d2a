"""Attention to a sliding window: each token attends to itself, to a fixed number of tokens before it, and to the first
tokens of its text, the attention sinks (Xiao et al., 2024, "Efficient Streaming Language Models with Attention Sinks").

What a token sees then depends neither on where a text was cut into segments nor on how many tokens are decoded at once.
The sinks are needed because a pretrained model lets heads that look for nothing attend to the first token that it sees;
without that token its perplexity rises far above that of a shorter window.

Legend: B rows of a batch, T queries, S keys, H query heads, H_kv key/value heads, d width of a head, t queries of a
block, s keys that some query of a block sees.
"""

from typing import Dict, Hashable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .causal_attention import causal_attention, has_causal_kernel
from .query_groups import group_queries, ungroup

SINKS = 4  # first tokens of a text that all its tokens attend to
_QUERIES_AT_ONCE = 256  # a block of t queries computes t * (window + t) scores
_ALIGNMENT = 8  # the fast kernels of GPUs read heads whose width is a multiple of this


class SlidingWindow:
    """A sliding window over the texts of several rows, for all layers that read the same new tokens.

    Args:
        size: Number of tokens before a query that it attends to.
        positions: Number of tokens of each row's text before the new ones, shape (B,), int64.
        started: Whether all rows have at least :data:`SINKS` tokens before the new ones.
    """

    def __init__(self, size: int, positions: Tensor, started: bool = False):
        self.size, self.positions, self.started = size, positions, started
        self._masks: Dict[Hashable, Tensor] = {}

    def sink_distances(self, tokens: int) -> Tensor:
        """Return how far back each of T new tokens sees the first sink, shape (B, T), int64; at most size + SINKS."""
        places = self.positions[:, None] + torch.arange(tokens, device=self.positions.device)
        return places.clamp(max=self.size + SINKS)

    def mask(self, rows: range, columns: range, slopes: Optional[Tensor], dtype: torch.dtype) -> Tensor:
        """Return the mask of a block of queries, which layers share.

        Args:
            rows: Numbers of the queries among the new tokens, t of them.
            columns: Numbers of the keys, s of them, counted from the first new token.
            slopes: Slopes of ALiBi, shape (H,); None for no bias.
            dtype: Type of a mask with ALiBi's bias.

        Returns:
            What each query sees of the sinks and of the keys, shape (B, 1, t, SINKS + s), bool; with ALiBi -inf for
            what it does not see, and the bias, shape (B, H, t, SINKS + s).
        """
        heads = None if slopes is None else slopes.size(0)
        place = rows, columns, heads, dtype
        if place not in self._masks:
            self._masks[place] = self._new_mask(rows, columns, slopes, dtype)
        return self._masks[place]

    def _new_mask(self, rows: range, columns: range, slopes: Optional[Tensor], dtype: torch.dtype) -> Tensor:
        device, positions = self.positions.device, self.positions.view(-1, 1, 1, 1)
        t, s = (torch.arange(x.start, x.stop, device=device) for x in (rows, columns))
        distance = t[:, None] - s  # (t, s)
        # A column's place in its text is negative for padding.
        near = ((distance >= 0) & (distance <= self.size)) & (positions + s >= SINKS)  # (B, 1, t, s)
        sinks = torch.arange(SINKS, device=device) <= positions + t[:, None]  # (B, 1, t, SINKS)
        visible = torch.cat([sinks, near], dim=3)
        if slopes is None:
            return visible
        bias = -slopes.to(device, torch.float32)[:, None, None] * distance  # float32: half collapses small multiples
        return F.pad(bias, (SINKS, 0)).to(dtype).masked_fill(~visible, float("-inf"))


class SeenWindow(NamedTuple):
    """A sliding window, and keys and values of the sinks.

    Attributes:
        window: The window.
        first_keys: Keys of the first tokens of each row's text, without position, shape (B, H_kv, SINKS, d).
        first_values: Their values, of the same shape.
    """

    window: SlidingWindow
    first_keys: Tensor
    first_values: Tensor


class Sinks(NamedTuple):
    """The first tokens of each row's text, as the new tokens see them.

    Attributes:
        scores: Scaled scores of queries and sinks, shape (B, H, T, SINKS); those of sinks that a query does not see are
            ignored.
        values: Values of the sinks, shape (B, H_kv, SINKS, d).
    """

    scores: Tensor
    values: Tensor


def first_tokens(cached: Optional[Tensor], new: Tensor, window: SlidingWindow) -> Tensor:
    """Return keys or values of the first tokens of each row's text, shape (B, H_kv, SINKS, d).

    Args:
        cached: What this function returned for the tokens before; None for no tokens.
        new: Keys or values of the new tokens, shape (B, H_kv, T, d).
        window: Window with the places of the new tokens.
    """
    if window.started and cached is not None:
        return cached
    numbers = torch.arange(SINKS, device=new.device) - window.positions[:, None]  # among the new tokens, (B, SINKS)
    index = numbers.clamp(0, new.size(2) - 1)[:, None, :, None].expand(-1, new.size(1), -1, new.size(3))
    first = new.gather(2, index)
    return first if cached is None else torch.where((numbers < 0)[:, None, :, None], cached, first)


def sink_scores(q: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """Return the scaled scores of queries (B, H, T, d) and of the sinks' keys (B, H_kv, SINKS, d)."""
    grouped = group_queries(q * scaling, keys.size(1))
    return ungroup(grouped @ keys.transpose(-1, -2), q.size(1))


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: SlidingWindow,
    sinks: Sinks,
    slopes: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from the last T of S positions to themselves, to the positions before each, and to the sinks.

    Args:
        q: Queries, shape (B, H, T, d).
        k: Keys, shape (B, H_kv, S, d); H is a multiple of H_kv.
        v: Values, shape (B, H_kv, S, d).
        window: Size of the window, and the places of the new tokens; columns before a row's text are hidden.
        sinks: What the new tokens see of the first tokens of their text.
        slopes: Slopes of ALiBi, shape (H,); None for no bias.
        dropout: Dropout probability of the attention weights.

    Returns:
        Output, shape (B, H, T, d).
    """
    if has_causal_kernel(q, dropout):
        return _attend_by_kernel(q, k, v, window, sinks, slopes)
    T, S, d = q.size(2), k.size(2), q.size(3)
    # A sink is a key of which one number more than d is 1, and in a query this number is the score. So the scores may
    # depend on the query in any way, and everything is one softmax of one kernel.
    extra = -(-SINKS // _ALIGNMENT) * _ALIGNMENT
    q = torch.cat([q, F.pad(sinks.scores.to(q.dtype) * d**0.5, (0, extra - SINKS))], dim=3)
    unit = torch.eye(SINKS, d + extra, dtype=k.dtype, device=k.device).roll(d, dims=1)
    unit = unit.expand(k.size(0), k.size(1), -1, -1)
    outputs = []
    for begin in range(0, T, _QUERIES_AT_ONCE):
        queries = q[:, :, begin : begin + _QUERIES_AT_ONCE]
        end = S - T + begin + queries.size(2)
        first = max(0, S - T + begin - window.size)
        rows = range(begin, begin + queries.size(2))
        mask = window.mask(rows, range(first - (S - T), rows.stop), slopes, queries.dtype)
        keys = torch.cat([unit, F.pad(k[:, :, first:end], (0, extra))], dim=2)
        values = F.pad(torch.cat([sinks.values, v[:, :, first:end]], dim=2), (0, extra))
        outputs.append(_attend(queries, keys, values, mask, d**-0.5, dropout)[..., :d])
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _attend_by_kernel(
    q: Tensor, k: Tensor, v: Tensor, window: SlidingWindow, sinks: Sinks, slopes: Optional[Tensor]
) -> Tensor:
    """Compute :func:`sliding_window_attention` by a kernel, whose softmax is joined with that of the sinks."""
    T, S, positions = q.size(2), k.size(2), window.positions.view(-1, 1, 1, 1)
    left = S - T + SINKS - window.positions  # columns before it are padding, or sinks
    local, sums = causal_attention(q, k, v, slopes, window.size, left)
    t = torch.arange(T, device=q.device)
    hidden = torch.arange(SINKS, device=q.device) > positions + t[:, None]  # (B, 1, T, SINKS)
    scores = sinks.scores.float().masked_fill(hidden, float("-inf"))
    weights = torch.softmax(torch.cat([sums[..., None], scores], dim=3), dim=3).to(local.dtype)
    of_sinks = group_queries(weights[..., 1:], k.size(1)) @ sinks.values.to(local.dtype)
    return weights[..., :1] * local + ungroup(of_sinks, q.size(1))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, dropout: float) -> Tensor:
    heads, kv_heads = q.size(1), k.size(1)
    options = {"dropout_p": dropout, "scale": scale}
    if q.size(2) > 1 or heads == kv_heads:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=heads != kv_heads, **options)
    grouped = group_queries(q, kv_heads)  # the queries of a group read the same keys, so that none is repeated
    if mask.size(1) == heads:
        mask = group_queries(mask, kv_heads)
    return ungroup(F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, **options), heads)

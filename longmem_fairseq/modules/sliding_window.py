"""Attention to a sliding window: each token attends to itself and to a fixed number of tokens before it.

What a token sees then depends neither on where a text was cut into segments nor on how many tokens are decoded at once.

Legend: B rows of a batch, T queries, S keys, H query heads, H_kv key/value heads, d width of a head, t queries of a
block, s keys that some query of a block sees.
"""

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from .query_groups import group_queries, ungroup

_QUERIES_AT_ONCE = 256  # a block of t queries computes t * (window + t) scores


def sliding_window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    left: Optional[Tensor] = None,
    slopes: Optional[Tensor] = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from the last T of S positions to themselves and to the ``window`` positions before each.

    Args:
        q: Queries, shape (B, H, T, d).
        k: Keys, shape (B, H_kv, S, d); H is a multiple of H_kv.
        v: Values, shape (B, H_kv, S, d).
        window: Number of positions before a query that it attends to.
        left: Number of positions of each row, from the left, that are hidden, shape (B,), int64; None for none.
        slopes: Slopes of ALiBi, shape (H,); None for no bias.
        dropout: Dropout probability of the attention weights.

    Returns:
        Output, shape (B, H, T, d).
    """
    T, S = q.size(2), k.size(2)
    outputs = []
    for begin in range(0, T, _QUERIES_AT_ONCE):
        queries = q[:, :, begin : begin + _QUERIES_AT_ONCE]
        end = S - T + begin + queries.size(2)
        first = max(0, S - T + begin - window)
        mask = _mask(queries, end - first, window, None if left is None else left - first, slopes)
        outputs.append(_attend(queries, k[:, :, first:end], v[:, :, first:end], mask, dropout))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _mask(q: Tensor, s: int, window: int, left: Optional[Tensor], slopes: Optional[Tensor]) -> Optional[Tensor]:
    """Return the mask of a block (B or 1, H or 1, t, s), bool or with ALiBi's bias; None if every query sees all."""
    t = q.size(2)
    if t == 1 and left is None and slopes is None:
        return None
    columns = torch.arange(s, device=q.device)
    rows = columns[s - t :, None]
    distance = rows - columns  # (t, s)
    visible = ((distance >= 0) & (distance <= window))[None, None]
    if left is not None:
        visible = visible & ((columns >= left.view(-1, 1, 1, 1)) | (distance == 0))  # padding sees itself, not nothing
    if slopes is None:
        return visible
    bias = -slopes.to(q.device, torch.float32)[:, None, None] * distance  # float32: half collapses small multiples
    return bias.to(q.dtype).masked_fill(~visible, float("-inf"))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Optional[Tensor], dropout: float) -> Tensor:
    heads, kv_heads = q.size(1), k.size(1)
    if q.size(2) > 1 or heads == kv_heads:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, enable_gqa=heads != kv_heads)
    grouped = group_queries(q, kv_heads)  # the queries of a group read the same keys, so that none is repeated
    if mask is not None and mask.size(1) == heads:
        mask = group_queries(mask, kv_heads)
    return ungroup(F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, dropout_p=dropout), heads)

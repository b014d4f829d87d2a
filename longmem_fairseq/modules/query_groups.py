"""Grouped-query attention: query heads that share a key/value head search and read its memory together.

Legend: B rows of a batch, H query heads, H_kv key/value heads, G = H / H_kv query heads of a group, T queries.

Query head h belongs to key/value head h // G, as in Llama and its kin; with G = 1 nothing changes.
"""

from torch import Tensor


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """Put the queries of all heads of a group end to end.

    Args:
        q: Tensor of the query heads, shape (B, H, T, ...).
        kv_heads: Number of key/value heads, H_kv; it divides H.

    Returns:
        The same numbers, shape (B, H_kv, G * T, ...); a view where ``q`` is contiguous.
    """
    return q.reshape(q.size(0), kv_heads, -1, *q.shape[3:])


def ungroup(x: Tensor, heads: int) -> Tensor:
    """Take the queries of a group apart again: the inverse of :func:`group_queries`.

    Args:
        x: Tensor of the key/value heads, shape (B, H_kv, G * T, ...).
        heads: Number of query heads, H.

    Returns:
        The same numbers, shape (B, H, T, ...).
    """
    return x.reshape(x.size(0), heads, -1, *x.shape[3:])

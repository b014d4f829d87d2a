"""Query heads grouped by the KV head that they read.

With grouped-query attention, query head h reads the keys and values of KV head h // G, where G is the number of query
heads of a KV head. The query heads of a group then are further queries of their KV head.

Legend: B rows of a batch, H query heads, H_kv KV heads, G = H / H_kv, T queries, d width of a head.
"""

from torch import Tensor


def group_queries(q: Tensor, kv_heads: int) -> Tensor:
    """Join the query heads of each KV head.

    Args:
        q: Queries of each query head, shape (B, H, T, d).
        kv_heads: Number of KV heads, H_kv.

    Returns:
        Queries of each KV head, shape (B, H_kv, G * T, d): query t of the group's query head g is at g * T + t.

    Raises:
        ValueError: The number of query heads is not a multiple of the number of KV heads.
    """
    B, H, T, d = q.shape
    if H % kv_heads:
        raise ValueError(f"{H} query heads are not a multiple of {kv_heads} KV heads")
    return q.reshape(B, kv_heads, H // kv_heads * T, d)


def ungroup(x: Tensor, heads: int) -> Tensor:
    """Split what was computed for grouped queries by query head; the inverse of :func:`group_queries`.

    Args:
        x: One vector for each grouped query, shape (B, H_kv, G * T, d); d may be any number.
        heads: Number of query heads, H.

    Returns:
        The vectors of each query head, shape (B, H, T, d).
    """
    B, kv_heads, queries, d = x.shape
    return x.reshape(B, heads, kv_heads * queries // heads, d)

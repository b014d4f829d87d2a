"""The share of memory attention that each chunk gets: for inspecting the model, not for running it.

Legend: B rows of a batch, H heads, T tokens of a segment, d width of a head, L lanes of the bank, N slots of a lane, C
tokens of a chunk, n chunks read per query and head.
"""

import torch
from torch import Tensor

from .row_products import row_products


def chunk_scores(q: Tensor, means: Tensor, lanes: Tensor, slots: Tensor) -> Tensor:
    """Return the inner products by which the search ranked chunks.

    Args:
        q: Queries, shape (B, H, T, d), any floating dtype.
        means: Mean keys of the bank's chunks, shape (L, H, N, d), float32.
        lanes: Lane of the bank for each row of the batch, shape (B,), int64.
        slots: Slots of chunks, shape (B, H, T, n), int64; -1 for none.

    Returns:
        Scores, shape (B, H, T, n), float32; zero where there is no chunk.
    """
    device = q.device
    q, lanes, slots = (x.to(means.device) for x in (q, lanes, slots))  # the bank may be on another device
    rows = _first_rows(means, lanes, slots)
    products = row_products(q.float().reshape(-1, q.size(-1)), means.view(-1, means.size(-1)), rows.flatten(0, 2))
    return products.view(slots.shape).masked_fill(slots < 0, 0.0).to(device)


def chunk_masses(q: Tensor, keys: Tensor, lanes: Tensor, slots: Tensor, scaling: float) -> Tensor:
    """Return how the attention of each query to the memory divides among the chunks that it reads.

    Args:
        q: Queries, shape (B, H, T, d), any floating dtype.
        keys: Keys of the bank, shape (L, H, N, C, d).
        lanes: Lane of the bank for each row of the batch, shape (B,), int64.
        slots: Slots of chunks, shape (B, H, T, n), int64; -1 for none.
        scaling: Factor of the scores, 1 / sqrt(d).

    Returns:
        Masses, shape (B, H, T, n), float32: the softmax over all tokens that a query reads, summed over the tokens of
        each chunk. A query's masses sum to 1, or to 0 where it reads nothing.
    """
    C, d = keys.shape[-2:]
    device = q.device
    q, lanes, slots = (x.to(keys.device) for x in (q, lanes, slots))
    tokens = torch.arange(C, device=slots.device)
    rows = _first_rows(keys, lanes, slots)[..., None] * C + tokens  # (B, H, T, n, C)
    products = row_products(q.reshape(-1, d), keys.view(-1, d), rows.flatten(3).flatten(0, 2)).view(rows.shape)
    scores = (products * scaling).masked_fill((slots < 0)[..., None], float("-inf"))
    weights = torch.softmax(scores.flatten(3), dim=-1).masked_fill((slots < 0).all(dim=-1, keepdim=True), 0.0)
    return weights.view(rows.shape).sum(dim=-1).to(device)


def _first_rows(table: Tensor, lanes: Tensor, slots: Tensor) -> Tensor:
    """Return the rows of slots in a table (L * H * N, ...) made of (L, H, N, ...), shape (B, H, T, n)."""
    H, N = table.shape[1:3]
    heads = torch.arange(H, device=slots.device)
    return (lanes[:, None] * H + heads)[:, :, None, None] * N + slots.clamp(min=0)

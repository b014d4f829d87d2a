"""Attention to the retrieved chunks of a memory (docs/method.md, "One step"; LongMem, section 2.3).

Legend: B rows of a batch, H heads, T queries, d width of a head, L lanes of the bank, N slots of a lane, C tokens of a
chunk, n chunks read per query and head, Q = B * H * T, K = n * C. With grouped-query attention H counts key/value heads
and T the queries of a group (see :mod:`longmem_fairseq.modules.query_groups`).
"""

import functools
import logging
from typing import Callable

import torch
from torch import Tensor

from .row_products import row_products, weighted_row_sums
from .triton_support import missing_triton

logger = logging.getLogger(__name__)

# (q, keys, values, lanes, slots, scaling) -> Z, see memory_attention
MemoryAttention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


class RowAttention(torch.autograd.Function):
    """Softmax attention of each query to its own rows of a table, without gathering those rows.

    Every query reads other tokens, so a plain implementation gathers (B, H, T, n * C, d) keys and values, many times
    the size of everything else in the layer. Embedding bags read them in place.
    """

    @staticmethod
    def forward(ctx, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, absent: Tensor, scaling: float):
        """Attend from each query to its rows.

        Args:
            ctx: Context of the backward pass.
            q: Queries, shape (Q, d).
            keys: Table of keys, shape (R, d).
            values: Table of values, shape (R, d).
            rows: Numbers of the rows that each query reads, shape (Q, K), int64.
            absent: Rows that are not read, shape (Q, K), bool.
            scaling: Factor of the scores.

        Returns:
            Weighted sums of values, shape (Q, d); zero where all rows are absent.
        """
        scores = (row_products(q, keys, rows) * scaling).masked_fill(absent, float("-inf"))  # (Q, K)
        # A query that reads nothing has no weights. One that is not a number, or whose scores overflow, stays visible.
        weights = torch.softmax(scores, dim=-1).masked_fill(absent.all(dim=-1, keepdim=True), 0.0)
        ctx.save_for_backward(keys, values, rows, weights)
        ctx.scaling = scaling
        return weighted_row_sums(weights.to(values.dtype), values, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """Return the gradient of the queries; the memory has none, since the frozen backbone computed it."""
        keys, values, rows, weights = ctx.saved_tensors
        products = row_products(grad, values, rows)  # (Q, K)
        grad_scores = weights * (products - (weights * products).sum(dim=-1, keepdim=True))
        return weighted_row_sums(grad_scores.to(keys.dtype), keys, rows) * ctx.scaling, None, None, None, None, None


@functools.lru_cache(maxsize=None)
def has_triton() -> bool:
    """Return whether Triton kernels can be built and run; see :func:`.triton_support.missing_triton`.

    The answer is logged once, because it decides which implementation reads the memory.
    """
    missing = missing_triton()
    logger.info("memory attention on CUDA: %s", f"embedding bags ({missing})" if missing else "Triton kernel")
    return missing is None


def memory_attention(q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, scaling: float) -> Tensor:
    """Attend from each query to all tokens of its retrieved chunks.

    On CUDA this is one Triton kernel where Triton is available (see :func:`has_triton`), elsewhere embedding bags.

    Args:
        q: Queries, shape (B, H, T, d), any floating dtype.
        keys: Keys of the bank, shape (L, H, N, C, d), without gradient. Where the bank is on another device than the
            queries, the chunks that are read are moved (see :func:`attend_across_devices`).
        values: Values of the bank, shape (L, H, N, C, d), without gradient.
        lanes: Lane of the bank for each row of the batch, shape (B,), int64.
        slots: Slots of the retrieved chunks, shape (B, H, T, n), int64; -1 reads nothing.
        scaling: Factor of the scores, 1 / sqrt(d).

    Returns:
        Z, shape (B, H, T, d), in the dtype of ``q``; zero where all slots are -1.
    """
    if keys.device != q.device:
        return attend_across_devices(memory_attention, q, keys, values, lanes, slots, scaling)
    if q.is_cuda and has_triton():
        from .memory_attention_triton import memory_attention_triton  # Triton is optional

        return memory_attention_triton(q, keys, values, lanes, slots, scaling)
    return row_memory_attention(q, keys, values, lanes, slots, scaling)


def row_memory_attention(
    q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, scaling: float
) -> Tensor:
    """Compute :func:`memory_attention` by embedding bags, on any device."""
    B, H, T, d = q.shape
    N, C = keys.shape[2:4]
    heads = torch.arange(H, device=q.device)
    first = (lanes[:, None] * H + heads)[:, :, None, None] * N  # first slot of each lane and head, (B, H, 1, 1)
    rows = (first + slots.clamp(min=0))[..., None] * C + torch.arange(C, device=q.device)  # (B, H, T, n, C)
    rows = rows.view(B * H * T, -1)
    absent = (slots < 0)[..., None].expand(*slots.shape, C).reshape(rows.shape)
    z = RowAttention.apply(q.reshape(B * H * T, d), keys.view(-1, d), values.view(-1, d), rows, absent, scaling)
    return z.view(B, H, T, d).to(q.dtype)


def attend_across_devices(
    attention: MemoryAttention, q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, scaling: float
) -> Tensor:
    """Compute :func:`memory_attention` for a bank on another device than the queries.

    The chunks that a lane reads, each once, are moved to the queries. At most T * n chunks of each head are on the
    queries' device at a time, and those of all lanes for the backward pass.

    Args:
        attention: Implementation that reads the moved chunks.
        q: Queries; this and the other arguments are those of :func:`memory_attention`.
        keys: Keys of the bank.
        values: Values of the bank.
        lanes: Lane for each row of the batch.
        slots: Slots of the retrieved chunks.
        scaling: Factor of the scores.
    """
    B, H, T, d = q.shape
    N, C = keys.shape[2:4]
    first = torch.arange(H, device=q.device)[:, None, None]
    parts = []
    for queries, lane, lane_slots in zip(q, lanes, slots):  # (H, T, d), (), (H, T, n)
        rows, places = ((lane * H + first) * N + lane_slots.clamp(min=0)).unique(return_inverse=True)
        rows = rows.to(keys.device)
        tables = [table.view(-1, C, d).index_select(0, rows).to(q.device)[None, None] for table in (keys, values)]
        places = places.masked_fill(lane_slots < 0, -1).view(1, 1, H * T, -1)  # in one table of all heads
        z = attention(queries.reshape(1, 1, H * T, d), *tables, lanes.new_zeros(1), places, scaling)
        parts.append(z.view(1, H, T, d))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def naive_memory_attention(
    q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, scaling: float
) -> Tensor:
    """Compute :func:`memory_attention` as its definition is written: the reference of the tests, and rounded as the
    released code rounds."""
    if keys.device != q.device:
        return attend_across_devices(naive_memory_attention, q, keys, values, lanes, slots, scaling)
    heads = torch.arange(q.size(1), device=q.device)[None, :, None, None]
    lanes = lanes[:, None, None, None]
    read_keys = keys[lanes, heads, slots.clamp(min=0)].float()  # (B, H, T, n, C, d)
    read_values = values[lanes, heads, slots.clamp(min=0)].float()
    scores = torch.einsum("bhtd,bhtncd->bhtnc", q.float() * scaling, read_keys)
    scores = scores.masked_fill((slots < 0)[..., None], float("-inf")).flatten(3)  # (B, H, T, K)
    weights = torch.softmax(scores, dim=-1).masked_fill((slots < 0).all(dim=-1, keepdim=True), 0.0)
    return torch.einsum("bhtk,bhtkd->bhtd", weights, read_values.flatten(3, 4)).to(q.dtype)

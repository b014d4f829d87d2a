"""Joint attention to the local window and to what was retrieved (METHOD: "One step", 4; LongMem, section 2.3).

Legend: B rows of a batch, H heads, T tokens of a segment, d width of a head, N slots of the bank, C tokens of a chunk,
n chunks read per query and head.
"""

import contextlib
import functools
import importlib.util
import logging
import os
import shutil
from typing import Optional

import torch
from torch import Tensor, nn

from .row_products import row_products, weighted_row_sums
from .self_attention import SelfAttention

logger = logging.getLogger(__name__)


class MemoryAttention(torch.autograd.Function):
    """Softmax attention of each query to the tokens of its own chunks, without copying those chunks together.

    Every query reads other tokens, so a plain implementation gathers (B, H, T, n * C, d) keys and values, many times
    the size of all else in the layer. Embedding bags read them where they lie.
    """

    @staticmethod
    def forward(ctx, q: Tensor, keys: Tensor, values: Tensor, rows: Tensor, absent: Optional[Tensor], scaling: float):
        """q (Q, d), tables keys and values (R, d), rows (Q, K) of the tables, absent (Q, K) bool -> (Q, d)."""
        scores = row_products(q, keys, rows) * scaling  # (Q, K)
        if absent is not None:
            scores = scores.masked_fill(absent, float("-inf"))
        weights = torch.softmax(scores, dim=-1)
        if absent is not None:
            weights = torch.nan_to_num(weights)  # a query that reads nothing has no weights
        ctx.save_for_backward(keys, values, rows, weights)
        ctx.scaling = scaling
        return weighted_row_sums(weights.to(values.dtype), values, rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        """The memory has no gradient (it was computed by the frozen backbone); the query has."""
        keys, values, rows, weights = ctx.saved_tensors
        products = row_products(grad, values, rows)  # (Q, K)
        grad_scores = weights * (products - (weights * products).sum(dim=-1, keepdim=True))
        return weighted_row_sums(grad_scores.to(keys.dtype), keys, rows) * ctx.scaling, None, None, None, None, None


@functools.lru_cache(maxsize=None)
def has_triton() -> bool:
    """Whether Triton kernels can be built and run here: Triton, a C compiler for its launchers, a GPU of sm_70 or up.

    The answer is logged once, as what attends to the memory depends on it.
    """
    missing = None
    if importlib.util.find_spec("triton") is None:
        missing = "Triton is not installed"
    elif not (os.environ.get("CC") or any(shutil.which(compiler) for compiler in ("cc", "gcc", "clang"))):
        missing = "Triton finds no C compiler"
    elif torch.cuda.get_device_capability() < (7, 0):
        missing = f"{torch.cuda.get_device_name()} is older than what Triton supports"
    logger.info("memory attention on CUDA: %s", f"embedding bags ({missing})" if missing else "Triton kernel")
    return missing is None


def memory_attention(q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, scaling: float) -> Tensor:
    """Attend from each query to all tokens of its retrieved chunks.

    On CUDA this is one Triton kernel where there is Triton (see :func:`has_triton`), elsewhere embedding bags.

    Args:
        q: queries, shape (B, H, T, d), any floating dtype.
        keys, values: the bank's, shape (L, H, N, C, d), without gradient; where they lie on another device than the
            queries, what is read is moved there (see :func:`attend_from_elsewhere`).
        lanes: row of the bank for each row of the batch, shape (B,), int64.
        slots: retrieved chunks, shape (B, H, T, n), int64; -1 reads nothing.
        scaling: of the scores, 1 / sqrt(d).

    Returns:
        Z, shape (B, H, T, d), dtype of q; zero where all slots are -1.
    """
    if keys.device != q.device:
        return attend_from_elsewhere(memory_attention, q, keys, values, lanes, slots, scaling)
    if q.is_cuda and has_triton():
        from .memory_attention_triton import memory_attention_triton

        return memory_attention_triton(q, keys, values, lanes, slots, scaling)
    return row_memory_attention(q, keys, values, lanes, slots, scaling)


def row_memory_attention(q, keys, values, lanes, slots, scaling) -> Tensor:
    """The same as :func:`memory_attention`, by embedding bags on any device."""
    B, H, T, d = q.shape
    L, _, N, C, _ = keys.shape
    heads = torch.arange(H, device=q.device)
    table = (lanes[:, None] * H + heads)[:, :, None, None] * N  # first slot of each lane and head, (B, H, 1, 1)
    rows = (table + slots.clamp(min=0))[..., None] * C + torch.arange(C, device=q.device)  # (B, H, T, n, C)
    rows = rows.view(B * H * T, -1)
    absent = slots < 0
    absent = absent[..., None].expand(*slots.shape, C).reshape(rows.shape)
    z = MemoryAttention.apply(
        q.reshape(B * H * T, d), keys.view(-1, d), values.view(-1, d), rows, absent, scaling
    )  # (B * H * T, d)
    return z.view(B, H, T, d).to(q.dtype)


def attend_from_elsewhere(attend, q, keys, values, lanes, slots, scaling) -> Tensor:
    """The same as :func:`memory_attention`, by ``attend``, of a bank on another device than the queries.

    The chunks that a lane reads, each once, are moved to the queries; so of keys and values at most T * n chunks of
    each head lie there at a time, and for the backward pass those of all lanes.
    """
    B, H, T, d = q.shape
    N, C = keys.shape[2:4]
    first = torch.arange(H, device=q.device)[:, None, None]
    parts = []
    for x, lane, found in zip(q, lanes, slots):  # (H, T, d), (), (H, T, n)
        rows, places = ((lane * H + first) * N + found.clamp(min=0)).unique(return_inverse=True)
        rows = rows.to(keys.device)
        read = [table.view(-1, C, d).index_select(0, rows).to(q.device)[None, None] for table in (keys, values)]
        places = places.masked_fill(found < 0, -1).view(1, 1, H * T, -1)  # in one table of all heads, (1, 1, U, C, d)
        parts.append(attend(x.reshape(1, 1, H * T, d), *read, lanes.new_zeros(1), places, scaling).view(1, H, T, d))
    return torch.cat(parts) if parts else torch.zeros_like(q)


def naive_memory_attention(q, keys, values, lanes, slots, scaling) -> Tensor:
    """The same as :func:`memory_attention`, written down plainly: the reference of the tests."""
    if keys.device != q.device:
        return attend_from_elsewhere(naive_memory_attention, q, keys, values, lanes, slots, scaling)
    B, H, T, d = q.shape
    heads = torch.arange(H, device=q.device)[None, :, None, None]
    lanes = lanes[:, None, None, None]
    read_keys = keys[lanes, heads, slots.clamp(min=0)].float()  # (B, H, T, n, C, d)
    read_values = values[lanes, heads, slots.clamp(min=0)].float()
    scores = torch.einsum("bhtd,bhtncd->bhtnc", q.float() * scaling, read_keys)
    scores = scores.masked_fill((slots < 0)[..., None], float("-inf")).flatten(3)  # (B, H, T, n * C)
    weights = torch.nan_to_num(torch.softmax(scores, dim=-1))
    return torch.einsum("bhtk,bhtkd->bhtd", weights, read_values.flatten(3, 4)).to(q.dtype)


class JointAttention(SelfAttention):
    """Self-attention that mixes in what its reader finds in the memory, with a gate per head.

    ``out = (1 - sigmoid(g)) * local + sigmoid(g) * memory``; ``out = local`` exactly where there is nothing to read.

    Attributes:
        memory_gate: g, shape (H,), starts at 0.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.memory_gate = nn.Parameter(torch.zeros(self.num_heads))
        self._reader = None

    @contextlib.contextmanager
    def reading(self, reader):
        """Within this context attention reads ``reader(q, scaling) -> (Z, present)``; None reads nothing."""
        self._reader = reader
        try:
            yield
        finally:
            self._reader = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None) -> Tensor:
        local = self.local_attention(q, k, v, left)
        gate = torch.sigmoid(self.memory_gate.float()).to(local.dtype).view(1, -1, 1, 1)
        if self._reader is None:
            # The gate stays in the graph: distributed training expects a gradient for every parameter at every step.
            return local + 0.0 * gate if self.training else local
        memory, present = self._reader(q, self.scaling)  # (B, H, T, d), (B,) bool
        if present is not None:
            gate = gate * present.to(gate.dtype).view(-1, 1, 1, 1)
        return (1 - gate) * local + gate * memory

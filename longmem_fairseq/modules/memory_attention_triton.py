"""Memory attention on CUDA as one Triton kernel: each query reads its chunks in place.

It computes the same as :func:`longmem_fairseq.modules.memory_attention.memory_attention` on the CPU. A program handles
one query of one head: it loads the K = n * C tokens of its chunks block by block (an online softmax joins the blocks),
so nothing of size (B, H, T, K) is ever written. The backward pass computes the weights again; queries and slots are
all that is kept for it.

Legend: B rows of a batch, H heads, T queries, d width of a head, L lanes, N slots of the bank, C tokens of a chunk, n
chunks read per query and head.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of one block of keys in a program: 32 floats a thread with four warps, and as many for the values.
_BLOCK = 4096


@triton.jit
def _tokens(slots, row, n, start, base, C: tl.constexpr, d: tl.constexpr, BLOCK_K: tl.constexpr):
    """Return the offsets of a query's tokens start to start + BLOCK_K - 1 in the bank, and which of them exist."""
    token = start + tl.arange(0, BLOCK_K)
    slot = tl.load(slots + row * n + token // C, mask=token < n * C, other=-1)
    return ((base + slot) * C + token % C) * d, slot >= 0


@triton.jit(do_not_specialize=["H", "T", "N", "n"])
def _forward(
    q,
    keys,
    values,
    lanes,
    slots,
    out,
    scaling,
    H,
    T,
    N,
    n,
    C: tl.constexpr,
    d: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)  # of q as (B * H * T, d)
    base = (tl.load(lanes + row // (H * T)) * H + row // T % H) * N  # first slot of this lane and head
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    x = tl.load(q + row * d + column, mask=inside, other=0.0).to(tl.float32) * scaling
    # Below all scores, but finite, so that blocks without a token leave weights of zero and not 0 * inf.
    best = -3.4e38
    total = 0.0
    z = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, n * C, BLOCK_K):
        where, present = _tokens(slots, row, n, start, base, C, d, BLOCK_K)
        mask = present[:, None] & inside[None, :]
        key = tl.load(keys + where[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        score = tl.where(present, tl.sum(key * x[None, :], axis=1), float("-inf"))
        highest = tl.maximum(best, tl.max(score, axis=0))
        weight = tl.exp(score - highest)
        shrink = tl.exp(best - highest)
        total = total * shrink + tl.sum(weight, axis=0)
        z = z * shrink + tl.sum(weight[:, None] * value, axis=0)
        best = highest
    z = z / tl.where(total == 0.0, 1.0, total)  # zero where nothing is present
    tl.store(out + row * d + column, z.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["H", "T", "N", "n"])
def _backward(
    q,
    keys,
    values,
    lanes,
    slots,
    grad,
    grad_q,
    scaling,
    H,
    T,
    N,
    n,
    C: tl.constexpr,
    d: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # With weights w and products p = grad . value, the gradient is sum w (p - mean p) key, mean over w. It is taken
    # in one pass from sums of w, w p, w key and w p key; p is counted from the first block's mean, without which the
    # difference of two large sums would lose digits where one token has nearly all the weight.
    row = tl.program_id(0).to(tl.int64)
    base = (tl.load(lanes + row // (H * T)) * H + row // T % H) * N
    column = tl.arange(0, BLOCK_D)
    inside = column < d
    x = tl.load(q + row * d + column, mask=inside, other=0.0).to(tl.float32) * scaling
    g = tl.load(grad + row * d + column, mask=inside, other=0.0).to(tl.float32)
    best = -3.4e38
    total = 0.0
    products = 0.0
    origin = 0.0
    sum_keys = tl.zeros([BLOCK_D], tl.float32)
    sum_products = tl.zeros([BLOCK_D], tl.float32)
    for start in range(0, n * C, BLOCK_K):
        where, present = _tokens(slots, row, n, start, base, C, d, BLOCK_K)
        mask = present[:, None] & inside[None, :]
        key = tl.load(keys + where[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        value = tl.load(values + where[:, None] + column[None, :], mask=mask, other=0.0).to(tl.float32)
        score = tl.where(present, tl.sum(key * x[None, :], axis=1), float("-inf"))
        highest = tl.maximum(best, tl.max(score, axis=0))
        weight = tl.exp(score - highest)
        shrink = tl.exp(best - highest)
        product = tl.sum(value * g[None, :], axis=1)
        here = tl.sum(weight, axis=0)
        mean = tl.sum(weight * product, axis=0) / tl.where(here == 0.0, 1.0, here)
        origin = tl.where(start == 0, mean, origin)
        weighted = weight * (product - origin)
        total = total * shrink + here
        products = products * shrink + tl.sum(weighted, axis=0)
        sum_keys = sum_keys * shrink + tl.sum(weight[:, None] * key, axis=0)
        sum_products = sum_products * shrink + tl.sum(weighted[:, None] * key, axis=0)
        best = highest
    total = tl.where(total == 0.0, 1.0, total)
    result = (sum_products - products / total * sum_keys) / total * scaling
    tl.store(grad_q + row * d + column, result.to(grad_q.dtype.element_ty), mask=inside)


def _launch(kernel, out: Tensor, q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, *rest):
    """Run one program per query and return ``out``; ``rest`` are the kernel's arguments behind the slots."""
    B, H, T, d = q.shape
    N, C, n = keys.size(2), keys.size(3), slots.size(3)
    BLOCK_D = triton.next_power_of_2(d)
    BLOCK_K = min(triton.next_power_of_2(n * C), max(16, _BLOCK // BLOCK_D))
    if out.numel():
        with torch.cuda.device_of(q):  # Triton launches on the current device
            kernel[(B * H * T,)](
                q, keys, values, lanes, slots, *rest, H, T, N, n, C=C, d=d, BLOCK_K=BLOCK_K, BLOCK_D=BLOCK_D
            )
    return out


class _MemoryAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, keys, values, lanes, slots, scaling):
        ctx.save_for_backward(q, keys, values, lanes, slots)
        ctx.scaling = scaling
        out = torch.empty_like(q)
        return _launch(_forward, out, q, keys, values, lanes, slots, out, scaling)

    @staticmethod
    def backward(ctx, grad):
        """Return the gradient of the queries; the memory has none, since the frozen backbone computed it."""
        q, keys, values, lanes, slots = ctx.saved_tensors
        grad_q = torch.empty_like(q)
        _launch(_backward, grad_q, q, keys, values, lanes, slots, grad.contiguous(), grad_q, ctx.scaling)
        return grad_q, None, None, None, None, None


def memory_attention_triton(
    q: Tensor, keys: Tensor, values: Tensor, lanes: Tensor, slots: Tensor, scaling: float
) -> Tensor:
    """Compute :func:`longmem_fairseq.modules.memory_attention.memory_attention` on CUDA.

    Sums are float32 whatever the dtypes of queries and bank, which may differ.

    Args:
        q: Queries, shape (B, H, T, d).
        keys: Keys of the bank, shape (L, H, N, C, d), contiguous.
        values: Values of the bank, shape (L, H, N, C, d), contiguous.
        lanes: Lane of the bank for each row of the batch, shape (B,), int64.
        slots: Slots of the retrieved chunks, shape (B, H, T, n), int64; -1 reads nothing.
        scaling: Factor of the scores, 1 / sqrt(d).

    Raises:
        ValueError: The bank is not contiguous; a copy of it would be as large as the memory.
    """
    if not (keys.is_contiguous() and values.is_contiguous()):
        raise ValueError("memory attention needs a contiguous bank of shape (L, H, N, C, d)")
    return _MemoryAttention.apply(q.contiguous(), keys, values, lanes.contiguous(), slots.contiguous(), scaling)

"""Causal attention on CUDA in Triton: with ALiBi, a sliding window and grouped queries, forward and backward.

It has the structure of FlashAttention-2 (Dao, 2023): a program holds one tile of queries and goes over the keys that
they see, and the backward pass computes the weights again from the logarithm of their sum. ALiBi's bias and the mask
are computed from positions, in float32, so nothing of size (T, S) is ever written, and tiles that are hidden as a whole
are not read. Key/value heads are not repeated. No result depends on the order in which programs run.

Legend: B rows of a batch, T queries, S keys, H query heads, H_kv key/value heads, d width of a head. The queries are
the last T of the S positions.
"""

import math
from typing import Dict, Optional, Tuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_SIZES = ["H", "kv_heads", "T", "S", "window"]


@triton.jit
def _tile(x, stride, rows, count, d: tl.constexpr, D: tl.constexpr):
    """Load some rows of a matrix; those outside are zeros, and so are columns from d on."""
    column = tl.arange(0, D)
    mask = ((rows >= 0) & (rows < count))[:, None] & (column < d)[None, :]
    return tl.load(x + rows.to(tl.int64)[:, None] * stride + column[None, :], mask=mask, other=0.0)


@triton.jit
def _put(x, stride, rows, count, value, d: tl.constexpr, D: tl.constexpr):
    """Store some rows of a matrix."""
    column = tl.arange(0, D)
    mask = (rows < count)[:, None] & (column < d)[None, :]
    tl.store(x + rows.to(tl.int64)[:, None] * stride + column[None, :], value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _scores(products, distance, shown, scale, slope, window):
    """Return scores in powers of 2; -inf where hidden: ``distance`` is that of the key before the query."""
    visible = (distance >= 0) & (distance <= window) & shown
    return tl.where(visible, products * scale - slope * distance.to(tl.float32), float("-inf"))


@triton.jit(do_not_specialize=_SIZES)
def _forward(
    q,
    k,
    v,
    out,
    sums,
    slopes,
    left,
    scale,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    out_b,
    out_h,
    out_t,
    H,
    kv_heads,
    T,
    S,
    window,
    d: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1) % H
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T  # the queries that see most keys start first
    t = first + tl.arange(0, BLOCK_T)
    x = _tile(q + b * q_b + h * q_h, q_t, t, T, d, D)
    kv = h // (H // kv_heads)
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    slope = tl.load(slopes + h)
    hidden = tl.load(left + b)
    # Below all scores, but finite, so that a tile without a visible key leaves weights of zero and not 0 * inf.
    best = tl.full([BLOCK_T], -3.4e38, tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    z = tl.zeros([BLOCK_T, D], tl.float32)
    position = S - T + t
    begin = tl.maximum(S - T + first - window, 0) // BLOCK_S * BLOCK_S
    for start in range(begin, tl.minimum(S - T + first + BLOCK_T, S), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        products = tl.dot(x, tl.trans(_tile(k, k_t, s, S, d, D)), input_precision=PRECISION)
        score = _scores(products, position[:, None] - s[None, :], (s >= hidden)[None, :], scale, slope, window)
        highest = tl.maximum(best, tl.max(score, axis=1))
        weight = tl.exp2(score - highest[:, None])
        shrink = tl.exp2(best - highest)
        value = _tile(v, v_t, s, S, d, D)
        total = total * shrink + tl.sum(weight, axis=1)
        z = tl.dot(weight.to(value.dtype), value, z * shrink[:, None], input_precision=PRECISION)
        best = highest
    total = tl.where(total == 0.0, 1.0, total)  # of queries that see nothing
    _put(out + b * out_b + h * out_h, out_t, t, T, z / total[:, None], d, D)
    tl.store(sums + tl.program_id(1).to(tl.int64) * T + t, best + tl.log2(total), mask=t < T)


@triton.jit(do_not_specialize=["H", "T"])
def _products_of_outputs(
    out,
    grad,
    products,
    out_b,
    out_h,
    out_t,
    grad_b,
    grad_h,
    grad_t,
    H,
    T,
    d: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Write the inner product of each output with its gradient."""
    b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1) % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    x = _tile(out + b * out_b + h * out_h, out_t, t, T, d, D).to(tl.float32)
    y = _tile(grad + b * grad_b + h * grad_h, grad_t, t, T, d, D).to(tl.float32)
    tl.store(products + tl.program_id(1).to(tl.int64) * T + t, tl.sum(x * y, axis=1), mask=t < T)


@triton.jit(do_not_specialize=_SIZES)
def _backward_queries(
    q,
    k,
    v,
    grad,
    grad_q,
    sums,
    products,
    slopes,
    left,
    scale,
    scaling,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    grad_b,
    grad_h,
    grad_t,
    H,
    kv_heads,
    T,
    S,
    window,
    d: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, h = tl.program_id(1).to(tl.int64) // H, tl.program_id(1) % H
    row = tl.program_id(1).to(tl.int64) * T
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_T
    t = first + tl.arange(0, BLOCK_T)
    x = _tile(q + b * q_b + h * q_h, q_t, t, T, d, D)
    g = _tile(grad + b * grad_b + h * grad_h, grad_t, t, T, d, D)
    kv = h // (H // kv_heads)
    k += b * k_b + kv * k_h
    v += b * v_b + kv * v_h
    slope = tl.load(slopes + h)
    hidden = tl.load(left + b)
    total = tl.load(sums + row + t, mask=t < T, other=float("inf"))
    mean = tl.load(products + row + t, mask=t < T, other=0.0)
    result = tl.zeros([BLOCK_T, D], tl.float32)
    position = S - T + t
    begin = tl.maximum(S - T + first - window, 0) // BLOCK_S * BLOCK_S
    for start in range(begin, tl.minimum(S - T + first + BLOCK_T, S), BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        key = _tile(k, k_t, s, S, d, D)
        value = _tile(v, v_t, s, S, d, D)
        product = tl.dot(x, tl.trans(key), input_precision=PRECISION)
        score = _scores(product, position[:, None] - s[None, :], (s >= hidden)[None, :], scale, slope, window)
        weight = tl.exp2(score - total[:, None])
        of_weight = tl.dot(g, tl.trans(value), input_precision=PRECISION)
        of_score = weight * (of_weight - mean[:, None])
        result = tl.dot(of_score.to(key.dtype), key, result, input_precision=PRECISION)
    _put(grad_q + row * d, d, t, T, result * scaling, d, D)


@triton.jit(do_not_specialize=_SIZES)
def _backward_keys(
    q,
    k,
    v,
    grad,
    grad_k,
    grad_v,
    sums,
    products,
    slopes,
    left,
    scale,
    scaling,
    q_b,
    q_h,
    q_t,
    k_b,
    k_h,
    k_t,
    v_b,
    v_h,
    v_t,
    grad_b,
    grad_h,
    grad_t,
    H,
    kv_heads,
    T,
    S,
    window,
    d: tl.constexpr,
    D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    b, kv = tl.program_id(1).to(tl.int64) // kv_heads, tl.program_id(1) % kv_heads
    first = tl.program_id(0) * BLOCK_S
    s = first + tl.arange(0, BLOCK_S)
    hidden = tl.load(left + b)
    key = _tile(k + b * k_b + kv * k_h, k_t, s, S, d, D)
    value = _tile(v + b * v_b + kv * v_h, v_t, s, S, d, D)
    of_key = tl.zeros([BLOCK_S, D], tl.float32)
    of_value = tl.zeros([BLOCK_S, D], tl.float32)
    begin = tl.maximum(first - (S - T), 0) // BLOCK_T * BLOCK_T
    end = tl.minimum(first + BLOCK_S + window - (S - T), T)
    group = H // kv_heads
    for h in range(kv * group, kv * group + group):
        slope = tl.load(slopes + h)
        row = (b * H + h) * T
        for start in range(begin, end, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            x = _tile(q + b * q_b + h * q_h, q_t, t, T, d, D)
            g = _tile(grad + b * grad_b + h * grad_h, grad_t, t, T, d, D)
            # A query that does not exist has no weights.
            total = tl.load(sums + row + t, mask=t < T, other=float("inf"))
            mean = tl.load(products + row + t, mask=t < T, other=0.0)
            product = tl.dot(key, tl.trans(x), input_precision=PRECISION)  # (s, t)
            score = _scores(product, (S - T + t)[None, :] - s[:, None], (s >= hidden)[:, None], scale, slope, window)
            weight = tl.exp2(score - total[None, :])
            of_value = tl.dot(weight.to(g.dtype), g, of_value, input_precision=PRECISION)
            of_weight = tl.dot(value, tl.trans(g), input_precision=PRECISION)
            of_score = weight * (of_weight - mean[None, :])
            of_key = tl.dot(of_score.to(x.dtype), x, of_key, input_precision=PRECISION)
    row = tl.program_id(1).to(tl.int64) * S
    _put(grad_k + row * d, d, s, S, of_key * scaling, d, D)
    _put(grad_v + row * d, d, s, S, of_value, d, D)


def _block(d: int, T: int, dtype: torch.dtype, backward: bool) -> Tuple[int, int, Dict[str, int]]:
    """Return the numbers of queries and of keys in a tile, and options of the launch."""
    D = max(16, triton.next_power_of_2(d))
    width = D * (4 if dtype == torch.float32 else 1)  # each product of float32 needs the registers of several
    if backward:
        block_t, block_s = (64, 64) if width <= 128 else (32, 32)
    else:
        block_t, block_s = (128, 64) if width <= 128 else (64, 32)
    warps = 8 if block_t == 128 or width >= 256 else 4
    most = max(16, triton.next_power_of_2(T))
    return min(block_t, most), block_s, {"d": d, "D": D, "num_warps": warps if block_t <= most else 4, "num_stages": 2}


def _strides(*tensors: Tensor) -> Tuple[int, ...]:
    return tuple(x.stride(i) for x in tensors for i in range(3))


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, slopes, left, window, scaling):
        B, H, T, d = q.shape
        kv_heads, S = k.shape[1:3]
        out = torch.empty_like(q)
        sums = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
        # A product of float32 is one of TF32 where PyTorch's products may be, and otherwise three, as exact as float32.
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
        sizes = H, kv_heads, T, S, window
        block_t, block_s, options = _block(d, T, q.dtype, backward=False)
        with torch.cuda.device_of(q):  # Triton launches on the current device
            _forward[(triton.cdiv(T, block_t), B * H)](
                *(q, k, v, out, sums, slopes, left, scaling * math.log2(math.e)),
                *_strides(q, k, v, out),
                *sizes,
                BLOCK_T=block_t,
                BLOCK_S=block_s,
                PRECISION=precision,
                **options,
            )
        ctx.save_for_backward(q, k, v, slopes, left, out, sums)
        ctx.sizes, ctx.scaling, ctx.precision = sizes, scaling, precision
        ctx.set_materialize_grads(False)
        return out, sums * math.log(2)

    @staticmethod
    def backward(ctx, grad, grad_sums):
        q, k, v, slopes, left, out, sums = ctx.saved_tensors
        (B, H, T, d), (kv_heads, S) = q.shape, k.shape[1:3]
        grad = torch.zeros_like(out) if grad is None else grad
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        products = torch.empty_like(sums)
        grads = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        block_t, block_s, options = _block(d, T, q.dtype, backward=True)
        tiles = {"BLOCK_T": block_t, "BLOCK_S": block_s, "PRECISION": ctx.precision, **options}
        scales = sums, products, slopes, left, ctx.scaling * math.log2(math.e), ctx.scaling
        strides = _strides(q, k, v, grad)
        with torch.cuda.device_of(q):
            _products_of_outputs[(triton.cdiv(T, block_t), B * H)](
                *(out, grad, products, *_strides(out, grad), H, T), BLOCK_T=block_t, **options
            )
            if grad_sums is not None:  # a score's gradient is its weight times what is counted from here
                products -= grad_sums
            _backward_queries[(triton.cdiv(T, block_t), B * H)](
                q, k, v, grad, grads[0], *scales, *strides, *ctx.sizes, **tiles
            )
            _backward_keys[(triton.cdiv(S, block_s), B * kv_heads)](
                q, k, v, grad, *grads[1:], *scales, *strides, *ctx.sizes, **tiles
            )
        return (*grads, None, None, None, None)


def causal_attention_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Optional[Tensor] = None,
    window: Optional[int] = None,
    left: Optional[Tensor] = None,
) -> Tuple[Tensor, Tensor]:
    """Attend causally from the last T of S positions.

    Args:
        q: Queries, shape (B, H, T, d).
        k: Keys, shape (B, H_kv, S, d); H is a multiple of H_kv.
        v: Values, shape (B, H_kv, S, d).
        slopes: Slopes of ALiBi, shape (H,), on the queries' device; None for no bias.
        window: Number of positions before a query that it attends to; None for all.
        left: Number of positions of each row, from the left, that are hidden, shape (B,), int64; None for none.

    Returns:
        Output, shape (B, H, T, d), in the dtype of ``q``, or in that of autocast where it is on, and the logarithm of
        the sum of exp(score) of each query, shape (B, H, T), float32. Where a query sees nothing, the output is 0 and
        the logarithm below that of any sum.
    """
    (B, H, _, d), device = q.shape, q.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else q.dtype
    q, k, v = (x.to(dtype) for x in (q, k, v))
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    slopes = torch.zeros(H, device=q.device) if slopes is None else slopes.float() * math.log2(math.e)
    left = torch.zeros(B, dtype=torch.int64, device=q.device) if left is None else left
    window = k.size(2) if window is None else window
    return _CausalAttention.apply(q, k, v, slopes, left, window, d**-0.5)

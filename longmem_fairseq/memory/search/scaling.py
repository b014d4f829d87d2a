"""Queries scaled so that no inner product with a finite key overflows float32."""

import math

import torch
from torch import Tensor


def scale_queries(queries: Tensor) -> Tensor:
    """Multiply each query by a power of two, after which scores of finite keys are finite, in the same order.

    No digit of a score changes, except where numbers vanish: products with keys below 1e-30 may count as 0.

    Args:
        queries: Queries, shape (..., d), float32.

    Returns:
        Scaled queries, shape (..., d), float32, with magnitudes below 1 / (4 d). Queries that are not finite stay so.
    """
    largest = queries.abs().amax(dim=-1, keepdim=True)
    exponent = (largest.view(torch.int32) >> 23).clamp(max=253)  # e of 1.x * 2 ** (e - 127); 0 for less than 2 ** -126
    inverse = ((254 - exponent) << 23).view(torch.float32)  # 2 ** (127 - e), so that magnitudes are below 4
    return queries * inverse * 2.0 ** -(4 + math.ceil(math.log2(queries.size(-1))))

"""Causal attention by a fused kernel on CUDA, in place of a mask in memory."""

from typing import Any, Tuple

import torch
from torch import Tensor

from .triton_support import missing_triton

_WIDEST = 512  # bytes of a head


def has_causal_kernel(q: Tensor, dropout: float) -> bool:
    """Return whether :func:`causal_attention` can attend here: on CUDA with Triton, where no weights are dropped.

    Heads may be 256 wide in half precision and 128 in float32, as far as a tile of them fits into shared memory. One
    query needs no kernel of its own: its mask is no larger than a row of scores.

    Args:
        q: Queries, shape (B, H, T, d).
        dropout: Dropout probability of the attention weights.
    """
    T, d = q.shape[2:]
    return dropout == 0.0 and T > 1 and d * q.element_size() <= _WIDEST and runs_kernels(q.device)


def runs_kernels(device: torch.device) -> bool:
    """Return whether tensors on a device can be given to Triton's kernels."""
    return device.type == "cuda" and missing_triton() is None


def causal_attention(*arguments: Any, **named: Any) -> Tuple[Tensor, Tensor]:
    """Compute :func:`.causal_attention_triton.causal_attention_triton`, whose arguments are the same."""
    from .causal_attention_triton import causal_attention_triton  # Triton is optional

    return causal_attention_triton(*arguments, **named)

"""Decoder layers of the Llama family (Touvron et al., 2023): RMSNorm, rotary grouped-query attention and SwiGLU.

Legend: B rows of a batch, T tokens, D width, F width of the feed-forward part.
"""

from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cached_attention import IncrementalState
from .rotary_attention import RotaryAttention
from .side_layer import SideLayer


class LlamaLayer(nn.Module):
    """A pre-norm decoder layer.

    Args:
        attention: Self-attention of the layer.
        width: Width D of the layer.
        inner_width: Width F of the feed-forward part.
        eps: Number added to the mean square in the norms.
        dropout: Dropout probability of what the attention and the feed-forward part add, in training.
    """

    def __init__(self, attention: RotaryAttention, width: int, inner_width: int, eps: float, dropout: float = 0.0):
        super().__init__()
        self.self_attn_norm = nn.RMSNorm(width, eps=eps)
        self.self_attn = attention
        self.feed_forward_norm = nn.RMSNorm(width, eps=eps)
        self.gate_proj = nn.Linear(width, inner_width, bias=False)
        self.up_proj = nn.Linear(width, inner_width, bias=False)
        self.down_proj = nn.Linear(inner_width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, incremental_state: IncrementalState = None, left: Optional[Tensor] = None
    ) -> Tuple[Tensor]:
        """Compute the layer's output.

        Args:
            x: Input, shape (T, B, D).
            incremental_state: Incremental state of decoding, or None.
            left: Number of columns of each row, from the left, that are padding, shape (B,), int64; None for none, or
                for those of the state.

        Returns:
            Output, shape (T, B, D), in a tuple, as fairseq's layers return it.
        """
        x = x + self.dropout(self.self_attn(self.self_attn_norm(x), incremental_state, left))
        # The inner numbers stay in the precision of the products, which a model in float32 may compute in bfloat16.
        normed = self.feed_forward_norm(x).to(self.gate_proj.weight.dtype, memory_format=torch.contiguous_format)
        gate, up = (F.linear(normed, projection.weight) for projection in (self.gate_proj, self.up_proj))
        inner = F.silu(gate) * up  # (T, B, F)
        return (x + self.dropout(self.down_proj(inner)),)


class LlamaSideLayer(SideLayer, LlamaLayer):
    """A layer of the side network of the Llama family's kind; arguments are those of :class:`LlamaLayer`."""

    output_projections = ("self_attn.out_proj", "down_proj")

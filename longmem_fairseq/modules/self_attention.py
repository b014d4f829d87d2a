"""Causal self-attention for the backbone and the side network, with the parameters of fairseq's own.

Legend: B lanes, T tokens of a segment, S cached tokens, H heads, d width of a head, D = H * d.
"""

import functools
import math
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

IncrementalState = Optional[Dict[str, Dict[str, Optional[Tensor]]]]

# Entry of an incremental state that says how many cached positions of each row, from the left, are none: {"left": (B,)
# int64}. Rows of unequal length end at the same column, so that all grow by one column a step.
LEFT_PADDING = "longmem.left_padding"


def alibi_slopes(heads: int) -> Tensor:
    """Slopes of ALiBi (Press et al., 2022), one per head, shape (heads,), float32, on the CPU.

    2^(-8i/H) for i = 1..H when H is a power of two; else those of the next lower power, then every other one of the
    next higher.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)][: heads - power]
    return torch.tensor(slopes)


def _causal_mask(alibi_heads: int, T: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Additive mask (1, 1 or alibi_heads, T, S) of the last T of S positions; without ALiBi for 0 heads."""
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)  # (T, S)
    slopes = alibi_slopes(alibi_heads) if alibi_heads else torch.zeros(1)
    bias = -slopes.to(device)[:, None, None] * distance  # float32: in half, multiples of small slopes collapse
    return bias.masked_fill_(distance < 0, float("-inf")).to(dtype)[None]


@functools.lru_cache(maxsize=2)
def _square_mask(alibi_heads: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The mask of a whole window, kept, since it has as many numbers as the layer has scores of a row."""
    with torch.inference_mode(False):  # else it could not serve a training that follows
        return _causal_mask(alibi_heads, S, S, dtype, device)


class SelfAttention(MultiheadAttention):
    """fairseq's decoder self-attention, computed by PyTorch's fused attention, optionally with ALiBi.

    Parameters, state dict keys and the calling convention are those of :class:`fairseq.modules.MultiheadAttention`, so
    that it takes the place of ``layer.self_attn`` in any fairseq decoder layer. It is always causal; since padding
    only ever follows a row's tokens, causality also hides the padding, and the masks that fairseq's decoder passes
    are not needed.

    Unlike the stock module it appends any number of tokens to its incremental state, not just one; a single token where
    the state says, under ``LEFT_PADDING``, that rows differ in length.

    Args:
        embed_dim: D.
        num_heads: H.
        dropout: dropout probability of the attention weights in training.
        bias: whether the four projections have biases.
        alibi: add ALiBi's linear bias to the scores of the local window.
        batch_first: take and give (B, T, D) instead of (T, B, D).

    Attributes:
        fused: compute by PyTorch's fused attention; off, scores are written out, as in the released LongMem, whose
            rounding it then shares.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        alibi: bool = False,
        batch_first: bool = False,
    ):
        super().__init__(embed_dim, num_heads, dropout=dropout, bias=bias, self_attention=True)
        self.alibi = alibi
        self.batch_first = batch_first
        self.fused = True

    def forward(
        self,
        query: Tensor,
        key: Optional[Tensor] = None,
        value: Optional[Tensor] = None,
        key_padding_mask: Optional[Tensor] = None,
        incremental_state: IncrementalState = None,
        need_weights: bool = False,
        static_kv: bool = False,
        attn_mask: Optional[Tensor] = None,
        before_softmax: bool = False,
        need_head_weights: bool = False,
    ) -> Tuple[Tensor, None]:
        """Attend causally from ``query`` (T, B, D) to itself and to what ``incremental_state`` holds before it.

        ``key`` and ``value`` are the query (self-attention); the masks are implied by causality. Returns the output
        (T, B, D) and, since fused attention has none, no attention weights.
        """
        q, k, v = (self._heads(projection(query)) for projection in (self.q_proj, self.k_proj, self.v_proj))
        left = None
        if incremental_state is not None:
            k, v = self._append(incremental_state, k, v)
            left = incremental_state.get(LEFT_PADDING, {}).get("left")
        x = self.attend(q, k, v, left)  # (B, H, T, d)
        x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return self.out_proj(x.reshape(query.shape)), None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None) -> Tensor:
        """Mix what the heads read, shape (B, H, T, d); joint attention overrides this."""
        return self.local_attention(q, k, v, left)

    def local_attention(self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None) -> Tensor:
        """Causal attention of the last T of S positions; q (B, H, T, d), k and v (B, H, S, d) -> (B, H, T, d).

        The first ``left`` (B,) positions of each row are not seen.
        """
        T, S = q.size(2), k.size(2)
        if not self.fused:
            return self._written_out(q, k, v, left)
        dropout = self.dropout_module.p if self.dropout_module.training else 0.0
        if left is not None:
            absent = torch.arange(S, device=q.device) < left.view(-1, 1, 1, 1)  # (B, 1, 1, S)
            mask = self._mask(T, S, q).masked_fill(absent, float("-inf"))  # (B, 1 or H, T, S)
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        if T == 1 and not self.alibi:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        if T == S and not self.alibi:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self._mask(T, S, q), dropout_p=dropout)

    def _written_out(self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor]) -> Tensor:
        T, S = q.size(2), k.size(2)
        if self.batch_first:  # the released backbone scales the scores, its side network the queries
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)  # (B, H, T, S)
        else:
            scores = torch.matmul(q * self.scaling, k.transpose(-1, -2))
        positions = torch.arange(S, device=q.device)
        if self.alibi:  # by the key's position, which differs from the distance by a constant for each query
            bias = alibi_slopes(self.num_heads).to(q.device)[:, None, None] * positions  # (H, 1, S)
            scores = scores + bias.to(q.dtype)
        scores = scores.masked_fill(positions > positions[S - T :, None], float("-inf"))
        if left is not None:
            scores = scores.masked_fill(positions < left.view(-1, 1, 1, 1), float("-inf"))
        return torch.matmul(self.dropout_module(torch.softmax(scores, dim=-1)), v)

    def _heads(self, x: Tensor) -> Tensor:
        """(T, B, D), or (B, T, D) where the batch comes first, -> (B, H, T, d)."""
        x = x.view(x.size(0), x.size(1), self.num_heads, self.head_dim)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

    def _mask(self, T: int, S: int, like: Tensor) -> Tensor:
        """Additive mask (1, 1 or H, T, S): causal, with ALiBi's bias relative to the query."""
        heads = self.num_heads if self.alibi else 0
        if T == S:  # every segment of a training: all layers share it
            return _square_mask(heads, S, like.dtype, like.device)
        return _causal_mask(heads, T, S, like.dtype, like.device)

    def _append(self, incremental_state: IncrementalState, k: Tensor, v: Tensor) -> Tuple[Tensor, Tensor]:
        """Keys and values with the cached ones before them, (B, H, S + T, d), which become the cached ones."""
        saved = self._get_input_buffer(incremental_state)
        if "prev_key" in saved:
            k = torch.cat([saved["prev_key"], k], dim=2)
            v = torch.cat([saved["prev_value"], v], dim=2)
        self._set_input_buffer(incremental_state, {"prev_key": k, "prev_value": v})
        return k, v

"""Causal self-attention of fairseq's decoders, for the backbone and the side network.

Legend: B lanes, T tokens of a segment, S cached tokens, H heads, d width of a head, D = H * d.
"""

import functools
import math
from typing import Optional, Tuple

import torch
import torch.nn.functional as F
from fairseq.modules import MultiheadAttention
from torch import Tensor

from .cached_attention import CachedAttention, IncrementalState, left_padding
from .causal_attention import causal_attention, has_causal_kernel
from .sliding_window import SINKS, SeenWindow, Sinks, sink_scores, sliding_window_attention


def alibi_slopes(heads: int) -> Tensor:
    """Return the slopes of ALiBi (Press et al., 2022), one per head.

    2^(-8i/H) for i = 1..H when H is a power of two; otherwise those of the next lower power, then every other one of
    the next higher.

    Args:
        heads: Number of heads, H.

    Returns:
        Slopes, shape (heads,), float32, on the CPU.
    """
    power = 2 ** math.floor(math.log2(heads))
    slopes = [2.0 ** (-8.0 * i / power) for i in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * i / (2 * power)) for i in range(1, 2 * power + 1, 2)][: heads - power]
    return torch.tensor(slopes)


def causal_mask(alibi_heads: int, T: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the additive causal mask of the last T of S positions.

    Args:
        alibi_heads: Number of heads with ALiBi's bias; 0 for a mask without it.
        T: Number of queries.
        S: Number of keys.
        dtype: Type of the mask.
        device: Device of the mask.

    Returns:
        The mask, shape (1, alibi_heads or 1, T, S): -inf after the query, and ALiBi's bias relative to the query.
        Square masks are kept, since all layers share them and each has as many numbers as a layer has scores.
    """
    return (_square_mask if T == S else _new_mask)(alibi_heads, T, S, dtype, device)


def forget_masks() -> None:
    """Free the square masks that are kept."""
    _square_mask.cache_clear()


def _new_mask(alibi_heads: int, T: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    distance = torch.arange(S - T, S, device=device)[:, None] - torch.arange(S, device=device)  # (T, S)
    slopes = _slopes_on(alibi_heads, device) if alibi_heads else torch.zeros(1, device=device)
    bias = -slopes[:, None, None] * distance  # float32: in half, multiples of small slopes collapse
    return bias.masked_fill_(distance < 0, float("-inf")).to(dtype)[None]


@functools.lru_cache(maxsize=None)
def _slopes_on(heads: int, device: torch.device) -> Tensor:
    """Return ALiBi's slopes on a device: a copy for each layer and segment would wait for a GPU."""
    with torch.inference_mode(False):  # otherwise a training that follows could not use them
        return alibi_slopes(heads).to(device)


@functools.lru_cache(maxsize=2)
def _square_mask(alibi_heads: int, T: int, S: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # otherwise a training that follows could not use it
        return _new_mask(alibi_heads, T, S, dtype, device)


class SelfAttention(CachedAttention, MultiheadAttention):
    """fairseq's decoder self-attention, computed by PyTorch's fused attention, optionally with ALiBi.

    Parameters, state dict keys and the calling convention are those of :class:`fairseq.modules.MultiheadAttention`, so
    that it takes the place of ``layer.self_attn`` in any fairseq decoder layer. It is always causal. Padding only ever
    follows a row's tokens, so causality hides it too, and the masks that fairseq's decoder passes are not needed.

    Args:
        embed_dim: Width D of the layer.
        num_heads: Number of heads, H.
        dropout: Dropout probability of the attention weights in training.
        bias: Whether the four projections have biases.
        alibi: Whether ALiBi's linear bias is added to the scores.
        batch_first: Whether input and output are (B, T, D) instead of (T, B, D).

    Attributes:
        fused: Whether PyTorch's fused attention is used. If false, scores are computed step by step, as in the released
            LongMem, so that results are rounded alike.
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
        """Attend causally from ``query`` to itself and to the cached tokens before it.

        Args:
            query: Input of the layer, shape (T, B, D).
            key: Ignored; it is the query.
            value: Ignored; it is the query.
            key_padding_mask: Ignored; causality implies it.
            incremental_state: Incremental state with the cache, which is extended; None outside decoding.
            need_weights: Ignored; fused attention has no weights.
            static_kv: Ignored; there is no encoder.
            attn_mask: Ignored; causality implies it.
            before_softmax: Ignored.
            need_head_weights: Ignored.

        Returns:
            Output, shape (T, B, D), and None in place of attention weights.
        """
        q = self.split_heads(self.q_proj(query))
        k, v = self.keys_and_values(query)
        if incremental_state is not None:
            k, v = self.append_to_cache(incremental_state, k, v)
        x = self.attend(q, k, v, left_padding(incremental_state), self.seen_window(incremental_state))  # (B, H, T, d)
        x = x.transpose(1, 2) if self.batch_first else x.permute(2, 0, 1, 3)
        return self.out_proj(x.reshape(query.shape)), None

    def keys_and_values(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Return projected keys and values (B, H, T, d) of the layer's normalized input (T, B, D)."""
        return self.split_heads(self.k_proj(x)), self.split_heads(self.v_proj(x))

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None, seen: Optional[SeenWindow] = None
    ) -> Tensor:
        """Compute the output of all heads, shape (B, H, T, d); joint attention overrides this.

        Arguments are those of :meth:`local_attention`.
        """
        return self.local_attention(q, k, v, left, seen)

    def local_attention(
        self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor] = None, seen: Optional[SeenWindow] = None
    ) -> Tensor:
        """Attend causally from the last T of S positions.

        Args:
            q: Queries, shape (B, H, T, d).
            k: Keys, shape (B, H, S, d).
            v: Values, shape (B, H, S, d).
            left: Number of positions of each row, from the left, that are hidden, shape (B,), int64; None for none.
            seen: Sliding window that the queries see; None for all positions.

        Returns:
            Output, shape (B, H, T, d).
        """
        T, S = q.size(2), k.size(2)
        dropout = self.dropout_module.p if self.dropout_module.training else 0.0
        slopes = _slopes_on(self.num_heads, q.device) if self.alibi else None
        if seen is not None:
            return sliding_window_attention(q, k, v, seen.window, self._sinks(q, seen, slopes), slopes, dropout)
        if not self.fused:
            return self._local_attention_by_steps(q, k, v, left)
        if left is None and not self.alibi and T in (1, S):
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=T > 1)
        if has_causal_kernel(q, dropout):
            return causal_attention(q, k, v, slopes, left=left)[0]
        mask = causal_mask(self.num_heads if self.alibi else 0, T, S, q.dtype, q.device)
        if left is not None:
            hidden = torch.arange(S, device=q.device) < left.view(-1, 1, 1, 1)  # (B, 1, 1, S)
            mask = mask.masked_fill(hidden, float("-inf"))  # (B, 1 or H, T, S)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)

    def _sinks(self, q: Tensor, seen: SeenWindow, slopes: Optional[Tensor]) -> Sinks:
        """Return what queries see of the first tokens: as far back as the window and they reach."""
        scores = sink_scores(q, seen.first_keys, self.head_dim**-0.5)
        if slopes is not None:
            far = seen.window.sink_distances(q.size(2))[:, None, :, None]  # of the first one, (B, 1, T, 1)
            distances = (far - torch.arange(SINKS, device=q.device)).float()
            scores = scores - (slopes.view(-1, 1, 1) * distances).to(q.dtype)
        return Sinks(scores, seen.first_values)

    def _local_attention_by_steps(self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor]) -> Tensor:
        T, S = q.size(2), k.size(2)
        if self.batch_first:  # the released backbone scales the scores, its side network the queries
            scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.head_dim)  # (B, H, T, S)
        else:
            scores = torch.matmul(q * self.scaling, k.transpose(-1, -2))
        positions = torch.arange(S, device=q.device)
        if self.alibi:  # by the key's position, which differs from the distance by a constant for each query
            bias = _slopes_on(self.num_heads, q.device)[:, None, None] * positions  # (H, 1, S)
            scores = scores + bias.to(q.dtype)
        scores = scores.masked_fill(positions > positions[S - T :, None], float("-inf"))
        if left is not None:
            scores = scores.masked_fill(positions < left.view(-1, 1, 1, 1), float("-inf"))
        return torch.matmul(self.dropout_module(torch.softmax(scores, dim=-1)), v)

    def split_heads(self, x: Tensor) -> Tensor:
        """Split (T, B, D), or (B, T, D) where the batch comes first, into heads: (B, H, T, d)."""
        x = x.view(x.size(0), x.size(1), self.num_heads, self.head_dim)
        return x.transpose(1, 2) if self.batch_first else x.permute(1, 2, 0, 3)

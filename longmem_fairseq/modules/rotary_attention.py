"""Causal self-attention of the Llama family: rotary positions and grouped queries.

Legend: B rows of a batch, T new tokens, S cached and new tokens, D width, H query heads, H_kv KV heads,
G = H / H_kv query heads of a KV head, d width of a head.
"""

from dataclasses import dataclass
from typing import Dict, Optional, Tuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .cached_attention import CachedAttention, IncrementalState, left_padding, sliding_window
from .causal_attention import causal_attention, has_causal_kernel
from .joint_attention import MemoryGate
from .query_groups import group_queries, ungroup
from .rotary import RotaryPositions
from .sliding_window import SINKS, SeenWindow, Sinks, sink_scores, sliding_window_attention

_UNROTATED = "unrotated_key"  # entry of the cache beside the rotated keys and the values


@dataclass(frozen=True)
class AttentionShape:
    """Sizes and parts of an attention module of the Llama family.

    Attributes:
        width: Width D of the layer.
        heads: Number of query heads, H.
        kv_heads: Number of KV heads, H_kv.
        head_dim: Width d of a head.
        qkv_bias: Whether the projections to queries, keys and values have biases (Qwen2).
        out_bias: Whether the output projection has a bias.
        qk_norm_eps: Number added to the mean square in the norms of each head's queries and keys (Qwen3); None for no
            norms.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    qkv_bias: bool = False
    out_bias: bool = False
    qk_norm_eps: Optional[float] = None


class RotaryAttention(CachedAttention, nn.Module):
    """Grouped-query attention with rotary positions.

    The cache holds rotated keys, so that a step of decoding rotates its own key only. Where the layer's keys are
    remembered, it holds them without position too. With a sliding window it holds keys without position alone.

    Args:
        shape: Sizes and parts of the module.
        rotary: Rotation of the model, shared by its layers.
        dropout: Dropout probability of the attention weights in training.

    Attributes:
        caches_unrotated: Whether the cache also holds keys without position.
    """

    def __init__(self, shape: AttentionShape, rotary: RotaryPositions, dropout: float = 0.0):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = shape.heads, shape.kv_heads, shape.head_dim
        self.rotary, self.dropout = rotary, dropout
        self.caches_unrotated = False
        self.q_proj = nn.Linear(shape.width, shape.heads * shape.head_dim, bias=shape.qkv_bias)
        self.k_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.v_proj = nn.Linear(shape.width, shape.kv_heads * shape.head_dim, bias=shape.qkv_bias)
        self.out_proj = nn.Linear(shape.heads * shape.head_dim, shape.width, bias=shape.out_bias)
        self.q_norm = self.k_norm = None
        if shape.qk_norm_eps is not None:
            self.q_norm = nn.RMSNorm(shape.head_dim, eps=shape.qk_norm_eps)
            self.k_norm = nn.RMSNorm(shape.head_dim, eps=shape.qk_norm_eps)

    def forward(self, x: Tensor, state: IncrementalState = None, left: Optional[Tensor] = None) -> Tensor:
        """Attend causally from new tokens to themselves and to the cached tokens before them.

        Args:
            x: Normalized input of the layer, shape (T, B, D).
            state: Incremental state with the cache, which is extended; None outside decoding.
            left: Number of columns of each row, from the left, that are padding, shape (B,), int64; None for none, or
                for those of the state.

        Returns:
            Output, shape (T, B, D).
        """
        left = left_padding(state) if left is None else left
        x = x.to(self.q_proj.weight.dtype, memory_format=torch.contiguous_format)  # once for three products
        start = self.cache(state)["prev_key"].size(2) if self.cache(state) else 0
        q = self.queries(x)
        unrotated, v = self.keys_and_values(x)
        window = sliding_window(state)
        rotated = self.rotary.rotate(q, start, left)
        if window is not None:
            k, v = self.append_to_cache(state, unrotated, v)
            sinks = self._sinks(q, self.seen_window(state))
            dropout = self.dropout if self.training else 0.0
            local = sliding_window_attention(rotated, self.rotary.rotate(k, 0, left), v, window, sinks, dropout=dropout)
        else:
            k = self.rotary.rotate(unrotated, start, left)
            if state is not None:
                k, v = self._extend_cache(state, k, v, unrotated)
            local = self._local_attention(rotated, k, v, left)
        return self.out_proj(self.combine(q, local).permute(2, 0, 1, 3).flatten(2))

    def _sinks(self, q: Tensor, seen: SeenWindow) -> Sinks:
        """Return what queries without position see of the first tokens: as far back as the window and they reach."""
        window = seen.window
        far = self.rotary.rotate_to(q, window.sink_distances(q.size(2)), window.size + SINKS)
        return Sinks(sink_scores(far, self.rotary.rotate(seen.first_keys), self.head_dim**-0.5), seen.first_values)

    def queries(self, x: Tensor) -> Tensor:
        """Return queries without position, shape (B, H, T, d), of the layer's normalized input (T, B, D)."""
        q = self._split(self.q_proj(x), self.heads)
        return q if self.q_norm is None else self.q_norm(q)

    def keys_and_values(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Return keys without position and values (B, H_kv, T, d) of the layer's normalized input (T, B, D)."""
        k, v = (self._split(projection(x), self.kv_heads) for projection in (self.k_proj, self.v_proj))
        return (k if self.k_norm is None else self.k_norm(k)), v

    def combine(self, q: Tensor, local: Tensor) -> Tensor:
        """Return the output of all heads; joint attention overrides this.

        Args:
            q: Queries without position, shape (B, H, T, d).
            local: Output of local attention, shape (B, H, T, d).
        """
        return local

    def cached_without_position(self, state: IncrementalState) -> Tuple[Tensor, Tensor]:
        cache = self.extended_cache(state)
        return cache["prev_key" if sliding_window(state) is not None else _UNROTATED], cache["prev_value"]

    def _extend_cache(self, state: IncrementalState, k: Tensor, v: Tensor, unrotated: Tensor) -> Tuple[Tensor, Tensor]:
        cache = {"prev_key": k, "prev_value": v, **({_UNROTATED: unrotated} if self.caches_unrotated else {})}
        before: Dict[str, Tensor] = self.cache(state)
        if before:
            cache = {name: torch.cat([before[name], x], dim=2) for name, x in cache.items()}
        self.set_cache(state, cache)
        return cache["prev_key"], cache["prev_value"]

    def _local_attention(self, q: Tensor, k: Tensor, v: Tensor, left: Optional[Tensor]) -> Tensor:
        """Attend causally from the last T of S positions; arguments are rotated, shape (B, H or H_kv, T or S, d)."""
        T, S = q.size(2), k.size(2)
        dropout = self.dropout if self.training else 0.0
        if T == 1:  # the queries of a group read the same keys, so that none is repeated
            visible = None if left is None else self._visible(T, S, left)
            grouped = F.scaled_dot_product_attention(
                group_queries(q, self.kv_heads), k, v, attn_mask=visible, dropout_p=dropout
            )
            return ungroup(grouped, self.heads)
        grouped = self.heads != self.kv_heads
        # PyTorch's fast kernels do not group queries in float32, and take a mask where queries or keys are left out.
        whole = left is None and T == S
        if not (whole and (q.dtype != torch.float32 or not grouped)) and has_causal_kernel(q, dropout):
            return causal_attention(q, k, v, left=left)[0]
        if whole:
            return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True, enable_gqa=grouped)
        left = torch.zeros(1, dtype=torch.int64, device=q.device) if left is None else left
        visible = self._visible(T, S, left)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, enable_gqa=grouped)

    @staticmethod
    def _visible(T: int, S: int, left: Tensor) -> Tensor:
        """Return what the last T of S columns may attend to, shape (B, 1, T, S), bool."""
        columns = torch.arange(S, device=left.device)
        rows = columns[S - T :, None]
        # Padding sees itself: a row of the softmax without any column would be NaN.
        return ((columns <= rows) & (columns >= left.view(-1, 1, 1, 1))) | (columns == rows)

    def _split(self, x: Tensor, heads: int) -> Tensor:
        """Split (T, B, heads * d) into heads: (B, heads, T, d)."""
        return x.view(x.size(0), x.size(1), heads, self.head_dim).permute(1, 2, 0, 3)


class RotaryJointAttention(MemoryGate, RotaryAttention):
    """:class:`RotaryAttention` that also reads a memory.

    Keys are remembered without position and read with queries without position; or with queries that are turned by a
    constant, as if all of the memory were at one distance (InfLLM; Xiao et al., 2024).

    Args:
        shape: Sizes and parts of the module.
        rotary: Rotation of the model.
        dropout: Dropout probability of the local attention weights in training.
        query_distance: Distance by which the queries that read the memory are turned, in tokens.
    """

    def __init__(self, shape: AttentionShape, rotary: RotaryPositions, dropout: float = 0.0, query_distance: int = 0):
        super().__init__(shape, rotary, dropout)
        self.query_distance = query_distance
        # The local scores are of queries and keys that both have YaRN's magnitude.
        self.memory_scaling = shape.head_dim**-0.5 * rotary.magnitude**2
        self.add_gate(shape.heads)

    def combine(self, q: Tensor, local: Tensor) -> Tensor:
        if self.query_distance:
            q = self.rotary.turn_by(q, self.query_distance)
        return self.mix(q, local, self.memory_scaling)

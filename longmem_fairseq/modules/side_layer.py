"""Layers of the side network: decoder layers of the backbone's kind and shape, one of them reading the memory."""

import copy
from typing import Optional

from fairseq.models.transformer import TransformerConfig
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..released.parallel_layer import ParallelLayer
from .joint_attention import JointAttention
from .self_attention import SelfAttention


class _Reading(nn.Module):
    """What a side layer adds to a decoder layer: a reader, and recomputation of its activations."""

    recompute = False

    def forward(self, x: Tensor, skip: Tensor, reader=None, incremental_state=None) -> Tensor:
        """This layer of x, plus ``skip``: (T, B, D) all, reading from ``reader`` where this layer reads at all."""
        # The plain form of checkpointing keeps gradients of parameters whose input needs none, as x_0's does not.
        if self.recompute and self.training:
            return checkpoint(self._forward, x, skip, reader, incremental_state, use_reentrant=False)
        return self._forward(x, skip, reader, incremental_state)

    def _forward(self, x: Tensor, skip: Tensor, reader, incremental_state) -> Tensor:
        if isinstance(self.self_attn, JointAttention):
            with self.self_attn.reading(reader):
                return self._add(x, skip, incremental_state)
        return self._add(x, skip, incremental_state)

    def _add(self, x: Tensor, skip: Tensor, incremental_state) -> Tensor:
        return super().forward(x, incremental_state=incremental_state)[0] + skip

    def start_from(self, layer: nn.Module) -> None:
        """Take over the weights of a backbone layer; the gate, which has none there, stays as it is."""
        missing, unexpected = self.load_state_dict(layer.state_dict(), strict=False)
        if set(missing) - {"self_attn.memory_gate"} or unexpected:
            raise ValueError(f"a side layer does not fit the backbone's: {missing + unexpected}")


class SideLayer(_Reading, TransformerDecoderLayerBase):
    """fairseq's pre-norm decoder layer, whose self-attention may read a memory.

    Args:
        cfg: the backbone decoder's configuration, with the side network's dropout probabilities.
        reads_memory: whether this is layer s, with joint attention.
        alibi: whether the backbone has ALiBi.
        recompute: recompute activations in the backward pass instead of keeping them (``--checkpoint-activations``).
    """

    def __init__(self, cfg: TransformerConfig, reads_memory: bool, alibi: bool, recompute: bool = False):
        super().__init__(cfg, no_encoder_attn=True)
        attention = JointAttention if reads_memory else SelfAttention
        self.self_attn = attention(
            self.embed_dim, cfg.decoder.attention_heads, dropout=cfg.attention_dropout, alibi=alibi
        )
        self.recompute = recompute


class ParallelSideLayer(_Reading, ParallelLayer):
    """A layer with attention and MLP side by side, whose self-attention may read a memory.

    Arguments as for :class:`SideLayer`, but it always has ALiBi.
    """

    def __init__(self, cfg: TransformerConfig, reads_memory: bool, recompute: bool = False):
        super().__init__(cfg, JointAttention if reads_memory else SelfAttention)
        self.recompute = recompute

    def _add(self, x: Tensor, skip: Tensor, incremental_state) -> Tensor:
        # In the order of the released code, which decides the last digits.
        return ParallelLayer.forward(self, x, incremental_state=incremental_state, residual=skip + x)[0]


def build_side_layer(like: nn.Module, cfg: TransformerConfig, reads_memory: bool, recompute: bool) -> _Reading:
    """A side layer of the same kind as a backbone's layer."""
    if isinstance(like, ParallelLayer):
        return ParallelSideLayer(cfg, reads_memory, recompute)
    return SideLayer(cfg, reads_memory, like.self_attn.alibi, recompute)


def side_layer_config(
    backbone_cfg: TransformerConfig, dropout: float, attention_dropout: float, activation_fn: Optional[str] = None
) -> TransformerConfig:
    """The backbone's layer configuration with the side network's dropout, and its activation if it is another."""
    cfg = copy.deepcopy(backbone_cfg)
    cfg.activation_fn = activation_fn or cfg.activation_fn
    cfg.dropout = dropout
    cfg.attention_dropout = attention_dropout
    cfg.activation_dropout = cfg.relu_dropout = 0.0
    cfg.checkpoint_activations = cfg.offload_activations = False
    return cfg

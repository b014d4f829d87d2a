"""A decoder layer whose attention and MLP are side by side: x + attention(norm x) + mlp(norm x).

Legend: B lanes, T tokens of a segment, D width.
"""

from typing import Optional, Tuple, Type

from fairseq import utils
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import LayerNorm
from fairseq.modules.fairseq_dropout import FairseqDropout
from torch import Tensor, nn

from ..modules.cached_attention import IncrementalState
from ..modules.joint_attention import JointAttention
from ..modules.self_attention import SelfAttention
from ..modules.side_layer import SideLayer


class ParallelLayer(nn.Module):
    """Attention and MLP on one LayerNorm, with biases in the MLP only and ALiBi (as in the released LongMem).

    It is called like fairseq's decoder layers. Dropout is applied to the local attention weights and to the MLP's
    output.

    Args:
        cfg: Configuration of the decoder.
        attention: Class of the attention, :class:`SelfAttention` or one derived from it.
        batch_first: Whether the layer computes on (B, T, D), as the released backbone does; on (T, B, D) numbers are
            rounded differently.

    Attributes:
        ln_1: The LayerNorm; fairseq's own layers call it ``self_attn_layer_norm``.
    """

    def __init__(
        self, cfg: TransformerConfig, attention: Type[SelfAttention] = SelfAttention, batch_first: bool = False
    ):
        super().__init__()
        width = cfg.decoder.embed_dim
        self.batch_first = batch_first
        self.self_attn = attention(
            width, cfg.decoder.attention_heads, cfg.attention_dropout, bias=False, alibi=True, batch_first=batch_first
        )
        self.ln_1 = LayerNorm(width)
        self.fc1 = nn.Linear(width, cfg.decoder.ffn_embed_dim)
        self.fc2 = nn.Linear(cfg.decoder.ffn_embed_dim, width)
        self.activation_fn = utils.get_activation_fn(cfg.activation_fn)
        self.dropout_module = FairseqDropout(cfg.dropout, module_name=type(self).__name__)

    @property
    def self_attn_layer_norm(self) -> nn.Module:
        """The LayerNorm, under the name in fairseq's layers."""
        return self.ln_1

    def forward(
        self,
        x: Tensor,
        encoder_out=None,
        padding_mask=None,
        incremental_state: IncrementalState = None,
        residual: Optional[Tensor] = None,
        **masks,
    ) -> Tuple[Tensor, None, None]:
        """Compute the layer.

        Args:
            x: Input, shape (T, B, D).
            encoder_out: Ignored; there is no encoder.
            padding_mask: Ignored; causality implies it.
            incremental_state: Incremental state of decoding, or None.
            residual: Tensor that is added in place of ``x``, shape (T, B, D).
            masks: Ignored; causality implies them.

        Returns:
            Output (T, B, D), and None for the attention weights and the state that fairseq's layers return.
        """
        residual = x if residual is None else residual
        if self.batch_first:
            x, residual = x.transpose(0, 1), residual.transpose(0, 1)
        normalized = self.ln_1(x)
        attended, _ = self.self_attn(normalized, incremental_state=incremental_state)
        mlp = self.dropout_module(self.fc2(self.activation_fn(self.fc1(normalized))))
        x = attended + mlp + residual
        return x.transpose(0, 1) if self.batch_first else x, None, None

    def upgrade_state_dict_named(self, state_dict, name):
        """Change nothing; fairseq's decoder calls this on every layer."""


class ParallelSideLayer(SideLayer, ParallelLayer):
    """:class:`ParallelLayer` as a layer of the side network.

    Args:
        cfg: Configuration of the backbone's decoder, with the side network's dropout.
        reads_memory: Whether its self-attention also reads the memory.
        recompute: Whether activations are recomputed in the backward pass.
    """

    output_projections = ("self_attn.out_proj", "fc2")

    def __init__(self, cfg: TransformerConfig, reads_memory: bool, recompute: bool = False):
        super().__init__(cfg, JointAttention if reads_memory else SelfAttention)
        self.recompute = recompute

    def add_skip(self, x: Tensor, skip: Tensor, incremental_state) -> Tensor:
        # In the order of the released code, which decides the last digits.
        return ParallelLayer.forward(self, x, incremental_state=incremental_state, residual=skip + x)[0]

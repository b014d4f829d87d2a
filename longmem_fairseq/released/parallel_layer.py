"""A decoder layer whose attention and MLP stand side by side: x + attention(norm x) + mlp(norm x).

Legend: B lanes, T tokens of a segment, D width.
"""

from typing import Optional, Tuple

from fairseq import utils
from fairseq.models.transformer import TransformerConfig
from fairseq.modules import LayerNorm
from fairseq.modules.fairseq_dropout import FairseqDropout
from torch import Tensor, nn

from ..modules.self_attention import IncrementalState, SelfAttention


class ParallelLayer(nn.Module):
    """Parallel attention and MLP on one LayerNorm, with biases in the MLP only and ALiBi (as in the released LongMem).

    It is called like fairseq's decoder layers. Dropout is applied to the local attention weights and to what the MLP
    gives.

    Args:
        cfg: the decoder's configuration.
        attention: class of the attention, :class:`SelfAttention` or one of its kind.
        batch_first: compute on (B, T, D) within, as the released backbone does; numbers are rounded otherwise on
            (T, B, D).

    Attributes:
        ln_1: the LayerNorm; also ``self_attn_layer_norm``, its name in fairseq's own layers.
    """

    def __init__(self, cfg: TransformerConfig, attention=SelfAttention, batch_first: bool = False):
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
        """x (T, B, D) -> (T, B, D), and neither attention weights nor a state, which fairseq's layers give too.

        Args:
            incremental_state: see :class:`SelfAttention`.
            residual: added in place of x, (T, B, D).
            masks: implied by causality.
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
        """Nothing to do: fairseq's decoder asks every layer."""

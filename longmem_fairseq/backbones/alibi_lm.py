"""A stock ``transformer_lm`` with ALiBi in place of position embeddings, trainable by ``fairseq-train``.

ALiBi (Press et al., 2022) penalizes attention linearly by distance. The weights are those of ``transformer_lm``
without position embeddings; only the attention differs.
"""

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerDecoder
from fairseq.models.transformer_lm import (
    TransformerLanguageModel,
    TransformerLanguageModelConfig,
    base_lm_architecture,
)
from fairseq.utils import safe_getattr

from ..modules.self_attention import SelfAttention


class AlibiDecoder(TransformerDecoder):
    """fairseq's decoder with :class:`SelfAttention` and ALiBi in every layer."""

    def build_decoder_layer(self, args, no_encoder_attn=False):
        layer = super().build_decoder_layer(args, no_encoder_attn)
        stock = layer.self_attn
        layer.self_attn = SelfAttention(
            stock.embed_dim, stock.num_heads, dropout=args.attention_dropout, bias=True, alibi=True
        )
        return layer


@register_model("alibi_lm", dataclass=TransformerLanguageModelConfig)
class AlibiLanguageModel(TransformerLanguageModel):
    """Decoder-only language model with ALiBi."""

    @classmethod
    def build_model(cls, args, task):
        """Build the model from its configuration.

        Args:
            args: Configuration of the model.
            task: fairseq task with the dictionary.

        Raises:
            ValueError: The configuration has adaptive inputs, an adaptive softmax or character embeddings.
        """
        for option in ("adaptive_input", "adaptive_softmax_cutoff", "character_embeddings"):
            if safe_getattr(args, option, None):
                raise ValueError(f"alibi_lm does not support --{option.replace('_', '-')}: use --arch transformer_lm")
        args.decoder_normalize_before = True
        args.no_token_positional_embeddings = True
        args.decoder_learned_pos = False
        if safe_getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = args.tokens_per_sample
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_input_dim)
        return cls(AlibiDecoder(args, task.target_dictionary, embed_tokens, no_encoder_attn=True))


def set_default_size(args, layers: int, width: int, heads: int) -> None:
    """Set the size of a decoder where the options do not set it; the MLP is four times as wide as the model.

    Args:
        args: Options of the model, changed in place.
        layers: Number of layers.
        width: Width of the model.
        heads: Number of attention heads.
    """
    args.decoder_layers = safe_getattr(args, "decoder_layers", layers)
    args.decoder_embed_dim = safe_getattr(args, "decoder_embed_dim", width)
    args.decoder_attention_heads = safe_getattr(args, "decoder_attention_heads", heads)
    args.decoder_ffn_embed_dim = safe_getattr(args, "decoder_ffn_embed_dim", 4 * args.decoder_embed_dim)


def _architecture(args, layers, width, heads):
    set_default_size(args, layers, width, heads)
    args.activation_fn = safe_getattr(args, "activation_fn", "gelu")
    args.share_decoder_input_output_embed = safe_getattr(args, "share_decoder_input_output_embed", True)
    args.no_scale_embedding = safe_getattr(args, "no_scale_embedding", True)
    base_lm_architecture(args)
    args.decoder_normalize_before = True
    args.no_token_positional_embeddings = True
    args.decoder_input_dim = args.decoder_output_dim = args.decoder_embed_dim


@register_model_architecture("alibi_lm", "alibi_lm_tiny")
def alibi_lm_tiny(args):
    """4 layers of width 128, 4 heads: for tests."""
    _architecture(args, 4, 128, 4)


@register_model_architecture("alibi_lm", "alibi_lm_mini")
def alibi_lm_mini(args):
    """6 layers of width 256, 8 heads: the backbone of the quick start."""
    _architecture(args, 6, 256, 8)


@register_model_architecture("alibi_lm", "alibi_lm_small")
def alibi_lm_small(args):
    """12 layers of width 768, 12 heads: GPT-2 small's size."""
    _architecture(args, 12, 768, 12)


@register_model_architecture("alibi_lm", "alibi_lm_medium")
def alibi_lm_medium(args):
    """24 layers of width 1024, 16 heads: GPT-2 medium's size, that of the published backbone."""
    _architecture(args, 24, 1024, 16)

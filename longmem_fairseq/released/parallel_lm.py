"""A language model whose layers have attention and MLP side by side: the backbone of the released LongMem.

It has ALiBi, one LayerNorm a layer, biases in the MLP and in the output projection only, and an output projection that
is not tied to the embedding. ``fairseq-train`` trains it, and the released backbone's checkpoint is one of its
architectures.
"""

from dataclasses import dataclass, field

from fairseq.models import register_model, register_model_architecture
from fairseq.models.transformer import TransformerDecoder
from fairseq.models.transformer_lm import TransformerLanguageModel, TransformerLanguageModelConfig, base_lm_architecture
from fairseq.utils import safe_getattr
from torch import nn

from ..backbones.alibi_lm import set_default_size
from ..modules.layer_norm import set_layer_norm_eps
from . import released_checkpoint
from .parallel_layer import ParallelLayer


@dataclass
class ParallelLanguageModelConfig(TransformerLanguageModelConfig):
    """Options of ``transformer_lm``, and one more."""

    layer_norm_eps: float = field(default=1e-5, metadata={"help": "eps of all LayerNorms"})


class ParallelDecoder(TransformerDecoder):
    """fairseq's decoder with layers of :class:`ParallelLayer` and a bias in the output projection."""

    def __init__(self, args, dictionary, embed_tokens):
        super().__init__(args, dictionary, embed_tokens, no_encoder_attn=True)
        set_layer_norm_eps(self, args.layer_norm_eps)

    def build_decoder_layer(self, args, no_encoder_attn=False):
        return ParallelLayer(args, batch_first=True)

    def build_output_projection(self, args, dictionary, embed_tokens):
        self.output_projection = nn.Linear(self.output_embed_dim, len(dictionary))
        nn.init.normal_(self.output_projection.weight, mean=0, std=self.output_embed_dim**-0.5)
        nn.init.zeros_(self.output_projection.bias)

    def upgrade_state_dict_named(self, state_dict, name):
        """Rename the weights of a released backbone, which has other names."""
        released_checkpoint.rename_backbone(state_dict, name + ".")
        return super().upgrade_state_dict_named(state_dict, name)


@register_model("parallel_lm", dataclass=ParallelLanguageModelConfig)
class ParallelLanguageModel(TransformerLanguageModel):
    """Decoder-only language model with attention and MLP side by side, and ALiBi."""

    @classmethod
    def build_model(cls, args, task):
        """Build the model from its own configuration or that of a released backbone.

        Args:
            args: Configuration of the model.
            task: fairseq task with the dictionary.

        Raises:
            ValueError: The configuration has settings that this model does not support.
        """
        _translate(args)
        for option in ("adaptive_input", "adaptive_softmax_cutoff", "character_embeddings", "layernorm_embedding"):
            if safe_getattr(args, option, None):
                raise ValueError(
                    f"parallel_lm does not support --{option.replace('_', '-')}: use --arch transformer_lm"
                )
        if safe_getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = args.tokens_per_sample
        embed_tokens = cls.build_embedding(args, task.source_dictionary, args.decoder_embed_dim)
        return cls(ParallelDecoder(args, task.target_dictionary, embed_tokens))


def _translate(args) -> None:
    """Translate the settings of a released backbone, and set what this model does not vary."""
    for name, value in released_checkpoint.backbone_settings(args).items():
        setattr(args, name, value)
    args.no_token_positional_embeddings = args.no_scale_embedding = True
    args.share_decoder_input_output_embed = args.decoder_learned_pos = False
    args.decoder_input_dim = args.decoder_output_dim = args.decoder_embed_dim
    args.layer_norm_eps = safe_getattr(args, "layer_norm_eps", 1e-5)


def _architecture(args, layers, width, heads):
    set_default_size(args, layers, width, heads)
    args.activation_fn = safe_getattr(args, "activation_fn", "gelu_accurate")
    _translate(args)
    base_lm_architecture(args)


@register_model_architecture("parallel_lm", "parallel_lm_tiny")
def parallel_lm_tiny(args):
    """4 layers of width 128, 4 heads: for tests."""
    _architecture(args, 4, 128, 4)


@register_model_architecture("parallel_lm", "parallel_lm_small")
@register_model_architecture("parallel_lm", "newgpt-small")
def parallel_lm_small(args):
    """12 layers of width 768, 12 heads: GPT-2 small's size; also under its released name."""
    _architecture(args, 12, 768, 12)


@register_model_architecture("parallel_lm", "newgpt-mini")
def newgpt_mini(args):
    """8 layers of width 128, 4 heads, by its released name."""
    _architecture(args, 8, 128, 4)


@register_model_architecture("parallel_lm", "parallel_lm_medium")
@register_model_architecture("parallel_lm", "newgpt-medium")
def parallel_lm_medium(args):
    """24 layers of width 1024, 16 heads: GPT-2 medium's size, that of the released backbone."""
    _architecture(args, 24, 1024, 16)


@register_model_architecture("parallel_lm", "newgpt-large")
def newgpt_large(args):
    """36 layers of width 1280, 20 heads, by its released name."""
    _architecture(args, 36, 1280, 20)


@register_model_architecture("parallel_lm", "newgpt-xl")
def newgpt_xl(args):
    """48 layers of width 1600, 25 heads, by its released name."""
    _architecture(args, 48, 1600, 25)

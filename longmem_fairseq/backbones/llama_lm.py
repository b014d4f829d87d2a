"""``llama_lm``: decoder-only language models of the Llama family, as a model of fairseq.

One model covers Llama 2 and 3, SmolLM and SmolLM2, Mistral, Qwen2, Qwen2.5 and Qwen3 (dense): RMSNorm, rotary positions
and their scalings, grouped-query attention, SwiGLU, and optionally biases and norms of queries and keys. It trains from
scratch with ``fairseq-train --arch llama_lm_small``, and ``preprocess.convert_huggingface`` converts pretrained ones.

Legend: B rows of a batch, T tokens, S tokens with the cached ones, D width, V symbols.
"""

import json
from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Tuple

import torch
from fairseq.dataclass import FairseqDataclass
from fairseq.models import (
    FairseqIncrementalDecoder,
    FairseqLanguageModel,
    register_model,
    register_model_architecture,
)
from fairseq.utils import safe_getattr
from omegaconf import II
from torch import Tensor, nn

from ..modules.llama_layer import LlamaLayer
from ..modules.rotary import RotaryPositions
from ..modules.rotary_attention import AttentionShape, RotaryAttention


@dataclass
class LlamaConfig(FairseqDataclass):
    """Options of ``llama_lm``."""

    decoder_layers: int = field(default=12, metadata={"help": "number of layers"})
    decoder_embed_dim: int = field(default=768, metadata={"help": "width of the model"})
    decoder_ffn_embed_dim: int = field(default=2048, metadata={"help": "width of the feed-forward part (SwiGLU)"})
    decoder_attention_heads: int = field(default=12, metadata={"help": "number of query heads"})
    decoder_kv_heads: Optional[int] = field(
        default=None, metadata={"help": "number of key/value heads (default: that of query heads)"}
    )
    decoder_head_dim: Optional[int] = field(
        default=None, metadata={"help": "width of a head (default: width of the model / number of query heads)"}
    )
    rope_theta: float = field(default=10000.0, metadata={"help": "base of the rotary frequencies"})
    rope_scaling: Optional[str] = field(
        default=None,
        metadata={
            "help": "scaling of the rotary frequencies: a JSON object as Hugging Face's rope_parameters, of type "
            "linear, llama3 or yarn"
        },
    )
    sliding_window: Optional[int] = field(
        default=None, metadata={"help": "longest window in which every token sees all before it (Mistral)"}
    )
    qkv_bias: bool = field(default=False, metadata={"help": "biases of queries, keys and values, as in Qwen2"})
    out_bias: bool = field(default=False, metadata={"help": "bias of the attention's output projection"})
    qk_norm: bool = field(default=False, metadata={"help": "norms of each head's queries and keys, as in Qwen3"})
    norm_eps: float = field(default=1e-5, metadata={"help": "number added to the mean square in RMSNorm"})
    share_decoder_input_output_embed: bool = field(
        default=False, metadata={"help": "share the embeddings of input and output"}
    )
    start_symbol: Optional[int] = field(
        default=None,
        metadata={"help": "number of the symbol that is read in place of an end-of-sentence at the window's start"},
    )
    dropout: float = field(default=0.0, metadata={"help": "dropout probability"})
    attention_dropout: float = field(default=0.0, metadata={"help": "dropout probability of attention weights"})
    max_target_positions: Optional[int] = field(
        default=None, metadata={"help": "window that the model is trained with (default: --tokens-per-sample)"}
    )
    # Always 0; fairseq 0.12.2 reads it of every model before it saves a checkpoint.
    base_layers: int = field(default=0, metadata={"help": "leave it at 0"})
    tokens_per_sample: int = II("task.tokens_per_sample")


class LlamaDecoder(FairseqIncrementalDecoder):
    """Decoder of the Llama family.

    Args:
        cfg: Options of the model (:class:`LlamaConfig`, or an object with its attributes).
        dictionary: fairseq dictionary of the data.

    Raises:
        ValueError: The options contradict each other.
    """

    def __init__(self, cfg: Any, dictionary):
        super().__init__(dictionary)
        self.shape = attention_shape(cfg)
        self.rotary = RotaryPositions(self.shape.head_dim, cfg.rope_theta, rope_scaling(cfg))
        self.start_symbol, self.sliding_window = cfg.start_symbol, cfg.sliding_window
        self.window = min(cfg.max_target_positions, cfg.sliding_window or cfg.max_target_positions)
        self.embed_tokens = nn.Embedding(len(dictionary), cfg.decoder_embed_dim, dictionary.pad())
        self.layers = nn.ModuleList(
            LlamaLayer(
                RotaryAttention(self.shape, self.rotary, cfg.attention_dropout),
                cfg.decoder_embed_dim,
                cfg.decoder_ffn_embed_dim,
                cfg.norm_eps,
                cfg.dropout,
            )
            for _ in range(cfg.decoder_layers)
        )
        self.layer_norm = nn.RMSNorm(cfg.decoder_embed_dim, eps=cfg.norm_eps)
        self.output_projection = nn.Linear(cfg.decoder_embed_dim, len(dictionary), bias=False)
        self.reset_parameters()
        if cfg.share_decoder_input_output_embed:
            self.output_projection.weight = self.embed_tokens.weight

    def reset_parameters(self) -> None:
        """Draw the weights as Llama's are: normal with a deviation of 0.02, biases and the padding's embedding zero."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        with torch.no_grad():
            self.embed_tokens.weight[self.embed_tokens.padding_idx].zero_()

    def embed(self, tokens: Tensor, first: Any = True) -> Tensor:
        """Return embeddings, shape (B, T, D).

        Args:
            tokens: Token ids, shape (B, T), int64.
            first: Whether the first column starts a window; or for each row, shape (B,), bool.

        Raises:
            ValueError: The window is longer than the sliding window.
        """
        if self.sliding_window is not None and tokens.size(1) > self.sliding_window:
            raise ValueError(
                f"a window of {tokens.size(1)} tokens is longer than the sliding window of {self.sliding_window}, in "
                "which every token sees all before it: lower --tokens-per-sample"
            )
        if self.start_symbol is None:
            return self.embed_tokens(tokens)
        starts = (tokens[:, 0] == self.dictionary.eos()) & first
        column = torch.where(starts, self.start_symbol, tokens[:, 0])
        return self.embed_tokens(torch.cat([column[:, None], tokens[:, 1:]], dim=1))

    def forward(
        self,
        prev_output_tokens: Tensor,
        encoder_out=None,
        incremental_state: Optional[Dict[str, Dict[str, Optional[Tensor]]]] = None,
        features_only: bool = False,
        src_lengths: Optional[Tensor] = None,
        **unused,
    ) -> Tuple[Tensor, Dict[str, Any]]:
        """Compute logits.

        Args:
            prev_output_tokens: Token ids, shape (B, T), int64; a row may be padded at either end.
            encoder_out: Ignored; there is no encoder.
            incremental_state: State of incremental decoding, which reads the last column only; or None.
            features_only: If true, return features (B, T, D) in place of logits.
            src_lengths: Ignored.
            unused: Ignored options that fairseq passes to decoders.

        Returns:
            Logits, shape (B, T, V), and a dictionary with ``inner_states``, each (T, B, D).
        """
        left, first = None, True
        if incremental_state is not None:
            first = not self.layers[0].self_attn.cache(incremental_state)
            prev_output_tokens = prev_output_tokens[:, -1:]
        else:
            left = leading_padding(prev_output_tokens, self.dictionary.pad())
        states: List[Tensor] = [self.embed(prev_output_tokens, first).transpose(0, 1)]
        for layer in self.layers:
            states.append(layer(states[-1], incremental_state, left)[0])
        x = self.layer_norm(states[-1]).transpose(0, 1)  # (B, T, D)
        return (x if features_only else self.output_layer(x)), {"attn": None, "inner_states": states}

    def output_layer(self, features: Tensor, **unused) -> Tensor:
        """Return logits (..., V) of features (..., D)."""
        return self.output_projection(features)

    def max_positions(self) -> int:
        """Return the window that the model is trained with."""
        return self.window


@register_model("llama_lm", dataclass=LlamaConfig)
class LlamaLanguageModel(FairseqLanguageModel):
    """Decoder-only language model of the Llama family."""

    @classmethod
    def build_model(cls, args, task):
        """Build the model from its configuration.

        Args:
            args: Configuration of the model.
            task: fairseq task with the dictionary.

        Raises:
            ValueError: The options contradict each other.
        """
        if safe_getattr(args, "max_target_positions", None) is None:
            args.max_target_positions = args.tokens_per_sample
        return cls(LlamaDecoder(args, task.target_dictionary))


def attention_shape(cfg: Any) -> AttentionShape:
    """Return the sizes and parts of the attention that options describe.

    Args:
        cfg: Options of the model.

    Raises:
        ValueError: The numbers of heads or their width do not fit.
    """
    width, heads = cfg.decoder_embed_dim, cfg.decoder_attention_heads
    kv_heads, head_dim = cfg.decoder_kv_heads or heads, cfg.decoder_head_dim
    if heads % kv_heads:
        raise ValueError(
            f"--decoder-attention-heads {heads} is not a multiple of --decoder-kv-heads {kv_heads}: change one of them"
        )
    if head_dim is None and width % heads:
        raise ValueError(
            f"--decoder-embed-dim {width} is not a multiple of --decoder-attention-heads {heads}: change one of them "
            "or give --decoder-head-dim"
        )
    return AttentionShape(
        width=width,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim or width // heads,
        qkv_bias=cfg.qkv_bias,
        out_bias=cfg.out_bias,
        qk_norm_eps=cfg.norm_eps if cfg.qk_norm else None,
    )


def rope_scaling(cfg: Any) -> Optional[Dict[str, Any]]:
    """Return the scaling of the rotary frequencies that options describe, None for none.

    Args:
        cfg: Options of the model.

    Raises:
        ValueError: ``--rope-scaling`` is not a JSON object.
    """
    if cfg.rope_scaling is None:
        return None
    try:
        scaling = json.loads(cfg.rope_scaling)
    except ValueError:
        scaling = None
    if not isinstance(scaling, dict):
        raise ValueError(
            f"--rope-scaling {cfg.rope_scaling} is not a JSON object: write it as "
            '\'{"rope_type": "linear", "factor": 2.0}\''
        )
    return scaling


def leading_padding(tokens: Tensor, pad: int) -> Optional[Tensor]:
    """Return the number of padding symbols before each row's first token, shape (B,); None where no row has any.

    Args:
        tokens: Token ids, shape (B, T), int64.
        pad: Number of the padding symbol.
    """
    left = (tokens == pad).cumprod(dim=1).sum(dim=1)
    return left if left.any() else None


def _architecture(args, layers: int, width: int, inner: int, heads: int, kv_heads: int) -> None:
    """Set every option that the command line left open; fairseq takes missing ones for unset."""
    sizes = {
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": inner,
        "decoder_attention_heads": heads,
        "decoder_kv_heads": kv_heads,
    }
    for name, entry in LlamaConfig.__dataclass_fields__.items():
        default = sizes.get(name, entry.default)
        if not name.startswith("_") and not str(default).startswith("${"):
            setattr(args, name, safe_getattr(args, name, default))


@register_model_architecture("llama_lm", "llama_lm_tiny")
def llama_lm_tiny(args):
    """4 layers of width 128, 4 query and 2 key/value heads: for tests."""
    _architecture(args, 4, 128, 352, 4, 2)


@register_model_architecture("llama_lm", "llama_lm_small")
def llama_lm_small(args):
    """12 layers of width 768, 12 query and 4 key/value heads: GPT-2 small's size."""
    _architecture(args, 12, 768, 2048, 12, 4)


@register_model_architecture("llama_lm", "llama_lm_medium")
def llama_lm_medium(args):
    """24 layers of width 1024, 16 query and 4 key/value heads: GPT-2 medium's size."""
    _architecture(args, 24, 1024, 2816, 16, 4)

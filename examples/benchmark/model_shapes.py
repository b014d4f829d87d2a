"""Shapes of published models, by name, as descriptions from which a backbone with random weights is built.

A Llama's shape is that of its config.json. Its embedding has rows for the tokens of the model; fairseq adds its four
special symbols, and ``madeupword`` symbols up to a multiple of eight.
"""

from dataclasses import dataclass
from typing import Any, Dict

from preprocess.dictionary import SPECIALS, filler_symbols


@dataclass(frozen=True)
class ModelShape:
    """The shape of a model.

    Attributes:
        settings: Description of the backbone without ``vocabulary`` (see ``describe_backbone``).
        tokens: Number of rows of the embedding of the published model.
    """

    settings: Dict[str, Any]
    tokens: int

    @property
    def symbols(self) -> int:
        """Number of symbols in fairseq's dictionary: the tokens, the special symbols and what fills it up."""
        return len(SPECIALS) + self.tokens + len(filler_symbols(self.tokens))

    @property
    def added_parameters(self) -> int:
        """Number of parameters that the published model does not have: added symbols, and two unused positions."""
        rows = self.symbols - self.tokens
        if not self.settings["share_decoder_input_output_embed"]:
            rows *= 2
        if self.settings.get("decoder_learned_pos"):
            rows += 2  # fairseq's positions begin behind the number of the padding symbol
        return rows * self.settings["decoder_embed_dim"]


def gpt2(layers: int, width: int, heads: int, tokens: int = 50257) -> ModelShape:
    """Return the shape of a GPT-2."""
    settings = {
        "model": "transformer_lm",
        "activation_fn": "gelu_accurate",
        "decoder_embed_dim": width,
        "decoder_input_dim": width,
        "decoder_output_dim": width,
        "decoder_ffn_embed_dim": 4 * width,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "decoder_normalize_before": True,
        "decoder_learned_pos": True,
        "share_decoder_input_output_embed": True,
        "no_scale_embedding": True,
        "max_target_positions": 1024,
    }
    return ModelShape(settings, tokens)


def llama(
    layers: int,
    width: int,
    inner_width: int,
    heads: int,
    kv_heads: int,
    tokens: int,
    head_dim: int = 64,
    tied: bool = True,
    qkv_bias: bool = False,
    qk_norm: bool = False,
) -> ModelShape:
    """Return the shape of a Llama or a relative.

    Args:
        layers: Number of layers.
        width: Width of the hidden states.
        inner_width: Width of the feed-forward part.
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        tokens: Number of rows of the embedding.
        head_dim: Width of a head.
        tied: Whether input and output share their embedding.
        qkv_bias: Whether queries, keys and values have biases (Qwen2).
        qk_norm: Whether each head's queries and keys are normalized (Qwen3).
    """
    settings = {
        "model": "llama_lm",
        "decoder_layers": layers,
        "decoder_embed_dim": width,
        "decoder_ffn_embed_dim": inner_width,
        "decoder_attention_heads": heads,
        "decoder_kv_heads": kv_heads,
        "decoder_head_dim": head_dim,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "sliding_window": None,
        "qkv_bias": qkv_bias,
        "out_bias": False,
        "qk_norm": qk_norm,
        "norm_eps": 1e-5,
        "share_decoder_input_output_embed": tied,
        "start_symbol": None,
        "max_target_positions": 2048,
    }
    return ModelShape(settings, tokens)


SHAPES = {
    "gpt2": gpt2(12, 768, 12),
    "gpt2-medium": gpt2(24, 1024, 16),
    "gpt2-large": gpt2(36, 1280, 20),
    "gpt2-xl": gpt2(48, 1600, 25),
    "SmolLM2-135M": llama(30, 576, 1536, 9, 3, 49152),
    "SmolLM2-360M": llama(32, 960, 2560, 15, 5, 49152),
    "SmolLM2-1.7B": llama(24, 2048, 8192, 32, 32, 49152),
    "Llama-3.2-1B": llama(16, 2048, 8192, 32, 8, 128256),
    "Llama-3.2-3B": llama(28, 3072, 8192, 24, 8, 128256, head_dim=128),
    "Qwen2.5-0.5B": llama(24, 896, 4864, 14, 2, 151936, qkv_bias=True),
    "Qwen2.5-1.5B": llama(28, 1536, 8960, 12, 2, 151936, head_dim=128, qkv_bias=True),
    "Qwen2.5-7B": llama(28, 3584, 18944, 28, 4, 152064, head_dim=128, tied=False, qkv_bias=True),
    "Qwen3-0.6B": llama(28, 1024, 3072, 16, 8, 151936, head_dim=128, qk_norm=True),
    "Qwen3-4B": llama(36, 2560, 9728, 32, 8, 151936, head_dim=128, qk_norm=True),
    "Mistral-7B-v0.3": llama(32, 4096, 14336, 32, 8, 32768, head_dim=128, tied=False),
}

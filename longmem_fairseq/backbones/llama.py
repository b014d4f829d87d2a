"""The family of ``llama_lm``: Llama, SmolLM2, Mistral, Qwen2 and Qwen3.

Legend: B lanes, T tokens of a segment, D width, H_kv key/value heads, d width of a head.
"""

from types import SimpleNamespace
from typing import Any, Dict, Optional, Sequence, Tuple

import numpy as np
from fairseq.utils import safe_getattr
from torch import Tensor, nn

from ..modules.llama_layer import LlamaSideLayer
from ..modules.rotary_attention import RotaryAttention, RotaryJointAttention
from ..modules.side_layer import SideLayer, SideNetworkOptions
from ..modules.staging import staged
from .base import Backbone, BackboneError, Start, register_backbone_family
from .llama_lm import LlamaConfig, LlamaDecoder, LlamaLanguageModel, attention_shape, rope_scaling

# Options that decide which function a model computes.
_DECISIVE = (
    "decoder_layers",
    "decoder_embed_dim",
    "decoder_ffn_embed_dim",
    "decoder_attention_heads",
    "decoder_kv_heads",
    "decoder_head_dim",
    "rope_theta",
    "rope_scaling",
    "sliding_window",
    "qkv_bias",
    "out_bias",
    "qk_norm",
    "norm_eps",
    "share_decoder_input_output_embed",
    "start_symbol",
    "max_target_positions",
)


@register_backbone_family(LlamaLanguageModel)
class LlamaBackbone(Backbone):
    """A frozen decoder of the Llama family.

    Args:
        config: Description of the model.
        decoder: Its decoder.
    """

    builds_on_meta = True
    has_relative_positions = True
    has_rotary_positions = True

    def __init__(self, config: Dict[str, Any], decoder: LlamaDecoder):
        super().__init__(config)
        self.decoder = decoder
        self.select_memory_layers([0])
        self.freeze()

    @classmethod
    def describe(cls, cfg: Any, vocabulary: int) -> Dict[str, Any]:
        defaults = LlamaConfig()
        config = {name: safe_getattr(cfg, name, getattr(defaults, name)) for name in _DECISIVE}
        if config["max_target_positions"] is None:
            config["max_target_positions"] = safe_getattr(cfg, "tokens_per_sample", 1024)
        try:
            attention_shape(SimpleNamespace(**config))
            rope_scaling(SimpleNamespace(**config))
        except ValueError as error:
            raise BackboneError(str(error)) from error
        return config

    @classmethod
    def build(cls, config: Dict[str, Any], dictionary) -> "LlamaBackbone":
        cfg = SimpleNamespace(**config, dropout=0.0, attention_dropout=0.0)
        return cls(config, LlamaDecoder(cfg, dictionary))

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def final_norm(self) -> nn.Module:
        return self.decoder.layer_norm

    @property
    def width(self) -> int:
        return self.decoder.shape.width

    @property
    def num_heads(self) -> int:
        return self.decoder.shape.heads

    @property
    def num_kv_heads(self) -> int:
        return self.decoder.shape.kv_heads

    @property
    def head_dim(self) -> int:
        return self.decoder.shape.head_dim

    @property
    def max_positions(self) -> Optional[int]:
        return self.config["sliding_window"]  # a rotation has no last position

    @property
    def trained_window(self) -> int:
        return self.config["max_target_positions"]

    def select_memory_layers(self, numbers: Sequence[int]) -> None:
        super().select_memory_layers(numbers)
        for i, layer in enumerate(self.layers):
            layer.self_attn.caches_unrotated = i in numbers

    def embed(self, tokens: Tensor, start: Start = 0) -> Tensor:
        first = staged(start == 0, tokens.device) if isinstance(start, np.ndarray) else start == 0
        return self.decoder.embed(tokens, first).transpose(0, 1)

    def memory_keys_and_values(self, x: Tensor, number: int) -> Tuple[Tensor, Tensor]:
        layer = self.layers[number]
        return layer.self_attn.keys_and_values(layer.self_attn_norm(x))

    def output(self, features: Tensor) -> Tensor:
        return self.decoder.output_layer(features)

    def side_layer(self, reads_memory: bool, options: SideNetworkOptions) -> SideLayer:
        decoder = self.decoder
        if reads_memory:
            attention = RotaryJointAttention(
                decoder.shape, decoder.rotary, options.attention_dropout, options.memory_query_distance
            )
        else:
            attention = RotaryAttention(decoder.shape, decoder.rotary, options.attention_dropout)
        layer = LlamaSideLayer(
            attention, self.width, self.config["decoder_ffn_embed_dim"], self._side_eps(options), options.dropout
        )
        layer.recompute = options.recompute
        return layer

    def side_norm(self, options: SideNetworkOptions) -> nn.Module:
        return nn.RMSNorm(self.width, eps=self._side_eps(options))

    def upgrade_weights(self, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
        if self.config["share_decoder_input_output_embed"]:
            weights = {"decoder.output_projection.weight": weights["decoder.embed_tokens.weight"], **weights}
        return weights

    def _side_eps(self, options: SideNetworkOptions) -> float:
        return options.layer_norm_eps or self.config["norm_eps"]

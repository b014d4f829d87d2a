"""The family of fairseq's own decoders: pre-norm ``transformer_lm`` models, and those with ALiBi.

Legend: B lanes, T tokens of a segment, D width, H heads, d = D / H.
"""

import copy
import json
from types import SimpleNamespace
from typing import Any, Dict, Optional, Tuple

import numpy as np
import torch
from fairseq.models import MODEL_REGISTRY
from fairseq.models.transformer import TransformerConfig, TransformerDecoderBase
from fairseq.models.transformer_lm import TransformerLanguageModel
from fairseq.modules import LayerNorm
from fairseq.modules.transformer_layer import TransformerDecoderLayerBase
from fairseq.utils import safe_getattr
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn

from ..modules.joint_attention import JointAttention
from ..modules.layer_norm import set_layer_norm_eps
from ..modules.self_attention import SelfAttention
from ..modules.side_layer import SideLayer, SideNetworkOptions
from ..modules.staging import staged
from .base import Backbone, BackboneError, Start, register_backbone_family

# Settings of a stock model that decide which function it computes. All others (dropout, checkpointing, options of
# training) may differ between two files of the same backbone.
_DECISIVE = (
    "activation_fn",
    "decoder_embed_dim",
    "decoder_input_dim",
    "decoder_output_dim",
    "decoder_ffn_embed_dim",
    "decoder_layers",
    "decoder_attention_heads",
    "decoder_learned_pos",
    "decoder_normalize_before",
    "no_decoder_final_norm",
    "no_token_positional_embeddings",
    "no_scale_embedding",
    "layernorm_embedding",
    "share_decoder_input_output_embed",
    "max_target_positions",
    "scale_fc",
    "scale_attn",
    "scale_heads",
    "scale_resids",
)

_REFUSED = {
    "adaptive_input": "adaptive inputs",
    "adaptive_softmax_cutoff": "an adaptive softmax",
    "character_embeddings": "character embeddings",
    "decoder_layers_to_keep": "layers pruned away (LayerDrop)",
    "decoder_layerdrop": "LayerDrop",
    "base_layers": "BASE layers",
    "quant_noise_pq": "product quantization",
    "quant_noise_scalar": "scalar quantization",
    "decoder_xformers_att_config": "xFormers attention",
}


class TransformerSideLayer(SideLayer, TransformerDecoderLayerBase):
    """fairseq's pre-norm decoder layer as a layer of the side network.

    Args:
        cfg: Configuration of the backbone's decoder, with the side network's dropout.
        reads_memory: Whether its self-attention also reads the memory.
        alibi: Whether the backbone has ALiBi.
        recompute: Whether activations are recomputed in the backward pass.
    """

    output_projections = ("self_attn.out_proj", "fc2")

    def __init__(self, cfg: TransformerConfig, reads_memory: bool, alibi: bool, recompute: bool = False):
        super().__init__(cfg, no_encoder_attn=True)
        attention = JointAttention if reads_memory else SelfAttention
        self.self_attn = attention(
            self.embed_dim, cfg.decoder.attention_heads, dropout=cfg.attention_dropout, alibi=alibi
        )
        self.recompute = recompute


@register_backbone_family(TransformerLanguageModel)
class TransformerBackbone(Backbone):
    """A pre-norm decoder of fairseq.

    Args:
        config: Description of the model.
        decoder: Its decoder. Stock self-attention modules are replaced by :class:`SelfAttention`, which computes the
            same from the same parameters.
    """

    def __init__(self, config: Dict[str, Any], decoder: TransformerDecoderBase):
        super().__init__(config)
        self.decoder = decoder
        for layer in decoder.layers:
            if not isinstance(layer.self_attn, SelfAttention):
                layer.self_attn = _fused(layer.self_attn)
        self.freeze()

    @classmethod
    def describe(cls, cfg: Any, vocabulary: int) -> Dict[str, Any]:
        for option, feature in _REFUSED.items():
            if safe_getattr(cfg, option, None):
                raise BackboneError(
                    f"it has {feature} ({option}={safe_getattr(cfg, option)}): a backbone must have none"
                )
        if not safe_getattr(cfg, "decoder_normalize_before", False):
            raise BackboneError(
                "its layers are post-norm (decoder_normalize_before=False): the side network's residual connections "
                "need a pre-norm backbone"
            )
        config = {name: safe_getattr(cfg, name, None) for name in _DECISIVE}
        if config["max_target_positions"] is None:
            config["max_target_positions"] = safe_getattr(cfg, "tokens_per_sample", 1024)
        if safe_getattr(cfg, "layer_norm_eps", None) is not None:  # only models of this package can vary it
            config["layer_norm_eps"] = cfg.layer_norm_eps
        return json.loads(json.dumps(config, default=str))

    @classmethod
    def build(cls, config: Dict[str, Any], dictionary) -> "TransformerBackbone":
        model = MODEL_REGISTRY[config["model"]]
        cfg = OmegaConf.structured(
            getattr(model, "__dataclass")()
        )  # settings that the description leaves out keep their defaults
        OmegaConf.set_struct(cfg, False)
        args = SimpleNamespace(**{key: None if OmegaConf.is_interpolation(cfg, key) else cfg[key] for key in cfg})
        for key, value in config.items():
            try:
                if value is not None:
                    cfg[key] = value
            except OmegaConfBaseException as error:
                raise BackboneError(f"its description is malformed: {key}: {str(error).splitlines()[0]}") from error
        vars(args).update({key: value for key, value in config.items() if key not in ("model", "vocabulary")})
        args.tokens_per_sample = args.max_target_positions
        args.dropout = args.attention_dropout = args.activation_dropout = args.relu_dropout = 0.0
        task = SimpleNamespace(source_dictionary=dictionary, target_dictionary=dictionary)
        return cls(config, model.build_model(args, task).decoder)

    @property
    def has_relative_positions(self) -> bool:
        return self.decoder.embed_positions is None

    @property
    def layers(self) -> nn.ModuleList:
        return self.decoder.layers

    @property
    def final_norm(self) -> Optional[nn.Module]:
        return self.decoder.layer_norm

    @property
    def width(self) -> int:
        return self.decoder.embed_dim

    @property
    def num_heads(self) -> int:
        return self.layers[0].self_attn.num_heads

    @property
    def head_dim(self) -> int:
        return self.layers[0].self_attn.head_dim

    @property
    def max_positions(self) -> Optional[int]:
        positions = self.decoder.embed_positions
        return positions.max_positions if isinstance(positions, nn.Embedding) else None

    @property
    def trained_window(self) -> int:
        return self.config["max_target_positions"]

    @property
    def dtype(self) -> torch.dtype:
        # A LayerNorm has the precision of the activations, also where linear layers compute in another.
        return self.layers[0].self_attn_layer_norm.weight.dtype

    def embed(self, tokens: Tensor, start: Start = 0) -> Tensor:
        decoder = self.decoder
        x = decoder.embed_scale * decoder.embed_tokens(tokens)
        if decoder.project_in_dim is not None:
            x = decoder.project_in_dim(x)
        if decoder.embed_positions is not None:
            T = tokens.size(1)
            if isinstance(start, np.ndarray):
                numbers = staged(start[:, None] + np.arange(T), x.device)  # (B, T)
                positions = self._positions(0, int(start.max(initial=0)) + T, x.device)[numbers]  # (B, T, D)
            else:
                positions = self._positions(start, start + T, x.device)
            x = x + positions.to(x)
        if decoder.layernorm_embedding is not None:
            x = decoder.layernorm_embedding(x)
        return x.transpose(0, 1)  # (T, B, D)

    def _positions(self, begin: int, end: int, device: torch.device) -> Tensor:
        """Return the embeddings of positions ``begin`` to ``end - 1``, shape (end - begin, D).

        They are taken by number: fairseq numbers the tokens of its input, which is not the window when decoding step
        by step.
        """
        table = self.decoder.embed_positions
        if self.max_positions is not None and end > self.max_positions:
            raise BackboneError(
                f"a segment of {end} tokens is longer than the backbone's {self.max_positions} positions: lower "
                "--tokens-per-sample"
            )
        first = self.decoder.padding_idx + 1  # fairseq's position embeddings start behind the padding's
        if isinstance(table, nn.Embedding):
            return table.weight[first + begin : first + end]
        if table.weights.size(0) < first + end:
            table.weights = table.get_embedding(first + end, table.embedding_dim, table.padding_idx).to(table.weights)
        if table.weights.device != device:  # no buffer, so it does not follow the model by itself
            table.weights = table.weights.to(device)
        return table.weights[first + begin : first + end]

    def memory_keys_and_values(self, x: Tensor, number: int) -> Tuple[Tensor, Tensor]:
        layer = self.layers[number]
        return layer.self_attn.keys_and_values(layer.self_attn_layer_norm(x))

    def output(self, features: Tensor) -> Tensor:
        if self.decoder.project_out_dim is not None:
            features = self.decoder.project_out_dim(features)
        return self.decoder.output_projection(features)

    def side_layer(self, reads_memory: bool, options: SideNetworkOptions) -> SideLayer:
        alibi = self.layers[0].self_attn.alibi
        layer = TransformerSideLayer(self.side_config(options), reads_memory, alibi, options.recompute)
        set_layer_norm_eps(layer, self.side_eps(options))
        return layer

    def side_norm(self, options: SideNetworkOptions) -> Optional[nn.Module]:
        if self.final_norm is None:
            return None
        norm = LayerNorm(self.width)
        set_layer_norm_eps(norm, self.side_eps(options))
        return norm

    def side_eps(self, options: SideNetworkOptions) -> float:
        """Return the number added to the variance in the side network's LayerNorms."""
        return options.layer_norm_eps or self.layers[0].self_attn_layer_norm.eps

    def side_config(self, options: SideNetworkOptions) -> TransformerConfig:
        """Return the configuration of the decoder's layers with the side network's options."""
        cfg = copy.deepcopy(self.decoder.cfg)
        cfg.activation_fn = options.activation_fn or cfg.activation_fn
        cfg.dropout = options.dropout
        cfg.attention_dropout = options.attention_dropout
        cfg.activation_dropout = cfg.relu_dropout = 0.0
        cfg.checkpoint_activations = cfg.offload_activations = False
        return cfg

    def upgrade_weights(self, weights: Dict[str, Tensor]) -> Dict[str, Tensor]:
        weights = dict(weights)
        if "decoder.layer_norm.weight" in weights:
            # fairseq takes a missing version for a model of 2018 and silently drops its final LayerNorm.
            weights.setdefault("decoder.version", torch.tensor([3.0]))
        self.decoder.upgrade_state_dict_named(weights, "decoder")
        return weights


def _fused(stock: nn.Module) -> SelfAttention:
    """Return the same attention with the same parameters, computed by :class:`SelfAttention`."""
    fused = SelfAttention(stock.embed_dim, stock.num_heads, dropout=stock.dropout_module.p)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        setattr(fused, name, getattr(stock, name))
    return fused

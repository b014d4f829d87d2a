"""Hugging Face's GPT-2 as fairseq's ``transformer_lm``, and back again.

Legend: V symbols, D width, F width of the feed-forward layer, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from preprocess.errors import InputError
from preprocess.huggingface_conversion import Conversion, check_numbers, check_settings
from preprocess.huggingface_weights import Config, WeightReader, Weights, order_rows

SUPPORTED = "gpt2 of any size, also distilgpt2"

# Names of activation functions: Hugging Face's and fairseq's.
ACTIVATIONS = {
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu": "gelu",
    "relu": "relu",
    "tanh": "tanh",
}
# Settings of a transformer_lm that GPT-2 and OPT share.
DECODER = {
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "decoder_learned_pos": True,
    "no_token_positional_embeddings": False,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
}
_EPS = 1e-5  # epsilon of every LayerNorm in fairseq
# Settings of config.json that fairseq's decoder cannot vary.
_REQUIRED = {
    "layer_norm_epsilon": _EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
# Modules of a layer: GPT-2's name and fairseq's.
_NORMS = (("ln_1", "self_attn_layer_norm"), ("ln_2", "final_layer_norm"))
_LINEAR = (("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2"))


def activation(config: Config, default: str) -> str:
    """Return fairseq's name of a model's activation function.

    Args:
        config: Content of config.json.
        default: Hugging Face's name of the function where config.json leaves it out.

    Raises:
        InputError: fairseq does not have the function.
    """
    name = config.get("activation_function", default)
    if not isinstance(name, str) or name not in ACTIVATIONS:
        raise InputError(
            f"activation_function={name} in config.json is not supported; supported are {', '.join(ACTIVATIONS)}"
        )
    return ACTIVATIONS[name]


class Gpt2Conversion(Conversion):
    """GPT2LMHeadModel, or GPT2Model."""

    model = "transformer_lm"
    default_vocabulary, default_end = 50257, 50256

    def settings(self, config: Config) -> Config:
        check_settings(config, _REQUIRED, SUPPORTED)
        check_numbers(config, (), ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"))
        width, positions = config.get("n_embd") or 768, config.get("n_positions") or 1024
        return {
            "decoder_embed_dim": width,
            "decoder_input_dim": width,
            "decoder_output_dim": width,
            "decoder_ffn_embed_dim": config.get("n_inner") or 4 * width,
            "decoder_layers": config.get("n_layer") or 12,
            "decoder_attention_heads": config.get("n_head") or 12,
            "activation_fn": activation(config, "gelu_new"),
            "dropout": config.get("resid_pdrop", 0.1),
            "attention_dropout": config.get("attn_pdrop", 0.1),
            "share_decoder_input_output_embed": config.get("tie_word_embeddings", True),
            "max_target_positions": positions,
            "tokens_per_sample": positions,
            **DECODER,
        }

    def convert(self, weights: Mapping[str, Tensor], settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
        source = WeightReader(weights, "transformer.", torch.float32)
        D, F, P = (settings[name] for name in ("decoder_embed_dim", "decoder_ffn_embed_dim", "max_target_positions"))
        embedding = source.take("wte.weight", vocabulary, D)
        positions = source.take("wpe.weight", P, D)
        # fairseq numbers positions after the symbol of the padding, 1: the first two rows are not used.
        converted = {
            "decoder.version": torch.tensor([3.0]),  # without it fairseq drops the final LayerNorm
            "decoder.embed_tokens.weight": order_rows(embedding, rows),
            "decoder.embed_positions.weight": torch.cat([positions.new_zeros(2, D), positions]),
        }
        for i in range(settings["decoder_layers"]):
            layer = f"decoder.layers.{i}"
            for source_name, name in _NORMS:
                for part in ("weight", "bias"):
                    converted[f"{layer}.{name}.{part}"] = source.take(f"h.{i}.{source_name}.{part}", D)
            # A Conv1D stores its matrix transposed, with the queries', keys' and values' side by side.
            weight = source.take(f"h.{i}.attn.c_attn.weight", D, 3 * D).t()
            bias = source.take(f"h.{i}.attn.c_attn.bias", 3 * D)
            for part, joined in (("weight", weight), ("bias", bias)):
                for letter, tensor in zip("qkv", joined.chunk(3), strict=True):
                    name = f"{layer}.self_attn.{letter}_proj.{part}"
                    converted[name] = tensor.clone(memory_format=torch.contiguous_format)
            for (source_name, name), (inputs, outputs) in zip(_LINEAR, ((D, D), (D, F), (F, D)), strict=True):
                weight = source.take(f"h.{i}.{source_name}.weight", inputs, outputs)
                converted[f"{layer}.{name}.weight"] = weight.t().contiguous()
                converted[f"{layer}.{name}.bias"] = source.take(f"h.{i}.{source_name}.bias", outputs)
        for part in ("weight", "bias"):
            converted[f"decoder.layer_norm.{part}"] = source.take(f"ln_f.{part}", D)
        converted["decoder.output_projection.weight"] = converted["decoder.embed_tokens.weight"]
        if not settings["share_decoder_input_output_embed"]:
            output = source.take("lm_head.weight", vocabulary, D)
            converted["decoder.output_projection.weight"] = order_rows(output, rows)
        source.finish(r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias")
        return converted

    def export(self, weights: Weights, settings: Config, rows: Sequence[int]) -> tuple[Config, Weights]:
        """Convert a ``transformer_lm`` to a GPT2LMHeadModel.

        Args:
            weights: Tensors by the names of a ``transformer_lm``.
            settings: Settings of the model, as in its checkpoint.
            rows: Symbol of the dictionary for each row of the exported embedding.

        Returns:
            Content of config.json, and tensors by their Hugging Face names, float32.

        Raises:
            InputError: GPT-2 cannot express the model.
        """
        width = settings["decoder_embed_dim"]
        required = {**DECODER, "decoder_input_dim": width, "decoder_output_dim": width}
        required.update(dict.fromkeys(("scale_fc", "scale_attn", "scale_heads", "scale_resids"), False))
        for name, value in required.items():
            if (value or None) != (settings[name] or None):
                raise InputError(f"a GPT-2 has {name}={value}, this model {settings[name]}: it cannot be exported")
        activations = {fairseq_name: name for name, fairseq_name in reversed(ACTIVATIONS.items())}
        function = activations.get(str(settings["activation_fn"]))
        if function is None:
            raise InputError(
                f"a GPT-2 cannot express activation_fn={settings['activation_fn']}: this model cannot be exported"
            )
        tied = bool(settings["share_decoder_input_output_embed"])
        index = torch.tensor(rows)
        exported = {
            "transformer.wte.weight": weights["decoder.embed_tokens.weight"][index],
            "transformer.wpe.weight": weights["decoder.embed_positions.weight"][2:],
        }
        for i in range(settings["decoder_layers"]):
            layer, exported_layer = f"decoder.layers.{i}", f"transformer.h.{i}"
            for exported_name, name in _NORMS:
                for part in ("weight", "bias"):
                    exported[f"{exported_layer}.{exported_name}.{part}"] = weights[f"{layer}.{name}.{part}"]
            for part in ("weight", "bias"):
                joined = torch.cat([weights[f"{layer}.self_attn.{letter}_proj.{part}"] for letter in "qkv"])
                exported[f"{exported_layer}.attn.c_attn.{part}"] = joined.t() if part == "weight" else joined
            for exported_name, name in _LINEAR:
                exported[f"{exported_layer}.{exported_name}.weight"] = weights[f"{layer}.{name}.weight"].t()
                exported[f"{exported_layer}.{exported_name}.bias"] = weights[f"{layer}.{name}.bias"]
        for part in ("weight", "bias"):
            exported[f"transformer.ln_f.{part}"] = weights[f"decoder.layer_norm.{part}"]
        if not tied:
            exported["lm_head.weight"] = weights["decoder.output_projection.weight"][index]
        config = {
            "model_type": "gpt2",
            "architectures": ["GPT2LMHeadModel"],
            "vocab_size": len(rows),
            "n_embd": width,
            "n_layer": settings["decoder_layers"],
            "n_head": settings["decoder_attention_heads"],
            "n_inner": settings["decoder_ffn_embed_dim"],
            "n_positions": len(exported["transformer.wpe.weight"]),
            "activation_function": function,
            "layer_norm_epsilon": _EPS,
            "tie_word_embeddings": tied,
            "torch_dtype": "float32",
        }
        return config, {name: tensor.float().contiguous() for name, tensor in exported.items()}

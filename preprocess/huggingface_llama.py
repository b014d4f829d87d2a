"""Settings and weights of Hugging Face's Llama, Mistral, Qwen2 and Qwen3 as those of ``llama_lm``, and back again.

Legend: V symbols, D width, F width of the feed-forward part, H query heads, H_kv KV heads, d width of a head.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from longmem_fairseq.modules.rotary import RotaryPositions, rope_type
from preprocess.dictionary import SPECIALS
from preprocess.errors import InputError
from preprocess.huggingface_conversion import Conversion, check_numbers, check_settings
from preprocess.huggingface_weights import Config, WeightReader, Weights, order_rows

SUPPORTED = "llama, mistral, qwen2 and qwen3 (dense)"

# model_type -> what a config.json of this type leaves out.
MODEL_TYPES: dict[str, Config] = {
    "llama": {},
    "mistral": {"sliding_window": 4096, "num_key_value_heads": 8, "max_position_embeddings": 131072},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32},
    "qwen3": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128},
}
_DEFAULTS: Config = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "vocab_size": 32000,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"),
)
# What the family cannot express, by the setting of config.json that tells.
_REFUSED = {
    "num_experts": "a mixture of experts",
    "num_local_experts": "a mixture of experts",
    "n_routed_experts": "a mixture of experts",
    "kv_lora_rank": "multi-head latent attention",
    "vision_config": "a vision model",
}

# Modules of a layer: Hugging Face's name and llama_lm's.
_NORMS = (("input_layernorm", "self_attn_norm"), ("post_attention_layernorm", "feed_forward_norm"))
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


class LlamaConversion(Conversion):
    """LlamaForCausalLM and its relatives; weights keep their precision."""

    model = "llama_lm"
    default_vocabulary = _DEFAULTS["vocab_size"]

    def settings(self, config: Config) -> Config:
        check_settings(config, {}, SUPPORTED)
        kind = config["model_type"]
        check_numbers(config, (), _SIZES)
        eps = config.get("rms_norm_eps", 1.0)
        if type(eps) not in (int, float) or not 0 < eps <= 1:
            raise InputError(f"rms_norm_eps={eps!r:.40} in config.json is not a number above 0 and up to 1")
        given = {name: value for name, value in config.items() if value is not None or name == "sliding_window"}
        known = {**_DEFAULTS, **MODEL_TYPES[kind], **given}
        for name, feature in _REFUSED.items():
            if config.get(name):
                raise InputError(f"{name}={_brief(config[name])} in config.json: {feature} is not supported")
        if known["hidden_act"] != "silu":
            raise InputError(f"hidden_act={known['hidden_act']} in config.json is not supported: SwiGLU takes silu")
        if known["mlp_bias"]:
            raise InputError(
                "mlp_bias=true in config.json is not supported: llama_lm's feed-forward part has no biases"
            )
        biased = bool(known["attention_bias"])
        heads, positions = known["num_attention_heads"], known["max_position_embeddings"]
        theta, scaling = _rotary(known)
        return {
            "decoder_layers": known["num_hidden_layers"],
            "decoder_embed_dim": known["hidden_size"],
            "decoder_ffn_embed_dim": known["intermediate_size"],
            "decoder_attention_heads": heads,
            "decoder_kv_heads": known["num_key_value_heads"] or heads,
            "decoder_head_dim": known["head_dim"] or known["hidden_size"] // heads,
            "rope_theta": theta,
            "rope_scaling": None if scaling is None else json.dumps(scaling, sort_keys=True),
            "sliding_window": _sliding_window(known),
            "qkv_bias": kind == "qwen2" or biased,
            "out_bias": kind != "qwen2" and biased,
            "qk_norm": kind == "qwen3",
            "norm_eps": known["rms_norm_eps"],
            "share_decoder_input_output_embed": known["tie_word_embeddings"],
            "max_target_positions": positions,
            "tokens_per_sample": positions,
        }

    def symbol_settings(self, config: Config, symbols: Sequence[str]) -> Config:
        start = config.get("bos_token_id")
        if start is None or start == self.end_of_text(config):
            return {"start_symbol": None}
        if str(start) not in symbols:
            raise InputError(
                f"bos_token_id={start} in config.json is not a token of the vocabulary of {self.vocabulary(config):,}: "
                "correct it, since a document starts with this token"
            )
        return {"start_symbol": len(SPECIALS) + symbols.index(str(start))}

    def convert(self, weights: Mapping[str, Tensor], settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
        source = WeightReader(weights, "model.")
        D, F = settings["decoder_embed_dim"], settings["decoder_ffn_embed_dim"]
        embedding = order_rows(source.take("embed_tokens.weight", vocabulary, D), rows)
        converted = {
            "decoder.embed_tokens.weight": embedding,
            "decoder.layer_norm.weight": source.take("norm.weight", D),
        }
        for i in range(settings["decoder_layers"]):
            for source_name, name in _NORMS:
                converted[f"decoder.layers.{i}.{name}.weight"] = source.take(f"layers.{i}.{source_name}.weight", D)
            for source_name, name, shape in _attention_tensors(settings):
                converted[f"decoder.layers.{i}.self_attn.{name}"] = source.take(
                    f"layers.{i}.self_attn.{source_name}", *shape
                )
            for name in _FEED_FORWARD:
                shape = (D, F) if name == "down_proj" else (F, D)
                converted[f"decoder.layers.{i}.{name}.weight"] = source.take(f"layers.{i}.mlp.{name}.weight", *shape)
        converted["decoder.output_projection.weight"] = embedding
        if not settings["share_decoder_input_output_embed"]:
            output = source.take("lm_head.weight", vocabulary, D)
            converted["decoder.output_projection.weight"] = order_rows(output, rows)
        source.finish(r"lm_head\.weight|layers\.\d+\.self_attn\.rotary_emb\.inv_freq")
        return converted

    def export(self, weights: Weights, settings: Config, rows: Sequence[int]) -> tuple[Config, Weights]:
        """Convert a ``llama_lm`` to a LlamaForCausalLM or the relative that has its parts.

        Args:
            weights: Tensors by the names of a ``llama_lm``.
            settings: Settings of the model, as in its checkpoint.
            rows: Symbol of the dictionary for each row of the exported embedding.

        Returns:
            Content of config.json, and tensors by their Hugging Face names, in their own precision.

        Raises:
            InputError: No model type of Hugging Face expresses the model.
        """
        kind = _exported_type(settings)
        index, tied = torch.tensor(rows), bool(settings["share_decoder_input_output_embed"])
        exported = {
            "model.embed_tokens.weight": weights["decoder.embed_tokens.weight"][index],
            "model.norm.weight": weights["decoder.layer_norm.weight"],
        }
        for i in range(settings["decoder_layers"]):
            for exported_name, name in _NORMS:
                exported[f"model.layers.{i}.{exported_name}.weight"] = weights[f"decoder.layers.{i}.{name}.weight"]
            for exported_name, name, _ in _attention_tensors(settings):
                exported[f"model.layers.{i}.self_attn.{exported_name}"] = weights[
                    f"decoder.layers.{i}.self_attn.{name}"
                ]
            for name in _FEED_FORWARD:
                exported[f"model.layers.{i}.mlp.{name}.weight"] = weights[f"decoder.layers.{i}.{name}.weight"]
        if not tied:
            exported["lm_head.weight"] = weights["decoder.output_projection.weight"][index]
        heads = settings["decoder_attention_heads"]
        scaling = json.loads(settings["rope_scaling"]) if settings["rope_scaling"] else None
        config = {
            "model_type": kind,
            "architectures": [f"{kind.capitalize()}ForCausalLM"],
            "vocab_size": len(rows),
            "hidden_size": settings["decoder_embed_dim"],
            "intermediate_size": settings["decoder_ffn_embed_dim"],
            "num_hidden_layers": settings["decoder_layers"],
            "num_attention_heads": heads,
            "num_key_value_heads": settings["decoder_kv_heads"] or heads,
            "head_dim": settings["decoder_head_dim"] or settings["decoder_embed_dim"] // heads,
            "hidden_act": "silu",
            "rms_norm_eps": settings["norm_eps"],
            "rope_theta": settings["rope_theta"],
            "rope_scaling": scaling,
            "max_position_embeddings": settings["max_target_positions"],
            "tie_word_embeddings": tied,
            "torch_dtype": str(exported["model.norm.weight"].dtype).removeprefix("torch."),
        }
        if kind == "llama":
            config["attention_bias"] = settings["qkv_bias"]
        if kind == "mistral":
            config["sliding_window"] = settings["sliding_window"]
        return config, {name: tensor.contiguous() for name, tensor in exported.items()}


def _attention_tensors(settings: Config) -> list[tuple[str, str, tuple[int, ...]]]:
    """List an attention's tensors: Hugging Face's name, llama_lm's and the shape."""
    D, d = settings["decoder_embed_dim"], settings["decoder_head_dim"]
    heads = settings["decoder_attention_heads"]
    d = d or D // heads
    tensors = []
    for letter, count in (
        ("q", heads),
        ("k", settings["decoder_kv_heads"] or heads),
        ("v", settings["decoder_kv_heads"] or heads),
    ):
        name = f"{letter}_proj"
        tensors.append((f"{name}.weight", f"{name}.weight", (count * d, D)))
        if settings["qkv_bias"]:
            tensors.append((f"{name}.bias", f"{name}.bias", (count * d,)))
    tensors.append(("o_proj.weight", "out_proj.weight", (D, heads * d)))
    if settings["out_bias"]:
        tensors.append(("o_proj.bias", "out_proj.bias", (D,)))
    if settings["qk_norm"]:
        tensors += [(f"{letter}_norm.weight", f"{letter}_norm.weight", (d,)) for letter in "qk"]
    return tensors


def _rotary(config: Config) -> tuple[float, Config | None]:
    """Return the base of the rotary frequencies and the parameters of their scaling, None for none."""
    parameters = config.get("rope_parameters") or config["rope_scaling"] or {}  # the first: since transformers 5
    if not isinstance(parameters, dict):
        raise InputError(f"rope_parameters={parameters!r:.40} in config.json is not an object")
    parameters = dict(parameters)
    theta = parameters.pop("rope_theta", None) or config["rope_theta"]
    if type(theta) not in (int, float) or not 0 < theta <= 1e12:
        raise InputError(f"rope_theta={theta!r:.40} in config.json is not a number above 0 and up to 1e12")
    partial = parameters.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise InputError(
            f"partial_rotary_factor={partial} in config.json is not supported: llama_lm rotates whole heads"
        )
    if rope_type(parameters) == "default":
        return theta, None
    parameters.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
    try:
        RotaryPositions(2, theta, parameters)
    except ValueError as error:
        raise InputError(f"config.json: {error}") from None
    return theta, parameters


def _sliding_window(config: Config) -> int | None:
    """Return the number of tokens that a token sees at most, None for all."""
    kind, window = config["model_type"], config["sliding_window"]
    if kind == "llama" or (kind != "mistral" and not config["use_sliding_window"]):
        return None
    return window if window is not None and window < config["max_position_embeddings"] else None


def _exported_type(settings: Config) -> str:
    """Return the Hugging Face model type that has the parts of a ``llama_lm``."""
    parts = tuple(bool(settings[name]) for name in ("qkv_bias", "out_bias", "qk_norm"))
    kinds = {(False, False, False): "llama", (True, True, False): "llama", (True, False, False): "qwen2"}
    kinds[(False, False, True)] = "qwen3"
    kind = kinds.get(parts)
    if kind == "llama" and settings["sliding_window"] and not settings["qkv_bias"]:
        kind = "mistral"
    if kind is None or (settings["sliding_window"] and kind != "mistral"):
        raise InputError(
            "no model type of Hugging Face has these parts together: "
            + ", ".join(f"{name}={settings[name]}" for name in ("qkv_bias", "out_bias", "qk_norm", "sliding_window"))
        )
    return kind


def _brief(value) -> str:
    return "{...}" if isinstance(value, dict) else str(value)

"""Settings and weights of Hugging Face's GPT-2 and OPT as those of fairseq's ``transformer_lm``, and GPT-2 back again.

Legend: V symbols, D width, E width of the embedding, F width of the feed-forward layer, P positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preprocess.errors import InputError

SUPPORTED = "gpt2 (any size, also distilgpt2) and opt (all but opt-350m, which is post-norm)"

_ACTIVATIONS = {
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu": "gelu",
    "relu": "relu",
    "tanh": "tanh",
}
_EPS = 1e-5  # epsilon of every LayerNorm in fairseq

Config = dict[str, Any]
Weights = dict[str, Tensor]

# Settings of a transformer_lm that all supported models share.
_FIXED = {
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "decoder_learned_pos": True,
    "no_token_positional_embeddings": False,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
}
# Settings of config.json that fairseq's decoder cannot vary.
_GPT2_SETTINGS = {
    "layer_norm_epsilon": _EPS,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "pruned_heads": {},
}
_OPT_SETTINGS = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}
# Sizes that config.json may leave out, and those that it must have.
_OPTIONAL_SIZES = {
    "gpt2": ("vocab_size", "n_embd", "n_layer", "n_head", "n_inner", "n_positions"),
    "opt": ("vocab_size", "word_embed_proj_dim"),
}
_REQUIRED_SIZES = {
    "gpt2": (),
    "opt": ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings"),
}
_MOST = 2**31 - 1  # of a size
_PROBABILITIES = ("resid_pdrop", "attn_pdrop", "dropout", "attention_dropout")
_DEFAULT_ACTIVATION = {"gpt2": "gelu_new", "opt": "relu"}

# Modules of a layer: GPT-2's name and fairseq's.
_NORMS = (("ln_1", "self_attn_layer_norm"), ("ln_2", "final_layer_norm"))
_LINEAR = (("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2"))


def check_config(config: Config) -> None:
    """Refuse a model that fairseq's pre-norm decoder cannot express.

    Args:
        config: Content of config.json.

    Raises:
        InputError: The model is not supported; the message names the setting and the supported models.
    """
    kind = config.get("model_type")
    required = {"gpt2": _GPT2_SETTINGS, "opt": _OPT_SETTINGS}.get(kind if isinstance(kind, str) else None)
    if required is None:
        raise InputError(f"model_type={kind} in config.json is not supported; supported are {SUPPORTED}")
    if config.get("quantization_config"):
        raise InputError(f"the {kind} is quantized (quantization_config): give its original weights")
    for name, value in required.items():
        if config.get(name, value) != value:
            raise InputError(
                f"{name}={config[name]} in config.json cannot be expressed by fairseq's decoder, which has {value}; "
                f"supported are {SUPPORTED}"
            )
    activation = config.get("activation_function", _DEFAULT_ACTIVATION[kind])
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise InputError(
            f"activation_function={activation} in config.json is not supported; supported are {', '.join(_ACTIVATIONS)}"
        )
    _check_numbers(config, kind)


def _check_numbers(config: Config, kind: str) -> None:
    """Refuse sizes and probabilities that are not numbers in their range."""
    for name in (*_REQUIRED_SIZES[kind], *_OPTIONAL_SIZES[kind]):
        size = config.get(name)
        if size is None and name not in _REQUIRED_SIZES[kind]:
            continue
        if type(size) is not int or not 0 < size <= _MOST:
            raise InputError(f"{name}={size!r:.40} in config.json is not a number from 1 to {_MOST}")
    for name in _PROBABILITIES:
        value = config.get(name, 0)
        if type(value) not in (int, float) or not 0 <= value <= 1:
            raise InputError(f"{name}={value!r:.40} in config.json is not a number from 0 to 1")
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise InputError(f"tie_word_embeddings={tied!r:.40} in config.json is not true or false")


def model_settings(config: Config) -> Config:
    """Translate a model's configuration.

    Args:
        config: Content of config.json, accepted by :func:`check_config`.

    Returns:
        Settings of a ``transformer_lm``.
    """
    if config["model_type"] == "gpt2":
        width, layers, heads = config.get("n_embd") or 768, config.get("n_layer") or 12, config.get("n_head") or 12
        inner, positions = config.get("n_inner") or 4 * width, config.get("n_positions") or 1024
        dropout, attention, symbol_width = config.get("resid_pdrop", 0.1), config.get("attn_pdrop", 0.1), width
    else:
        width, layers, heads = (config[name] for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"))
        inner, positions = config["ffn_dim"], config["max_position_embeddings"]
        dropout, attention = config.get("dropout", 0.1), config.get("attention_dropout", 0.0)
        symbol_width = config.get("word_embed_proj_dim") or width
    return {
        "decoder_embed_dim": width,
        "decoder_input_dim": symbol_width,
        "decoder_output_dim": symbol_width,
        "decoder_ffn_embed_dim": inner,
        "decoder_layers": layers,
        "decoder_attention_heads": heads,
        "activation_fn": _ACTIVATIONS[config.get("activation_function", _DEFAULT_ACTIVATION[config["model_type"]])],
        "dropout": dropout,
        "attention_dropout": attention,
        "share_decoder_input_output_embed": config.get("tie_word_embeddings", True),
        "max_target_positions": positions,
        "tokens_per_sample": positions,
        **_FIXED,
    }


class _WeightReader:
    """Weights of a Hugging Face model, taken one by one in float32; weights that nobody takes are an error.

    Args:
        weights: Tensors by their names.
        prefix: Prefix of the names, to remove where it is.
    """

    def __init__(self, weights: Weights, prefix: str):
        self._left = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}

    def take(self, name: str, *shape: int) -> Tensor:
        """Take one tensor of a shape, as float32."""
        if name not in self._left:
            raise InputError(f"the weights lack {name}, which config.json requires")
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but config.json requires {shape}")
        return tensor.float()

    def finish(self, ignored: str) -> None:
        """Refuse weights that were not taken, but for names that match a regular expression."""
        left = [name for name in self._left if not re.fullmatch(ignored, name)]
        if left:
            raise InputError(f"{len(left)} of the weights are not in config.json, such as {left[0]}")


def convert_gpt2(weights: Weights, settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
    """Convert the weights of a GPT2LMHeadModel (or GPT2Model).

    Args:
        weights: Tensors by their Hugging Face names.
        settings: Settings of the ``transformer_lm``, from :func:`model_settings`.
        rows: Row of the embedding for each symbol of the dictionary, special ones included; -1 for a symbol without.
        vocabulary: V, number of rows of the embedding.

    Returns:
        Tensors by the names of a ``transformer_lm``, float32.

    Raises:
        InputError: A tensor is missing, of another shape or unknown.
    """
    source = _WeightReader(weights, "transformer.")
    D, F, P = (settings[name] for name in ("decoder_embed_dim", "decoder_ffn_embed_dim", "max_target_positions"))
    embedding = source.take("wte.weight", vocabulary, D)
    positions = source.take("wpe.weight", P, D)
    # fairseq numbers positions after the symbol of the padding, 1: the first two rows are not used.
    converted = {
        "decoder.version": torch.tensor([3.0]),  # without it fairseq drops the final LayerNorm
        "decoder.embed_tokens.weight": _permute(embedding, rows),
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
        converted["decoder.output_projection.weight"] = _permute(output, rows)
    source.finish(r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias")
    return converted


def convert_opt(weights: Weights, settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
    """Convert the weights of an OPTForCausalLM, whose names are fairseq's.

    Args:
        weights: Tensors by their Hugging Face names.
        settings: Settings of the ``transformer_lm``, from :func:`model_settings`.
        rows: Row of the embedding for each symbol of the dictionary, special ones included.
        vocabulary: V, number of rows of the embedding.

    Returns:
        Tensors by the names of a ``transformer_lm``, float32.

    Raises:
        InputError: A tensor is missing, of another shape or unknown.
    """
    source = _WeightReader({name.removeprefix("model."): tensor for name, tensor in weights.items()}, "decoder.")
    D, F, P = (settings[name] for name in ("decoder_embed_dim", "decoder_ffn_embed_dim", "max_target_positions"))
    E = settings["decoder_input_dim"]
    converted = {
        "decoder.version": torch.tensor([3.0]),
        "decoder.embed_tokens.weight": _permute(source.take("embed_tokens.weight", vocabulary, E), rows),
        "decoder.embed_positions.weight": source.take("embed_positions.weight", P + 2, D),
    }
    if E != D:
        converted["decoder.project_in_dim.weight"] = source.take("project_in.weight", D, E)
        converted["decoder.project_out_dim.weight"] = source.take("project_out.weight", E, D)
    shapes = {f"self_attn.{name}_proj": (D, D) for name in ("q", "k", "v", "out")}
    shapes.update({"fc1": (F, D), "fc2": (D, F), "self_attn_layer_norm": (D,), "final_layer_norm": (D,)})
    for i in range(settings["decoder_layers"]):
        for name, shape in shapes.items():
            key = f"layers.{i}.{name}."
            converted[f"decoder.{key}weight"] = source.take(key + "weight", *shape)
            converted[f"decoder.{key}bias"] = source.take(key + "bias", shape[0])
    for name in ("weight", "bias"):
        converted[f"decoder.layer_norm.{name}"] = source.take(f"final_layer_norm.{name}", D)
    converted["decoder.output_projection.weight"] = converted["decoder.embed_tokens.weight"]
    if not settings["share_decoder_input_output_embed"]:
        converted["decoder.output_projection.weight"] = _permute(source.take("lm_head.weight", vocabulary, E), rows)
    source.finish(r"lm_head\.weight")
    return converted


def _permute(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Bring the rows of a table (V, D) into the order of a dictionary.

    A symbol without a row gets the mean of all: its logit is then the mean of the logits, so that by Jensen's
    inequality its probability is at most 1/V. A row of zeros would be a logit of 0, far above what GPT-2 gives.
    """
    index = torch.tensor(rows)
    return torch.where((index < 0)[:, None], table.mean(dim=0), table[index.clamp(min=0)])


def export_gpt2(weights: Weights, settings: Config, rows: Sequence[int]) -> tuple[Config, Weights]:
    """Convert a ``transformer_lm`` to a GPT2LMHeadModel.

    Args:
        weights: Tensors by the names of a ``transformer_lm`` (``decoder.embed_tokens.weight`` ...).
        settings: Settings of the model, as in its checkpoint.
        rows: Symbol of the dictionary for each row of GPT-2's embedding.

    Returns:
        The content of config.json, and tensors by their Hugging Face names, float32.

    Raises:
        InputError: GPT-2 cannot express the model.
    """
    width = settings["decoder_embed_dim"]
    required = {**_FIXED, "decoder_input_dim": width, "decoder_output_dim": width}
    required.update(dict.fromkeys(("scale_fc", "scale_attn", "scale_heads", "scale_resids"), False))
    for name, value in required.items():
        if (value or None) != (settings[name] or None):
            raise InputError(f"a GPT-2 has {name}={value}, this model {settings[name]}: it cannot be exported")
    activations = {fairseq_name: name for name, fairseq_name in reversed(_ACTIVATIONS.items())}
    activation = activations.get(str(settings["activation_fn"]))
    if settings["model"] != "transformer_lm" or activation is None:
        raise InputError(
            f"a GPT-2 cannot express a {settings['model']} with activation_fn={settings['activation_fn']}: it cannot "
            "be exported"
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
        "activation_function": activation,
        "layer_norm_epsilon": _EPS,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }
    return config, {name: tensor.float().contiguous() for name, tensor in exported.items()}

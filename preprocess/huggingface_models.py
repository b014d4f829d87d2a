"""What Hugging Face's GPT-2 and OPT are in terms of fairseq's ``transformer_lm``, and GPT-2 back again.

Legend: V symbols, D width, N layers, P positions.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from preprocess.errors import InputError

SUPPORTED = "gpt2 (any size, also distilgpt2) and opt (all but opt-350m, which is post-norm)"
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")

_ACTIVATIONS = {
    "gelu_new": "gelu_accurate",
    "gelu_pytorch_tanh": "gelu_accurate",
    "gelu": "gelu",
    "relu": "relu",
    "tanh": "tanh",
}
_EPS = 1e-5  # of all of fairseq's LayerNorms

Config = dict[str, Any]
Weights = dict[str, Tensor]


def check_config(config: Config) -> None:
    """Refuse what fairseq's pre-norm decoder cannot express.

    Raises:
        InputError: naming the setting and what is supported.
    """
    kind = config.get("model_type")
    wanted = {"gpt2": _GPT2_SETTINGS, "opt": _OPT_SETTINGS}.get(kind)
    if wanted is None:
        raise InputError(f"model_type={kind} in config.json is not supported; supported are {SUPPORTED}")
    if config.get("quantization_config"):
        raise InputError(f"the {kind} is quantized (quantization_config): give its original weights")
    for name, value in wanted.items():
        if config.get(name, value) != value:
            raise InputError(
                f"{name}={config[name]} in config.json cannot be expressed by fairseq's decoder, which has {value}; "
                f"supported are {SUPPORTED}"
            )
    activation = config.get("activation_function", _DEFAULT_ACTIVATION[kind])
    if activation not in _ACTIVATIONS:
        raise InputError(f"activation_function={activation} is none of fairseq's: {', '.join(_ACTIVATIONS)}")


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
_DEFAULT_ACTIVATION = {"gpt2": "gelu_new", "opt": "relu"}


def model_settings(config: Config) -> Config:
    """Settings of a ``transformer_lm`` for a configuration that :func:`check_config` let pass."""
    if config["model_type"] == "gpt2":
        width, layers, heads = config.get("n_embd", 768), config.get("n_layer", 12), config.get("n_head", 12)
        inner, positions = config.get("n_inner") or 4 * width, config.get("n_positions", 1024)
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
        **FIXED,
    }


# What all of them share with each other.
FIXED = {
    "decoder_normalize_before": True,
    "no_decoder_final_norm": False,
    "decoder_learned_pos": True,
    "no_token_positional_embeddings": False,
    "no_scale_embedding": True,
    "layernorm_embedding": False,
}

_LAYER = "decoder.layers.{}."
_NORMS = (("ln_1", "self_attn_layer_norm"), ("ln_2", "final_layer_norm"))
_LINEAR = (("attn.c_proj", "self_attn.out_proj"), ("mlp.c_fc", "fc1"), ("mlp.c_proj", "fc2"))


class _Source:
    """Weights of a Hugging Face model, taken one by one as float32; what is left over is an error."""

    def __init__(self, weights: Weights, prefix: str):
        self._left = {re.sub(f"^{re.escape(prefix)}", "", name): tensor for name, tensor in weights.items()}

    def take(self, name: str, *shape: int) -> Tensor:
        if name not in self._left:
            raise InputError(f"the weights lack {name}, which config.json asks for")
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but config.json asks for {shape}")
        return tensor.float()

    def finish(self, ignored: str) -> None:
        left = [name for name in self._left if not re.fullmatch(ignored, name)]
        if left:
            raise InputError(f"the weights hold {len(left)} that config.json does not know, such as {left[0]}")


def convert_gpt2(weights: Weights, settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
    """Weights of a ``transformer_lm`` from those of a GPT2LMHeadModel (or GPT2Model).

    Args:
        weights: by their names there.
        settings: see :func:`model_settings`.
        rows: for each symbol of the dictionary, special ones included, its row of the embedding; -1 for none.
        vocabulary: V, rows of the embedding.
    """
    source = _Source(weights, "transformer.")
    D, F, P = (settings[name] for name in ("decoder_embed_dim", "decoder_ffn_embed_dim", "max_target_positions"))
    embedding = source.take("wte.weight", vocabulary, D)
    positions = source.take("wpe.weight", P, D)
    # fairseq numbers positions from behind the padding's symbol, 1.
    converted = {
        "decoder.version": torch.tensor([3.0]),  # without it fairseq drops the final LayerNorm
        "decoder.embed_tokens.weight": _permute(embedding, rows),
        "decoder.embed_positions.weight": torch.cat([positions.new_zeros(2, D), positions]),
    }
    for i in range(settings["decoder_layers"]):
        theirs, ours = f"h.{i}.", _LAYER.format(i)
        for their, our in _NORMS:
            for name in ("weight", "bias"):
                converted[f"{ours}{our}.{name}"] = source.take(f"{theirs}{their}.{name}", D)
        # A Conv1D, which keeps its matrix the other way round; queries, keys and values lie side by side.
        weight = source.take(f"{theirs}attn.c_attn.weight", D, 3 * D).t()
        bias = source.take(f"{theirs}attn.c_attn.bias", 3 * D)
        for name, joined in (("weight", weight), ("bias", bias)):
            for which, part in zip("qkv", joined.chunk(3), strict=True):
                converted[f"{ours}self_attn.{which}_proj.{name}"] = part.clone(memory_format=torch.contiguous_format)
        for (their, our), (inner, outer) in zip(_LINEAR, ((D, D), (D, F), (F, D)), strict=True):
            converted[f"{ours}{our}.weight"] = source.take(f"{theirs}{their}.weight", inner, outer).t().contiguous()
            converted[f"{ours}{our}.bias"] = source.take(f"{theirs}{their}.bias", outer)
    for name in ("weight", "bias"):
        converted[f"decoder.layer_norm.{name}"] = source.take(f"ln_f.{name}", D)
    converted["decoder.output_projection.weight"] = converted["decoder.embed_tokens.weight"]
    if not settings["share_decoder_input_output_embed"]:
        output = source.take("lm_head.weight", vocabulary, D)
        converted["decoder.output_projection.weight"] = _permute(output, rows)
    source.finish(r"lm_head\.weight|h\.\d+\.attn\.(masked_)?bias")
    return converted


def convert_opt(weights: Weights, settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
    """Weights of a ``transformer_lm`` from those of an OPTForCausalLM, which were fairseq's once: the names remain."""
    source = _Source({re.sub(r"^model\.", "", name): x for name, x in weights.items()}, "decoder.")
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
    """Rows of a table (V, D) in the order of a dictionary.

    A symbol without a row gets the mean of all: its logit is then the mean of the logits, so that by Jensen's
    inequality its probability is at most 1/V. A row of zeros would be a logit of 0, far above what GPT-2 gives.
    """
    index = torch.tensor(rows)
    return torch.where((index < 0)[:, None], table.mean(dim=0), table[index.clamp(min=0)])


def export_gpt2(weights: Weights, settings: Config, rows: Sequence[int]) -> tuple[Config, Weights]:
    """A GPT2LMHeadModel's configuration and weights from those of a ``transformer_lm``'s decoder.

    Args:
        weights: by their names in the decoder (``embed_tokens.weight`` ...).
        settings: of the model, as in its checkpoint.
        rows: the symbol of the dictionary for each row of the embedding that is to be.

    Raises:
        InputError: where the model is none that GPT-2 can express.
    """
    wanted = {**FIXED, **dict.fromkeys(("scale_fc", "scale_attn", "scale_heads", "scale_resids"), False)}
    width = settings["decoder_embed_dim"]
    wanted.update(decoder_input_dim=width, decoder_output_dim=width)
    for name, value in wanted.items():
        if (value or None) != (settings[name] or None):
            raise InputError(f"a GPT-2 has {name}={value}, this model {settings[name]}: it cannot be exported")
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    activation = activations.get(str(settings["activation_fn"]))
    if settings["model"] != "transformer_lm" or activation is None:
        raise InputError(
            f"a GPT-2 cannot express a {settings['model']} with activation_fn={settings['activation_fn']}: it cannot "
            "be exported"
        )
    tied = bool(settings["share_decoder_input_output_embed"])
    index = torch.tensor(rows)
    exported = {
        "transformer.wte.weight": weights["embed_tokens.weight"][index],
        "transformer.wpe.weight": weights["embed_positions.weight"][2:],
    }
    for i in range(settings["decoder_layers"]):
        theirs, ours = f"transformer.h.{i}.", f"layers.{i}."
        for their, our in _NORMS:
            for name in ("weight", "bias"):
                exported[f"{theirs}{their}.{name}"] = weights[f"{ours}{our}.{name}"]
        for name in ("weight", "bias"):
            joined = torch.cat([weights[f"{ours}self_attn.{which}_proj.{name}"] for which in "qkv"])
            exported[f"{theirs}attn.c_attn.{name}"] = joined.t() if name == "weight" else joined
        for their, our in _LINEAR:
            exported[f"{theirs}{their}.weight"] = weights[f"{ours}{our}.weight"].t()
            exported[f"{theirs}{their}.bias"] = weights[f"{ours}{our}.bias"]
    for name in ("weight", "bias"):
        exported[f"transformer.ln_f.{name}"] = weights[f"layer_norm.{name}"]
    if not tied:
        exported["lm_head.weight"] = weights["output_projection.weight"][index]
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

"""Hugging Face's OPT, whose names of weights are fairseq's, as fairseq's ``transformer_lm``.

Legend: V symbols, D width, E width of the embedding, F width of the feed-forward layer, P positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from preprocess.dictionary import EOS, SPECIALS
from preprocess.errors import InputError
from preprocess.huggingface_conversion import Conversion, check_numbers, check_settings
from preprocess.huggingface_gpt2 import DECODER, activation
from preprocess.huggingface_tokenizer import JsonTokenizer, dictionary_symbols
from preprocess.huggingface_weights import Config, WeightReader, Weights, order_rows

SUPPORTED = "opt, all but opt-350m, which is post-norm"

# Settings of config.json that fairseq's decoder cannot vary.
_REQUIRED = {
    "do_layer_norm_before": True,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
    "_remove_final_layer_norm": False,
}


class OptConversion(Conversion):
    """OPTForCausalLM."""

    model = "transformer_lm"
    default_vocabulary, default_end = 50272, EOS

    def settings(self, config: Config) -> Config:
        check_settings(config, _REQUIRED, SUPPORTED)
        sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim", "max_position_embeddings")
        check_numbers(config, sizes, ("vocab_size", "word_embed_proj_dim"))
        width, positions = config["hidden_size"], config["max_position_embeddings"]
        symbol_width = config.get("word_embed_proj_dim") or width
        return {
            "decoder_embed_dim": width,
            "decoder_input_dim": symbol_width,
            "decoder_output_dim": symbol_width,
            "decoder_ffn_embed_dim": config["ffn_dim"],
            "decoder_layers": config["num_hidden_layers"],
            "decoder_attention_heads": config["num_attention_heads"],
            "activation_fn": activation(config, "relu"),
            "dropout": config.get("dropout", 0.1),
            "attention_dropout": config.get("attention_dropout", 0.0),
            "share_decoder_input_output_embed": config.get("tie_word_embeddings", True),
            "max_target_positions": positions,
            "tokens_per_sample": positions,
            **DECODER,
        }

    def symbols(
        self, config: Config, tokenizer: JsonTokenizer | None, dictionary: str | None
    ) -> tuple[list[str], list[int]]:
        if dictionary is not None:
            raise InputError(f"--dict {dictionary} cannot be used with an OPT, whose order is fixed: leave --dict out")
        vocabulary = self.vocabulary(config)
        symbols = [str(number) for number in range(len(SPECIALS), vocabulary)]
        if tokenizer is not None and dictionary_symbols(tokenizer, vocabulary) != symbols:
            raise InputError(f"the tokenizer of an OPT begins with {', '.join(SPECIALS)}, but this one does not")
        if self.end_of_text(config) != EOS:
            raise InputError(f"eos_token_id={config['eos_token_id']} in config.json: an OPT's is {EOS}, as fairseq's")
        return symbols, list(range(vocabulary))

    def convert(self, weights: Mapping[str, Tensor], settings: Config, rows: Sequence[int], vocabulary: int) -> Weights:
        source = WeightReader(
            {name.removeprefix("model."): tensor for name, tensor in weights.items()}, "decoder.", torch.float32
        )
        D, F, P = (settings[name] for name in ("decoder_embed_dim", "decoder_ffn_embed_dim", "max_target_positions"))
        E = settings["decoder_input_dim"]
        converted = {
            "decoder.version": torch.tensor([3.0]),
            "decoder.embed_tokens.weight": order_rows(source.take("embed_tokens.weight", vocabulary, E), rows),
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
            converted["decoder.output_projection.weight"] = order_rows(
                source.take("lm_head.weight", vocabulary, E), rows
            )
        source.finish(r"lm_head\.weight")
        return converted

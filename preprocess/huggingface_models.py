"""The kinds of Hugging Face models that can be converted, by their ``model_type``."""

from __future__ import annotations

from preprocess.errors import InputError
from preprocess.huggingface_conversion import Conversion
from preprocess.huggingface_gpt2 import Gpt2Conversion
from preprocess.huggingface_llama import MODEL_TYPES, LlamaConversion
from preprocess.huggingface_opt import OptConversion
from preprocess.huggingface_weights import Config

SUPPORTED = (
    "gpt2 (any size, also distilgpt2), opt (all but opt-350m, which is post-norm), llama (Llama 2 and 3, SmolLM, "
    "SmolLM2), mistral, qwen2 (also Qwen2.5) and qwen3 (dense)"
)

_GPT2, _LLAMA = Gpt2Conversion(), LlamaConversion()
_CONVERSIONS: dict[str, Conversion] = {"gpt2": _GPT2, "opt": OptConversion(), **dict.fromkeys(MODEL_TYPES, _LLAMA)}
_EXPORTS = {_GPT2.model: _GPT2, _LLAMA.model: _LLAMA}

# What a model type has that none of the families can express; others are only unknown.
_REASONS = {
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), "a mixture of experts"),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "minicpm3"), "multi-head latent attention"),
    **dict.fromkeys(("gemma2", "gemma3", "gemma3_text", "cohere2"), "layers with sliding windows"),
    **dict.fromkeys(("llava", "mllama", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "mistral3", "idefics3"), "vision"),
    **dict.fromkeys(("mamba", "mamba2", "jamba", "qwen3_next"), "layers that are not attention"),
}


def conversion_of(config: Config) -> Conversion:
    """Return how a model is converted.

    Args:
        config: Content of config.json.

    Raises:
        InputError: The kind of model is not supported; the message names the reason and the supported kinds.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in _CONVERSIONS:
        reason = f" ({_REASONS[kind]})" if isinstance(kind, str) and kind in _REASONS else ""
        raise InputError(f"model_type={kind} in config.json is not supported{reason}; supported are {SUPPORTED}")
    return _CONVERSIONS[kind]


def export_of(model: str):
    """Return the conversion whose ``export`` takes a model of fairseq.

    Args:
        model: Registered name of the model.

    Raises:
        InputError: Models of this name cannot be exported.
    """
    if model not in _EXPORTS:
        raise InputError(f"a {model} cannot be exported to Hugging Face: {' and '.join(_EXPORTS)} can")
    return _EXPORTS[model]

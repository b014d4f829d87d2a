"""GGUF files of tiny models of transformers, written as llama.cpp's converter and quantizer write them."""

import gguf
import numpy as np
import torch
import transformers
from transformers import LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM

F32, I16 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.I16
MODELS = {
    "llama": (LlamaForCausalLM, transformers.LlamaConfig),
    "mistral": (MistralForCausalLM, transformers.MistralConfig),
    "qwen2": (Qwen2ForCausalLM, transformers.Qwen2Config),
    "qwen3": (Qwen3ForCausalLM, transformers.Qwen3Config),
}


def tiny(kind, **options):
    """A random model of transformers, biases and norms too, so that none can be forgotten."""
    model_class, config_class = MODELS[kind]
    sizes = dict(
        vocab_size=67,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=None,
    )
    model = model_class(config_class(**{**sizes, **options})).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = float("norm" in name)
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15 + scale)
    return model


def metadata_of(model, **changes):
    """What llama.cpp's converter writes of a model; a change of None leaves a value out."""
    config = model.config
    kind = "llama" if config.model_type == "mistral" else config.model_type
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rope = dict(getattr(config, "rope_parameters", None) or {"rope_theta": config.rope_theta})
    values = {
        "context_length": config.max_position_embeddings,
        "block_count": config.num_hidden_layers,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": rope["rope_theta"],
        "rope.dimension_count": head_dim,
    }
    if rope.get("rope_type") in ("linear", "yarn"):
        values["rope.scaling.type"], values["rope.scaling.factor"] = rope["rope_type"], rope["factor"]
        values["rope.scaling.original_context_length"] = rope.get("original_max_position_embeddings")
    values = {f"{kind}.{name}": value for name, value in values.items()}
    values = {"general.type": "model", **values, "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}
    return {**values, **changes}


def factors_of(rope, head_dim):
    """The divisors of the frequencies that llama.cpp's converter writes for Llama 3, number by number."""
    factors = []
    for i in range(0, head_dim, 2):
        turns = rope["original_max_position_embeddings"] / (2 * np.pi * rope["rope_theta"] ** (i / head_dim))
        smooth = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        smooth = min(max(smooth, 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(factors, dtype=np.float32)


def permute(weights, heads):
    """The order in which llama.cpp's converter writes queries and keys of a Llama."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weights.shape)


def tensors_of(model, kind):
    """Tensors by their names in a GGUF, and their contents and types; the model gets what can be read from them."""
    architecture = gguf.MODEL_ARCH.QWEN3 if "qwen3" in model.config.model_type else None
    architecture = architecture or (gguf.MODEL_ARCH.QWEN2 if "qwen2" in model.config.model_type else None)
    names = gguf.get_tensor_name_map(architecture or gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    tensors, readable = {}, {}
    for name, parameter in model.named_parameters():
        stored = quantize(parameter.detach().numpy(), kind) if parameter.dim() == 2 else parameter.detach().numpy()
        types = kind if parameter.dim() == 2 else gguf.GGMLQuantizationType.F32
        readable[name] = torch.from_numpy(np.array(gguf.dequantize(stored, types)))
        if architecture is None and ("q_proj" in name or "k_proj" in name):
            heads = model.config.num_attention_heads if "q_proj" in name else model.config.num_key_value_heads
            stored = permute(stored, heads)
        tensors[names.get_name(name, try_suffixes=(".weight", ".bias"))] = stored, types
    model.load_state_dict(readable, strict=False)
    rope = dict(getattr(model.config, "rope_parameters", None) or {})
    if rope.get("rope_type") == "llama3":
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        tensors["rope_freqs.weight"] = factors_of(rope, head_dim), gguf.GGMLQuantizationType.F32
    return tensors


def quantize(values, kind):
    """Blocks near the values; random ones of the K types, which the package gguf only reads."""
    halves = {"Q2_K": (80, 84), "Q3_K": (108, 110), "Q4_K": (0, 4), "Q5_K": (0, 4), "Q6_K": (208, 210)}
    if kind.name not in halves:
        return gguf.quantize(values, kind)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(values.size)
    blocks = generator.integers(0, 256, (values.size // numbers, size), dtype=np.uint8)
    first, last = halves[kind.name]
    scales = generator.uniform(1e-4, 4e-4, (len(blocks), (last - first) // 2)).astype(np.float16)
    blocks[:, first:last] = scales.view(np.uint8)
    return blocks.reshape(values.shape[0], -1)


def write(path, metadata, tensors, architecture="llama", **options):
    """Write a GGUF file."""
    writer = gguf.GGUFWriter(path, architecture, **options)
    for name, value in metadata.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            adders = {str: writer.add_string, bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
            adders[type(value)](name, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_model(path, model, kind="F32", changes=None, **options):
    """Write a model as llama.cpp's converter and quantizer do; the model gets the weights that the file holds."""
    architecture = "llama" if model.config.model_type == "mistral" else model.config.model_type
    tensors = tensors_of(model, gguf.GGMLQuantizationType[kind])
    return write(path, metadata_of(model, **(changes or {})), tensors, architecture, **options)

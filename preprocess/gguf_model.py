"""A GGUF file, llama.cpp's format, as what a directory of a Hugging Face model holds: config, weights and tokenizer.

The package ``gguf`` of llama.cpp parses the file and dequantizes its tensors. Tensors are read one by one from the
memory map when they are asked for.

Legend: H heads, d width of a head.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preprocess.errors import InputError, require_package
from preprocess.gguf_config import check_model, huggingface_config
from preprocess.gguf_metadata import GgufMetadata
from preprocess.gguf_tokenizer import tokenizer_json
from preprocess.huggingface_weights import Config

# Types of tensors, by their names in the package gguf.
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
)
_NUMBERS_AT_ONCE = 1 << 22  # of a tensor that are dequantized together, in float32

# Modules by their names in a GGUF and in a LlamaForCausalLM or a relative.
_MODULES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_EMBEDDING, _ROTARY_FACTORS = "token_embd.weight", "rope_freqs.weight"
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class GgufModel:
    """A model in a GGUF file.

    Attributes:
        config: Content of config.json.
        weights: Tensors by their Hugging Face names, read from the file at each access.
        metadata: Metadata of the file.
    """

    config: Config
    weights: Mapping[str, Tensor]
    metadata: GgufMetadata

    def tokenizer_json(self) -> str:
        """Return the content of the tokenizer.json.

        Raises:
            InputError: The tokenizer is of an unknown kind, or has more tokens than the embedding has rows.
        """
        return tokenizer_json(self.metadata, self.config["vocab_size"])


def read_gguf(path: Path, dtype: torch.dtype | None = None) -> GgufModel:
    """Read a model of the Llama family from a GGUF file.

    Args:
        path: Path of the file; of a model in several files (``-00001-of-00002.gguf``) any of them.
        dtype: Precision of the weights; if None, float32 for a file in float32 and bfloat16 for others.

    Raises:
        InputError: The file is not a whole GGUF, or its model is not supported; the message says what is.
    """
    path = Path(path)
    gguf = require_package("gguf", str(path), extra="convert")
    paths = _files(path)
    metadata, tensors = _parse(paths[0], gguf)
    for shard in paths[1:]:
        tensors.update(_parse(shard, gguf)[1])
    if metadata.get("split.count", 1) > len(paths):
        raise InputError(
            f"{path} is one of {metadata.get('split.count')} files of a model: give them their names back, such as "
            f"{path.stem}-00001-of-{metadata.get('split.count'):05}.gguf"
        )
    check_model(metadata)
    for name, tensor in tensors.items():
        if tensor.tensor_type.name not in TENSOR_TYPES:
            raise InputError(
                f"{path}: tensor {name} is of type {tensor.tensor_type.name}, which is not supported; supported are "
                + ", ".join(TENSOR_TYPES)
            )
    if _EMBEDDING not in tensors:
        raise InputError(f"{path} lacks the tensor {_EMBEDDING}: it does not hold a language model")
    rotary = tensors.get(_ROTARY_FACTORS)
    factors = None if rotary is None else _read_tensor(rotary, torch.float32, gguf)
    vocabulary = int(tensors[_EMBEDDING].shape[1])
    config = huggingface_config(metadata, tensors, vocabulary, factors)
    if dtype is None:
        full = all(tensor.tensor_type.name == "F32" for tensor in tensors.values())
        dtype = torch.float32 if full else torch.bfloat16
    return GgufModel(config, _GgufWeights(path, tensors, config, dtype, gguf), metadata)


class _GgufWeights(Mapping):
    """Tensors by their Hugging Face names, each read from the file at every access.

    Args:
        path: Path of the file, for messages.
        tensors: Tensors of the package gguf by their names in the file.
        config: Content of config.json.
        dtype: Precision of the tensors to return.
        gguf: The package gguf.

    Raises:
        InputError: A tensor is not one of the Llama family's.
    """

    def __init__(self, path: Path, tensors: dict[str, Any], config: Config, dtype: torch.dtype, gguf: Any):
        self._config, self._dtype, self._gguf = config, dtype, gguf
        self._tensors = {_translate(name, path): x for name, x in tensors.items() if name != _ROTARY_FACTORS}

    def __getitem__(self, name: str) -> Tensor:
        values = _read_tensor(self._tensors[name], self._dtype, self._gguf)
        heads = self._permuted_heads(name)
        return values if heads is None else _restore_halves(values, heads)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _permuted_heads(self, name: str) -> int | None:
        """Return the number of heads in a tensor whose rows llama.cpp orders in another way, None for other tensors."""
        if self._config["model_type"] not in ("llama", "mistral"):
            return None
        if ".q_proj." in name:
            return self._config["num_attention_heads"]
        return self._config["num_key_value_heads"] if ".k_proj." in name else None


def _restore_halves(values: Tensor, heads: int) -> Tensor:
    """Order the rows (H * d, ...) of each head as Hugging Face does.

    Rotary positions turn pairs of rows. For the architecture llama, llama.cpp stores the two rows of a pair beside each
    other; Hugging Face stores the first rows of all pairs, then the second ones.
    """
    return values.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _read_tensor(tensor: Any, dtype: torch.dtype, gguf: Any) -> Tensor:
    """Read a tensor of the package gguf, dequantizing some rows at a time, so that no float32 copy of it is made."""
    shape = tuple(reversed(tensor.shape.tolist()))
    values = torch.empty(shape, dtype=dtype)
    rows = values.view(-1, shape[-1])
    data = tensor.data.reshape(rows.size(0), -1)
    step = max(1, _NUMBERS_AT_ONCE // shape[-1])
    for start in range(0, rows.size(0), step):
        block = gguf.dequantize(data[start : start + step], tensor.tensor_type)
        rows[start : start + step] = torch.from_numpy(np.array(block))
    return values


def _translate(name: str, path: Path) -> str:
    """Return the Hugging Face name of a tensor."""
    module, _, kind = name.rpartition(".")
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", module)
    if layer and layer[2] in _LAYER_MODULES:
        return f"model.layers.{layer[1]}.{_LAYER_MODULES[layer[2]]}.{kind}"
    if module in _MODULES:
        return f"{_MODULES[module]}.{kind}"
    raise InputError(f"{path}: tensor {name} is not one of a Llama, Mistral, Qwen2 or Qwen3, which are supported")


def _files(path: Path) -> list[Path]:
    """Return the paths of all files of a model, in their order."""
    shard = _SHARD.search(path.name)
    if shard is None:
        return [path]
    prefix = path.name[: shard.start()]
    return [path.with_name(f"{prefix}-{i + 1:05}-of-{shard[2]}.gguf") for i in range(int(shard[2]))]


def _parse(path: Path, gguf: Any) -> tuple[GgufMetadata, dict[str, Any]]:
    """Read the metadata, and the tensors by their names, which stay in the memory map."""
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file, which begins with GGUF")
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise InputError(f"{path} is not a whole GGUF file, or has a newer form: {error}") from None
    if reader.byte_order != "I":
        raise InputError(f"{path} is a GGUF file in the other byte order: convert the model on a machine like this one")
    return GgufMetadata(path, values), {tensor.name: tensor for tensor in reader.tensors}

"""Where a Hugging Face model is read from: a local directory, or a GGUF file."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor

from longmem_fairseq.safe_load import load_safely, refuse_adapter
from longmem_fairseq.tensor_files import read_tensors
from preprocess.errors import InputError
from preprocess.gguf_model import GgufModel, read_gguf
from preprocess.huggingface_weights import Config, Weights
from preprocess.tokenizer_json import has_tokenizer, read_json, read_tokenizer_json

logger = logging.getLogger("preprocess.convert_huggingface")


@dataclass(frozen=True)
class ModelDirectory:
    """A directory of a Hugging Face model.

    Attributes:
        path: Path of the directory.
    """

    path: Path

    @cached_property
    def config(self) -> Config:
        """Content of config.json.

        Raises:
            InputError: The file cannot be read, or the directory holds an adapter.
        """
        try:
            refuse_adapter(str(self.path))
        except ValueError as error:
            raise InputError(str(error)) from None
        return read_json(self.path / "config.json")

    @cached_property
    def tokenizer_json(self) -> bytes | None:
        """Content of a tokenizer.json that alone gives the ids of transformers; None without a tokenizer.

        Raises:
            InputError: The files of the tokenizer cannot be read or contradict each other.
        """
        return read_tokenizer_json(self.path) if has_tokenizer(self.path) else None

    def weights(self) -> Mapping[str, Tensor]:
        """Read all weights, in the precision of the files.

        Raises:
            InputError: There are no weights, or they cannot be read.
        """
        for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
            if (self.path / name).is_file():
                return read(self.path / name)
            if (self.path / f"{name}.index.json").is_file():
                shards = sorted(set(read_json(self.path / f"{name}.index.json").get("weight_map", {}).values()))
                weights: Weights = {}
                for shard in shards:
                    logger.info("reading %s", self.path / shard)
                    weights.update(read(self.path / Path(shard).name))
                return weights
        raise InputError(f"{self.path} holds neither model.safetensors nor pytorch_model.bin")


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file; see :class:`ModelDirectory`, whose properties this class has.

    Attributes:
        path: Path of the file.
    """

    path: Path

    @cached_property
    def model(self) -> GgufModel:
        """The model in the file."""
        return read_gguf(self.path)

    @property
    def config(self) -> Config:
        """Content of a config.json."""
        return self.model.config

    @cached_property
    def tokenizer_json(self) -> bytes:
        """Content of a tokenizer.json."""
        return self.model.tokenizer_json().encode()

    def weights(self) -> Mapping[str, Tensor]:
        """Return all weights, which are read from the file one by one."""
        return self.model.weights


def open_model(path: Path) -> ModelDirectory | GgufFile:
    """Return what reads a model.

    Args:
        path: Path of a directory with config.json, weights and a tokenizer, or of a GGUF file.
    """
    return GgufFile(path) if path.is_file() else ModelDirectory(path)


def _read_safetensors(path: Path) -> Weights:
    """Read the weights in a safetensors file."""
    try:
        return read_tensors(path)[1]
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def _read_pickle(path: Path) -> Weights:
    """Read the weights in a pickle, without running code from it."""
    try:
        weights = load_safely(str(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a dictionary of tensors")
    return weights

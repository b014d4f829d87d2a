"""Safetensors files: written whole or not at all, and read with one sentence where they cannot be."""

import os
from typing import Dict, Optional, Tuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .files import PathLike, write_whole

Header = Dict[str, str]


def write_tensors(path: PathLike, tensors: Dict[str, Tensor], header: Optional[Header] = None) -> None:
    """Write a safetensors file, whole or not at all; a file of that name is replaced.

    Args:
        path: Path of the file.
        tensors: Contiguous tensors on the CPU, by name; no two share memory.
        header: Strings by name.

    Raises:
        OSError: The file cannot be written; the message names ``path``.
    """

    def write(temporary: str) -> None:
        try:
            save_file(tensors, temporary, metadata=header)
        except SafetensorError as error:  # so the library reports that a disk is full
            raise OSError(str(error)) from error

    write_whole(path, write)


def read_tensors(path: PathLike) -> Tuple[Header, Dict[str, Tensor]]:
    """Read a safetensors file; the tensors are mapped rather than read where that is possible.

    Args:
        path: Path of the file.

    Returns:
        Header, empty where the file has none, and tensors by name.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: It is damaged, or not a safetensors file; the message names ``path``.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{os.fspath(path)} does not exist")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{os.fspath(path)} is damaged, or not a safetensors file: {error}") from error

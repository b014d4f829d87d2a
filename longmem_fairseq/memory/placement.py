"""Where a memory is stored: on the model's device, in the CPU's memory, or in a file that is mapped there."""

import mmap
import os
import tempfile
from dataclasses import dataclass
from math import prod
from typing import Optional, Sequence

import torch
from torch import Tensor

DEVICES = ("auto", "cuda", "cpu")


@dataclass(frozen=True)
class Placement:
    """Where the parts of a bank are stored.

    Attributes:
        tokens: Device of keys and values.
        means: Device of the chunk means, which are searched.
        directory: Directory of memory-mapped files for keys and values, on the CPU; None for no files.
        map_means: Whether the chunk means are in a file too.
    """

    tokens: torch.device = torch.device("cpu")
    means: torch.device = torch.device("cpu")
    directory: Optional[str] = None
    map_means: bool = False

    def new_tokens(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return zeros of a shape for keys or values."""
        return self._zeros(shape, dtype, self.tokens, self.directory is not None)

    def new_means(self, shape: Sequence[int]) -> Tensor:
        """Return zeros of a shape for chunk means, float32."""
        return self._zeros(shape, torch.float32, self.means, self.directory is not None and self.map_means)

    def _zeros(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device, mapped: bool) -> Tensor:
        return mapped_zeros(self.directory, shape, dtype) if mapped else torch.zeros(shape, dtype=dtype, device=device)

    def __str__(self) -> str:
        where = f"a file in {self.directory}" if self.directory is not None else str(self.tokens)
        return where if self.means == self.tokens else f"{where}, chunk means on {self.means}"


def choose_placement(device: str, directory: Optional[str], model: torch.device, indexed: bool) -> Placement:
    """Return the placement for ``--memory-device`` and ``--memory-map``.

    The means are searched: by an index on the CPU, and exactly on the model's device.

    Args:
        device: Value of ``--memory-device``: ``auto``, ``cuda`` or ``cpu``.
        directory: Value of ``--memory-map``, or None.
        model: Device of the model.
        indexed: Whether the search is by an index (``--memory-index``).

    Raises:
        ValueError: The memory cannot be stored there.
    """
    cpu = torch.device("cpu")
    if device not in DEVICES:
        raise ValueError(f"--memory-device {device} is unknown: it is {', '.join(DEVICES[:-1])} or {DEVICES[-1]}")
    if directory is not None:
        if device == "cuda":
            raise ValueError(
                f"--memory-map {directory} puts the memory into a file and --memory-device cuda on the GPU: leave one "
                "out"
            )
        if not os.path.isdir(directory) or not os.access(directory, os.W_OK):
            raise ValueError(
                f"--memory-map {directory} is not a directory that can be written: name another one (in evaluation: "
                "--model-overrides \"{'memory_map': '...'}\")"
            )
    if device == "cuda" and model.type != "cuda":
        raise ValueError(f"--memory-device cuda: the model is on {model}, choose auto or cpu")
    tokens = cpu if device == "cpu" or directory is not None else model
    return Placement(tokens, cpu if indexed else model, directory, map_means=indexed)


def mapped_zeros(directory: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return zeros in a file without a name, which is removed with the last tensor or process that uses it.

    Its room on the disk is taken at once, since a disk that is full later would end the process by a signal.

    Args:
        directory: Directory of the file.
        shape: Shape of the tensor.
        dtype: Type of the tensor.

    Raises:
        OSError: The disk has no room.
    """
    size = prod(shape) * torch.empty(0, dtype=dtype).element_size()
    handle, path = tempfile.mkstemp(dir=directory, prefix="longmem-memory-")
    try:
        os.unlink(path)
        os.posix_fallocate(handle, 0, size)
        buffer = mmap.mmap(handle, size)
    except OSError as error:
        raise OSError(
            f"--memory-map {directory} has no room for {size / 2**30:.2f} GiB of a memory ({error.strerror}): name "
            "another directory, or lower --memory-size"
        ) from error
    finally:
        os.close(handle)
    buffer.madvise(mmap.MADV_RANDOM)  # chunks are read here and there, so reading ahead is wasted
    return torch.frombuffer(buffer, dtype=dtype).view(*shape)

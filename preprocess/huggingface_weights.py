"""Weights of Hugging Face models, taken by their names and shapes.

Legend: V symbols, D width.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from preprocess.errors import InputError

Config = dict[str, Any]  # content of config.json, or settings of a model of fairseq
Weights = dict[str, Tensor]


class WeightReader:
    """Weights of a Hugging Face model, taken one by one; weights that nobody takes are an error.

    Args:
        weights: Tensors by their names.
        prefix: Prefix of the names, to remove where it is.
        dtype: Precision of the tensors that are taken; None for their own.
    """

    def __init__(self, weights: Mapping[str, Tensor], prefix: str, dtype: torch.dtype | None = None):
        self._dtype = dtype
        self._left = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}

    def take(self, name: str, *shape: int) -> Tensor:
        """Take one tensor.

        Args:
            name: Name of the tensor, without the prefix.
            shape: Shape that config.json requires.

        Raises:
            InputError: The tensor is missing, has another shape, or is quantized.
        """
        if name not in self._left:
            raise InputError(f"the weights lack {name}, which config.json requires")
        tensor = self._left.pop(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {tuple(tensor.shape)}, but config.json requires {shape}")
        if not tensor.is_floating_point():
            raise InputError(f"{name} is {tensor.dtype}, so the weights are quantized: give the original weights")
        return tensor if self._dtype is None else tensor.to(self._dtype)

    def finish(self, ignored: str) -> None:
        """Refuse weights that were not taken.

        Args:
            ignored: Regular expression of names that may be left.

        Raises:
            InputError: Other weights are left.
        """
        left = [name for name in self._left if not re.fullmatch(ignored, name)]
        if left:
            raise InputError(f"{len(left)} of the weights are not in config.json, such as {left[0]}")


def order_rows(table: Tensor, rows: Sequence[int]) -> Tensor:
    """Bring the rows of a table into the order of a dictionary.

    A symbol without a row gets the mean of all: its logit is then the mean of the logits, so that by Jensen's
    inequality its probability is at most 1/V. A row of zeros would be a logit of 0, far above what a model gives.

    Args:
        table: Embeddings of the input or the output, shape (V, D).
        rows: Row of the table for each symbol of the dictionary; -1 for a symbol without.

    Returns:
        The table of the dictionary, shape (symbols, D), in the same precision.
    """
    index = torch.tensor(rows)
    mean = table.mean(dim=0, dtype=torch.float32).to(table.dtype)
    return torch.where((index < 0)[:, None], mean, table[index.clamp(min=0)])

"""Memory dropout: in training some rows of a batch read nothing, so that the side network learns to do without.

Legend: B rows of a batch, T tokens of a segment, H heads, d width of a head.
"""

from typing import List, Optional, Tuple

import torch
from torch import Tensor, nn

from ..modules.staging import staged
from ..modules.token_mixture import TokenReads
from .reader import BatchReader, MemoryReader


class KeptRows:
    """What one batch reads where only some of its rows read anything, called like a reader.

    Args:
        reader: What all rows would read.
        rows: Which rows read, shape (B,), bool, on the model's device; None for all.
    """

    def __init__(self, reader: BatchReader, rows: Optional[Tensor]):
        self.reader, self.rows = reader, rows

    @property
    def readers(self) -> List[MemoryReader]:
        """The reader of each memory layer, the lowest layer's first, as all rows would read."""
        return self.reader.readers

    def of_layer(self, number: int) -> "KeptRows":
        """Return the reader of a memory layer, counted from 0 among the memory layers."""
        return KeptRows(self.reader.of_layer(number), self.rows)

    def __call__(self, q: Tensor, scaling: float) -> Tuple[Tensor, Optional[Tensor]]:
        """Read as :class:`longmem_fairseq.memory.reader.MemoryReader` does, for the rows that read."""
        memory, present = self.reader(q, scaling)
        if self.rows is None:
            return memory, present
        return memory, self.rows if present is None else present & self.rows

    def of_tokens(self, reads: Optional[TokenReads]) -> Optional[TokenReads]:
        """Return what the rows that read found in a token memory; None without one."""
        if reads is None or self.rows is None:
            return reads
        return reads._replace(sizes=reads.sizes * self.rows[:, None])


class MemoryDropout(nn.Module):
    """Choose at random, in training, which rows of a batch read the memories (``--memory-dropout``).

    The numbers are those of PyTorch's generator, which fairseq seeds for each update, so that a resumed training draws
    the same.

    Args:
        probability: Probability that a row reads nothing.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability

    def forward(self, reader: BatchReader, rows: int, device: torch.device) -> KeptRows:
        """Return what a batch reads.

        Args:
            reader: What all rows would read.
            rows: Number of rows, B.
            device: Device of the model.
        """
        if not self.training or not self.probability:
            return KeptRows(reader, None)
        return KeptRows(reader, staged(torch.rand(rows) >= self.probability, device))

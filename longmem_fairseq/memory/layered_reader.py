"""Reading the memories of several backbone layers.

Legend: n memory layers, B rows of a batch, H query heads of one layer, T queries of a row.
"""

from typing import List, Optional, Sequence, Tuple

import torch
from torch import Tensor

from .reader import BatchReader, MemoryReader


class LayeredReader(BatchReader):
    """What one batch reads from several memory layers, and figures of all of them.

    Args:
        readers: Reader of each memory layer.
    """

    def __init__(self, readers: Sequence[MemoryReader]):
        self._readers = list(readers)

    @property
    def readers(self) -> List[MemoryReader]:
        return self._readers

    @property
    def recall(self) -> Optional[Tuple[float, float]]:
        compared = [reader.recall for reader in self.readers if reader.recall is not None]
        return tuple(map(sum, zip(*compared))) if compared else None

    @property
    def retrieved(self) -> Optional[Tensor]:
        retrieved = [reader.retrieved for reader in self.readers]
        return None if any(x is None for x in retrieved) else torch.cat(retrieved, dim=1)  # (B, n * H, T, k / C)

    @property
    def fill(self) -> float:
        return sum(reader.fill for reader in self.readers) / len(self.readers)

    def distance(self) -> Tuple[Tensor, Tensor]:
        distances, reads = zip(*(reader.distance() for reader in self.readers))
        return sum(distances), sum(reads)


def join_layers(readers: Sequence[MemoryReader]) -> BatchReader:
    """Return what a batch reads from: the reader itself where there is one memory layer."""
    return readers[0] if len(readers) == 1 else LayeredReader(readers)

"""Which documents of a collection belong to a mixture, decided for each document alone.

Each document has a random number in [0, 1) that follows from the seed and its place in the input alone, so it is kept
or not whatever the shard, the worker or the order of reading.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass


def draw(seed: int, key: str, purpose: str) -> float:
    """Draw the random number of a document.

    Args:
        seed: Seed of all random choices.
        key: Key of the document, its place in the input.
        purpose: Name of the choice to make; numbers for different purposes are independent.

    Returns:
        A number in [0, 1), the same for the same arguments on every machine.
    """
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass(frozen=True)
class Selection:
    """The documents whose random number is below the threshold of their subset.

    Args:
        seed: Seed of the random numbers.
        thresholds: Threshold in [0, 1] by name of the subset; documents of other subsets are left out.
    """

    seed: int
    thresholds: dict[str, float]

    def keeps(self, key: str, subset: str) -> bool:
        """Return whether a document is part of the selection.

        Args:
            key: Key of the document.
            subset: Name of its subset.
        """
        threshold = self.thresholds.get(subset, 0.0)
        return threshold > 0.0 and draw(self.seed, key, "keep") < threshold

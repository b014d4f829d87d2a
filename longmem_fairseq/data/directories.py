"""The data directories that a task is given (``a:b:c``): which files a split is, and that they belong together."""

import os
from typing import List, Sequence

from fairseq.data import Dictionary

from .document_dataset import find_split
from .manifest import verify_shards


def has_split(path: str, split: str) -> bool:
    """Whether a directory holds a split."""
    return os.path.exists(os.path.join(path, split + ".idx"))


def open_split(paths: Sequence[str], split: str, dictionary: Dictionary, combine: bool = False) -> List[str]:
    """Prefixes of a split's files in each of these directories, checked against their manifests and dictionaries.

    Args:
        paths: data directories that are read as one, or in turn.
        split: name of the split.
        dictionary: the one that all of them must have been made with.
        combine: also take ``split1``, ``split2``... of each.

    Raises:
        FileNotFoundError: a directory has no such split.
        ValueError: one has another dictionary, is damaged, or was made with another tokenizer than the others.
    """
    for path in paths:
        own = os.path.join(path, "dict.txt")
        if os.path.isfile(own) and Dictionary.load(own).symbols != dictionary.symbols:
            raise ValueError(
                f"{own} differs from the dictionary of the first data directory: all that are read together, or in "
                "turn, must share one"
            )
    prefixes = {path: find_split(path, split, combine) for path in paths}
    for name in sorted({os.path.basename(prefix) for found in prefixes.values() for prefix in found}):
        verify_shards([path for path, found in prefixes.items() if os.path.join(path, name) in found], name)
    return [prefix for found in prefixes.values() for prefix in found]

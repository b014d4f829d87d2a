"""The data directories of a task (``a:b:c``): which files make up a split, and that they belong together."""

import glob
import os
from typing import List, Sequence

from fairseq.data import Dictionary

from .manifest import verify_shards


def has_split(path: str, split: str) -> bool:
    """Return whether a directory contains a split.

    Args:
        path: Path of the data directory.
        split: Name of the split.
    """
    return os.path.exists(os.path.join(path, split + ".idx"))


def find_split(path: str, split: str, combine: bool = False) -> List[str]:
    """List the data files of a split in one directory.

    Args:
        path: Path of the data directory.
        split: Name of the split.
        combine: If true, also list ``split1``, ``split2``...

    Returns:
        Prefixes of the files: paths without ``.bin`` and ``.idx``.

    Raises:
        FileNotFoundError: The directory has no such split; the message lists its splits.
    """
    prefix = os.path.join(path, split)
    if not has_split(path, split):
        indices = glob.glob(os.path.join(glob.escape(path), "*.idx"))
        splits = ", ".join(sorted(os.path.basename(index)[: -len(".idx")] for index in indices))
        raise FileNotFoundError(
            f"no data for the split '{split}': {prefix}.idx does not exist (splits in {path}: {splits or 'none'})"
        )
    prefixes = [prefix]
    while combine and os.path.exists(f"{prefix}{len(prefixes)}.idx"):
        prefixes.append(f"{prefix}{len(prefixes)}")
    return prefixes


def open_split(paths: Sequence[str], split: str, dictionary: Dictionary, combine: bool = False) -> List[str]:
    """List the data files of a split in several directories, checked against their manifests and dictionaries.

    Args:
        paths: Paths of the data directories that are read as one, or in turn.
        split: Name of the split.
        dictionary: Dictionary that all directories must have been made with.
        combine: If true, also list ``split1``, ``split2``... of each directory.

    Returns:
        Prefixes of the files: paths without ``.bin`` and ``.idx``.

    Raises:
        FileNotFoundError: A directory has no such split.
        ValueError: A directory has another dictionary, is damaged, or was made with another tokenizer than the others.
    """
    for path in paths:
        dictionary_path = os.path.join(path, "dict.txt")
        if os.path.isfile(dictionary_path) and Dictionary.load(dictionary_path).symbols != dictionary.symbols:
            raise ValueError(
                f"{dictionary_path} differs from the dictionary of the first data directory: all that are read "
                "together, or in turn, must share one"
            )
    prefixes = {path: find_split(path, split, combine) for path in paths}
    names = {os.path.basename(prefix) for in_path in prefixes.values() for prefix in in_path}
    for name in sorted(names):
        verify_shards([path for path, in_path in prefixes.items() if os.path.join(path, name) in in_path], name)
    return [prefix for in_path in prefixes.values() for prefix in in_path]

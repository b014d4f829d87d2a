"""Description of a data directory, ``manifest.json``: written by preprocess/, and checked when the data is loaded.

The cheap check (sizes, counts, dictionary) reads a few kilobytes and the index; the full one reads every byte.
A directory without a manifest, as stock ``fairseq-preprocess`` writes it, is not checked.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ..files import read_json, write_json
from .mmap_index import MmapIndexError, read_index

MANIFEST = "manifest.json"
FORMAT = "longmem documents, version 1"
_READ_BYTES = 1 << 22
# Types of the entries that are read here.
_ENTRIES = {"tokenizer": dict, "dictionary": dict, "splits": dict}
_DICTIONARY = {"fingerprint": str, "sha256": str}
_SPLIT = {"documents": int, "tokens": int, "files": dict}
_FILE = {"bytes": int, "sha256": str}


class ManifestError(ValueError):
    """Data differs from its manifest; the message is one sentence that names the file and both values."""


def dictionary_fingerprint(symbols: Iterable[str]) -> str:
    """Hash the symbols of a dictionary in order, special ones included; counts do not matter.

    Args:
        symbols: Symbols of the dictionary (``Dictionary.symbols`` of fairseq).

    Returns:
        SHA-256 in hexadecimal.
    """
    return hashlib.sha256("\n".join(symbols).encode("utf-8")).hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """Hash a file of any size.

    Args:
        path: Path of the file.

    Returns:
        SHA-256 in hexadecimal.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def read_manifest(directory: str | os.PathLike) -> dict | None:
    """Read the manifest of a data directory.

    Args:
        directory: Path of the data directory.

    Returns:
        The manifest, or None if the directory has none.

    Raises:
        ManifestError: The manifest is damaged or has another format.
    """
    path = Path(directory, MANIFEST)
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read ({error}): make the data again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ManifestError(f'{path} is not of the format "{FORMAT}": make the data again with this version')
    _require_types(path, "", manifest, _ENTRIES)
    _require_types(path, "tokenizer.", manifest["tokenizer"], {"fingerprint": str})
    _require_types(path, "dictionary.", manifest["dictionary"], _DICTIONARY)
    for split, described in manifest["splits"].items():
        _require_types(path, "splits.", manifest["splits"], {split: dict})
        _require_types(path, f"splits.{split}.", described, _SPLIT)
        for name, file in described["files"].items():
            _require_types(path, f"splits.{split}.files.", described["files"], {name: dict})
            _require_types(path, f"splits.{split}.files.{name}.", file, _FILE)
    return manifest


def _require_types(path: Path, place: str, entries: dict, types: dict[str, type]) -> None:
    """Refuse a manifest in which an entry at a place is missing or has another type."""
    for name, expected in types.items():
        if type(entries.get(name)) is not expected:
            raise ManifestError(
                f"{path} is malformed: {place}{name} is {entries.get(name)!r:.40}, not a {expected.__name__}: make the "
                "data again"
            )


def write_manifest(path: str | os.PathLike, manifest: dict) -> None:
    """Write a manifest, whole or not at all.

    Args:
        path: Path of the file to write.
        manifest: Content of the manifest, plain JSON types, without its format.

    Raises:
        OSError: The file cannot be written.
    """
    write_json(path, {"format": FORMAT, **manifest})


def verify(directory: str | os.PathLike, split: str, full: bool = False) -> dict | None:
    """Check one split of a data directory against its manifest.

    Args:
        directory: Path of a data directory that contains ``manifest.json``, ``dict.txt``, ``<split>.bin`` and
            ``<split>.idx``.
        split: Name of the split: ``train``, ``valid`` or ``test``.
        full: If true, also read every file and compare its SHA-256; otherwise compare sizes, counts and the dictionary.

    Returns:
        The manifest, or None if the directory has none.

    Raises:
        ManifestError: Anything differs.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    directory = Path(directory)
    described = manifest["splits"].get(split)
    if described is None:
        raise ManifestError(f"{directory / MANIFEST} lists {', '.join(manifest['splits'])} but no split {split}")
    _verify_dictionary(directory / "dict.txt", manifest["dictionary"])
    for name, expected in described["files"].items():
        path = directory / name
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ManifestError(f"{path} is missing although the manifest lists it: make the data again")
        if size != expected["bytes"]:
            raise ManifestError(
                f"{path} has {size:,} bytes, its manifest says {expected['bytes']:,}: it is truncated or was replaced"
            )
    _verify_index(directory, split, described)
    if full:
        for name, expected in described["files"].items():
            if file_sha256(directory / name) != expected["sha256"]:
                raise ManifestError(f"{directory / name} is damaged: its SHA-256 is not that of the manifest")
    return manifest


def verify_shards(directories: Sequence[str | os.PathLike], split: str, full: bool = False) -> list[dict | None]:
    """Check several data directories that are read as one: each by itself, and that all were encoded alike.

    Args:
        directories: Paths of the data directories.
        split: Name of the split.
        full: If true, also read every file and compare its SHA-256.

    Returns:
        The manifest of each directory, None where there is none.

    Raises:
        ManifestError: A directory is damaged, or two differ in tokenizer or dictionary.
    """
    manifests = [verify(directory, split, full) for directory in directories]
    described = [(directory, manifest) for directory, manifest in zip(directories, manifests) if manifest]
    for directory, manifest in described[1:]:
        first_directory, first = described[0]
        for part in ("tokenizer", "dictionary"):
            if manifest[part]["fingerprint"] != first[part]["fingerprint"]:
                raise ManifestError(
                    f"{directory} was made with another {part} than {first_directory}: shards read together must "
                    "share it"
                )
    return manifests


def _verify_dictionary(path: Path, expected: dict) -> None:
    if not path.is_file():
        raise ManifestError(f"{path} is missing: make the data again")
    if file_sha256(path) != expected["sha256"]:
        raise ManifestError(f"{path} is not the dictionary that the data beside it was made with: its SHA-256 differs")


def _verify_index(directory: Path, split: str, described: dict) -> None:
    path = directory / f"{split}.idx"
    dtype, sizes = read_sizes(path)
    if len(sizes) != described["documents"]:
        raise ManifestError(f"{path} counts {len(sizes):,} documents, its manifest {described['documents']:,}")
    tokens = int(sizes.sum(dtype=np.int64))
    stored = (directory / f"{split}.bin").stat().st_size // np.dtype(dtype).itemsize
    if not tokens == described["tokens"] == stored:
        raise ManifestError(
            f"{path} counts {tokens:,} tokens, {split}.bin holds {stored:,}, the manifest says {described['tokens']:,}"
        )


def read_sizes(path: str | os.PathLike) -> tuple[type, np.ndarray]:
    """Read the lengths of the documents from the index of a split.

    Args:
        path: Path of the ``.idx`` file.

    Returns:
        The NumPy type of the tokens, and the lengths in tokens, shape (documents,), int32.

    Raises:
        ManifestError: The file has another format, or is truncated.
    """
    try:
        index = read_index(path)
    except MmapIndexError as error:
        raise ManifestError(str(error)) from None
    return index.dtype, index.sizes

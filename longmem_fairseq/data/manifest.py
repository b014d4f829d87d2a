"""What a data directory says about itself: ``manifest.json``, written by preprocess/ and checked when data is loaded.

The cheap check (sizes, counts, dictionary) reads a few kilobytes and the index; the full one reads every byte.
A directory without a manifest, as stock ``fairseq-preprocess`` makes it, is not checked.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

MANIFEST = "manifest.json"
FORMAT = "longmem documents, version 1"

# fairseq's mmap index begins with this, then come int32 lengths and int64 offsets in bytes
INDEX_HEADER = struct.Struct("<9sQBQ")  # magic, version, dtype code, documents
INDEX_MAGIC = b"MMIDIDX\x00\x00"
INDEX_DTYPES = {4: np.int32, 5: np.int64, 8: np.uint16, 9: np.uint32}
_READ_BYTES = 1 << 22


class ManifestError(ValueError):
    """Data is not what its manifest says; the message is one sentence that names the file and both values."""


def dictionary_fingerprint(symbols: Iterable[str]) -> str:
    """SHA-256 over the symbols in order, special ones included; counts do not matter.

    Args:
        symbols: ``Dictionary.symbols`` of fairseq.
    """
    return hashlib.sha256("\n".join(symbols).encode("utf-8")).hexdigest()


def file_sha256(path: str | os.PathLike) -> str:
    """SHA-256 of a file of any size, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        while data := stream.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def read_manifest(directory: str | os.PathLike) -> dict | None:
    """The manifest of a data directory, None if there is none; raises ManifestError if it is damaged."""
    path = Path(directory, MANIFEST)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ManifestError(f"{path} cannot be read ({error}): make the data again") from None
    wanted = {"tokenizer", "dictionary", "splits"}
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or not wanted <= manifest.keys():
        raise ManifestError(f'{path} is not of the format "{FORMAT}": make the data again with this version')
    return manifest


def verify(directory: str | os.PathLike, split: str, full: bool = False) -> dict | None:
    """Check one split of a data directory against its manifest.

    Args:
        directory: holds ``manifest.json``, ``dict.txt``, ``<split>.bin`` and ``<split>.idx``.
        split: ``train``, ``valid``, ``test``.
        full: also read every file and compare its SHA-256; otherwise sizes, counts and the dictionary.

    Returns:
        The manifest, or None if the directory has none.

    Raises:
        ManifestError: anything differs.
    """
    manifest = read_manifest(directory)
    if manifest is None:
        return None
    directory = Path(directory)
    described = manifest["splits"].get(split)
    if described is None:
        raise ManifestError(f"{directory / MANIFEST} knows {', '.join(manifest['splits'])} but no split {split}")
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
    """``verify`` for each of several data directories that are read as one, and that they were encoded alike.

    Raises:
        ManifestError: a directory is damaged, or two differ in tokenizer or dictionary.
    """
    manifests = [verify(directory, split, full) for directory in directories]
    known = [(directory, manifest) for directory, manifest in zip(directories, manifests) if manifest]
    for directory, manifest in known[1:]:
        for part in ("tokenizer", "dictionary"):
            if manifest[part]["fingerprint"] != known[0][1][part]["fingerprint"]:
                raise ManifestError(
                    f"{directory} was made with another {part} than {known[0][0]}: shards read together must share it"
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
    """The dtype of the tokens and the documents' lengths, shape (documents,) int32, in a fairseq mmap index.

    Raises:
        ManifestError: the file is no such index, or is truncated.
    """
    with open(path, "rb") as stream:
        header = stream.read(INDEX_HEADER.size)
    fields = INDEX_HEADER.unpack(header) if len(header) == INDEX_HEADER.size else None
    if fields is None or fields[0] != INDEX_MAGIC or fields[1] != 1 or fields[2] not in INDEX_DTYPES:
        raise ManifestError(f"{path} is not the index of a fairseq mmap dataset: make the data again")
    documents = fields[3]
    expected = INDEX_HEADER.size + documents * 12  # int32 length and int64 offset each
    if os.path.getsize(path) != expected:
        raise ManifestError(f"{path} has {os.path.getsize(path):,} bytes, {documents:,} documents need {expected:,}")
    return INDEX_DTYPES[fields[2]], np.fromfile(path, dtype=np.int32, count=documents, offset=INDEX_HEADER.size)


def write_manifest(path: str | os.PathLike, manifest: dict) -> None:
    """Write a manifest, whole or not at all."""
    temporary = Path(f"{os.fspath(path)}.tmp")
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump({"format": FORMAT, **manifest}, stream, indent=2, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)

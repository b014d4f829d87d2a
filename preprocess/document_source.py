"""The files that documents are read from, also compressed ones."""

from __future__ import annotations

import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preprocess.errors import InputError, require_package

COMPRESSED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class DocumentSource:
    """One input file.

    Args:
        path: Path of the file.
        name: Path of the file inside the input directory, or its name if the file itself is the input.
        subset: Name of the subset that its documents belong to, unless they name one.
        size: Size of the file on disk, in bytes.
    """

    path: Path
    name: str
    subset: str
    size: int

    @property
    def is_json_lines(self) -> bool:
        """Return whether the file holds one document per line."""
        suffixes = self.path.suffixes[-2:] if self.compression else self.path.suffixes[-1:]
        return any(suffix in JSON_LINES for suffix in suffixes)

    @property
    def key(self) -> str:
        """Return the file's place in the input, without the directories of this machine."""
        return f"{self.subset}/{self.name}"

    @property
    def compression(self) -> str:
        """Return the suffix of a compressed file, empty for an uncompressed one."""
        return self.path.suffix if self.path.suffix in COMPRESSED else ""


def list_sources(paths: Iterable[str | os.PathLike]) -> list[DocumentSource]:
    """List the files of the input.

    Args:
        paths: Paths of files and directories.

    Returns:
        The files in the order of the paths, those of a directory in sorted order.

    Raises:
        InputError: A path does not exist, or a directory holds no visible file.
    """
    sources = []
    for path in paths:
        root = Path(path)
        subset = re.sub(r"(\.(jsonl|ndjson|txt))?(\.(gz|zst))?$", "", root.resolve().name)
        if root.is_dir():
            files = _visible_files(root)
            if not files:
                raise InputError(f"the directory {root} holds no visible file: give text files or JSON lines")
            for file in files:
                sources.append(DocumentSource(file, file.relative_to(root).as_posix(), subset, file.stat().st_size))
        elif root.is_file():
            sources.append(DocumentSource(root, root.name, subset, root.stat().st_size))
        else:
            raise InputError(f"there is no file or directory {root}")
    return sources


def _visible_files(root: Path) -> list[Path]:
    """List the regular files below a directory that are not hidden, in the same order on every machine."""
    paths = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        paths.extend(Path(directory, name) for name in names if not name.startswith("."))
    # by parts, so that "a/b" comes before "a-b" on every machine
    return sorted((path for path in paths if path.is_file()), key=lambda path: path.relative_to(root).parts)


@contextmanager
def open_source(source: DocumentSource) -> Iterator[tuple[io.BufferedIOBase, Callable[[], int]]]:
    """Open a file for reading.

    Args:
        source: The file.

    Yields:
        A stream of the decompressed bytes, and a function that returns how many bytes of the file were read.

    Raises:
        InputError: While it is open, the file cannot be read to its end.
    """
    try:
        with open(source.path, "rb") as raw:
            if source.compression == ".gz":
                with gzip.GzipFile(fileobj=raw) as stream:
                    yield stream, raw.tell
            elif source.compression == ".zst":
                with io.BufferedReader(_ZstdReader(raw), 1 << 20) as stream:
                    yield stream, raw.tell
            else:
                yield raw, raw.tell
    except (EOFError, OSError, zlib.error) as error:
        raise InputError(f"{source.path} cannot be read to its end: {error}") from None


class _ZstdReader(io.RawIOBase):
    """Decompressed bytes of a zstd file of any number of frames; reports a cut file, as zstandard's own does not.

    Args:
        raw: Stream of the compressed bytes.
    """

    def __init__(self, raw: io.BufferedIOBase):
        zstandard = require_package("zstandard", f"the compressed file {raw.name}")
        self._raw = raw
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
        self._error = zstandard.ZstdError
        self._frame = None
        self._pending = b""
        self._output = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._output:
            data = self._pending or self._raw.read(1 << 17)
            self._pending = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("compressed file ended before the end-of-stream marker was reached")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._output = memoryview(self._frame.decompress(data))
            except self._error as error:
                raise OSError(str(error)) from None
            if self._frame.eof:
                self._pending, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._output))
        buffer[:size] = self._output[:size]
        self._output = self._output[size:]
        return size

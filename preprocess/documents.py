"""Documents out of text files, directories of text files and JSON lines, one at a time.

What an input path may be:

* a text file: one document, named after the file;
* a directory: every regular file below it that is not hidden, in sorted order, named after its path in the directory;
* JSON lines (``.jsonl`` or ``.ndjson``): one document a line, the string under ``"text"``, named after ``"name"`` if
  there is one, else ``file:line``. ``{"meta": {"pile_set_name": "..."}}`` names its subset, as in the Pile.

Each may be compressed (``.gz``, ``.zst``). Text is UTF-8 and kept exactly: newlines, tabs and spaces are content.
A document's subset is its ``pile_set_name`` or, without one, the name of the input path without its extensions.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from preprocess.errors import InputError, need

COMPRESSED = (".gz", ".zst")
JSON_LINES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Document:
    """One document: a non-empty ``text`` with all its whitespace, its ``name`` and the ``subset`` it belongs to."""

    name: str
    text: str
    subset: str = ""


@dataclass(frozen=True)
class Source:
    """One input file: ``name`` is its path inside the directory that was given, ``size`` its bytes on disk."""

    path: Path
    name: str
    subset: str
    size: int

    @property
    def is_json_lines(self) -> bool:
        return any(suffix in JSON_LINES for suffix in self._suffixes())

    @property
    def key(self) -> str:
        """The file's place in the input, without the directories of this machine."""
        return f"{self.subset}/{self.name}"

    @property
    def compression(self) -> str:
        return self.path.suffix if self.path.suffix in COMPRESSED else ""

    def _suffixes(self) -> list[str]:
        return self.path.suffixes[-2:] if self.compression else self.path.suffixes[-1:]


def list_sources(paths: Iterable[str | os.PathLike]) -> list[Source]:
    """The files behind the input ``paths``, in the order given, directories walked in sorted order.

    Raises:
        InputError: a path does not exist, or a directory holds no file.
    """
    sources = []
    for given in paths:
        root = Path(given)
        subset = re.sub(r"(\.(jsonl|ndjson|txt))?(\.(gz|zst))?$", "", root.resolve().name)
        if root.is_dir():
            found = [
                Source(path, path.relative_to(root).as_posix(), subset, path.stat().st_size)
                for path in _regular_files(root)
            ]
            if not found:
                raise InputError(f"the directory {root} holds no visible file: give text files or JSON lines")
            sources.extend(found)
        elif root.is_file():
            sources.append(Source(root, root.name, subset, root.stat().st_size))
        else:
            raise InputError(f"there is no file or directory {root}")
    return sources


def _regular_files(root: Path) -> list[Path]:
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [name for name in subdirectories if not name.startswith(".")]
        found.extend(Path(directory, name) for name in names if not name.startswith("."))
    # by parts, so that "a/b" comes before "a-b" on every machine
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


@dataclass
class Parsed:
    """The documents of one block and how many bad ones were left out of it."""

    documents: list[Document] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # one a document: its place in the input, the same on every machine
    skipped: int = 0


def parse_text(source: Source, data: bytes) -> Document:
    """The document that a whole text file is; raises InputError if it is empty or not UTF-8."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source.path} is not UTF-8 text (byte {error.start}): {_SKIP_HINT}") from None
    if not text:
        raise InputError(f"{source.path} is an empty document: {_SKIP_HINT}")
    return Document(source.name, text, source.subset)


def parse_json_line(source: Source, number: int, line: bytes) -> Document:
    """The document in line ``number`` (from 1) of JSON lines; raises InputError if there is none or it is empty."""
    where = f"{source.path}, line {number},"
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}): {_SKIP_HINT}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): {_SKIP_HINT}") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no string under "text": {_SKIP_HINT}')
    if not text:
        raise InputError(f"{where} is an empty document: {_SKIP_HINT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is no character
        raise InputError(f"{where} holds a lone surrogate (character {error.start}): {_SKIP_HINT}") from None
    name = record.get("name")
    meta = record.get("meta")
    subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return Document(
        name if isinstance(name, str) and name else f"{source.name}:{number}",
        text,
        subset if isinstance(subset, str) and subset else source.subset,
    )


_SKIP_HINT = "repair it, or leave such documents out with --bad-documents skip"


@contextmanager
def open_source(source: Source) -> Iterator[tuple[io.BufferedIOBase, Callable[[], int]]]:
    """A stream of ``source``'s decompressed bytes, and a function that tells how many bytes of the file were read.

    Raises:
        InputError: while it is open, whatever keeps the file from being read to its end.
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
    """Decompressed bytes of a zstd file of any number of frames; reports a cut file, as zstandard's own does not."""

    def __init__(self, raw: io.BufferedIOBase):
        zstandard = need("zstandard", f"the compressed file {raw.name}")
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


def iter_documents(
    paths: Iterable[str | os.PathLike], bad_documents: str = "refuse", progress: bool = False
) -> Iterator[Document]:
    """All documents behind ``paths``, in order, one at a time.

    Args:
        paths: text files, directories, JSON lines (see the module).
        bad_documents: ``refuse`` raises at an empty or undecodable document, ``skip`` leaves it out.
        progress: show how much was read.

    Raises:
        InputError: a missing path or, unless skipped, a bad document.
    """
    from preprocess.blocks import read_blocks  # blocks are made of what is above

    sources = list_sources(paths)
    total = sum(source.size for source in sources)
    with tqdm(total=total, desc="read", unit="B", unit_scale=True, mininterval=0.5, disable=not progress) as bar:
        for block, position in read_blocks(sources):
            yield from block.parse(bad_documents).documents
            bar.update(position.consumed - bar.n)

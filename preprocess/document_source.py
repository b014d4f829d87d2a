"""The files that documents are read from, also compressed ones."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from preprocess.compressed_files import COMPRESSED, ERRORS, compression_of, decompressed
from preprocess.errors import InputError
from preprocess.file_contents import SUFFIXES, TEXT, content_by_name, content_of

_EXTENSIONS = re.compile(
    rf"({'|'.join(map(re.escape, SUFFIXES))})?({'|'.join(map(re.escape, COMPRESSED))})?$", flags=re.IGNORECASE
)


@dataclass(frozen=True)
class DocumentFormat:
    """How the documents of an input are marked.

    Args:
        text_key: Key of the text in JSON lines, or name of its column in Parquet files.
        separator: Mark between the documents of a text file; if empty, a text file is one document.
    """

    text_key: str = "text"
    separator: str = ""


@dataclass(frozen=True)
class DocumentSource:
    """One input file.

    Args:
        path: Path of the file.
        name: Path of the file inside the input directory, or its name if the file itself is the input.
        subset: Name of the subset that its documents belong to, unless they name one.
        size: Size of the file on disk, in bytes.
        compression: Suffix of its compression, empty for an uncompressed file.
        content: Kind of its content, one of those of ``file_contents``.
        unsupported: Description of its content if that is not supported, otherwise empty.
        format: Marks of its documents.
    """

    path: Path
    name: str
    subset: str
    size: int
    compression: str = ""
    content: str = TEXT
    unsupported: str = ""
    format: DocumentFormat = DocumentFormat()

    @property
    def key(self) -> str:
        """Return the file's place in the input, without the directories of this machine."""
        return f"{self.subset}/{self.name}"

    def require_supported(self) -> None:
        """Refuse a file that does not contain text.

        Raises:
            InputError: The content is not supported.
        """
        if self.unsupported:
            raise InputError(
                f"{self.path} is {self.unsupported}: give UTF-8 text, JSON lines or Parquet, or leave such files out "
                "with --bad-documents skip"
            )


def list_sources(paths: Iterable[str | os.PathLike], form: DocumentFormat | None = None) -> list[DocumentSource]:
    """List the files of the input. A path that is named twice is read twice.

    Args:
        paths: Paths of files and directories.
        form: Marks of the documents; if None, the defaults.

    Returns:
        The files in the order of the paths, those of a directory in sorted order.

    Raises:
        InputError: A path does not exist or cannot be read, or a directory holds no visible file.
    """
    form = form or DocumentFormat()
    sources = []
    for path in paths:
        root = Path(path)
        subset = _EXTENSIONS.sub("", root.resolve().name)
        if root.is_dir():
            files = _visible_files(root)
            if not files:
                raise InputError(f"the directory {root} holds no visible file: give text files or JSON lines")
            sources += [_source(file, file.relative_to(root).as_posix(), subset, form) for file in files]
        elif root.is_file():
            sources.append(_source(root, root.name, subset, form))
        else:
            raise InputError(f"there is no file or directory {root}")
    return sources


def _source(path: Path, name: str, subset: str, form: DocumentFormat) -> DocumentSource:
    """Describe one file by its name and its first bytes."""
    suffix = Path(path.stem).suffix if path.suffix.lower() in COMPRESSED else path.suffix
    try:
        with open(path, "rb") as raw:
            compression = compression_of(path.suffix.lower(), raw.peek(16))
            content, unsupported = content_of(suffix.lower(), decompressed(raw, compression), form.text_key)
    except ERRORS as error:
        if getattr(error, "errno", None) is not None:
            raise InputError(f"{path} cannot be read: {error.strerror}") from None
        content, unsupported = content_by_name(suffix.lower()), ""  # damaged, which is reported when it is read
    return DocumentSource(path, name, subset, path.stat().st_size, compression, content, unsupported, form)


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
        with open(source.path, "rb") as raw, decompressed(raw, source.compression) as stream:
            yield stream, raw.tell
    except ERRORS as error:
        raise InputError(f"{source.path} cannot be read to its end: {error}") from None

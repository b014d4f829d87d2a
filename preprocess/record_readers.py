"""Files of several documents, read one document after the other: JSON lines, Parquet, and text with separators."""

from __future__ import annotations

import io
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

from preprocess.document_source import DocumentSource, open_source
from preprocess.errors import InputError, require_package
from preprocess.file_contents import JSON_LINES, PARQUET, TEXT

_READ_BYTES = 1 << 20
_ROWS = 256  # of a Parquet file that are decoded at once
_NAMES = ("name", "meta")  # columns of a Parquet file beside the text, as the keys of JSON lines


class RecordReader(ABC):
    """The documents of one file, not yet parsed.

    Args:
        source: The file.
    """

    def __init__(self, source: DocumentSource):
        self.source = source
        self._tell: Callable[[], int] = lambda: 0

    @abstractmethod
    def read(self, number: int, offset: int) -> Iterator[tuple[int, int, Any, int]]:
        """Read the documents one after the other.

        Args:
            number: Number of documents that were read before.
            offset: Offset after them, as it came with the last of them.

        Yields:
            Number of the document, from 1; offset after it; its content, None if it is blank and left out; size of the
            content in bytes, about.

        Raises:
            InputError: The file cannot be read to its end.
        """

    def consumed(self) -> int:
        """Return how many bytes of the file as it is on disk were read, for progress bars."""
        return self._tell()


def has_records(source: DocumentSource) -> bool:
    """Return whether a file holds several documents.

    Args:
        source: The file.
    """
    return source.content != TEXT or bool(source.format.separator and not source.unsupported)


def record_reader(source: DocumentSource) -> RecordReader:
    """Make the reader of a file of several documents.

    Args:
        source: The file.
    """
    return _READERS[source.content](source)


class LinesReader(RecordReader):
    """Lines; blank ones are not documents."""

    def read(self, number: int, offset: int) -> Iterator[tuple[int, int, bytes | None, int]]:
        with open_source(self.source) as (stream, self._tell):
            _skip_to(stream, self.source, offset)
            for line in stream:
                number += 1
                size = len(line)
                offset += size
                yield number, offset, None if line.isspace() else line, size


class PartsReader(RecordReader):
    """Parts of a text between separators; those of whitespace only are not documents."""

    def read(self, number: int, offset: int) -> Iterator[tuple[int, int, bytes | None, int]]:
        separator = self.source.format.separator.encode()
        with open_source(self.source) as (stream, self._tell):
            _skip_to(stream, self.source, offset)
            rest, begin, searched = b"", 0, 0  # what is left starts at begin, and has no separator before searched
            while data := stream.read(_READ_BYTES):
                rest, searched, begin = rest[begin:] + data, searched - begin, 0
                while (end := rest.find(separator, searched)) >= 0:
                    number += 1
                    offset += end - begin + len(separator)
                    part = rest[begin:end]
                    yield number, offset, part if part.strip() else None, len(part)
                    begin = searched = end + len(separator)
                searched = max(begin, len(rest) - len(separator) + 1)
            part = rest[begin:]
            if part.strip():
                yield number + 1, offset + len(part), part, len(part)


class RowsReader(RecordReader):
    """Rows of a Parquet file."""

    def read(self, number: int, offset: int) -> Iterator[tuple[int, int, dict, int]]:
        path = self.source.path
        if self.source.compression:
            raise InputError(f"{path} is a compressed Parquet file, which cannot be read in parts: decompress it")
        pyarrow = require_package("pyarrow", f"the Parquet file {path}", extra="parquet")
        parquet = require_package("pyarrow.parquet", f"the Parquet file {path}", "pyarrow", extra="parquet")
        try:
            with parquet.ParquetFile(path) as file:
                rows = file.metadata.num_rows
                groups = list(range(file.num_row_groups))
                skipped = offset
                while groups and skipped >= file.metadata.row_group(groups[0]).num_rows:
                    skipped -= file.metadata.row_group(groups.pop(0)).num_rows
                for batch in file.iter_batches(_ROWS, groups, self._columns(file.schema_arrow.names)):
                    left_out = min(skipped, batch.num_rows)
                    skipped -= left_out
                    for row in batch.slice(left_out).to_pylist():
                        offset += 1
                        self._tell = lambda done=offset: self.source.size * done // rows
                        yield offset, offset, row, len(str(row[self.source.format.text_key]))
        except (OSError, pyarrow.ArrowException) as error:
            raise InputError(f"{path} cannot be read to its end: {error}") from None

    def _columns(self, names: list[str]) -> list[str]:
        """Choose the columns to read."""
        key = self.source.format.text_key
        if key not in names:
            raise InputError(
                f"{self.source.path} has no column {key} (its columns are {', '.join(names)}): name that of the text "
                "with --text-key"
            )
        return [key, *(name for name in _NAMES if name in names and name != key)]


_READERS = {JSON_LINES: LinesReader, PARQUET: RowsReader, TEXT: PartsReader}


def _skip_to(stream: io.BufferedIOBase, source: DocumentSource, offset: int) -> None:
    """Move a stream forward to an offset after decompression, in bytes."""
    if not source.compression:
        stream.seek(offset)
        return
    while offset > 0:
        skipped = len(stream.read(min(offset, _READ_BYTES)))
        if not skipped:
            raise InputError(f"{source.path} is shorter than when it was read before: start again with --overwrite")
        offset -= skipped

"""Files of several documents, read one document after the other: JSON lines, Parquet, and text with separators."""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any, NamedTuple

from preprocess.document_source import DocumentSource, open_source
from preprocess.errors import InputError, require_package
from preprocess.file_contents import JSON_LINES, PARQUET, TEXT

_READ_BYTES = 1 << 20
_ROWS = 256  # of a Parquet file that are decoded at once
_NAMES = ("name", "meta")  # columns of a Parquet file beside the text, as the keys of JSON lines


class Record(NamedTuple):
    """One document of a file, not yet parsed.

    Args:
        number: Number of the document in the file, from 1.
        offset: Bytes read of the file after decompression, up to its end; rows of a Parquet file.
        consumed: Bytes read of the file as it is on disk, for progress bars.
        content: Content of the document; None for one that is blank and left out.
        size: Size of the content in bytes, about.
    """

    number: int
    offset: int
    consumed: int
    content: Any
    size: int


def has_records(source: DocumentSource) -> bool:
    """Return whether a file holds several documents.

    Args:
        source: The file.
    """
    return source.content != TEXT or bool(source.format.separator and not source.unsupported)


def read_records(source: DocumentSource, number: int = 0, offset: int = 0) -> Iterator[Record]:
    """Read the documents of a file one after the other.

    Args:
        source: The file.
        number: Number of documents that were read before.
        offset: Offset after them.

    Yields:
        The documents after these.

    Raises:
        InputError: The file cannot be read to its end.
    """
    return _READERS[source.content](source, number, offset)


def _read_lines(source: DocumentSource, number: int, offset: int) -> Iterator[Record]:
    """Read lines; blank ones are not documents."""
    with open_source(source) as (stream, tell):
        _skip_to(stream, source, offset)
        for line in stream:
            number += 1
            offset += len(line)
            yield Record(number, offset, tell(), line if line.strip() else None, len(line))


def _read_parts(source: DocumentSource, number: int, offset: int) -> Iterator[Record]:
    """Read the parts of a text between separators; those of whitespace only are not documents."""
    separator = source.format.separator.encode()
    with open_source(source) as (stream, tell):
        _skip_to(stream, source, offset)
        rest, searched, data = b"", 0, stream.read(_READ_BYTES)
        while data:
            rest += data
            while (end := rest.find(separator, searched)) >= 0:
                part, rest, searched = rest[:end], rest[end + len(separator) :], 0
                number += 1
                offset += end + len(separator)
                yield Record(number, offset, tell(), part if part.strip() else None, len(part))
            searched = max(0, len(rest) - len(separator) + 1)
            data = stream.read(_READ_BYTES)
        if rest.strip():
            yield Record(number + 1, offset + len(rest), tell(), rest, len(rest))


def _read_rows(source: DocumentSource, number: int, offset: int) -> Iterator[Record]:
    """Read the rows of a Parquet file."""
    if source.compression:
        raise InputError(f"{source.path} is a compressed Parquet file, which cannot be read in parts: decompress it")
    parquet = require_package("pyarrow.parquet", f"the Parquet file {source.path}", "pyarrow")
    pyarrow = require_package("pyarrow", f"the Parquet file {source.path}")
    key = source.format.text_key
    try:
        with parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if key not in names:
                raise InputError(
                    f"{source.path} has no column {key} (its columns are {', '.join(names)}): name that of the text "
                    "with --text-key"
                )
            groups = list(range(file.num_row_groups))
            while groups and offset >= file.metadata.row_group(groups[0]).num_rows:
                offset -= file.metadata.row_group(groups.pop(0)).num_rows
            columns = [key, *(name for name in _NAMES if name in names and name != key)]
            for batch in file.iter_batches(_ROWS, groups, columns):
                skipped, offset = min(offset, batch.num_rows), max(0, offset - batch.num_rows)
                for row in batch.slice(skipped).to_pylist():
                    number += 1
                    consumed = source.size * number // file.metadata.num_rows
                    yield Record(number, number, consumed, row, len(str(row.get(key))))
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{source.path} cannot be read to its end: {error}") from None


_READERS = {JSON_LINES: _read_lines, PARQUET: _read_rows, TEXT: _read_parts}


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

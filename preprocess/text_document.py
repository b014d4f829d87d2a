"""One document, and how it is read from a text file or a line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from preprocess.document_source import DocumentSource
from preprocess.errors import InputError
from preprocess.package_modules import files

_SKIP_HINT = "repair it, or leave such documents out with --bad-documents skip"


@dataclass(frozen=True)
class TextDocument:
    """One document.

    Args:
        name: Name of the document, for the list beside the data.
        text: Text with all its whitespace, not empty.
        subset: Name of the subset that the document belongs to.
    """

    name: str
    text: str
    subset: str = ""


def parse_text(source: DocumentSource, data: bytes) -> TextDocument:
    """Make a document of a whole text file.

    Args:
        source: The file.
        data: Decompressed bytes of the file.

    Returns:
        The document, named after the file.

    Raises:
        InputError: The file is empty or not UTF-8.
    """
    return _decode(source, f"{source.path}", source.name, data)


def parse_text_part(source: DocumentSource, number: int, data: bytes) -> TextDocument:
    """Make a document of a part of a text file.

    Args:
        source: The file.
        number: Number of the part, from 1.
        data: Bytes of the part.

    Returns:
        The document, named after the file and the part.

    Raises:
        InputError: The part is not UTF-8.
    """
    return _decode(source, f"{source.path}, part {number},", f"{source.name}:{number}", data)


def _decode(source: DocumentSource, where: str, name: str, data: bytes) -> TextDocument:
    """Make a document of bytes; ``where`` names their place for messages."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}): {_SKIP_HINT}") from None
    if not text:
        raise InputError(f"{where} is an empty document: {_SKIP_HINT}")
    return TextDocument(files.printable(name), text, files.printable(source.subset))


def parse_json_line(source: DocumentSource, number: int, line: bytes) -> TextDocument:
    """Make a document of one line of JSON.

    Args:
        source: The file of JSON lines.
        number: Number of the line, from 1.
        line: Bytes of the line.

    Returns:
        The document: the string under the key of the text, named after ``name`` or else the file and the line.

    Raises:
        InputError: The line is not a JSON object with a text, or the text is empty or not valid Unicode.
    """
    where = f"{source.path}, line {number},"
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start}): {_SKIP_HINT}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error}): {_SKIP_HINT}") from None
    return parse_record(source, number, record, where)


def parse_record(source: DocumentSource, number: int, record: Any, where: str = "") -> TextDocument:
    """Make a document of a record with a text.

    Args:
        source: The file of the record.
        number: Number of the record, from 1.
        record: Value of a line of JSON, or row of a table.
        where: Place of the record, for messages; by default that of a row.

    Returns:
        The document, as :func:`parse_json_line` makes it.

    Raises:
        InputError: The record is not an object with a text, or the text is empty or not valid Unicode.
    """
    where = where or f"{source.path}, row {number},"
    key = source.format.text_key
    text = record.get(key) if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no string under "{key}": name its key with --text-key, {_SKIP_HINT}')
    if not text:
        raise InputError(f"{where} is an empty document: {_SKIP_HINT}")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is not a character
        raise InputError(f"{where} holds a lone surrogate (character {error.start}): {_SKIP_HINT}") from None
    name = record.get("name")
    meta = record.get("meta")
    subset = meta.get("pile_set_name") if isinstance(meta, dict) else None
    return TextDocument(
        files.printable(name if isinstance(name, str) and name else f"{source.name}:{number}"),
        text,
        files.printable(subset if isinstance(subset, str) and subset else source.subset),
    )

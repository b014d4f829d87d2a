"""One document, and how it is read from a text file or a line of JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass

from preprocess.document_source import DocumentSource
from preprocess.errors import InputError

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
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{source.path} is not UTF-8 text (byte {error.start}): {_SKIP_HINT}") from None
    if not text:
        raise InputError(f"{source.path} is an empty document: {_SKIP_HINT}")
    return TextDocument(source.name, text, source.subset)


def parse_json_line(source: DocumentSource, number: int, line: bytes) -> TextDocument:
    """Make a document of one line of JSON.

    Args:
        source: The file of JSON lines.
        number: Number of the line, from 1.
        line: Bytes of the line.

    Returns:
        The document: the string under ``text``, named after ``name`` or else the file and the line.

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
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise InputError(f'{where} has no string under "text": {_SKIP_HINT}')
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
        name if isinstance(name, str) and name else f"{source.name}:{number}",
        text,
        subset if isinstance(subset, str) and subset else source.subset,
    )

"""What a file contains, by its first bytes: text, documents as JSON lines or Parquet, or something that is not text."""

from __future__ import annotations

import io
import json
import re

HEAD_BYTES = 1 << 12
_FIRST_LINE_BYTES = 1 << 24  # of JSON lines without a name that says so
JSON_LINES, TEXT, PARQUET = "JSON lines", "text", "Parquet"

# Suffixes of names that say what a file contains.
_BY_SUFFIX = {".jsonl": JSON_LINES, ".ndjson": JSON_LINES, ".txt": TEXT, ".text": TEXT, ".md": TEXT}
SUFFIXES = (*_BY_SUFFIX, ".json", ".parquet")

_ZIP = {
    b"mimetypeapplication/epub+zip": "an EPUB book",
    b"word/": "a Word document (.docx)",
    b"xl/": "an Excel workbook (.xlsx)",
    b"ppt/": "a PowerPoint presentation (.pptx)",
    b"mimetypeapplication/vnd.oasis": "an OpenDocument file",
}
_TEXT_MAGIC = {b"%PDF-": "a PDF document", b"{\\rtf": "an RTF document"}
_MAGIC = {
    b"SQLite format 3\x00": "an SQLite database",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
    b"ARROW1": "an Arrow file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1": "an Office document (.doc, .xls, .ppt)",
    b"7z\xbc\xaf\x27\x1c": "a 7-Zip archive",
    b"Rar!\x1a\x07": "a RAR archive",
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
    b"\x7fELF": "a program (ELF)",
    b"GGUF": "a GGUF model",
    b"\xff\xfe\x00\x00": "UTF-32 text",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
}
_JSON_START = re.compile(rb"\s*[\[{]")


def content_by_name(suffix: str) -> str:
    """Return what a file contains as far as its name says.

    Args:
        suffix: Suffix of the file's name, without that of a compression.
    """
    return _BY_SUFFIX.get(suffix, TEXT)


def content_of(suffix: str, stream: io.BufferedIOBase, text_key: str) -> tuple[str, str]:
    """Recognize what a file contains.

    JSON lines are recognized where the name does not say it: the first line is an object with the key of the text, or
    the first two are objects.

    Args:
        suffix: Suffix of the file's name, without that of a compression.
        stream: Stream of the decompressed bytes, at their beginning.
        text_key: Key under which JSON lines hold the text.

    Returns:
        :data:`JSON_LINES`, :data:`TEXT` or :data:`PARQUET`, and what else the file is if it is not supported, else an
        empty string.
    """
    head = stream.read(HEAD_BYTES)
    if head.startswith(b"PAR1") and b"\0" in head:
        return PARQUET, ""
    other = _describe(head)
    if suffix in _BY_SUFFIX or other or not _JSON_START.match(head):
        return content_by_name(suffix), other
    key = json.dumps(text_key).encode()
    if re.match(rb"\s*\[\s*\{", head) and re.search(re.escape(key) + rb"\s*:", head):
        return TEXT, "a JSON array, which is not read in parts (write one object a line)"
    lines = [line for line in _first_lines(head, stream) if line.strip()]
    records = list(map(_parse_object, lines[:2]))
    has_text = bool(records) and isinstance(records[0].get(text_key), str)
    return (JSON_LINES if has_text or (len(records) == 2 and all(records)) else TEXT), ""


def _describe(head: bytes) -> str:
    """Name the format of a file that is not text by its first bytes; an empty string for any other."""
    if head.startswith(b"PK\x03\x04"):
        return next((name for mark, name in _ZIP.items() if mark in head), "a ZIP archive")
    if head[257:262] == b"ustar":
        return "a tar archive"
    # A text may begin with the letters of some, such as "ORC".
    marks = {**_TEXT_MAGIC, **{magic: name for magic, name in _MAGIC.items() if b"\0" in head or not magic.isascii()}}
    return next((name for magic, name in marks.items() if head.startswith(magic)), "")


def _first_lines(head: bytes, stream: io.BufferedIOBase) -> list[bytes]:
    """Return the first lines of a stream after its first bytes, whole if they are not longer than a limit."""
    lines = head.splitlines(keepends=True)
    lines[-1] += stream.readline(_FIRST_LINE_BYTES)
    if len(lines) == 1:
        lines.append(stream.readline(_FIRST_LINE_BYTES))
    return lines


def _parse_object(line: bytes) -> dict:
    """Parse a line of JSON; an empty dictionary for anything but an object."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}

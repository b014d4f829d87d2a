"""Input cut into blocks of about a megabyte, the unit of reading, of a worker's task and of resuming.

Reading is sequential and cheap; parsing and encoding, which are not, are left to the process that holds the block.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from preprocess.document_source import DocumentSource, open_source
from preprocess.errors import InputError
from preprocess.file_contents import JSON_LINES, PARQUET, TEXT
from preprocess.record_readers import has_records, record_reader
from preprocess.text_document import TextDocument, parse_json_line, parse_record, parse_text, parse_text_part

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Position:
    """A place in the input from which reading continues.

    Args:
        source: Index of the next source.
        line: Number of lines, or other records, already read of that source.
        offset: Bytes already read of that source, after decompression; rows of a Parquet file.
        consumed: Bytes read of all files so far, as they are on disk, for progress bars.
    """

    source: int = 0
    line: int = 0
    offset: int = 0
    consumed: int = 0


START = Position()


@dataclass
class ParsedBlock:
    """The documents of one block.

    Args:
        documents: The documents in order.
        keys: One key per document: its place in the input, the same on every machine.
        skipped: Number of bad documents that were left out.
    """

    documents: list[TextDocument] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    skipped: int = 0

    def add(self, key: str, bad_documents: str, parse: Callable[..., TextDocument], *arguments) -> None:
        """Parse and add one document.

        Args:
            key: Key of the document.
            bad_documents: ``refuse`` or ``skip``.
            parse: Function that makes the document.
            *arguments: Arguments of the function.

        Raises:
            InputError: The document is bad and not to be left out.
        """
        try:
            document = parse(*arguments)
        except InputError:
            if bad_documents != "skip":
                raise
            self.skipped += 1
            return
        self.documents.append(document)
        self.keys.append(key)


class Block(ABC):
    """Input of about a megabyte, or one document where that is larger."""

    @abstractmethod
    def parse(self, bad_documents: str) -> ParsedBlock:
        """Parse the documents of the block.

        Args:
            bad_documents: ``refuse`` to raise at a bad document, ``skip`` to leave it out.

        Returns:
            The documents.

        Raises:
            InputError: A document is bad and not to be left out.
        """


@dataclass(frozen=True)
class TextBlock(Block):
    """Whole text files, read by the process that parses the block.

    Args:
        sources: The files.
    """

    sources: tuple[DocumentSource, ...]

    def parse(self, bad_documents: str) -> ParsedBlock:
        parsed = ParsedBlock()
        for source in self.sources:
            parsed.add(source.key, bad_documents, _read_text, source)
        return parsed


@dataclass(frozen=True)
class RecordsBlock(Block):
    """Consecutive documents of one file that holds several.

    Args:
        source: The file.
        records: Number, from 1, and content of each document, as the file's reader yields it.
    """

    source: DocumentSource
    records: tuple[tuple[int, Any], ...]

    def parse(self, bad_documents: str) -> ParsedBlock:
        parsed = ParsedBlock()
        for number, record in self.records:
            parse = _PARSERS[self.source.content]
            parsed.add(f"{self.source.key}:{number}", bad_documents, parse, self.source, number, record)
        return parsed


_PARSERS = {JSON_LINES: parse_json_line, PARQUET: parse_record, TEXT: parse_text_part}


def _read_text(source: DocumentSource) -> TextDocument:
    """Read a text file that is one document."""
    source.require_supported()
    with open_source(source) as (stream, _):
        data = stream.read()
    return parse_text(source, data)


def read_blocks(
    sources: Sequence[DocumentSource],
    start: Position = START,
    stripe: tuple[int, int] = (0, 1),
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[Block, Position]]:
    """Cut the input into blocks.

    Args:
        sources: Files to read, in order.
        start: Position to continue from, as it came with an earlier block.
        stripe: Pair ``(i, n)`` that keeps only every n-th document beginning with the i-th, counted per file for files
            of several documents and over files for text; the same documents whatever the blocks are.
        block_bytes: Bytes at which a block is closed, so that memory does not grow with the input.

    Yields:
        Each block, and the position after it.

    Raises:
        InputError: A file cannot be read to its end.
    """
    position = start
    texts: list[DocumentSource] = []
    text_bytes = 0
    while position.source < len(sources):
        source = sources[position.source]
        if not has_records(source):
            following = Position(position.source + 1, consumed=position.consumed + source.size)
            if position.source % stripe[1] == stripe[0]:
                texts.append(source)
                text_bytes += source.size
            position = following
            if text_bytes >= block_bytes:
                yield TextBlock(tuple(texts)), position
                texts, text_bytes = [], 0
            continue
        if texts:
            yield TextBlock(tuple(texts)), position
            texts, text_bytes = [], 0
        before = sum(source.size for source in sources[: position.source])
        yield from _read_records(source, position, before, stripe, block_bytes)
        position = Position(position.source + 1, consumed=before + source.size)
    if texts:
        yield TextBlock(tuple(texts)), position


def _read_records(
    source: DocumentSource, start: Position, before: int, stripe: tuple[int, int], block_bytes: int
) -> Iterator[tuple[RecordsBlock, Position]]:
    """Cut one file of several documents into blocks; ``before`` is the size of the files ahead of it, in bytes."""
    number, offset = start.line, start.offset
    records, size = [], 0
    reader = record_reader(source)
    for number, offset, record, length in reader.read(start.line, start.offset):
        if record is None or (number - 1) % stripe[1] != stripe[0]:
            continue
        records.append((number, record))
        size += length
        if size >= block_bytes:
            position = replace(start, line=number, offset=offset, consumed=before + reader.consumed())
            yield RecordsBlock(source, tuple(records)), position
            records, size = [], 0
    if records:
        position = replace(start, line=number, offset=offset, consumed=before + source.size)
        yield RecordsBlock(source, tuple(records)), position

"""Input cut into blocks of about a megabyte: what is read at once, sent to a worker, and resumed after.

Reading is sequential and cheap; parsing and encoding, which are not, are left to whoever holds the block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from preprocess.documents import Parsed, Source, open_source, parse_json_line, parse_text
from preprocess.errors import InputError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Position:
    """Where reading goes on: the next source, and in it the next line and its byte offset after decompression.

    ``consumed`` counts the bytes of all files read so far, for progress bars.
    """

    source: int = 0
    line: int = 0
    offset: int = 0
    consumed: int = 0


START = Position()


@dataclass(frozen=True)
class TextBlock:
    """Whole text files, read by whoever parses the block."""

    sources: tuple[Source, ...]

    def parse(self, bad_documents: str) -> Parsed:
        """Their documents; raises InputError for a bad one unless ``bad_documents`` is ``skip``."""
        parsed = Parsed()
        for source in self.sources:
            with open_source(source) as (stream, _):
                data = stream.read()
            _keep(parsed, source.key, bad_documents, parse_text, source, data)
        return parsed


@dataclass(frozen=True)
class LinesBlock:
    """Consecutive JSON lines of one file: ``lines`` are (number, bytes), numbered from 1."""

    source: Source
    lines: tuple[tuple[int, bytes], ...]

    def parse(self, bad_documents: str) -> Parsed:
        """Their documents; raises InputError for a bad one unless ``bad_documents`` is ``skip``."""
        parsed = Parsed()
        for number, line in self.lines:
            key = f"{self.source.key}:{number}"
            _keep(parsed, key, bad_documents, parse_json_line, self.source, number, line)
        return parsed


def _keep(parsed: Parsed, key: str, bad_documents: str, parse, *arguments) -> None:
    try:
        document = parse(*arguments)
    except InputError:
        if bad_documents != "skip":
            raise
        parsed.skipped += 1
        return
    parsed.documents.append(document)
    parsed.keys.append(key)


def read_blocks(
    sources: Sequence[Source],
    start: Position = START,
    stripe: tuple[int, int] = (0, 1),
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[tuple[TextBlock | LinesBlock, Position]]:
    """Blocks of about ``block_bytes``, each with the position after it.

    Args:
        sources: files to read, in order.
        start: go on from here; a position that came with an earlier block.
        stripe: ``(i, n)`` keeps only every n-th document beginning with the i-th, counted per file for JSON lines and
            over files for text; the same documents whatever the blocks are.
        block_bytes: a block is closed when it has this many bytes, so memory does not grow with the input.

    Raises:
        InputError: a file cannot be read to its end.
    """
    position = start
    texts: list[Source] = []
    text_bytes = 0
    while position.source < len(sources):
        source = sources[position.source]
        if not source.is_json_lines:
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
        yield from _read_lines(source, position, before, stripe, block_bytes)
        position = Position(position.source + 1, consumed=before + source.size)
    if texts:
        yield TextBlock(tuple(texts)), position


def _read_lines(source: Source, start: Position, before: int, stripe: tuple[int, int], block_bytes: int):
    """The blocks of one file of JSON lines; ``before`` bytes were in the files ahead of it."""
    number, offset = start.line, start.offset
    lines, size = [], 0
    with open_source(source) as (stream, tell):
        _skip_to(stream, source, offset)
        for line in stream:
            number += 1
            offset += len(line)
            if not line.strip() or (number - 1) % stripe[1] != stripe[0]:
                continue
            lines.append((number, line))
            size += len(line)
            if size >= block_bytes:
                yield (
                    LinesBlock(source, tuple(lines)),
                    replace(start, line=number, offset=offset, consumed=before + tell()),
                )
                lines, size = [], 0
    if lines:
        position = replace(start, line=number, offset=offset, consumed=before + source.size)
        yield LinesBlock(source, tuple(lines)), position


def _skip_to(stream, source: Source, offset: int) -> None:
    if not source.compression:
        stream.seek(offset)
        return
    while offset > 0:
        skipped = len(stream.read(min(offset, 1 << 20)))
        if not skipped:
            raise InputError(f"{source.path} is shorter than when it was read before: start again with --overwrite")
        offset -= skipped

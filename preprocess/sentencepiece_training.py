"""Train a sentencepiece model that keeps every character of a document, newlines and indentation included.

    python -m preprocess.sentencepiece_training --train P... --vocab-size 32000 --output tokenizer.model

binarize_documents does this by itself unless several shards are to share the model.

* BPE without normalization and with byte fallback: no text becomes ``<unk>``, and decoding gives the text back exactly.
* sentencepiece trains on lines, so newlines would never be learned. The most frequent runs of a newline and the
  whitespace after it ("\\n    " in source code, "\\n\\n" in prose) become pieces of their own; any other newline is a
  byte piece.
* Whitespace other than the space is never part of another piece, which lets fairseq's dictionary hold every piece.
* Small vocabularies spend at most half of the room on single characters; rarer ones are spelled in bytes.
"""

from __future__ import annotations

import argparse
import heapq
import io
import logging
import random
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from preprocess.destination import check_output
from preprocess.dictionary import SPECIALS
from preprocess.document_source import list_sources
from preprocess.documents import iter_documents
from preprocess.errors import InputError
from preprocess.format_options import add_format_options, check_sources, document_format
from preprocess.package_modules import files

logger = logging.getLogger("preprocess.sentencepiece_training")

PROG = "python -m preprocess.sentencepiece_training"
BYTES = 256
SMALLEST_VOCABULARY = len(SPECIALS) + BYTES + 40
VOCAB_SIZE = 8000
SAMPLE_BYTES = 20_000_000
COVERAGE = 0.9999  # of the characters of the sample; the others are spelled in bytes
LARGEST_PASSAGE = 1 << 14  # characters
LONGEST_RUN = 64  # characters of whitespace

_RUN = re.compile(r"\r?\n[\r\n\t ]*")
# Whitespace that is not a space, with what follows; the two characters that sentencepiece reserves; the zero byte.
_BOUNDARY = re.compile(r"[^\S ]\s*|[\u2581\u2585\x00]")


def train(texts: Iterable[str], vocab_size: int, sample_bytes: int = SAMPLE_BYTES, seed: int = 1) -> bytes:
    """Train a sentencepiece model; the same input gives the same bytes.

    Args:
        texts: Texts of the documents, read once and not held in memory beyond the sample.
        vocab_size: Largest number of symbols in the model's fairseq dictionary, special ones included.
        sample_bytes: Size of the random sample of passages to train on, in bytes of UTF-8.
        seed: Seed of the sample.

    Returns:
        The bytes of the model file.

    Raises:
        InputError: ``vocab_size`` is too small, or there is no text to train on.
    """
    import sentencepiece

    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"--vocab-size {vocab_size} is smaller than {SMALLEST_VOCABULARY} "
            f"({len(SPECIALS)} special symbols, {BYTES} bytes, 40 pieces)"
        )
    passages = sample_passages(texts, sample_bytes, seed)
    room = vocab_size - len(SPECIALS) - BYTES
    runs = frequent_runs(passages, min(64, room // 16))
    characters = frequent_characters(passages, (room - len(runs)) // 2)
    sentences = list(training_sentences(passages, characters))
    if not sentences:
        raise InputError("the --train documents hold no visible character to train a tokenizer on")
    logger.info("training a sentencepiece model of %d symbols on %d lines", vocab_size, len(sentences))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size - len(SPECIALS) + 1,  # its <unk> is fairseq's
        hard_vocab_limit=False,  # a short text has fewer pieces to offer
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        allow_whitespace_only_pieces=True,
        user_defined_symbols=[run.replace(" ", "\u2581") for run in runs],
        character_coverage=1.0,
        max_sentence_length=8 * LARGEST_PASSAGE,
        unk_id=0,
        bos_id=-1,
        eos_id=-1,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def sample_passages(texts: Iterable[str], sample_bytes: int, seed: int) -> list[str]:
    """Sample passages at random until they fill a size.

    Each passage draws a number and those with the smallest stay, so one reading and constant memory suffice.

    Args:
        texts: Texts of the documents.
        sample_bytes: Size of the sample, in bytes of UTF-8.
        seed: Seed of the sample.

    Returns:
        The passages in the order of the text.
    """
    draw = random.Random(seed)
    sample: list[tuple[float, int, str, int]] = []  # a heap, largest draw first: (-draw, position, passage, bytes)
    total = 0
    for position, passage in enumerate(_passages(texts)):
        size = len(passage.encode("utf-8"))
        total += size
        heapq.heappush(sample, (-draw.random(), position, passage, size))
        while total > sample_bytes and len(sample) > 1:
            total -= heapq.heappop(sample)[3]
    return [passage for _, _, passage, _ in sorted(sample, key=lambda item: item[1])]


def _passages(texts: Iterable[str]) -> Iterator[str]:
    """Yield the texts in passages of at most ``LARGEST_PASSAGE`` characters, cut before newlines where possible."""
    for text in texts:
        start = 0
        while len(text) - start > LARGEST_PASSAGE:
            cut = text.rfind("\n", start + 1, start + LARGEST_PASSAGE)
            cut = cut if cut > 0 else start + LARGEST_PASSAGE
            yield text[start:cut]
            start = cut
        yield text[start:]


def frequent_runs(passages: Iterable[str], most: int) -> list[str]:
    """Find the runs of newline and whitespace that are worth a piece.

    Args:
        passages: Passages of the sample.
        most: Largest number of runs.

    Returns:
        The runs, most frequent first.
    """
    counts = Counter(run for passage in passages for run in _RUN.findall(passage) if 1 < len(run) <= LONGEST_RUN)
    total = sum(counts.values())
    frequent = [run for run, count in counts.items() if count >= max(8, total / 2000)]
    return sorted(frequent, key=lambda run: (-counts[run], run))[:most]


def frequent_characters(passages: Iterable[str], most: int) -> set[str]:
    """Find the visible characters that are worth a piece: ``COVERAGE`` of the text and all its ASCII.

    Args:
        passages: Passages of the sample.
        most: Largest number of characters.

    Returns:
        The most frequent characters.
    """
    counts = Counter()
    for passage in passages:
        counts.update(passage)
    counts = {char: count for char, count in counts.items() if not _BOUNDARY.match(char) and char != " "}
    total = sum(counts.values())
    chosen, covered = set(), 0
    for char in sorted(counts, key=lambda char: (-counts[char], char)):
        if len(chosen) == most:
            break
        # stock fairseq shows a character that is spelled in bytes as <0x24>
        if covered < COVERAGE * total or (char.isascii() and char.isprintable()):
            chosen.add(char)
        covered += counts[char]
    return chosen


def training_sentences(passages: Iterable[str], characters: set[str]) -> Iterator[str]:
    """Yield the lines to train on, cut where there is anything but spaces and known characters.

    Args:
        passages: Passages of the sample.
        characters: Characters that may be in a line.

    Yields:
        Lines that are not blank.
    """
    for passage in passages:
        rare = "".join(set(passage) - characters - {" "})
        boundary = re.compile(f"{_BOUNDARY.pattern}|[{re.escape(rare)}]") if rare else _BOUNDARY
        for line in boundary.split(passage):
            if line and not line.isspace():
                yield line


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can repair ends it with one sentence.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--train", nargs="+", required=True, metavar="P", help="text files, directories or JSON lines to train on")
    add("--output", type=Path, required=True, metavar="F", help="model file to write")
    add(
        "--vocab-size",
        type=int,
        default=VOCAB_SIZE,
        metavar="N",
        help="largest number of symbols in the dictionary (default: %(default)s)",
    )
    add(
        "--sample-bytes",
        type=int,
        default=SAMPLE_BYTES,
        metavar="N",
        help="bytes of text to train on, sampled from more (default: %(default)s)",
    )
    add("--seed", type=int, default=1, metavar="N", help="seed of the sample (default: %(default)s)")
    add_format_options(parser)
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logging.getLogger("preprocess").setLevel(logging.INFO)
    try:
        check_output(args.output, "--output")
        check_sources(list_sources(args.train, form := document_format(args)), args)
        texts = (document.text for document in iter_documents(args.train, args.bad_documents, True, form))
        model = train(texts, args.vocab_size, args.sample_bytes, args.seed)
        files.write_whole(args.output, lambda path: Path(path).write_bytes(model))
    except (InputError, OSError) as error:
        raise SystemExit(f"{PROG}: error: {error}") from None


if __name__ == "__main__":
    main()

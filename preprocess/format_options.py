"""The options that say how documents are marked in the inputs, for every script that reads documents."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Iterable

from preprocess.document_source import DocumentFormat, DocumentSource
from preprocess.errors import InputError
from preprocess.file_contents import TEXT

logger = logging.getLogger("preprocess.format_options")


def add_format_options(parser: argparse.ArgumentParser) -> None:
    """Add the options to a command line.

    Args:
        parser: Parser of the command line.
    """
    parser.add_argument(
        "--text-key",
        default="text",
        metavar="KEY",
        help="key of the text in JSON lines, column of the text in Parquet files (default: %(default)s)",
    )
    parser.add_argument(
        "--document-separator",
        default="",
        metavar="S",
        help="mark between the documents of a text file, such as '<|endoftext|>' (default: a file is one document)",
    )
    parser.add_argument(
        "--bad-documents",
        choices=("refuse", "skip"),
        default="refuse",
        help="refuse empty or undecodable documents and files that are not text, or leave them out (default: "
        "%(default)s)",
    )


def document_format(args: argparse.Namespace) -> DocumentFormat:
    """Return the marks of documents that a command line names.

    Args:
        args: Options of the command line.
    """
    return DocumentFormat(args.text_key, args.document_separator)


def check_sources(sources: Iterable[DocumentSource], args: argparse.Namespace) -> None:
    """Refuse files that are not supported before any is read, and options without effect; name files that are repeated.

    Args:
        sources: All files of the input.
        args: Options of the command line.

    Raises:
        InputError: A file is not supported, or an option has no effect.
    """
    sources = list(sources)
    if args.bad_documents == "refuse":
        for source in sources:
            source.require_supported()
    for path, times in Counter(source.path.resolve() for source in sources).items():
        if times > 1:
            logger.warning("%s is named %d times: its documents are read %d times", path, times, times)
    texts = [source for source in sources if source.content == TEXT]
    if args.document_separator and not texts:
        raise InputError(
            "--document-separator is for text files, but all inputs are JSON lines or Parquet: leave it out"
        )
    if args.text_key != "text" and len(texts) == len(sources):
        raise InputError(
            f"--text-key {args.text_key} is for JSON lines and Parquet, but no input is either: leave it out, or name "
            "the files .jsonl"
        )

"""fairseq's dictionary as plain symbols: special symbols, ``dict.txt`` and ids, without importing fairseq."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from preprocess.errors import InputError

# The symbols with which every fairseq dictionary begins, in this order; dict.txt leaves them out.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(4)


def dictionary_lines(symbols: Sequence[str]) -> Iterator[str]:
    """Yield the lines of a dict.txt, with falling counts, which keep the order if anything sorts the dictionary again.

    Args:
        symbols: Symbols in the order of their ids, without the special ones.

    Yields:
        One line per symbol, ``symbol count`` and a newline.
    """
    for rank, symbol in enumerate(symbols):
        yield f"{symbol} {len(symbols) - rank}\n"


def filler_symbols(symbols: int) -> list[str]:
    """Name the ``madeupword`` symbols with which fairseq fills a dictionary up to a multiple of eight.

    Args:
        symbols: Number of symbols in the dictionary, without the special ones.

    Returns:
        Names of the zero to seven symbols to add.
    """
    return [f"madeupword{i:04d}" for i in range(-(symbols + len(SPECIALS)) % 8)]


def read_dictionary(path: str | os.PathLike) -> list[str]:
    """Read the symbols of a fairseq dict.txt.

    Args:
        path: Path of the file.

    Returns:
        Symbols in the order of their ids, without the special ones.

    Raises:
        InputError: The file cannot be read, a line is not ``symbol count``, or a symbol appears twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the dictionary {path} cannot be read: {error}") from None
    symbols = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        symbol, _, count = line.removesuffix(" #fairseq:overwrite").rpartition(" ")
        if not symbol or not count.isdigit():
            raise InputError(f'{path}, line {number}, is not "symbol count": give a fairseq dict.txt with --dict')
        symbols.append(symbol)
    if len(set(symbols)) != len(symbols):
        raise InputError(f"the dictionary {path} has a symbol twice: give a fairseq dict.txt with --dict")
    return symbols


def symbol_ids(required: Sequence[str], symbols: Sequence[str], tokenizer: str) -> dict[str, int]:
    """Map the symbols of a dictionary to their ids, after checking that it has all that a tokenizer needs.

    Args:
        required: Symbols that the tokenizer produces.
        symbols: Symbols of the dictionary in the order of their ids, without the special ones.
        tokenizer: Path of the tokenizer, for the message.

    Returns:
        The id of each symbol of the dictionary.

    Raises:
        InputError: The dictionary lacks a required symbol.
    """
    index = {symbol: len(SPECIALS) + rank for rank, symbol in enumerate(symbols)}
    missing = [symbol for symbol in required if symbol not in index]
    if missing:
        raise InputError(
            f"{len(missing):,} of the {len(required):,} symbols of {tokenizer} (the first: {missing[0]}) are not in "
            f"the dictionary of {len(symbols):,} symbols: give the --dict that belongs to --tokenizer, or leave it out"
        )
    return index

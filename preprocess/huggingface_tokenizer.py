"""A Hugging Face tokenizer, whose ids are those of transformers; fairseq's symbols are these ids in decimal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from preprocess.dictionary import SPECIALS, UNK, filler_symbols, symbol_ids
from preprocess.errors import InputError, require_package
from preprocess.package_modules import json_tokenizer
from preprocess.sentencepiece_tokenizer import PROBE
from preprocess.tokenizer import Tokenizer
from preprocess.tokenizer_json import TOKENIZER, read_json, read_tokenizer_json

JsonTokenizer = json_tokenizer.JsonTokenizer


class HuggingFaceTokenizer(Tokenizer):
    """The tokenizer of a Hugging Face directory, or of a ``tokenizer.json``.

    The ids are the model's, so a tokenizer that changes text is not refused; ``lossless`` is false for it.

    Args:
        path: Path of the directory, or of the file.
        symbols: Symbols of an existing dictionary; if None, the ids of the model's vocabulary in order.

    Raises:
        InputError: A file cannot be read, or the tokenizer does not fit the model's vocabulary or the dictionary.
    """

    kind = "huggingface"
    FILE = TOKENIZER

    def __init__(self, path: Path, symbols: Sequence[str] | None = None):
        require_package("tokenizers", f"--tokenizer {path}")
        content = read_tokenizer_json(path)
        try:
            self._tokenizer = JsonTokenizer(content)
        except ValueError as error:
            raise InputError(f"--tokenizer {path} cannot be used: {error}") from None
        self._content = content
        if symbols is None:
            directory = path if path.is_dir() else path.parent
            symbols = dictionary_symbols(self._tokenizer, _vocab_size(directory) or self._tokenizer.size)
        super().__init__(symbols, {self.FILE: path / self.FILE if path.is_dir() else path}, content)
        numbers = sorted(self._tokenizer.vocabulary.values())
        names = list(map(self._tokenizer.symbol, numbers))
        index = symbol_ids([name for name in names if name not in SPECIALS], self.symbols, str(path))
        index.update((name, number) for number, name in enumerate(SPECIALS))
        self._to_id = np.full(self._tokenizer.size, UNK, dtype=np.int32)  # (the tokenizer's ids,) fairseq id
        self._to_id[numbers] = [index[name] for name in names]
        self._to_number = np.full(len(self), -1, dtype=np.int64)  # (dictionary,) the tokenizer's id
        self._to_number[self._to_id[numbers]] = numbers
        self._to_number[: len(SPECIALS)] = -1
        self.lossless = all(self.decode(self.encode_array(text)) == text for text in (*PROBE, "e\u0301 \u212b", "A a"))

    def encode_array(self, text: str) -> np.ndarray:
        return self.encode_arrays([text])[0]

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._to_id[numbers] for numbers in self._tokenizer.encode_batch(texts)]

    def decode(self, ids: Iterable[int]) -> str:
        ids = np.asarray(list(ids), dtype=np.int64)
        text = []
        numbers: list[int] = []
        for token, number in zip(ids.tolist(), self._to_number[ids].tolist()):
            if number >= 0:
                numbers.append(number)
            elif token == UNK:
                text += [self._tokenizer.decode(numbers), "<unk>"]
                numbers = []
        return "".join(text) + self._tokenizer.decode(numbers)

    def write_files(self, directory: Path) -> None:
        (directory / self.FILE).write_bytes(self._content)  # with what stood in other files


def dictionary_symbols(tokenizer: JsonTokenizer, vocab_size: int) -> list[str]:
    """Return the symbols of a dictionary for a Hugging Face model: one for each row of its embedding.

    Args:
        tokenizer: Tokenizer of the model.
        vocab_size: Number of rows of the model's embedding.

    Returns:
        Symbols without the special ones, in the order of the ids. If the tokenizer begins with fairseq's special
        symbols, as OPT's, its ids are those of the dictionary; otherwise they follow the four special symbols, and
        ``madeupword`` symbols fill the dictionary up to a multiple of eight.

    Raises:
        InputError: The tokenizer has ids that the model has not.
    """
    try:
        symbols = tokenizer.symbols(vocab_size)
    except ValueError as error:
        raise InputError(str(error)) from None
    return symbols if len(symbols) < vocab_size else symbols + filler_symbols(vocab_size)


def _vocab_size(directory: Path) -> int | None:
    """Return the number of rows of the embedding of the model in a directory; None if there is no model."""
    if not (directory / "config.json").is_file():
        return None
    size = read_json(directory / "config.json").get("vocab_size")
    return size if isinstance(size, int) else None

"""GPT-2's byte-level BPE: fairseq's ``GPT2BPE`` and dictionary in one step, the same ids about ten times faster.

Text is cut into words by the same regular expression as in fairseq. Most words were seen before, so their ids come from
a table; a new word is merged by the ``tokenizers`` library (Rust).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from preprocess.dictionary import UNK, filler_symbols, symbol_ids
from preprocess.errors import InputError, require_package
from preprocess.package_modules import files
from preprocess.tokenizer import Tokenizer

WORDS_IN_TABLE = 1 << 18  # about 50 MB
PART_CHARACTERS = 1 << 13  # of a long text that are cut into words at once

# GPT-2's definition of a word, and its equivalent for ASCII text: Python's own module has no Unicode classes, but is
# twice as fast.
_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_ASCII_WORDS = re.compile(r" ?[A-Za-z]+|'(?:[stmd]|re|ve|ll)| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+", flags=re.ASCII)
# No word spans the place between a visible character and a newline, so texts may be cut there.
_CUT = re.compile(r"(?<=\S)(?=\n)")


class GPT2Tokenizer(Tokenizer):
    """GPT-2's BPE from ``encoder.json`` and ``vocab.bpe``; fairseq's symbols are its ids in decimal.

    Args:
        encoder_json: Path of the JSON object of tokens and their GPT-2 ids.
        vocab_bpe: Path of the merges, best first, below a line with the version.
        symbols: Symbols of an existing dictionary; if None, the GPT-2 ids in order, filled up like fairseq's with
            ``madeupword`` symbols to a multiple of eight.

    Raises:
        InputError: A file is missing or of another format, the two do not belong together, or do not fit the
            dictionary.
    """

    kind = "gpt2"
    ENCODER, MERGES = "encoder.json", "vocab.bpe"

    def __init__(self, encoder_json: Path, vocab_bpe: Path, symbols: Sequence[str] | None = None):
        regex = require_package("regex", "--tokenizer gpt2")
        tokenizers = require_package("tokenizers", "--tokenizer gpt2")
        models, pre_tokenizers, decoders = tokenizers.models, tokenizers.pre_tokenizers, tokenizers.decoders
        vocabulary, merges = read_gpt2_files(encoder_json, vocab_bpe)
        try:
            self._bpe = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=merges, cache_capacity=0))
        except Exception as error:  # the library raises Exception itself
            raise InputError(
                f"--gpt2-encoder-json {encoder_json} and --gpt2-vocab-bpe {vocab_bpe} do not belong together: {error}"
            ) from None
        self._bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._bpe.decoder = decoders.ByteLevel()
        missing_bytes = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in vocabulary]
        if missing_bytes:
            raise InputError(f"--gpt2-encoder-json {encoder_json} lacks {len(missing_bytes)} of the 256 bytes")
        names = [str(number) for number in sorted(vocabulary.values())]
        if symbols is None:
            symbols = names + filler_symbols(len(names))
        identity = json.dumps([sorted(vocabulary.items(), key=lambda item: item[1]), merges]).encode()
        super().__init__(symbols, {self.ENCODER: encoder_json, self.MERGES: vocab_bpe}, identity)
        index = symbol_ids(names, self.symbols, str(encoder_json))
        self._to_id = np.full(max(vocabulary.values()) + 1, UNK, dtype=np.int32)  # (GPT-2 ids,) fairseq id
        self._to_gpt2 = np.full(len(self), -1, dtype=np.int64)  # (dictionary,) GPT-2 id
        for name in names:
            self._to_id[int(name)] = index[name]
            self._to_gpt2[index[name]] = int(name)
        self._words = regex.compile(_WORDS)
        self.word_table = _WordTable(self._encode_word)

    def _encode_word(self, word: str) -> bytes:
        return self._to_id[self._bpe.encode(word).ids].tobytes()

    def encode_array(self, text: str) -> np.ndarray:
        lookup = self.word_table.__getitem__
        ids = []
        for part in _parts(text):
            words = _ASCII_WORDS.findall(part) if part.isascii() else self._words.findall(part)
            ids.append(b"".join(map(lookup, words)))
        return np.frombuffer(b"".join(ids), dtype=np.int32)

    def decode(self, ids: Iterable[int]) -> str:
        ids = np.asarray(list(ids), dtype=np.int64)
        text = []
        numbers: list[int] = []
        for token, number in zip(ids.tolist(), self._to_gpt2[ids].tolist()):
            if number >= 0:
                numbers.append(number)
            elif token == UNK:
                text += [self._bpe.decode(numbers, skip_special_tokens=False), "<unk>"]
                numbers = []
        return "".join(text) + self._bpe.decode(numbers, skip_special_tokens=False)


class _WordTable(dict):
    """Token ids of words, as int32 bytes; emptied when it is full, which bounds the memory of a worker.

    Args:
        encode: Function that encodes one word.
    """

    def __init__(self, encode: Callable[[str], bytes]):
        super().__init__()
        self._encode = encode

    def __missing__(self, word: str) -> bytes:
        if len(self) >= WORDS_IN_TABLE:
            self.clear()
        ids = self._encode(word)
        if len(word) <= 64:
            self[word] = ids
        return ids


def _parts(text: str) -> Iterator[str]:
    """Yield a text in parts of about ``PART_CHARACTERS``, cut where no word is cut."""
    start = 0
    while len(text) - start > 2 * PART_CHARACTERS:
        cut = _CUT.search(text, start + PART_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


def read_gpt2_files(encoder_json: Path, vocab_bpe: Path) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Read GPT-2's two files.

    Args:
        encoder_json: Path of the JSON object of tokens and their GPT-2 ids.
        vocab_bpe: Path of the merges.

    Returns:
        The id of each token, and the merges, best first.

    Raises:
        InputError: A file is missing or of another format.
    """
    try:
        vocabulary = files.read_json(encoder_json)
        ids = list(vocabulary.values())
        if not ids or not all(isinstance(number, int) and number >= 0 for number in ids) or len(set(ids)) != len(ids):
            raise ValueError("its values are not distinct ids")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"--gpt2-encoder-json {encoder_json} is not GPT-2's encoder.json: {error}") from None
    try:
        lines = vocab_bpe.read_text(encoding="utf-8").split("\n")[1:-1]
        merges = [tuple(line.split(" ")) for line in lines]
        if not merges or not all(len(merge) == 2 for merge in merges):
            raise ValueError("a line below the first is not two symbols")
    except (OSError, ValueError) as error:
        raise InputError(f"--gpt2-vocab-bpe {vocab_bpe} is not GPT-2's vocab.bpe: {error}") from None
    return vocabulary, merges

"""Text to fairseq token ids and back, without loss: sentencepiece models and GPT-2's byte-level BPE.

>>> tokenizer = load_tokenizer("data/sentencepiece.model")
>>> tokenizer.decode(tokenizer.encode("if x:\\n    return")) == "if x:\\n    return"
True

Ids are those of the fairseq dictionary (``tokenizer.dictionary``), its four special symbols first. Importing this
module and encoding needs neither torch nor fairseq, so that worker processes start at once.
"""

from __future__ import annotations

import hashlib
import io
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from preprocess.errors import InputError

# The symbols with which every fairseq dictionary begins, in this order.
SPECIALS = ("<s>", "<pad>", "</s>", "<unk>")
BOS, PAD, EOS, UNK = range(4)

# Every kind of whitespace and script; what comes back unchanged from here comes back unchanged from everywhere.
_PROBE = (
    "if x:\n\n    y =\t1  # a  b\r\n",
    " \n leading",
    "trailing \n ",
    "\n\n\n",
    "\u2581a\u2581 b\u2581",
    "é 日本 \U0001f600 \u00a0\u2028\u0085\x00\x1c",
)


class Tokenizer(ABC):
    """Common to all tokenizers. Subclasses give ``kind``, ``lossless``, ``_encode`` and ``_decode``.

    Args:
        symbols: the dictionary's symbols after the four special ones, in order.
        files: name in the data directory → file, all that is needed to load the tokenizer again.
        identity: bytes that tell two tokenizers apart.
    """

    kind: str
    lossless = True

    def __init__(self, symbols: Sequence[str], files: dict[str, Path], identity: bytes):
        self.symbols = list(symbols)
        self.files = files
        self._identity = identity
        self._dictionary = None

    def __len__(self) -> int:
        return len(SPECIALS) + len(self.symbols)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``, without an end-of-sentence symbol."""
        return self.encode_array(text).tolist()

    @abstractmethod
    def encode_array(self, text: str) -> np.ndarray:
        """The ids of ``text`` as an array of shape (tokens,), dtype int32."""

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; bos, pad and eos have none, an unknown symbol reads ``<unk>``."""

    def fingerprint(self) -> str:
        """SHA-256 of what decides how text is encoded: the same for the same files wherever they lie."""
        return hashlib.sha256(self._identity).hexdigest()

    @property
    def dictionary(self):
        """The fairseq ``Dictionary`` whose ids these are."""
        if self._dictionary is None:
            from fairseq.data import Dictionary  # takes seconds and is not needed to encode

            self._dictionary = Dictionary()
            self._dictionary.add_from_file(io.StringIO("".join(self.dictionary_lines())))
        return self._dictionary

    def dictionary_lines(self) -> Iterator[str]:
        """The lines of fairseq's dict.txt; falling counts keep the order if anything sorts the dictionary again."""
        for rank, symbol in enumerate(self.symbols):
            yield f"{symbol} {len(self.symbols) - rank}\n"


def load_tokenizer(
    tokenizer: str | os.PathLike,
    gpt2_encoder_json: str | os.PathLike | None = None,
    gpt2_vocab_bpe: str | os.PathLike | None = None,
    dictionary: str | os.PathLike | None = None,
    allow_lossy: bool = False,
) -> Tokenizer:
    """A tokenizer from its files.

    Args:
        tokenizer: a sentencepiece model file, ``gpt2``, or a directory that binarize_documents.py wrote.
        gpt2_encoder_json, gpt2_vocab_bpe: GPT-2's two files, for ``gpt2``.
        dictionary: a fairseq dict.txt to use; without it one is made from the tokenizer.
        allow_lossy: accept a sentencepiece model that does not give back every text as it was.

    Raises:
        InputError: a file is missing or not what it should be, or the tokenizer does not fit the dictionary.
    """
    if str(tokenizer) != "gpt2" and Path(tokenizer).is_dir():
        return _load_from_data(Path(tokenizer))
    symbols = None if dictionary is None else read_dictionary(dictionary)
    if str(tokenizer) == "gpt2":
        from preprocess.gpt2 import GPT2Tokenizer

        if gpt2_encoder_json is None or gpt2_vocab_bpe is None:
            raise InputError("--tokenizer gpt2 needs local files: give --gpt2-encoder-json and --gpt2-vocab-bpe")
        return GPT2Tokenizer(Path(gpt2_encoder_json), Path(gpt2_vocab_bpe), symbols)
    return SentencePieceTokenizer(Path(tokenizer), symbols, allow_lossy)


def _load_from_data(directory: Path) -> Tokenizer:
    dictionary = directory / "dict.txt"
    if (directory / SentencePieceTokenizer.FILE).is_file():
        return load_tokenizer(directory / SentencePieceTokenizer.FILE, dictionary=dictionary, allow_lossy=True)
    if (directory / "encoder.json").is_file():
        return load_tokenizer("gpt2", directory / "encoder.json", directory / "vocab.bpe", dictionary)
    raise InputError(
        f"{directory} holds neither {SentencePieceTokenizer.FILE} nor encoder.json: give a directory that "
        "binarize_documents.py wrote"
    )


def read_dictionary(path: str | os.PathLike) -> list[str]:
    """The symbols of a fairseq dict.txt in order, without the four special ones that it leaves out."""
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


def require_in_dictionary(wanted: Sequence[str], symbols: Sequence[str], tokenizer: str) -> dict[str, int]:
    """Ids of the ``wanted`` symbols; raises InputError if the dictionary of ``symbols`` lacks one of them."""
    index = {symbol: len(SPECIALS) + rank for rank, symbol in enumerate(symbols)}
    missing = [symbol for symbol in wanted if symbol not in index]
    if missing:
        raise InputError(
            f"{len(missing):,} of the {len(wanted):,} symbols of {tokenizer} (the first: {missing[0]}) are not in the "
            f"dictionary of {len(symbols):,} symbols: give the --dict that belongs to --tokenizer, or none"
        )
    return index


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; fairseq's symbols are its pieces.

    Whitespace inside a piece is written in byte notation (``<0x0A>``), since a dict.txt cannot hold it; pieces without
    any are the symbols that fairseq's own ``--bpe sentencepiece`` uses.

    Args:
        model: the model file.
        symbols: of an existing dictionary; None makes one in the order of the pieces.
        allow_lossy: accept a model that does not give back every text.
    """

    kind = "sentencepiece"
    FILE = "sentencepiece.model"

    def __init__(self, model: Path, symbols: Sequence[str] | None = None, allow_lossy: bool = False):
        import sentencepiece

        try:
            proto = model.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a sentencepiece model"
            raise InputError(f"--tokenizer {model} cannot be loaded: {reason}") from None
        processor = self._processor
        # what the model puts before every text (a dummy prefix), seen before a byte that joins nothing
        self._anchor = processor.encode("\x00")
        usable = [
            piece
            for piece in range(processor.vocab_size())
            if not (processor.is_control(piece) or processor.is_unknown(piece) or processor.is_unused(piece))
        ]
        names = [visible(processor.id_to_piece(piece)) for piece in usable]
        if symbols is None:
            symbols = names
            if len(set(names)) != len(names) or set(names) & set(SPECIALS):
                raise InputError(f"--tokenizer {model} has pieces that a fairseq dictionary cannot tell apart")
        super().__init__(symbols, {self.FILE: model}, proto)
        index = require_in_dictionary(names, self.symbols, str(model))
        self._to_id = np.full(processor.vocab_size(), UNK, dtype=np.int32)  # (pieces,) fairseq id
        self._to_id[usable] = [index[name] for name in names]
        self._to_piece = np.full(len(self), -1, dtype=np.int64)  # (dictionary,) sentencepiece id
        self._to_piece[self._to_id[usable]] = usable
        byte_pieces = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        # U+2581 stands for a space inside sentencepiece, so the character itself has to be spelled in bytes
        self._lower_block = self._to_id[byte_pieces] if all(map(processor.is_byte, byte_pieces)) else None
        self._check(model, allow_lossy)

    def _check(self, model: Path, allow_lossy: bool) -> None:
        for text in _PROBE:
            returned = self.decode(self.encode_array(text))
            if returned != text:
                self.lossless = False
                if not allow_lossy:
                    raise InputError(
                        f"--tokenizer {model} does not give text back as it was ({text!r} became {returned!r}): train "
                        "one with --tokenizer sentencepiece, or accept the loss with --allow-lossy-tokenizer"
                    )

    def encode_array(self, text: str) -> np.ndarray:
        if self._lower_block is None or "\u2581" not in text:
            return self._to_id[self._processor.encode(text)]
        first, *others = text.split("\u2581")
        parts = [self._to_id[self._processor.encode(first)]] if first else []
        for other in others:
            parts.append(self._lower_block)
            parts.append(self._encode_continuation(other))
        return np.concatenate(parts)

    def _encode_continuation(self, text: str) -> np.ndarray:
        """Encode what follows other tokens, without the space that some models put before a text."""
        pieces = self._processor.encode(f"\x00{text}")
        return self._to_id[pieces[len(self._anchor) :]]

    def decode(self, ids: Iterable[int]) -> str:
        ids = np.asarray(list(ids), dtype=np.int64)
        text = []
        known: list[int] = []
        for token, piece in zip(ids.tolist(), self._to_piece[ids].tolist()):
            if piece >= 0:
                known.append(piece)
            elif token == UNK:
                text += [self._processor.decode(known), "<unk>"]
                known = []
        return "".join(text) + self._processor.decode(known)


def visible(piece: str) -> str:
    """``piece`` with each whitespace character written as its UTF-8 bytes, ``<0x0A>``."""
    if not any(map(str.isspace, piece)):
        return piece
    return "".join("".join(f"<0x{byte:02X}>" for byte in char.encode()) if char.isspace() else char for char in piece)

"""A sentencepiece model as a tokenizer whose symbols are the model's pieces."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from preprocess.dictionary import SPECIALS, UNK, symbol_ids
from preprocess.errors import InputError
from preprocess.package_modules import sentence_pieces
from preprocess.tokenizer import Tokenizer

SentencePieces = sentence_pieces.SentencePieces

# Every kind of whitespace and script: a model that gives this back unchanged gives every text back unchanged.
PROBE = (
    "if x:\n\n    y =\t1  # a  b\r\n",
    " \n leading",
    "trailing \n ",
    "\n\n\n",
    "\u2581a\u2581 b\u2581",
    "é 日本 \U0001f600 \u00a0\u2028\u0085\x00\x1c",
)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model; fairseq's symbols are its pieces.

    Whitespace inside a piece is written in byte notation (``<0x0A>``), since a dict.txt cannot hold it; pieces without
    any are the symbols that fairseq's own ``--bpe sentencepiece`` uses.

    Args:
        model: Path of the model file.
        symbols: Symbols of an existing dictionary; if None, the pieces in their order.
        allow_lossy: If true, accept a model that does not give every text back.

    Raises:
        InputError: The model cannot be loaded, does not fit the dictionary, or loses text.
    """

    kind = "sentencepiece"
    FILE = "sentencepiece.model"

    def __init__(self, model: Path, symbols: Sequence[str] | None = None, allow_lossy: bool = False):
        import sentencepiece

        try:
            proto = model.read_bytes()
            processor = sentencepiece.SentencePieceProcessor(model_proto=proto)
        except (OSError, RuntimeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not a sentencepiece model"
            raise InputError(f"--tokenizer {model} cannot be loaded: {reason}") from None
        self._processor = processor
        self._pieces = SentencePieces(processor)
        usable = self._pieces.text_pieces
        names = [self._pieces.names[piece] for piece in usable]
        if symbols is None:
            symbols = names
            if len(set(names)) != len(names) or set(names) & set(SPECIALS):
                raise InputError(f"--tokenizer {model} has pieces that a fairseq dictionary cannot tell apart")
        super().__init__(symbols, {self.FILE: model}, proto)
        index = symbol_ids(names, self.symbols, str(model))
        self._to_id = np.full(processor.vocab_size(), UNK, dtype=np.int32)  # (pieces,) fairseq id
        self._to_id[usable] = [index[name] for name in names]
        self._to_piece = np.full(len(self), -1, dtype=np.int64)  # (dictionary,) sentencepiece id
        self._to_piece[self._to_id[usable]] = usable
        self._check(model, allow_lossy)

    def _check(self, model: Path, allow_lossy: bool) -> None:
        """Set ``lossless``, and refuse a model that loses text unless this is accepted."""
        for text in PROBE:
            decoded = self.decode(self.encode_array(text))
            if decoded != text:
                self.lossless = False
                if not allow_lossy:
                    raise InputError(
                        f"--tokenizer {model} does not give text back as it was ({text!r} became {decoded!r}): train "
                        "one with --tokenizer sentencepiece, or accept the loss with --allow-lossy-tokenizer"
                    )

    def encode_array(self, text: str) -> np.ndarray:
        return self._to_id[self._pieces.encode(text)]

    def decode(self, ids: Iterable[int]) -> str:
        ids = np.asarray(list(ids), dtype=np.int64)
        text = []
        pieces: list[int] = []
        for token, piece in zip(ids.tolist(), self._to_piece[ids].tolist()):
            if piece >= 0:
                pieces.append(piece)
            elif token == UNK:
                text += [self._processor.decode(pieces), "<unk>"]
                pieces = []
        return "".join(text) + self._processor.decode(pieces)

"""Text as the tokens that a model knows, and where in the text each of them lies."""

from typing import Callable, Optional

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor

from ...text import decode_text, encode_text, find_bpe, token_texts

_NEWLINE = "<0x0A>", "\u010a"  # as the pieces of sentencepiece and of GPT-2 spell it


class Tokenizer:
    """A fairseq dictionary with the BPE that belongs to it: sentencepiece, GPT-2's, or none (words between spaces).

    Args:
        dictionary: of the tokens.
        bpe: fairseq's; None where the dictionary has words.
    """

    def __init__(self, dictionary: Dictionary, bpe=None):
        self.dictionary, self.bpe = dictionary, bpe
        # A model that puts a space before every text would see two where a text goes on with one.
        self._adds_space = hasattr(bpe, "sp") and bpe.sp.encode("x", out_type=str)[0].startswith("\u2581")

    @classmethod
    def load(cls, directory: str, dictionary: Dictionary) -> "Tokenizer":
        """With the files of a data directory: ``sentencepiece.model``, or ``encoder.json`` and ``vocab.bpe``."""
        return cls(dictionary, find_bpe(directory))

    @property
    def eos(self) -> int:
        return self.dictionary.eos()

    def encode(self, text: str) -> Tensor:
        """Tokens of a text, shape (length,), int64, without an end-of-sentence; none where there is no text."""
        if not text or (self.bpe is None and not text.split()):
            return torch.zeros(0, dtype=torch.int64)
        return encode_text(text, self.dictionary, self.bpe)

    def encode_continuation(self, text: str) -> Tensor:
        """Tokens of a text that goes on where another ends: as :meth:`encode`, but a space before it counts once."""
        return self.encode(text[1:] if self._adds_space and text.startswith(" ") else text)

    def decode(self, tokens: Tensor) -> str:
        """The text of tokens (length,); end-of-sentence and padding have none."""
        return decode_text(tokens, self.dictionary, self.bpe) if len(tokens) else ""

    def ends(self, text: str, tokens: Tensor) -> Optional[np.ndarray]:
        """Where in a text each of its tokens ends, in characters, shape (length,), int64.

        None where the tokens do not give the text back, as those of a tokenizer that normalises it.
        """
        texts = token_texts(tokens, self.dictionary, self.bpe)
        if "".join(texts) != text:
            return None
        return np.cumsum([len(piece) for piece in texts], dtype=np.int64)

    def line_ends(self) -> Tensor:
        """Symbols whose text begins with a newline, shape (n,), int64."""
        return self._symbols(lambda piece: piece is not None and piece.startswith(_NEWLINE))

    def silent(self) -> Tensor:
        """Symbols that stand for no text, shape (n,), int64: special ones, and those that fill up the dictionary.

        End-of-sentence is not among them.
        """
        found = self._symbols(lambda piece: piece is None)
        return found[found != self.eos]

    def _symbols(self, wanted: Callable[[Optional[str]], bool]) -> Tensor:
        """Numbers of symbols by their piece, as the BPE spells it; None for those of which it has none."""
        special = self.dictionary.nspecial
        pieces = [None] * special + self.dictionary.symbols[special:]
        if hasattr(getattr(self.bpe, "bpe", None), "decoder"):  # GPT-2's, whose symbols are numbers
            known = self.bpe.bpe.decoder
            pieces = [known.get(int(piece)) if piece is not None and piece.isdigit() else None for piece in pieces]
        return torch.tensor([number for number, piece in enumerate(pieces) if wanted(piece)], dtype=torch.int64)

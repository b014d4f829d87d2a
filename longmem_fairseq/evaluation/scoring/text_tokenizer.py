"""Text to the tokens of a model and back, and the place of each token in the text."""

from functools import cached_property
from typing import Callable, List, Optional, Sequence

import numpy as np
import torch
from fairseq.data import Dictionary
from torch import Tensor

from ...data.text_meter import TextMeter, TextSize
from ...text import decode_text, encode_text, find_bpe, text_codec, token_texts


class TextTokenizer:
    """A fairseq dictionary with its BPE: Hugging Face's, sentencepiece, GPT-2's, or none (words between spaces).

    Args:
        dictionary: Dictionary of the model.
        bpe: fairseq BPE whose pieces the dictionary holds; None for a dictionary of words.

    Attributes:
        adds_space: Whether the BPE puts a space before every text.
        starts_texts: Whether the tokenizer itself puts a token before every text, as transformers applies it; None
            where the BPE does not tell.
    """

    def __init__(self, dictionary: Dictionary, bpe=None):
        self.dictionary, self.bpe = dictionary, bpe
        self._codec = text_codec(bpe)
        # A BPE that puts a space before every text would double the space that a continuation starts with.
        self.adds_space, self.starts_texts = self._codec.adds_space, self._codec.starts_texts

    @classmethod
    def load(cls, directory: str, dictionary: Dictionary) -> "TextTokenizer":
        """Load the BPE of a data directory.

        Args:
            directory: Path of a directory with ``tokenizer.json``, ``sentencepiece.model``, or ``encoder.json`` and
                ``vocab.bpe``; without these the dictionary has words.
            dictionary: Dictionary of the model.
        """
        return cls(dictionary, find_bpe(directory))

    @property
    def eos(self) -> int:
        """Token id of end-of-sentence."""
        return self.dictionary.eos()

    def encode(self, text: str) -> Tensor:
        """Return the token ids of a text, shape (length,), int64, without end-of-sentence; length 0 for no text."""
        if not text or (self.bpe is None and not text.split()):
            return torch.zeros(0, dtype=torch.int64)
        return encode_text(text, self.dictionary, self.bpe)

    def encode_continuation(self, text: str) -> Tensor:
        """Return the token ids of a text that continues another one.

        Differs from :meth:`encode` where the BPE adds a space before every text: a space at the start counts once.

        Args:
            text: Text of the continuation.

        Returns:
            Token ids, shape (length,), int64.
        """
        return self.encode(text[1:] if self.adds_space and text.startswith(" ") else text)

    def decode(self, tokens: Tensor) -> str:
        """Return the text of token ids, shape (length,); end-of-sentence and padding have no text."""
        return decode_text(tokens, self.dictionary, self.bpe) if len(tokens) else ""

    def ends(self, text: str, tokens: Tensor) -> Optional[np.ndarray]:
        """Find where each token ends in its text.

        Args:
            text: Text that was encoded.
            tokens: Token ids of the text, shape (length,), int64.

        Returns:
            End of each token in characters, shape (length,), int64; None if the tokens do not give the text back, for
            example because the tokenizer normalizes it.
        """
        texts = token_texts(tokens, self.dictionary, self.bpe)
        if "".join(texts) != text:
            return None
        return np.cumsum([len(piece) for piece in texts], dtype=np.int64)

    def measure(self, pieces: Sequence[Tensor], continues: bool = False) -> Optional[List[TextSize]]:
        """Measure the text of tokens.

        Args:
            pieces: Token ids of the consecutive pieces of a text, each of shape (length,), int64.
            continues: If true, the text continues another one.

        Returns:
            Words and bytes of each piece; None where the tokenizer does not tell them.
        """
        return None if self._meter is None else self._meter.measure(pieces, continues)

    @cached_property
    def _meter(self) -> Optional[TextMeter]:
        try:
            return TextMeter(self.dictionary, self.bpe)
        except ValueError:
            return None

    def line_ends(self) -> Tensor:
        """Return the token ids whose text starts with a newline, shape (n,), int64."""
        return self._numbers(self._codec.starts_line)

    def silent(self) -> Tensor:
        """Return the token ids that stand for no text, shape (n,), int64, except end-of-sentence.

        These are the special symbols and those that only pad the dictionary.
        """
        special = [number for number in range(self.dictionary.nspecial) if number != self.eos]
        padding = self._numbers(lambda symbol: not self._codec.is_text(symbol))
        return torch.cat([torch.tensor(special, dtype=torch.int64), padding])

    def _numbers(self, condition: Callable[[str], bool]) -> Tensor:
        """Return the token ids, special ones left out, whose symbol meets a condition."""
        special, symbols = self.dictionary.nspecial, self.dictionary.symbols
        numbers = [number for number in range(special, len(symbols)) if condition(symbols[number])]
        return torch.tensor(numbers, dtype=torch.int64)

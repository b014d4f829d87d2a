"""UTF-8 bytes and words of the text that tokens stand for: units that do not depend on a tokenizer."""

import codecs
import math
from typing import Dict, Iterable, List, NamedTuple, Optional, Sequence

import numpy as np
from fairseq.data import Dictionary

from ..text import TOKENIZER_FILES, find_bpe, text_codec


class TextSize(NamedTuple):
    """Size of a text.

    Attributes:
        words: Number of words, which whitespace separates.
        bytes: Number of bytes in UTF-8.
    """

    words: int
    bytes: int


def figures_by_text(loss: float, size: Optional[TextSize]) -> Dict[str, Optional[float]]:
    """Return the figures of a text that do not depend on the tokenizer.

    Args:
        loss: Negative log-likelihood of all tokens of the text, nats.
        size: Size of the text, None where it is not known.

    Returns:
        ``perplexity_per_word`` and ``bits_per_byte``, None where the text has no words or bytes, or is not known.
    """
    words, size_in_bytes = (0, 0) if size is None else size
    return {
        "perplexity_per_word": math.exp(min(loss / words, 700.0)) if words else None,  # above it, infinite
        "bits_per_byte": loss / math.log(2) / size_in_bytes if size_in_bytes else None,
    }


class TextMeter:
    """Measure the text of tokens.

    Args:
        dictionary: Dictionary of the tokens.
        bpe: fairseq's BPE.

    Raises:
        ValueError: The BPE does not define the bytes of single tokens, as in a dictionary of words.
    """

    def __init__(self, dictionary: Dictionary, bpe):
        codec = text_codec(bpe)
        symbol_bytes = codec.symbol_bytes
        self._bytes = [symbol_bytes.get(symbol) for symbol in dictionary.symbols]  # None: not text
        self._bytes[dictionary.eos()] = b""
        self._adds_space = codec.adds_space

    def measure(self, pieces: Iterable[Sequence[int]], continues: bool = False) -> Optional[List[TextSize]]:
        """Measure the pieces of a text.

        Args:
            pieces: Token ids of the consecutive pieces; an end-of-sentence has no text.
            continues: If true, the text continues another one, so that a space that the BPE puts before every text is a
                part of it.

        Returns:
            Size of each piece, of which the sums are those of the whole text: a word counts where it starts. None if a
            token stands for unknown text, such as ``<unk>``.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        added_space, in_word, sizes = self._adds_space and not continues, False, []
        for piece in pieces:
            parts = [self._bytes[token] for token in np.asarray(piece).tolist()]
            if None in parts:
                return None
            data = b"".join(parts)
            if data and added_space:
                data, added_space = data[data.startswith(b" ") :], False
            text = decoder.decode(data)
            words = len(text.split()) - (in_word and bool(text) and not text[0].isspace())
            in_word = not text[-1].isspace() if text else in_word
            sizes.append(TextSize(words, len(data)))
        return sizes


def measure_text(tokens: Sequence[int], dictionary: Dictionary, bpe, continues: bool = False) -> Optional[TextSize]:
    """Measure the text of tokens.

    Args:
        tokens: Token ids of the text.
        dictionary: Dictionary of the tokens.
        bpe: fairseq's BPE, or None.
        continues: If true, the text continues another one.

    Returns:
        Size of the text; None where the tokens do not tell it.
    """
    try:
        sizes = TextMeter(dictionary, bpe).measure([tokens], continues)
    except ValueError:
        return None
    return None if sizes is None else sizes[0]


def find_meter(directories: Sequence[str], dictionary: Dictionary) -> TextMeter:
    """Build the meter of the tokenizer in data directories.

    Args:
        directories: Paths of data directories that share a tokenizer.
        dictionary: Dictionary of the data.

    Raises:
        ValueError: No directory has a tokenizer, or it does not define the bytes of single tokens.
    """
    for directory in directories:
        bpe = find_bpe(directory)
        if bpe is not None:
            return TextMeter(dictionary, bpe)
    raise ValueError(f"the data directory has no tokenizer ({', '.join(TOKENIZER_FILES)})")

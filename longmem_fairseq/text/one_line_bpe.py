"""BPEs whose texts are lines, as in the prompts and answers of fairseq's commands, and the codec of each BPE."""

from functools import lru_cache
from typing import Type

from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE

from .gpt2_text import Gpt2Text
from .huggingface_bpe import HuggingFaceBPE
from .huggingface_text import HuggingFaceText
from .sentencepiece_text import SentencePieceText
from .text_codec import TextCodec
from .words_text import WordsText

_CODECS = {SentencepieceBPE: SentencePieceText, GPT2BPE: Gpt2Text, HuggingFaceBPE: HuggingFaceText}
# Spelling of the line ends in the lines that fairseq's commands read and print.
_LINE_ENDS = {"\n": "<0x0A>", "\r": "<0x0D>"}


def text_codec(bpe) -> TextCodec:
    """Choose the codec of a BPE.

    Args:
        bpe: fairseq's BPE, an :class:`OneLineBPE`, or None for a dictionary of words.

    Returns:
        The codec of its kind.
    """
    if isinstance(bpe, OneLineBPE):
        return bpe.codec
    for kind, codec in _CODECS.items():
        if isinstance(bpe, kind):
            return _make_codec(codec, bpe)
    return WordsText(bpe)


@lru_cache(maxsize=8)  # the bytes of a large vocabulary take a while to collect
def _make_codec(codec: Type[TextCodec], bpe) -> TextCodec:
    return codec(bpe)


class OneLineBPE:
    """A BPE for fairseq's commands, whose prompts and answers are lines: a newline in one is written ``<0x0A>``.

    Without it a newline ends a prompt, and sentencepiece's pieces of bytes and newlines are printed by their names. All
    other whitespace is kept, since an answer continues its prompt; a carriage return is written ``<0x0D>``.

    Args:
        bpe: fairseq's BPE, of a kind that defines the text of single tokens; all other attributes of this object are
            those of this BPE.

    Raises:
        ValueError: The BPE is of another kind.
    """

    def __init__(self, bpe):
        self.inner, self.codec = bpe, text_codec(bpe)
        self.codec.symbol_bytes  # noqa: B018  (refuses another kind)

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def encode(self, line: str) -> str:
        """Encode a line.

        Args:
            line: Text with line ends written as ``<0x0A>`` and ``<0x0D>``.

        Returns:
            Symbols between spaces.
        """
        return " ".join(self.codec.encode(of_line(line)))

    def decode(self, symbols: str) -> str:
        """Decode a line of symbols.

        Args:
            symbols: Symbols between spaces.

        Returns:
            Text with line ends written as ``<0x0A>`` and ``<0x0D>``.
        """
        return in_line("".join(self.codec.texts(symbols.split())))


def in_line(text: str) -> str:
    """Spell a text in the lines that fairseq's commands read and print: line ends are ``<0x0A>`` and ``<0x0D>``."""
    for char, spelling in _LINE_ENDS.items():
        text = text.replace(char, spelling)
    return text


def of_line(line: str) -> str:
    """Return the text that :func:`in_line` spells."""
    for char, spelling in _LINE_ENDS.items():
        line = line.replace(spelling, char)
    return line


def one_line(bpe):
    """Wrap a BPE for fairseq's commands, if its kind defines the text of single tokens.

    Args:
        bpe: fairseq's BPE, or None.

    Returns:
        An :class:`OneLineBPE`, or ``bpe`` itself.
    """
    return OneLineBPE(bpe) if text_codec(bpe).has_token_bytes else bpe

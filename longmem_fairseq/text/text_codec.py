"""The contract of codecs: text as symbols of a dictionary, for one kind of BPE."""

import codecs
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple


class TextCodec(ABC):
    """Text as symbols of a dictionary, for one kind of BPE.

    Args:
        bpe: fairseq's BPE, or None.

    Attributes:
        adds_space: Whether the BPE puts a space before every text that it encodes.
        starts_texts: Whether transformers puts a token before every text; None where that is not known.
        complete: Whether a dictionary without one of the symbols that a text is encoded to does not belong to the BPE.
    """

    adds_space = False
    starts_texts: Optional[bool] = None
    complete = False

    def __init__(self, bpe):
        self.bpe = bpe

    @abstractmethod
    def encode(self, text: str) -> List[str]:
        """Split a text into symbols.

        Args:
            text: Text of any number of lines.
        """

    @abstractmethod
    def decode(self, symbols: Sequence[str]) -> str:
        """Join symbols to a text; the inverse of :meth:`encode`.

        Args:
            symbols: Symbols of the dictionary.
        """

    def recipe(self) -> Tuple[Callable, Tuple]:
        """Return a function and its arguments that make the BPE again; unlike some BPEs they can be pickled."""
        return _same, (self.bpe,)

    @cached_property
    @abstractmethod
    def symbol_bytes(self) -> Dict[str, bytes]:
        """Bytes of text that each symbol stands for (UTF-8, perhaps a part of a character); others are not text.

        Raises:
            ValueError: The BPE does not define them.
        """

    @property
    def has_token_bytes(self) -> bool:
        """Return whether :attr:`symbol_bytes` is defined, so that every text, also of many lines, is one line."""
        return True

    def is_text(self, symbol: str) -> bool:
        """Return whether a symbol stands for text.

        Args:
            symbol: Symbol of the dictionary.
        """
        return symbol in self.symbol_bytes

    def starts_line(self, symbol: str) -> bool:
        """Return whether a symbol's text starts with a newline.

        Args:
            symbol: Symbol of the dictionary.
        """
        return self.symbol_bytes.get(symbol, b"").startswith(b"\n")

    def texts(self, symbols: Sequence[str]) -> List[str]:
        """Decode symbols one by one.

        Args:
            symbols: Symbols of the dictionary.

        Returns:
            The text that each symbol adds. A character that several symbols share belongs to the last of them; a symbol
            that is not text is its own name.
        """
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        texts = [decoder.decode(self.symbol_bytes.get(symbol, symbol.encode())) for symbol in symbols]
        if texts:
            texts[-1] += decoder.decode(b"", final=True)
        return texts


def _same(bpe: Any) -> Any:
    return bpe

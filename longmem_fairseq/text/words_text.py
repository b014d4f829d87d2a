"""Text in words, or in the symbols of a BPE that is known only as fairseq's commands use it."""

from functools import cached_property
from typing import Dict, List, Sequence

from fairseq import tokenizer as words

from .text_codec import TextCodec


class WordsText(TextCodec):
    """Words between spaces, without a BPE or as any other BPE of fairseq spells a line."""

    def encode(self, text: str) -> List[str]:
        return words.tokenize_line(text if self.bpe is None else self.bpe.encode(text))

    def decode(self, symbols: Sequence[str]) -> str:
        line = " ".join(symbols)
        return line if self.bpe is None else self.bpe.decode(line)

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        raise ValueError(
            f"{type(self.bpe).__name__} does not define the text of single tokens: use sentencepiece, GPT-2's BPE or "
            "a tokenizer.json"
        )

    @property
    def has_token_bytes(self) -> bool:
        return False

    def is_text(self, symbol: str) -> bool:
        return True

    def starts_line(self, symbol: str) -> bool:
        return False

    def texts(self, symbols: Sequence[str]) -> List[str]:
        if self.bpe is not None:
            return super().texts(symbols)
        return [f"{symbol} " for symbol in symbols[:-1]] + list(symbols[-1:])

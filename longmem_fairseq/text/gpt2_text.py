"""Text in the symbols of GPT-2's byte-level BPE."""

from functools import cached_property
from typing import Dict, List, Sequence

from .text_codec import TextCodec


class Gpt2Text(TextCodec):
    """Text in the numbers of GPT-2's byte-level BPE."""

    def encode(self, text: str) -> List[str]:
        return self.bpe.encode(text).split()

    def decode(self, symbols: Sequence[str]) -> str:
        # fairseq's own method fails for symbols that are not in the BPE, such as the dictionary's madeupword0000.
        text = b"".join(self.symbol_bytes.get(symbol, symbol.encode()) for symbol in symbols)
        return text.decode("utf-8", errors="replace")

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        encoder = self.bpe.bpe
        return {
            str(number): bytes(encoder.byte_decoder[char] for char in piece)
            for number, piece in encoder.decoder.items()
        }

"""Text in the symbols of GPT-2's byte-level BPE."""

from functools import cached_property
from typing import Callable, Dict, List, Sequence, Tuple

from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from fairseq.data.encoders.gpt2_bpe_utils import Encoder

from .text_codec import TextCodec


class Gpt2Text(TextCodec):
    """Text in the numbers of GPT-2's byte-level BPE."""

    def encode(self, text: str) -> List[str]:
        return self.bpe.encode(text).split()

    def decode(self, symbols: Sequence[str]) -> str:
        # fairseq's own method fails for symbols that are not in the BPE, such as the dictionary's madeupword0000.
        text = b"".join(self.symbol_bytes.get(symbol, symbol.encode()) for symbol in symbols)
        return text.decode("utf-8", errors="replace")

    def recipe(self) -> Tuple[Callable, Tuple]:
        encoder = self.bpe.bpe  # which refers to a module, so it cannot be pickled
        return _gpt2_bpe, (encoder.encoder, list(encoder.bpe_ranks), encoder.errors)

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        encoder = self.bpe.bpe
        return {
            str(number): bytes(encoder.byte_decoder[char] for char in piece)
            for number, piece in encoder.decoder.items()
        }


def _gpt2_bpe(encoder: Dict[str, int], merges: List[Tuple[str, str]], errors: str) -> GPT2BPE:
    """Return fairseq's GPT-2 BPE without reading its files."""
    bpe = GPT2BPE.__new__(GPT2BPE)
    bpe.bpe = Encoder(encoder, merges, errors)
    return bpe

"""Text in the pieces of a sentencepiece model."""

from functools import cached_property
from typing import Dict, List, Sequence

from .sentence_pieces import SentencePieces
from .text_codec import TextCodec


class SentencePieceText(TextCodec):
    """Text in the pieces of a sentencepiece model, split as preprocessing does.

    fairseq's own method joins the pieces by spaces, in which those with a newline in them would be lost.

    Args:
        bpe: fairseq's sentencepiece BPE.
    """

    def __init__(self, bpe):
        super().__init__(bpe)
        self._pieces = SentencePieces(bpe.sp)

    @property
    def adds_space(self) -> bool:
        return self._pieces.adds_space

    def encode(self, text: str) -> List[str]:
        return [self._pieces.names[piece] for piece in self._pieces.encode(text)]

    def decode(self, symbols: Sequence[str]) -> str:
        return self._pieces.decode(symbols)

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        pieces = self._pieces
        return {pieces.names[piece]: pieces.piece_bytes(piece) for piece in pieces.text_pieces}

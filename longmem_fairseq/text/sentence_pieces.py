"""A sentencepiece model in the spelling of a fairseq dictionary, used by everything that encodes.

This module needs neither torch nor fairseq, so that the worker processes of preprocessing start at once.
"""

from functools import cached_property
from typing import Dict, List, Sequence

_SPACE = "\u2581"  # stands for a space inside a piece


class SentencePieces:
    """The pieces of a model, their names in a dictionary, and the texts that they stand for.

    Args:
        processor: The ``SentencePieceProcessor``.
    """

    def __init__(self, processor):
        self.processor = processor
        # The pieces that the model puts before every text (a dummy prefix), with a byte that does not join them.
        self._anchor = len(processor.encode("\x00"))
        pieces = [processor.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]
        # The sign that stands for a space has to be spelled in bytes where a text contains it.
        self._space_sign = pieces if all(map(processor.is_byte, pieces)) else None

    @cached_property
    def names(self) -> List[str]:
        """Names of the pieces: as fairseq's ``--bpe sentencepiece``, but whitespace as bytes (``<0x0A>``).

        A dict.txt cannot hold whitespace.
        """
        return [_visible(self.processor.id_to_piece(piece)) for piece in range(self.processor.get_piece_size())]

    @cached_property
    def text_pieces(self) -> List[int]:
        """Numbers of the pieces that stand for text."""
        sp = self.processor
        return [i for i in range(sp.get_piece_size()) if not (sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i))]

    @property
    def adds_space(self) -> bool:
        """Return whether the model puts a space before every text."""
        return self.processor.encode("x", out_type=str)[0].startswith(_SPACE)

    def encode(self, text: str) -> List[int]:
        """Split a text into pieces.

        Args:
            text: Text of any length.

        Returns:
            Numbers of the pieces.
        """
        if self._space_sign is None or _SPACE not in text:
            return self.processor.encode(text)
        first, *others = text.split(_SPACE)
        pieces = self.processor.encode(first) if first else []
        for other in others:
            # What follows is encoded without the space that some models put before a text.
            pieces += [*self._space_sign, *self.processor.encode(f"\x00{other}")[self._anchor :]]
        return pieces

    def decode(self, symbols: Sequence[str]) -> str:
        """Join pieces to a text.

        Args:
            symbols: Names of the pieces; a name that is not one of a piece is its own text.

        Returns:
            The text.
        """
        return self.processor.decode([self._pieces_by_name.get(symbol, symbol) for symbol in symbols])

    @cached_property
    def _pieces_by_name(self) -> Dict[str, str]:
        return {name: self.processor.id_to_piece(piece) for piece, name in enumerate(self.names)}

    def piece_bytes(self, piece: int) -> bytes:
        """Return the bytes of text that a piece stands for.

        Args:
            piece: Number of the piece.
        """
        name = self.processor.id_to_piece(piece)
        if self.processor.is_byte(piece):
            return bytes([int(name[3:5], 16)])  # <0x0A>
        return name.replace(_SPACE, " ").encode()


def _visible(piece: str) -> str:
    """Write each whitespace character of a piece as its UTF-8 bytes."""
    if not any(map(str.isspace, piece)):
        return piece
    return "".join("".join(f"<0x{byte:02X}>" for byte in char.encode()) if char.isspace() else char for char in piece)

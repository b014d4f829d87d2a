"""Text to tokens and back, by fairseq's dictionary and BPE.

A :class:`TextCodec` knows one kind of BPE: how it spells a text in the symbols of a dictionary, and which bytes of text
each symbol stands for.
"""

import codecs
import os
import sys
from abc import ABC, abstractmethod
from functools import cached_property, lru_cache
from typing import Dict, List, Sequence, Type

import torch
from fairseq import tokenizer as words
from fairseq.data import Dictionary, encoders
from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from omegaconf import OmegaConf
from torch import Tensor

_NEWLINE = "<0x0A>"  # spelling of a newline in the lines that fairseq's commands read and print


class TextCodec(ABC):
    """Text as symbols of a dictionary, for one kind of BPE.

    Args:
        bpe: fairseq's BPE, or None.

    Attributes:
        lossless: Whether every text, its newlines included, can be decoded from its symbols.
        adds_space: Whether the BPE puts a space before every text that it encodes.
    """

    lossless = True
    adds_space = False

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

    @cached_property
    @abstractmethod
    def symbol_bytes(self) -> Dict[str, bytes]:
        """Bytes of text that each symbol stands for (UTF-8, perhaps a part of a character); others are not text.

        Raises:
            ValueError: The BPE does not define them.
        """

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


class SentencePieceText(TextCodec):
    """Text in the pieces of a sentencepiece model."""

    @property
    def adds_space(self) -> bool:
        return self.bpe.sp.encode("x", out_type=str)[0].startswith("\u2581")

    def encode(self, text: str) -> List[str]:
        # fairseq's own method joins the pieces by spaces, in which those with a newline in them would be lost.
        return [_visible(piece) for piece in self.bpe.sp.encode(text, out_type=str)]

    def decode(self, symbols: Sequence[str]) -> str:
        return self.bpe.sp.decode([self._pieces.get(symbol, symbol) for symbol in symbols])

    @cached_property
    def _pieces(self) -> Dict[str, str]:
        sp = self.bpe.sp
        return {_visible(piece): piece for piece in map(sp.id_to_piece, range(sp.get_piece_size()))}

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        sp = self.bpe.sp
        numbers = [i for i in range(sp.get_piece_size()) if not (sp.is_control(i) or sp.is_unknown(i))]
        return {_visible(sp.id_to_piece(i)): self._piece_bytes(i) for i in numbers}

    def _piece_bytes(self, number: int) -> bytes:
        piece = self.bpe.sp.id_to_piece(number)
        if self.bpe.sp.is_byte(number):
            return bytes([int(piece[3:5], 16)])  # <0x0A>
        return piece.replace("\u2581", " ").encode()


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


class WordsText(TextCodec):
    """Words between spaces, without a BPE or as any other BPE of fairseq spells a line."""

    lossless = False

    def encode(self, text: str) -> List[str]:
        return words.tokenize_line(text if self.bpe is None else self.bpe.encode(text))

    def decode(self, symbols: Sequence[str]) -> str:
        line = " ".join(symbols)
        return line if self.bpe is None else self.bpe.decode(line)

    @cached_property
    def symbol_bytes(self) -> Dict[str, bytes]:
        raise ValueError(
            f"{type(self.bpe).__name__} does not define the text of single tokens: use sentencepiece or GPT-2's BPE"
        )

    def is_text(self, symbol: str) -> bool:
        return True

    def starts_line(self, symbol: str) -> bool:
        return False

    def texts(self, symbols: Sequence[str]) -> List[str]:
        if self.bpe is not None:
            return super().texts(symbols)
        return [f"{symbol} " for symbol in symbols[:-1]] + list(symbols[-1:])


_CODECS = {SentencepieceBPE: SentencePieceText, GPT2BPE: Gpt2Text}


@lru_cache(maxsize=8)
def _kept(codec: Type[TextCodec], bpe) -> TextCodec:
    """Return the codec of a BPE, always the same one: it has tables as long as the vocabulary."""
    return codec(bpe)


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
            return _kept(codec, bpe)
    return WordsText(bpe)


def encode_text(text: str, dictionary: Dictionary, bpe=None, tokenizer=None) -> Tensor:
    """Encode a text.

    Args:
        text: Text of any number of lines.
        dictionary: Dictionary of the tokens.
        bpe: fairseq's BPE as its commands build it, or None for a dictionary of words.
        tokenizer: fairseq's tokenizer, which is applied before the BPE, or None.

    Returns:
        Token ids without an end-of-sentence, shape (length,), int64.

    Raises:
        ValueError: The text has no tokens.
    """
    if tokenizer is not None:
        text = tokenizer.encode(text)
    ids = [dictionary.index(symbol) for symbol in text_codec(bpe).encode(text)]
    if not ids:
        raise ValueError("the text is empty")
    return torch.tensor(ids, dtype=torch.int64)


def decode_text(tokens: Tensor, dictionary: Dictionary, bpe=None, tokenizer=None) -> str:
    """Decode tokens; the inverse of :func:`encode_text`.

    Args:
        tokens: Token ids, shape (length,), int64; end-of-sentence and padding are left out.
        dictionary: Dictionary of the tokens.
        bpe: fairseq's BPE, or None for a dictionary of words.
        tokenizer: fairseq's tokenizer, which is applied after the BPE, or None.

    Returns:
        The text.
    """
    symbols = [dictionary[token] for token in tokens.tolist() if token not in (dictionary.eos(), dictionary.pad())]
    text = text_codec(bpe).decode(symbols)
    return text if tokenizer is None else tokenizer.decode(text)


def token_texts(tokens: Tensor, dictionary: Dictionary, bpe=None) -> List[str]:
    """Decode tokens one by one.

    Args:
        tokens: Token ids, shape (length,), int64.
        dictionary: Dictionary of the tokens.
        bpe: fairseq's BPE, or None for a dictionary of words.

    Returns:
        The text that each token adds; joined they are :func:`decode_text`. A character that several tokens share
        belongs to the last of them, the others are empty. A token that is not text, such as end-of-sentence, is its
        name.

    Raises:
        ValueError: The BPE is neither sentencepiece nor GPT-2's.
    """
    texts = text_codec(bpe).texts([dictionary[token] for token in tokens.tolist()])
    if texts and texts[0].startswith(" ") and "".join(texts)[1:] == decode_text(tokens, dictionary, bpe):
        texts[0] = texts[0][1:]  # sentencepiece may have put a space before the text
    return texts


class OneLineBPE:
    """A BPE for fairseq's commands, whose prompts and answers are lines: a newline in one is written ``<0x0A>``.

    Without it a newline ends a prompt, and sentencepiece's pieces of bytes and newlines are printed by their names.

    Args:
        bpe: fairseq's sentencepiece or GPT-2 BPE; all other attributes of this object are those of this BPE.

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
            line: Text with newlines written as ``<0x0A>``.

        Returns:
            Symbols between spaces.
        """
        return " ".join(self.codec.encode(of_line(line)))

    def decode(self, symbols: str) -> str:
        """Decode a line of symbols.

        Args:
            symbols: Symbols between spaces.

        Returns:
            Text with newlines written as ``<0x0A>``.
        """
        return in_line("".join(self.codec.texts(symbols.split())).strip())


def in_line(text: str) -> str:
    """Spell a text in the lines that fairseq's commands read and print: a newline is written ``<0x0A>``."""
    return text.replace("\n", _NEWLINE)


def of_line(line: str) -> str:
    """Return the text that :func:`in_line` spells."""
    return line.replace(_NEWLINE, "\n")


def one_line(bpe):
    """Wrap a BPE for fairseq's commands, if its kind supports it.

    Args:
        bpe: fairseq's BPE, or None.

    Returns:
        An :class:`OneLineBPE`, or ``bpe`` itself.
    """
    return OneLineBPE(bpe) if text_codec(bpe).lossless else bpe


def _visible(piece: str) -> str:
    """Spell a piece as the dictionary does: whitespace, which dict.txt cannot hold, as bytes (``<0x0A>``)."""
    return "".join("".join(f"<0x{byte:02X}>" for byte in char.encode()) if char.isspace() else char for char in piece)


def find_bpe(directory: str):
    """Build the BPE of a data directory.

    Args:
        directory: Path of the directory; it may contain ``sentencepiece.model``, or ``encoder.json`` and
            ``vocab.bpe`` of GPT-2.

    Returns:
        fairseq's BPE, or None where there are no such files.
    """
    sentencepiece, *gpt2 = (
        os.path.join(directory, name) for name in ("sentencepiece.model", "encoder.json", "vocab.bpe")
    )
    if os.path.isfile(sentencepiece):
        return encoders.build_bpe(OmegaConf.create({"_name": "sentencepiece", "sentencepiece_model": sentencepiece}))
    if all(map(os.path.isfile, gpt2)):
        options = {"_name": "gpt2", "gpt2_encoder_json": gpt2[0], "gpt2_vocab_bpe": gpt2[1]}
        return encoders.build_bpe(OmegaConf.create(options))
    return None


def read_text(path: str) -> str:
    """Read a UTF-8 text.

    Args:
        path: Path of the file, or ``-`` for standard input.

    Returns:
        The text.

    Raises:
        ValueError: The file is not UTF-8.
        OSError: The file cannot be read.
    """
    if path == "-":
        data = sys.stdin.buffer.read()
    else:
        with open(path, "rb") as file:
            data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text (byte {error.start})") from error

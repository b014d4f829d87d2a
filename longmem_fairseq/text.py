"""Text as tokens, and tokens as text."""

import codecs
import os
import sys
from typing import Dict, List, Sequence

import torch
from fairseq.data import Dictionary, encoders
from omegaconf import OmegaConf
from torch import Tensor

_NEWLINE = "<0x0A>"  # how the lines that fairseq's commands read and print spell a newline


def encode_text(text: str, dictionary: Dictionary, bpe=None, tokenizer=None) -> Tensor:
    """Tokens of a text, shape (length,), int64, without an end-of-sentence.

    Args:
        text: of any number of lines.
        dictionary: of the tokens.
        bpe, tokenizer: fairseq's, as its commands build them.

    Raises:
        ValueError: there is nothing in it.
    """
    if tokenizer is not None:
        text = tokenizer.encode(text)
    if hasattr(bpe, "sp"):  # fairseq joins the pieces by spaces, in which those with a newline in them would be lost
        ids = [dictionary.index(_visible(piece)) for piece in bpe.sp.encode(text, out_type=str)]
        tokens = torch.tensor(ids, dtype=torch.int64)
    else:
        line = text if bpe is None else bpe.encode(text)
        tokens = dictionary.encode_line(line, append_eos=False, add_if_not_exist=False).long()
    if not len(tokens):
        raise ValueError("the text is empty")
    return tokens


def decode_text(tokens: Tensor, dictionary: Dictionary, bpe=None, tokenizer=None) -> str:
    """The text of tokens (length,), without end-of-sentence; the inverse of :func:`encode_text`."""
    symbols = [dictionary[token] for token in tokens.tolist() if token not in (dictionary.eos(), dictionary.pad())]
    if hasattr(bpe, "sp"):
        pieces = {_visible(piece): piece for piece in map(bpe.sp.id_to_piece, range(bpe.sp.get_piece_size()))}
        text = bpe.sp.decode([pieces.get(symbol, symbol) for symbol in symbols])
    else:
        line = " ".join(symbols)
        text = line if bpe is None else bpe.decode(line)
    return text if tokenizer is None else tokenizer.decode(text)


def token_texts(tokens: Tensor, dictionary: Dictionary, bpe=None) -> List[str]:
    """What each token (length,) adds to the text: end to end they are :func:`decode_text`, as far as there is one.

    A character that several tokens share the bytes of belongs to the last of them, the others are empty. Tokens that
    are no text, such as an end-of-sentence, keep their name.

    Raises:
        ValueError: the BPE is another one than sentencepiece and GPT-2's.
    """
    symbols = [dictionary[token] for token in tokens.tolist()]
    if bpe is None:
        return [f"{symbol} " for symbol in symbols[:-1]] + symbols[-1:]
    texts = _symbol_texts(symbols, _bytes_of_symbols(bpe))
    if texts and texts[0].startswith(" ") and "".join(texts)[1:] == decode_text(tokens, dictionary, bpe):
        texts[0] = texts[0][1:]  # sentencepiece may have put a space before the text
    return texts


class OneLineBPE:
    """A BPE for fairseq's commands, whose prompts and answers are lines: a newline in one is written ``<0x0A>``.

    Without it a newline ends a prompt, and sentencepiece's pieces of bytes and newlines are printed by their names.

    Args:
        bpe: fairseq's, sentencepiece or GPT-2's; anything else asked of this object is asked of it.
    """

    def __init__(self, bpe):
        self._bpe, self._bytes = bpe, _bytes_of_symbols(bpe)

    def __getattr__(self, name: str):
        return getattr(self._bpe, name)

    def encode(self, line: str) -> str:
        text = line.replace(_NEWLINE, "\n")
        if hasattr(self._bpe, "sp"):
            return " ".join(map(_visible, self._bpe.sp.encode(text, out_type=str)))
        return self._bpe.encode(text)

    def decode(self, symbols: str) -> str:
        return "".join(_symbol_texts(symbols.split(), self._bytes)).strip().replace("\n", _NEWLINE)


def one_line(bpe):
    """A BPE as :class:`OneLineBPE`, if it is of a kind that has one."""
    return OneLineBPE(bpe) if hasattr(bpe, "sp") or _is_gpt2(bpe) else bpe


def _is_gpt2(bpe) -> bool:
    return hasattr(getattr(bpe, "bpe", None), "byte_decoder")


def _bytes_of_symbols(bpe) -> Dict[str, bytes]:
    """What the dictionary's symbols stand for, those that are text."""
    if hasattr(bpe, "sp"):
        ids = (i for i in range(bpe.sp.get_piece_size()) if not (bpe.sp.is_control(i) or bpe.sp.is_unknown(i)))
        return {_visible(bpe.sp.id_to_piece(i)): _piece_bytes(bpe.sp, i) for i in ids}
    if _is_gpt2(bpe):
        return {str(i): bytes(bpe.bpe.byte_decoder[char] for char in piece) for i, piece in bpe.bpe.decoder.items()}
    raise ValueError(f"{type(bpe).__name__} cannot tell the text of single tokens: sentencepiece and GPT-2's can")


def _symbol_texts(symbols: Sequence[str], known: Dict[str, bytes]) -> List[str]:
    """The text of each symbol; one that is no text is its own name."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts = [decoder.decode(known.get(symbol, symbol.encode())) for symbol in symbols]
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
    return texts


def _piece_bytes(sp, piece: int) -> bytes:
    """The text of a piece of sentencepiece, by its number."""
    text = sp.id_to_piece(piece)
    return bytes([int(text[3:5], 16)]) if sp.is_byte(piece) else text.replace("\u2581", " ").encode()


def _visible(piece: str) -> str:
    """A piece as the dictionary has it: whitespace, which dict.txt cannot hold, as bytes (``<0x0A>``)."""
    return "".join("".join(f"<0x{byte:02X}>" for byte in char.encode()) if char.isspace() else char for char in piece)


def find_bpe(data: str):
    """fairseq's BPE for the model files in a data directory, None where there are none."""
    sentencepiece, *gpt2 = (os.path.join(data, name) for name in ("sentencepiece.model", "encoder.json", "vocab.bpe"))
    if os.path.isfile(sentencepiece):
        return encoders.build_bpe(OmegaConf.create({"_name": "sentencepiece", "sentencepiece_model": sentencepiece}))
    if all(map(os.path.isfile, gpt2)):
        options = {"_name": "gpt2", "gpt2_encoder_json": gpt2[0], "gpt2_vocab_bpe": gpt2[1]}
        return encoders.build_bpe(OmegaConf.create(options))
    return None


def read_text(path: str) -> str:
    """The text of a file, ``-`` for standard input.

    Raises:
        ValueError: it is no UTF-8.
        OSError: it cannot be read.
    """
    data = sys.stdin.buffer.read() if path == "-" else open(path, "rb").read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is no UTF-8 text (byte {error.start})") from error

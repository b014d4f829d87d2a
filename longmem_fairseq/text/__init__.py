"""Text to tokens and back, by fairseq's dictionary and BPE.

A :class:`TextCodec` knows one kind of BPE: how it spells a text in the symbols of a dictionary, and which bytes of text
each symbol stands for.
"""

from .bpe_files import TOKENIZER_FILES, find_bpe
from .encoding import decode_text, encode_text, token_texts
from .one_line_bpe import OneLineBPE, in_line, of_line, one_line, text_codec
from .text_codec import TextCodec
from .text_file import read_text

__all__ = [
    "TOKENIZER_FILES",
    "OneLineBPE",
    "TextCodec",
    "decode_text",
    "encode_text",
    "find_bpe",
    "in_line",
    "of_line",
    "one_line",
    "read_text",
    "text_codec",
    "token_texts",
]

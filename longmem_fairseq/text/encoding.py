"""Text to token ids and back, by fairseq's dictionary and BPE."""

from typing import List

import torch
from fairseq.data import Dictionary
from torch import Tensor

from .one_line_bpe import text_codec


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
        ValueError: The text has no tokens, or the dictionary does not belong to the BPE.
    """
    if tokenizer is not None:
        text = tokenizer.encode(text)
    codec = text_codec(bpe)
    symbols = codec.encode(text)
    if not symbols:
        raise ValueError("the text is empty")
    missing = next((symbol for symbol in symbols if symbol not in dictionary), None) if codec.complete else None
    if missing is not None:
        raise ValueError(
            f"the tokenizer's symbol {missing} is not in the dictionary of {len(dictionary):,} symbols: give the "
            "dict.txt that belongs to the tokenizer"
        )
    return torch.tensor([dictionary.index(symbol) for symbol in symbols], dtype=torch.int64)


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
        ValueError: The BPE does not define the text of single tokens.
    """
    texts = text_codec(bpe).texts([dictionary[token] for token in tokens.tolist()])
    if texts and texts[0].startswith(" ") and "".join(texts)[1:] == decode_text(tokens, dictionary, bpe):
        texts[0] = texts[0][1:]  # sentencepiece may have put a space before the text
    return texts

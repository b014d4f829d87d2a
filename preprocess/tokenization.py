"""Loading a tokenizer from its files: sentencepiece models, Hugging Face's tokenizers and GPT-2's byte-level BPE.

>>> tokenizer = load_tokenizer("data/sentencepiece.model")
>>> tokenizer.decode(tokenizer.encode("if x:\\n    return")) == "if x:\\n    return"
True
"""

from __future__ import annotations

import os
from pathlib import Path

from preprocess.dictionary import read_dictionary
from preprocess.errors import InputError
from preprocess.gpt2_tokenizer import GPT2Tokenizer
from preprocess.huggingface_tokenizer import HuggingFaceTokenizer
from preprocess.sentencepiece_tokenizer import SentencePieceTokenizer
from preprocess.tokenizer import Tokenizer
from preprocess.tokenizer_json import has_tokenizer


def load_tokenizer(
    tokenizer: str | os.PathLike,
    gpt2_encoder_json: str | os.PathLike | None = None,
    gpt2_vocab_bpe: str | os.PathLike | None = None,
    dictionary: str | os.PathLike | None = None,
    allow_lossy: bool = False,
) -> Tokenizer:
    """Load a tokenizer from its files.

    Args:
        tokenizer: Path of a sentencepiece model or of a ``tokenizer.json``, ``gpt2``, or path of a directory of a
            Hugging Face model or that binarize_documents wrote.
        gpt2_encoder_json: Path of GPT-2's encoder.json, for ``gpt2``.
        gpt2_vocab_bpe: Path of GPT-2's vocab.bpe, for ``gpt2``.
        dictionary: Path of a fairseq dict.txt to use; if None, the one in the directory, or one is made from the
            tokenizer.
        allow_lossy: If true, accept a sentencepiece model that does not give every text back.

    Returns:
        The tokenizer.

    Raises:
        InputError: A file is missing or of another format, or the tokenizer does not fit the dictionary.
    """
    path = Path(tokenizer)
    if str(tokenizer) != "gpt2" and path.is_dir():
        return _load_from_directory(path, dictionary)
    symbols = None if dictionary is None else read_dictionary(dictionary)
    if str(tokenizer) == "gpt2":
        if gpt2_encoder_json is None or gpt2_vocab_bpe is None:
            raise InputError("--tokenizer gpt2 needs local files: give --gpt2-encoder-json and --gpt2-vocab-bpe")
        return GPT2Tokenizer(Path(gpt2_encoder_json), Path(gpt2_vocab_bpe), symbols)
    if path.suffix == ".json":
        return HuggingFaceTokenizer(path, symbols)
    return SentencePieceTokenizer(path, symbols, allow_lossy)


def _load_from_directory(directory: Path, dictionary: str | os.PathLike | None) -> Tokenizer:
    """Load the tokenizer and dictionary of a data directory, or of a Hugging Face model."""
    if dictionary is None and (directory / "dict.txt").is_file():
        dictionary = directory / "dict.txt"
    if has_tokenizer(directory):
        return HuggingFaceTokenizer(directory, None if dictionary is None else read_dictionary(dictionary))
    if (directory / SentencePieceTokenizer.FILE).is_file():
        return load_tokenizer(directory / SentencePieceTokenizer.FILE, dictionary=dictionary, allow_lossy=True)
    if (directory / GPT2Tokenizer.ENCODER).is_file():
        return load_tokenizer("gpt2", directory / GPT2Tokenizer.ENCODER, directory / GPT2Tokenizer.MERGES, dictionary)
    raise InputError(
        f"{directory} holds neither {HuggingFaceTokenizer.FILE} nor {SentencePieceTokenizer.FILE} nor "
        f"{GPT2Tokenizer.ENCODER}: give a directory that binarize_documents wrote, or of a Hugging Face model with its "
        "tokenizer (transformers' save_pretrained writes it)"
    )

"""The tokenizer that is stored beside a dictionary."""

import os

from fairseq.data import encoders
from omegaconf import OmegaConf

# Files of each kind of tokenizer, the first that is complete counts: fairseq's name, and its option for each file.
_FILES = {
    "hf_tokenizer": {"tokenizer_json": "tokenizer.json"},
    "sentencepiece": {"sentencepiece_model": "sentencepiece.model"},
    "gpt2": {"gpt2_encoder_json": "encoder.json", "gpt2_vocab_bpe": "vocab.bpe"},
}
TOKENIZER_FILES = tuple(file for files in _FILES.values() for file in files.values())


def find_bpe(directory: str):
    """Build the BPE of a data directory.

    Args:
        directory: Path of the directory; it may contain ``tokenizer.json``, ``sentencepiece.model``, or
            ``encoder.json`` and ``vocab.bpe`` of GPT-2.

    Returns:
        fairseq's BPE, or None where there are no such files.
    """
    for name, files in _FILES.items():
        options = {option: os.path.join(directory, file) for option, file in files.items()}
        if all(map(os.path.isfile, options.values())):
            return encoders.build_bpe(OmegaConf.create({"_name": name, **options}))
    return None

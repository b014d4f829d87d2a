"""A directory of a tiny Llama with random weights, as a reader of the examples has a pretrained one."""

import sysconfig
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from preprocess.huggingface_tokenizer import JsonTokenizer
from tests.huggingface_tokenizers import byte_level

MODULES = ("bisect", "cmd", "code", "codeop", "colorsys", "copyreg", "heapq", "keyword", "linecache", "struct", "types")


def source_texts() -> dict:
    """Return the beginnings of some modules of the standard library by name."""
    return {name: Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text()[:3000] for name in MODULES}


def write_llama(directory: Path, window: int) -> Path:
    """Write config.json, model.safetensors and tokenizer.json.

    Args:
        directory: Directory to write.
        window: Number of positions of the model.

    Returns:
        The directory.
    """
    content = byte_level(list(source_texts().values()))
    vocabulary = JsonTokenizer(content).vocabulary
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=max(vocabulary.values()) + 1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=window,
        tie_word_embeddings=True,
        bos_token_id=vocabulary["<|im_start|>"],
        eos_token_id=vocabulary["<|endoftext|>"],
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    (directory / "tokenizer.json").write_bytes(content)
    return directory

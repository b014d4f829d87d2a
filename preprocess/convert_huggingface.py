r"""Convert a Hugging Face model to a model of fairseq, and back.

    python -m preprocess.convert_huggingface SmolLM2-135M/ backbone/
    python -m preprocess.convert_huggingface model.Q4_K_M.gguf backbone/
    python -m preprocess.binarize_documents --tokenizer backbone ...
    fairseq-train ... --arch longmem_lm --pretrained-model-path backbone/checkpoint.pt
    python -m preprocess.convert_huggingface --export backbone/checkpoint.pt exported/

The Hugging Face side is a local directory with config.json and model.safetensors or pytorch_model.bin (also in shards),
and the tokenizer's files, or a GGUF file; nothing is downloaded and no code in the files is run. The fairseq side is a
directory with checkpoint.pt (a ``transformer_lm`` for GPT-2 and OPT, a ``llama_lm`` for Llama, Mistral, Qwen2 and
Qwen3), dict.txt and tokenizer.json (for ``--bpe hf_tokenizer``, which gives a text the ids of transformers, those of
added tokens included). --export takes any checkpoint of such a model (OPT excepted), or of a LongMem model that holds
one.

The dictionary names the tokens by their numbers, in their order or that of --dict (for GPT-2 fairseq's own dict.txt,
say), and adds fairseq's four special symbols. ``</s>``, which ends documents, gets the embedding of the token that ends
texts (``eos_token_id``); symbols that the model does not have get the mean embedding, so that each takes at most 1/V of
the probability. Where a Llama starts texts with another token (``bos_token_id``), it reads that one in place of the
``</s>`` at the start of a window.
"""

from __future__ import annotations

import argparse
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fairseq.models import MODEL_DATACLASS_REGISTRY
from omegaconf import OmegaConf
from torch import Tensor

from longmem_fairseq.backbones.base import BackboneError
from longmem_fairseq.backbones.loading import read_backbone
from longmem_fairseq.data.manifest import dictionary_fingerprint
from longmem_fairseq.files import write_json, write_text
from longmem_fairseq.tensor_files import write_tensors
from preprocess.checkpoint_file import write_checkpoint
from preprocess.destination import whole_directory
from preprocess.dictionary import EOS, SPECIALS, read_dictionary
from preprocess.errors import InputError
from preprocess.huggingface_models import conversion_of, export_of
from preprocess.huggingface_source import open_model
from preprocess.huggingface_tokenizer import JsonTokenizer
from preprocess.tokenizer_json import TOKENIZER, read_json, read_tokenizer_json

logger = logging.getLogger("preprocess.convert_huggingface")

PROG = "python -m preprocess.convert_huggingface"
CHECKPOINT, DICTIONARY, ENCODER, MERGES = "checkpoint.pt", "dict.txt", "encoder.json", "vocab.bpe"
_END_OF_TEXT = "<|endoftext|>"
_EXPORTED_FILES = {TOKENIZER: TOKENIZER, ENCODER: "vocab.json", MERGES: "merges.txt"}


def from_huggingface(source: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a Hugging Face model to a directory for fairseq.

    Args:
        source: Path of a directory with config.json, weights and, to read text, the tokenizer's files; or of a GGUF
            file.
        destination: Path of the directory to write checkpoint.pt, dict.txt and tokenizer.json to; it is created if it
            does not exist.
        dictionary: Path of a fairseq dict.txt whose order to use (not with an OPT); if None, the order of the tokens'
            numbers.

    Raises:
        InputError: The model is not supported, or a file cannot be read or does not fit the others.
    """
    source, destination = open_model(Path(source)), Path(destination)
    config = source.config
    conversion = conversion_of(config)
    settings = conversion.settings(config)
    content = source.tokenizer_json
    tokenizer = None if content is None else _parse_tokenizer(content, source.path)
    symbols, rows = conversion.symbols(config, tokenizer, dictionary)
    settings.update(conversion.symbol_settings(config, symbols))
    logger.info(
        "%s: %s, %d layers of width %d, %d heads, %s symbols",
        source.path,
        config["model_type"],
        settings["decoder_layers"],
        settings["decoder_embed_dim"],
        settings["decoder_attention_heads"],
        f"{len(rows):,}",
    )
    weights = conversion.convert(source.weights(), settings, rows, conversion.vocabulary(config))
    if content is None:
        logger.warning(
            "%s holds no tokenizer (tokenizer.json, or vocab.json and merges.txt), which text needs", source.path
        )
    logger.info("writing %s", destination / CHECKPOINT)
    with whole_directory(destination) as directory:
        write_text(directory / DICTIONARY, "".join(f"{symbol} 1\n" for symbol in symbols))
        if content is not None:
            write_text(directory / TOKENIZER, content.decode())
        symbols = [*SPECIALS, *symbols]
        write_checkpoint(
            directory / CHECKPOINT,
            _complete(conversion.model, settings),
            {"_name": "language_modeling", "data": None, "tokens_per_sample": settings["tokens_per_sample"]},
            weights,
            {"dictionary_sha256": dictionary_fingerprint(symbols), "dictionary_size": len(symbols)},
        )


def to_huggingface(checkpoint: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a fairseq model that is built like GPT-2 or Llama, or the backbone of a LongMem model, to Hugging Face's.

    Args:
        checkpoint: Path of a checkpoint of a ``transformer_lm`` or ``llama_lm``, or of a ``longmem_lm`` that holds its
            backbone.
        destination: Path of the directory to write config.json, model.safetensors and the files of the tokenizer that
            is beside the checkpoint to; it is created if it does not exist.
        dictionary: Path of the model's dict.txt; if None, the one beside the checkpoint. If its symbols are the numbers
            of the tokens, these get their numbers again; otherwise their ids, 4 for the first symbol.

    Raises:
        InputError: No Hugging Face model expresses this one, or the model does not fit the dictionary.
    """
    checkpoint, destination = Path(checkpoint), Path(destination)
    try:
        settings, weights = read_backbone(str(checkpoint))
    except BackboneError as error:
        raise InputError(str(error)) from None
    conversion = export_of(settings["model"])
    symbols = read_dictionary(dictionary or checkpoint.parent / DICTIONARY)
    if len(SPECIALS) + len(symbols) != settings["vocabulary"]:
        raise InputError(
            f"the dictionary has {len(SPECIALS) + len(symbols)} symbols and the model {settings['vocabulary']}: give "
            "the model's dict.txt with --dict"
        )
    by_number = {int(symbol): row for row, symbol in enumerate(symbols, len(SPECIALS)) if symbol.isdigit()}
    if sorted(by_number) == list(range(len(by_number))) and by_number:
        rows = [by_number[number] for number in range(len(by_number))]
        embedding = weights["decoder.embed_tokens.weight"]
        end = _same_row(embedding, rows, EOS)
        end = _vocabulary(checkpoint.parent).get(_END_OF_TEXT) if end is None else end
        start = settings.get("start_symbol")
        special = {"bos_token_id": end if start is None else rows.index(start), "eos_token_id": end}
    else:
        rows = list(range(settings["vocabulary"]))
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config, exported = conversion.export(weights, settings, rows)
    with whole_directory(destination) as directory:
        for name, exported_name in _EXPORTED_FILES.items():
            if (checkpoint.parent / name).is_file():
                shutil.copyfile(checkpoint.parent / name, directory / exported_name)
        if (directory / TOKENIZER).is_file():  # which transformers then reads as it is
            write_json(directory / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"})
        write_json(directory / "config.json", {**config, **special})
        write_tensors(directory / "model.safetensors", exported, {"format": "pt"})
    logger.info("wrote %s", destination / "model.safetensors")


def _parse_tokenizer(content: bytes, source: Path) -> JsonTokenizer:
    """Load a tokenizer from the content of its tokenizer.json."""
    try:
        return JsonTokenizer(content)
    except ValueError as error:
        raise InputError(f"the tokenizer of {source} cannot be used: {error}") from None


def _same_row(table: Tensor, rows: Sequence[int], special: int) -> int | None:
    """Find the number of the token that shares its embedding with a special symbol, None if there is not one."""
    same = (table[torch.tensor(rows)] == table[special]).all(dim=1).nonzero()
    return int(same[-1]) if len(same) else None


def _vocabulary(directory: Path) -> dict[str, int]:
    """Read the id of each token from the tokenizer in a directory; empty if there is none."""
    if (directory / TOKENIZER).is_file():
        return _parse_tokenizer(read_tokenizer_json(directory / TOKENIZER), directory).vocabulary
    return read_json(directory / ENCODER) if (directory / ENCODER).is_file() else {}


def _complete(model: str, settings: dict) -> dict[str, Any]:
    """Complete the settings of a model, as fairseq-train would have written them."""
    defaults = OmegaConf.structured(MODEL_DATACLASS_REGISTRY[model]())
    values = {name: None if OmegaConf.is_interpolation(defaults, name) else defaults[name] for name in defaults}
    values = {name: getattr(value, "value", value) for name, value in values.items()}  # enumerations
    flags = {name: False for name in ("add_bos_token", "tpu") if name in values}  # of the task and of a run
    return {**values, **flags, "_name": model, **settings}


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can repair ends it with one sentence.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=Path, help="directory of a Hugging Face model, or GGUF file; with --export a checkpoint"
    )
    parser.add_argument("destination", type=Path, help="directory to write")
    parser.add_argument("--export", action="store_true", help="convert from fairseq to Hugging Face")
    parser.add_argument("--dict", type=Path, help="dict.txt whose order to use; with --export the model's dict.txt")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    convert = to_huggingface if args.export else from_huggingface
    try:
        convert(args.source, args.destination, args.dict)
    except (InputError, OSError) as error:
        raise SystemExit(f"{PROG}: error: {error}") from None


if __name__ == "__main__":
    main()

r"""Convert a Hugging Face GPT-2 or OPT to a fairseq language model, and a fairseq GPT-2 to a Hugging Face one.

    python -m preprocess.convert_huggingface gpt2-medium/ backbone/ [--dict dict.txt]
    python -m preprocess.binarize_documents --tokenizer backbone ...
    fairseq-train ... --arch longmem_gpt2_medium --pretrained-model-path backbone/checkpoint.pt
    python -m preprocess.convert_huggingface --export backbone/checkpoint.pt exported/

The Hugging Face side is a local directory with config.json and model.safetensors or pytorch_model.bin (also in shards),
and the tokenizer's files; nothing is downloaded and no code in the files is run. The fairseq side is a directory with
checkpoint.pt (a plain ``transformer_lm``, which every fairseq command reads), dict.txt and tokenizer.json (for
``--bpe hf_tokenizer``, which gives a text the ids of transformers, added tokens included).
--export takes any checkpoint of a ``transformer_lm`` that is built like GPT-2, or of a LongMem model that holds one.

The dictionary names GPT-2's tokens by their numbers, in GPT-2's order or that of --dict (fairseq's own dict.txt, say),
and adds fairseq's four special symbols. ``</s>``, which ends documents, gets the embedding of ``<|endoftext|>``;
symbols that GPT-2 does not have get the mean embedding, so that each takes at most 1/V of the probability.
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
from fairseq.models.transformer_lm import TransformerLanguageModelConfig
from omegaconf import OmegaConf
from torch import Tensor

from longmem_fairseq.backbones.base import BackboneError
from longmem_fairseq.backbones.loading import read_backbone
from longmem_fairseq.data.manifest import dictionary_fingerprint
from longmem_fairseq.files import write_json, write_text
from longmem_fairseq.safe_load import load_safely, refuse_adapter
from longmem_fairseq.tensor_files import read_tensors, write_tensors
from preprocess.checkpoint_file import write_checkpoint
from preprocess.destination import whole_directory
from preprocess.dictionary import EOS, SPECIALS, filler_symbols, read_dictionary
from preprocess.errors import InputError
from preprocess.huggingface_models import check_config, convert_gpt2, convert_opt, export_gpt2, model_settings
from preprocess.huggingface_tokenizer import JsonTokenizer, dictionary_symbols
from preprocess.tokenizer_json import TOKENIZER, has_tokenizer, read_json, read_tokenizer_json

logger = logging.getLogger("preprocess.convert_huggingface")

PROG = "python -m preprocess.convert_huggingface"
CHECKPOINT, DICTIONARY, ENCODER, MERGES = "checkpoint.pt", "dict.txt", "encoder.json", "vocab.bpe"
_END_OF_TEXT = "<|endoftext|>"
_EXPORTED_FILES = {TOKENIZER: TOKENIZER, ENCODER: "vocab.json", MERGES: "merges.txt"}


def from_huggingface(source: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a Hugging Face model directory to a directory for fairseq.

    Args:
        source: Path of a directory with config.json, weights and, to read text, the tokenizer's files.
        destination: Path of the directory to write checkpoint.pt, dict.txt and tokenizer.json to; it is created if it
            does not exist.
        dictionary: Path of a fairseq dict.txt whose order to use (GPT-2 only); if None, the order of the tokens'
            numbers.

    Raises:
        InputError: The model is not supported, or a file cannot be read or does not fit the others.
    """
    source, destination = Path(source), Path(destination)
    try:
        refuse_adapter(str(source))
    except ValueError as error:
        raise InputError(str(error)) from None
    config = read_json(source / "config.json")
    check_config(config)
    content = read_tokenizer_json(source) if has_tokenizer(source) else None
    tokenizer = None if content is None else _parse_tokenizer(content, source)
    vocabulary = config.get("vocab_size") or 50257
    if config["model_type"] == "opt":
        symbols, rows = _opt_symbols(config, vocabulary, tokenizer, dictionary)
    else:
        symbols, rows = _gpt2_symbols(config, vocabulary, tokenizer, dictionary)
    settings = model_settings(config)
    logger.info(
        "%s: %s, %d layers of width %d, %d heads, %s symbols",
        source,
        config["model_type"],
        settings["decoder_layers"],
        settings["decoder_embed_dim"],
        settings["decoder_attention_heads"],
        f"{len(rows):,}",
    )
    convert = convert_opt if config["model_type"] == "opt" else convert_gpt2
    weights = convert(_read_weights(source), settings, rows, vocabulary)
    if content is None:
        logger.warning("%s holds no tokenizer (tokenizer.json, or vocab.json and merges.txt), which text needs", source)
    logger.info("writing %s", destination / CHECKPOINT)
    with whole_directory(destination) as directory:
        write_text(directory / DICTIONARY, "".join(f"{symbol} 1\n" for symbol in symbols))
        if content is not None:
            write_text(directory / TOKENIZER, content.decode())
        symbols = [*SPECIALS, *symbols]
        write_checkpoint(
            directory / CHECKPOINT,
            _complete(settings),
            {"_name": "language_modeling", "data": None, "tokens_per_sample": settings["tokens_per_sample"]},
            weights,
            {"dictionary_sha256": dictionary_fingerprint(symbols), "dictionary_size": len(symbols)},
        )


def to_huggingface(checkpoint: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a fairseq model that is built like GPT-2, or the backbone of a LongMem model, to a Hugging Face one.

    Args:
        checkpoint: Path of a checkpoint of a ``transformer_lm`` or of a ``longmem_lm`` that holds its backbone.
        destination: Path of the directory to write config.json, model.safetensors and the files of the tokenizer that
            is beside the checkpoint to; it is created if it does not exist.
        dictionary: Path of the model's dict.txt; if None, the one beside the checkpoint. If its symbols are the numbers
            of GPT-2's tokens, tokens get these numbers again; otherwise their ids, 4 for the first symbol.

    Raises:
        InputError: GPT-2 cannot express the model, or the model does not fit the dictionary.
    """
    checkpoint, destination = Path(checkpoint), Path(destination)
    try:
        settings, weights = read_backbone(str(checkpoint))
    except BackboneError as error:
        raise InputError(str(error)) from None
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
        special = {"bos_token_id": end, "eos_token_id": end}
    else:
        rows = list(range(settings["vocabulary"]))
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config, exported = export_gpt2(weights, settings, rows)
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


def _gpt2_symbols(
    config: dict, vocabulary: int, tokenizer: JsonTokenizer | None, dictionary: Path | None
) -> tuple[list[str], list[int]]:
    """Choose the symbols of the dictionary, and the row of the embedding for each after those of the special ones."""
    symbols = [str(number) for number in range(vocabulary)] + filler_symbols(vocabulary)
    if tokenizer is not None:
        symbols = dictionary_symbols(tokenizer, vocabulary)
    if len(symbols) < vocabulary:
        raise InputError("the tokenizer begins with fairseq's special symbols, as OPT's; those of a GPT-2 do not")
    if dictionary is not None:
        symbols = read_dictionary(dictionary)
        numbers = set(tokenizer.vocabulary.values()) if tokenizer else set(range(vocabulary))
        missing = sorted(numbers - {int(symbol) for symbol in symbols if symbol.isdigit()})
        if missing:
            raise InputError(
                f"--dict {dictionary} lacks {len(missing)} of the model's {len(numbers)} tokens, such as {missing[0]}: "
                "give a dictionary of GPT-2's numbers, or leave --dict out"
            )
    rows = [int(symbol) if symbol.isdigit() and int(symbol) < vocabulary else -1 for symbol in symbols]
    special = [-1] * len(SPECIALS)
    special[EOS] = _end_of_text(config, vocabulary, 50256)
    return symbols, [*special, *rows]


def _opt_symbols(
    config: dict, vocabulary: int, tokenizer: JsonTokenizer | None, dictionary: Path | None
) -> tuple[list[str], list[int]]:
    """Return the same for an OPT, whose ids are those of the dictionary: the special symbols are fairseq's own."""
    if dictionary is not None:
        raise InputError(f"--dict {dictionary} cannot be used with an OPT, whose order is fixed: leave --dict out")
    symbols = [str(number) for number in range(len(SPECIALS), vocabulary)]
    if tokenizer is not None and dictionary_symbols(tokenizer, vocabulary) != symbols:
        raise InputError(f"the tokenizer of an OPT begins with {', '.join(SPECIALS)}, but this one does not")
    if _end_of_text(config, vocabulary, EOS) != EOS:
        raise InputError(f"eos_token_id={config['eos_token_id']} in config.json: an OPT's is {EOS}, as fairseq's")
    return symbols, list(range(vocabulary))


def _end_of_text(config: dict, vocabulary: int, default: int) -> int:
    """Return the token that ends a text, whose embedding ``</s>`` gets; ``default`` is that of transformers."""
    end = config.get("eos_token_id", default)
    if isinstance(end, list) and end:
        end = end[0]
    if not isinstance(end, int) or not 0 <= end < vocabulary:
        raise InputError(
            f"eos_token_id={end} in config.json is not a token of the vocabulary of {vocabulary:,}: correct it, since "
            "the end of a document gets the embedding of this token"
        )
    return end


def _same_row(table: Tensor, rows: Sequence[int], special: int) -> int | None:
    """Find the number of the token that shares its embedding with a special symbol, None if there is not one."""
    same = (table[torch.tensor(rows)] == table[special]).all(dim=1).nonzero()
    return int(same[-1]) if len(same) else None


def _vocabulary(directory: Path) -> dict[str, int]:
    """Read the id of each token from the tokenizer in a directory; empty if there is none."""
    if (directory / TOKENIZER).is_file():
        return _parse_tokenizer(read_tokenizer_json(directory / TOKENIZER), directory).vocabulary
    return read_json(directory / ENCODER) if (directory / ENCODER).is_file() else {}


def _complete(settings: dict) -> dict[str, Any]:
    """Complete the settings of a ``transformer_lm``, as fairseq-train would have written them."""
    defaults = OmegaConf.structured(TransformerLanguageModelConfig())
    model = {name: None if OmegaConf.is_interpolation(defaults, name) else defaults[name] for name in defaults}
    model = {name: getattr(value, "value", value) for name, value in model.items()}  # enumerations
    return {**model, "_name": "transformer_lm", "add_bos_token": False, "tpu": False, **settings}


def _read_weights(source: Path) -> dict[str, Tensor]:
    """Read all weights of a model directory."""
    for name, read in (("model.safetensors", _read_safetensors), ("pytorch_model.bin", _read_pickle)):
        if (source / name).is_file():
            return read(source / name)
        if (source / f"{name}.index.json").is_file():
            shards = sorted(set(read_json(source / f"{name}.index.json").get("weight_map", {}).values()))
            weights: dict[str, Tensor] = {}
            for shard in shards:
                logger.info("reading %s", source / shard)
                weights.update(read(source / Path(shard).name))
            return weights
    raise InputError(f"{source} holds neither model.safetensors nor pytorch_model.bin")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read the weights in a safetensors file."""
    try:
        return read_tensors(path)[1]
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Read the weights in a pickle, without running code from it."""
    try:
        weights = load_safely(str(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} is not a dictionary of tensors")
    return weights


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can repair ends it with one sentence.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path, help="directory of a Hugging Face model; with --export a checkpoint")
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

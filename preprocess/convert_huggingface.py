r"""Convert a Hugging Face GPT-2 or OPT to a fairseq language model, and a fairseq GPT-2 to a Hugging Face one.

    python -m preprocess.convert_huggingface gpt2-medium/ backbone/ [--dict dict.txt]
    python -m preprocess.binarize_documents --tokenizer gpt2 --gpt2-encoder-json backbone/encoder.json \
        --gpt2-vocab-bpe backbone/vocab.bpe --dict backbone/dict.txt ...
    fairseq-train ... --arch longmem_gpt2_medium --pretrained-model-path backbone/checkpoint.pt
    python -m preprocess.convert_huggingface --export backbone/checkpoint.pt exported/

The Hugging Face side is a local directory with config.json and model.safetensors or pytorch_model.bin (also in shards),
and the tokenizer's files; nothing is downloaded and no code in the files is run. The fairseq side is a directory with
checkpoint.pt (a plain ``transformer_lm``, which every fairseq command reads), dict.txt, encoder.json and vocab.bpe.
--export takes any checkpoint of a ``transformer_lm`` that is built like GPT-2, or of a LongMem model that holds one.

The dictionary names GPT-2's tokens by their numbers, in GPT-2's order or that of --dict (fairseq's own dict.txt, say),
and adds fairseq's four special symbols. ``</s>``, which ends documents, gets the embedding of ``<|endoftext|>``;
symbols that GPT-2 does not have get the mean embedding, so that each takes at most 1/V of the probability.
"""

from __future__ import annotations

import argparse
import json
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
from longmem_fairseq.files import read_json, write_text, write_whole
from longmem_fairseq.safe_load import load_safely, refuse_adapter
from longmem_fairseq.tensor_files import read_tensors, write_tensors
from preprocess.checkpoint_file import write_checkpoint
from preprocess.dictionary import EOS, SPECIALS, filler_symbols, read_dictionary
from preprocess.errors import InputError
from preprocess.huggingface_models import check_config, convert_gpt2, convert_opt, export_gpt2, model_settings

logger = logging.getLogger("preprocess.convert_huggingface")

PROG = "python -m preprocess.convert_huggingface"
CHECKPOINT, DICTIONARY, ENCODER, MERGES = "checkpoint.pt", "dict.txt", "encoder.json", "vocab.bpe"
_END_OF_TEXT = "<|endoftext|>"


def from_huggingface(source: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a Hugging Face model directory to a directory for fairseq.

    Args:
        source: Path of a directory with config.json, weights and, to read text, the tokenizer's files.
        destination: Path of the directory to write checkpoint.pt, dict.txt, encoder.json and vocab.bpe to; it is
            created if it does not exist.
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
    config = _read_json(source / "config.json")
    check_config(config)
    tokenizer = _read_tokenizer(source)
    vocabulary = config.get("vocab_size") or 50257
    if config["model_type"] == "opt":
        if dictionary is not None:
            raise InputError(f"--dict {dictionary} cannot be used with an OPT, whose order is fixed: leave --dict out")
        symbols = [str(number) for number in range(len(SPECIALS), vocabulary)]
        rows = list(range(vocabulary))
        if tokenizer is not None:  # the special symbols are fairseq's own
            tokens = {token: number for token, number in tokenizer[0].items() if number >= len(SPECIALS)}
            tokenizer = tokens, tokenizer[1]
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
    destination.mkdir(parents=True, exist_ok=True)
    write_text(destination / DICTIONARY, "".join(f"{symbol} 1\n" for symbol in symbols))
    if tokenizer is None:
        logger.warning("%s holds no tokenizer (vocab.json and merges.txt, or tokenizer.json), which text needs", source)
    else:
        write_text(destination / ENCODER, json.dumps(tokenizer[0]))
        lines = "".join(f"{first} {second}\n" for first, second in tokenizer[1])
        write_text(destination / MERGES, "#version: 0.2\n" + lines)
    logger.info("writing %s", destination / CHECKPOINT)
    symbols = [*SPECIALS, *symbols]
    write_checkpoint(
        destination / CHECKPOINT,
        _complete(settings),
        {"_name": "language_modeling", "data": None, "tokens_per_sample": settings["tokens_per_sample"]},
        weights,
        {"dictionary_sha256": dictionary_fingerprint(symbols), "dictionary_size": len(symbols)},
    )


def to_huggingface(checkpoint: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a fairseq model that is built like GPT-2, or the backbone of a LongMem model, to a Hugging Face one.

    Args:
        checkpoint: Path of a checkpoint of a ``transformer_lm`` or of a ``longmem_lm`` that holds its backbone.
        destination: Path of the directory to write config.json, model.safetensors and, if encoder.json and vocab.bpe
            are beside the checkpoint, vocab.json and merges.txt to; it is created if it does not exist.
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
    tokenizer = _read_tokenizer(checkpoint.parent, ENCODER, MERGES)
    by_number = {int(symbol): row for row, symbol in enumerate(symbols, len(SPECIALS)) if symbol.isdigit()}
    if sorted(by_number) == list(range(len(by_number))) and by_number:
        rows = [by_number[number] for number in range(len(by_number))]
        embedding = weights["decoder.embed_tokens.weight"]
        end = tokenizer[0].get(_END_OF_TEXT) if tokenizer else _same_row(embedding, rows, EOS)
        special = {"bos_token_id": end, "eos_token_id": end}
    else:
        rows = list(range(settings["vocabulary"]))
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config, exported = export_gpt2(weights, settings, rows)
    destination.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        write_whole(destination / "vocab.json", lambda path: shutil.copyfile(checkpoint.parent / ENCODER, path))
        write_whole(destination / "merges.txt", lambda path: shutil.copyfile(checkpoint.parent / MERGES, path))
    write_text(destination / "config.json", json.dumps({**config, **special}, indent=2))
    write_tensors(destination / "model.safetensors", exported, {"format": "pt"})
    logger.info("wrote %s", destination / "model.safetensors")


def _gpt2_symbols(
    config: dict, vocabulary: int, tokenizer: tuple[dict, list] | None, dictionary: Path | None
) -> tuple[list[str], list[int]]:
    """Choose the symbols of the dictionary, and the row of the embedding for each after those of the special ones."""
    if dictionary is None:
        symbols = [str(number) for number in range(vocabulary)] + filler_symbols(vocabulary)
    else:
        symbols = read_dictionary(dictionary)
        numbers = set(tokenizer[0].values()) if tokenizer else set(range(vocabulary))
        missing = sorted(numbers - {int(symbol) for symbol in symbols if symbol.isdigit()})
        if missing:
            raise InputError(
                f"--dict {dictionary} lacks {len(missing)} of the model's {len(numbers)} tokens, such as {missing[0]}: "
                "give a dictionary of GPT-2's numbers, or leave --dict out"
            )
    rows = [int(symbol) if symbol.isdigit() and int(symbol) < vocabulary else -1 for symbol in symbols]
    end = config.get("eos_token_id", 50256)
    special = [-1] * len(SPECIALS)
    if isinstance(end, int) and 0 <= end < vocabulary:
        special[EOS] = end
    return symbols, [*special, *rows]


def _same_row(table: Tensor, rows: Sequence[int], special: int) -> int | None:
    """Find the number of the token that shares its embedding with a special symbol, None if there is not one."""
    same = (table[torch.tensor(rows)] == table[special]).all(dim=1).nonzero()
    return int(same[-1]) if len(same) else None


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
            shards = sorted(set(_read_json(source / f"{name}.index.json").get("weight_map", {}).values()))
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


def _read_tokenizer(
    directory: Path, vocabulary: str = "vocab.json", merges: str = "merges.txt"
) -> tuple[dict[str, int], list[Sequence[str]]] | None:
    """Read the number of each token, and the merges, best first; None if the directory has no tokenizer."""
    if (directory / vocabulary).is_file() and (directory / merges).is_file():
        lines = (directory / merges).read_text(encoding="utf-8").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        return _read_json(directory / vocabulary), [line.split(" ") for line in lines if line]
    if not (directory / "tokenizer.json").is_file():
        return None
    tokenizer = _read_json(directory / "tokenizer.json")
    model = tokenizer.get("model", {})
    if model.get("type") != "BPE":
        raise InputError(f"{directory / 'tokenizer.json'} is a {model.get('type')}: GPT-2's and OPT's are a BPE")
    added = {token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {**model["vocab"], **added}, pairs


def _read_json(path: Path) -> dict:
    """Read a JSON object."""
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is not a JSON object")
    return content


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

"""A Hugging Face GPT-2 or OPT as a fairseq language model, and a GPT-2-like fairseq model as a Hugging Face one.

    python preprocess/convert_huggingface.py gpt2-medium/ backbone/ [--dict dict.txt]
    python preprocess/binarize_documents.py --tokenizer gpt2 --gpt2-encoder-json backbone/encoder.json \
        --gpt2-vocab-bpe backbone/vocab.bpe --dict backbone/dict.txt ...
    fairseq-train ... --arch longmem_gpt2_medium --pretrained-model-path backbone/checkpoint.pt
    python preprocess/convert_huggingface.py --export backbone/checkpoint.pt exported/

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

if not __package__:  # run as a script: find the packages beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from preprocess.checkpoint_file import write_checkpoint, write_whole
from preprocess.errors import InputError
from preprocess.huggingface_models import (
    SPECIALS,
    check_config,
    convert_gpt2,
    convert_opt,
    export_gpt2,
    model_settings,
)
from preprocess.package_manifest import manifest
from preprocess.tokenization import read_dictionary

logger = logging.getLogger("preprocess.convert_huggingface")

CHECKPOINT, DICTIONARY, ENCODER, MERGES = "checkpoint.pt", "dict.txt", "encoder.json", "vocab.bpe"
_END_OF_TEXT = "<|endoftext|>"


def from_huggingface(source: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Convert a Hugging Face model directory into a directory for fairseq.

    Args:
        source: with config.json, weights and, if it shall be able to read text, the tokenizer's files.
        destination: directory for checkpoint.pt, dict.txt, encoder.json and vocab.bpe; made if need be.
        dictionary: a fairseq dict.txt whose order to take (GPT-2 only); by default the order of the tokens' numbers.

    Raises:
        InputError: where the model is not supported, or the files are not what they should be.
    """
    source, destination = Path(source), Path(destination)
    config = _read_json(source / "config.json")
    check_config(config)
    tokenizer = _read_tokenizer(source)
    vocabulary = config.get("vocab_size", 50257)
    if config["model_type"] == "opt":
        if dictionary is not None:
            raise InputError(f"--dict {dictionary} cannot be used: an OPT has its own order, which is fairseq's")
        symbols = [str(number) for number in range(len(SPECIALS), vocabulary)]
        rows = list(range(vocabulary))
        if tokenizer is not None:  # the special symbols are fairseq's own
            tokenizer = {t: n for t, n in tokenizer[0].items() if n >= len(SPECIALS)}, tokenizer[1]
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
    write_whole(destination / DICTIONARY, lambda path: path.write_text("".join(f"{symbol} 1\n" for symbol in symbols)))
    if tokenizer is None:
        logger.warning("%s holds no tokenizer (vocab.json and merges.txt, or tokenizer.json): text needs one", source)
    else:
        write_whole(destination / ENCODER, lambda path: path.write_text(json.dumps(tokenizer[0])))
        lines = "".join(f"{first} {second}\n" for first, second in tokenizer[1])
        write_whole(destination / MERGES, lambda path: path.write_text("#version: 0.2\n" + lines, encoding="utf-8"))
    logger.info("writing %s", destination / CHECKPOINT)
    symbols = [*SPECIALS, *symbols]
    write_checkpoint(
        destination / CHECKPOINT,
        _complete(settings),
        {"_name": "language_modeling", "data": None, "tokens_per_sample": settings["tokens_per_sample"]},
        weights,
        {"dictionary_sha256": manifest.dictionary_fingerprint(symbols), "dictionary_size": len(symbols)},
    )


def to_huggingface(checkpoint: Path, destination: Path, dictionary: Path | None = None) -> None:
    """Export a fairseq model that is built like GPT-2, or the one inside a LongMem model, for Hugging Face.

    Args:
        checkpoint: of a ``transformer_lm`` or of a ``longmem_lm`` that holds its backbone.
        destination: directory for config.json, model.safetensors and, where the checkpoint's directory has encoder.json
            and vocab.bpe, vocab.json and merges.txt; made if need be.
        dictionary: the model's dict.txt; by default that beside the checkpoint. Where its symbols are the numbers of
            GPT-2's tokens, tokens get these numbers again; else those of the dictionary, 4 for its first symbol.

    Raises:
        InputError: where the model is none that GPT-2 can express, or does not fit the dictionary.
    """
    from longmem_fairseq.backbones.loading import BackboneError, read_backbone

    checkpoint, destination = Path(checkpoint), Path(destination)
    try:
        settings, weights = read_backbone(str(checkpoint))
    except BackboneError as error:
        raise InputError(str(error)) from None
    symbols = read_dictionary(dictionary or checkpoint.parent / DICTIONARY)
    if len(SPECIALS) + len(symbols) != settings["vocabulary"]:
        raise InputError(
            f"the dictionary has {len(SPECIALS) + len(symbols)} symbols and the model {settings['vocabulary']}: give "
            "the model's own with --dict"
        )
    tokenizer = _read_tokenizer(checkpoint.parent, ENCODER, MERGES)
    by_number = {int(symbol): row for row, symbol in enumerate(symbols, len(SPECIALS)) if symbol.isdigit()}
    if sorted(by_number) == list(range(len(by_number))) and by_number:
        rows = [by_number[number] for number in range(len(by_number))]
        end = tokenizer[0].get(_END_OF_TEXT) if tokenizer else _same_row(weights["embed_tokens.weight"], rows, 2)
        special = {"bos_token_id": end, "eos_token_id": end}
    else:
        rows = list(range(settings["vocabulary"]))
        special = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}
    config, exported = export_gpt2(weights, settings, rows)
    destination.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        write_whole(destination / "vocab.json", lambda path: shutil.copyfile(checkpoint.parent / ENCODER, path))
        write_whole(destination / "merges.txt", lambda path: shutil.copyfile(checkpoint.parent / MERGES, path))
    write_whole(destination / "config.json", lambda path: path.write_text(json.dumps({**config, **special}, indent=2)))
    write_whole(destination / "model.safetensors", lambda path: save_file(exported, path, metadata={"format": "pt"}))
    logger.info("wrote %s", destination / "model.safetensors")


def _gpt2_symbols(
    config: dict, vocabulary: int, tokenizer: tuple[dict, list] | None, dictionary: Path | None
) -> tuple[list[str], list[int]]:
    """The dictionary's symbols, and the row of the embedding for each and, before them, for the special ones."""
    if dictionary is None:
        symbols = [str(number) for number in range(vocabulary)]
        symbols += [f"madeupword{i:04d}" for i in range(-(vocabulary + len(SPECIALS)) % 8)]
    else:
        symbols = read_dictionary(dictionary)
        wanted = set(tokenizer[0].values()) if tokenizer else set(range(vocabulary))
        missing = sorted(wanted - {int(symbol) for symbol in symbols if symbol.isdigit()})
        if missing:
            raise InputError(
                f"--dict {dictionary} lacks {len(missing)} of the model's {len(wanted)} tokens, such as {missing[0]}: "
                "give a dictionary of GPT-2's numbers, or none"
            )
    rows = [int(symbol) if symbol.isdigit() and int(symbol) < vocabulary else -1 for symbol in symbols]
    end = config.get("eos_token_id", 50256)
    special = dict.fromkeys(SPECIALS, -1)
    if isinstance(end, int) and 0 <= end < vocabulary:
        special["</s>"] = end
    return symbols, [*special.values(), *rows]


def _same_row(table: Tensor, rows: Sequence[int], special: int) -> int | None:
    """The number of the token whose embedding a special symbol has, None if there is none."""
    same = (table[torch.tensor(rows)] == table[special]).all(dim=1).nonzero()
    return int(same[-1]) if len(same) else None


def _complete(settings: dict) -> dict[str, Any]:
    """All settings of a ``transformer_lm``, as fairseq-train would have written them."""
    from fairseq.models.transformer_lm import TransformerLanguageModelConfig

    defaults = OmegaConf.structured(TransformerLanguageModelConfig())
    model = {name: None if OmegaConf.is_interpolation(defaults, name) else defaults[name] for name in defaults}
    model = {name: getattr(value, "value", value) for name, value in model.items()}  # enumerations
    return {**model, "_name": "transformer_lm", "add_bos_token": False, "tpu": False, **settings}


def _read_weights(source: Path) -> dict[str, Tensor]:
    """All weights of a model directory."""
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
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    from longmem_fairseq.safe_load import load_safely

    try:
        weights = load_safely(str(path))
    except (ValueError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"{path} holds no dictionary of tensors")
    return weights


def _read_tokenizer(
    directory: Path, vocabulary: str = "vocab.json", merges: str = "merges.txt"
) -> tuple[dict[str, int], list[Sequence[str]]] | None:
    """Token → number and the merges, best first; None where the directory has no tokenizer."""
    if (directory / vocabulary).is_file() and (directory / merges).is_file():
        lines = (directory / merges).read_text(encoding="utf-8").split("\n")
        lines = lines[1:] if lines[0].startswith("#version") else lines
        return _read_json(directory / vocabulary), [line.split(" ") for line in lines if line]
    if not (directory / "tokenizer.json").is_file():
        return None
    whole = _read_json(directory / "tokenizer.json")
    model = whole.get("model", {})
    if model.get("type") != "BPE":
        raise InputError(f"{directory / 'tokenizer.json'} is a {model.get('type')}: GPT-2's and OPT's are a BPE")
    added = {token["content"]: token["id"] for token in whole.get("added_tokens", [])}
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    return {**model["vocab"], **added}, pairs


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is no JSON object")
    return content


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what the user can mend ends it with one sentence."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], epilog="Examples are at the top of this file.")
    parser.add_argument("source", type=Path, help="directory of a Hugging Face model; with --export a checkpoint")
    parser.add_argument("destination", type=Path, help="directory to write")
    parser.add_argument("--export", action="store_true", help="from fairseq to Hugging Face")
    parser.add_argument("--dict", type=Path, help="dict.txt whose order to take; with --export the model's dictionary")
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(asctime)s | %(levelname)s | %(message)s", stream=sys.stderr)
    logger.setLevel(logging.INFO)
    try:
        (to_huggingface if args.export else from_huggingface)(args.source, args.destination, args.dict)
    except (InputError, OSError) as error:
        raise SystemExit(f"convert_huggingface.py: error: {error}") from None


if __name__ == "__main__":
    main()

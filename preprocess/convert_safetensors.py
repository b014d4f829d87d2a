"""Convert a fairseq language model to one safetensors file and back, and a LongMem checkpoint to a model directory.

    python -m preprocess.convert_safetensors checkpoint.pt model.safetensors [--half]
    python -m preprocess.convert_safetensors model.safetensors checkpoint.pt
    python -m preprocess.convert_safetensors longmem/checkpoint_best.pt directory/ [--half]

fairseq's checkpoints are pickles with the optimizer's state in them. The safetensors file holds the weights and, as
JSON in its header, the model's configuration: no code, a third of the size or, in half precision, a sixth. The way back
writes a checkpoint (in single precision) that every fairseq command reads.

A model directory holds ``config.json``, ``side_network.safetensors``, ``backbone.safetensors``, and the dictionary and
tokenizer of the data that the LongMem model was trained on; ``LongMem.from_pretrained("directory/")`` reads it.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf

from longmem_fairseq.files import require_writable
from longmem_fairseq.hub import LongMem
from longmem_fairseq.memory.container import crc32, write_container
from longmem_fairseq.models.model_directory import read_language_model, write_directory
from longmem_fairseq.safe_load import load_safely
from longmem_fairseq.text import TOKENIZER_FILES
from preprocess.checkpoint_file import write_checkpoint
from preprocess.destination import whole_directory

PROG = "python -m preprocess.convert_safetensors"
DATA_FILES = ("dict.txt", *TOKENIZER_FILES)


def to_safetensors(checkpoint: str, path: str, half: bool = False) -> None:
    """Convert a fairseq checkpoint to a safetensors file of its weights and model configuration.

    Equal matrices (tied embeddings; fairseq's half precision stores them twice) are written once.

    Args:
        checkpoint: Path of the checkpoint.
        path: Path of the safetensors file to write.
        half: If true, write all floating-point tensors as float16.

    Raises:
        FileNotFoundError: The checkpoint does not exist.
        ValueError: The checkpoint is not one of fairseq, or holds code.
        OSError: The file cannot be written.
    """
    require_writable(path)
    try:
        state = load_safely(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{checkpoint} is not a fairseq checkpoint: it lacks the weights (model)")
    if not state.get("cfg"):  # older than fairseq 0.11, which brings its options into today's form
        state = checkpoint_utils.load_checkpoint_to_cpu(checkpoint)
    config = OmegaConf.to_container(OmegaConf.create(state["cfg"]["model"]), resolve=False)
    weights, tied = {}, {}
    for name, tensor in state["model"].items():
        same = next((other for other, x in weights.items() if x.shape == tensor.shape and torch.equal(x, tensor)), None)
        if same is not None and tensor.dim() > 1:
            tied[name] = same
        else:
            weights[name] = tensor
    if half:
        weights = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
    metadata = {"format": "fairseq", "model": json.dumps(config, default=str), "tied": json.dumps(tied)}
    weights = {name: x.contiguous() for name, x in weights.items()}
    write_container(path, weights, metadata, crc32)


def to_fairseq(path: str, checkpoint: str) -> None:
    """Convert a safetensors file to a fairseq checkpoint in float32.

    Args:
        path: Path of the safetensors file, as :func:`to_safetensors` writes it.
        checkpoint: Path of the checkpoint to write.

    Raises:
        ValueError: The file was not written by :func:`to_safetensors`.
        OSError: The checkpoint cannot be written.
    """
    require_writable(checkpoint)
    settings, weights = read_language_model(path)
    write_checkpoint(Path(checkpoint), settings, {"_name": "language_modeling"}, weights, {})


def to_directory(checkpoint: str, directory: str, half: bool = False) -> None:
    """Convert a LongMem checkpoint to a model directory.

    Args:
        checkpoint: Path of the checkpoint; ``dict.txt`` is beside it or in the directory of its training data.
        directory: Path of the directory to write; it is created if it does not exist.
        half: If true, write all floating-point tensors as float16.

    Raises:
        FileNotFoundError: The checkpoint or its dictionary does not exist.
        ValueError: The checkpoint is not one of a LongMem model, or holds code.
    """
    longmem = LongMem.from_pretrained(checkpoint, device="cpu")
    with whole_directory(Path(directory)) as temporary:
        write_directory(longmem.model, str(temporary), half, longmem.task.args.tokens_per_sample)
        for name in DATA_FILES:
            if (source := Path(longmem.task.args.data, name)).is_file():
                shutil.copyfile(source, temporary / name)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error that the user can repair ends it with one sentence.

    Args:
        arguments: Arguments of the command line; if None, those of the process.
    """
    parser = argparse.ArgumentParser(
        prog=PROG, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help=".pt checkpoint or .safetensors file")
    parser.add_argument("destination", help=".safetensors file, .pt checkpoint or model directory to write")
    parser.add_argument("--half", action="store_true", help="write float16 weights into safetensors files")
    args = parser.parse_args(arguments)
    try:
        if args.destination.endswith(".safetensors"):
            to_safetensors(args.source, args.destination, args.half)
        elif args.destination.endswith(".pt") or args.source.endswith(".safetensors"):
            to_fairseq(args.source, args.destination)
        else:
            to_directory(args.source, args.destination, args.half)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{PROG}: error: {error}") from None


if __name__ == "__main__":
    main()

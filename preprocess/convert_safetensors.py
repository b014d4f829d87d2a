"""A fairseq language model as one safetensors file, and back.

    python preprocess/convert_safetensors.py checkpoint.pt model.safetensors [--half]
    python preprocess/convert_safetensors.py model.safetensors checkpoint.pt

fairseq's checkpoints are pickles with the optimizer's state in them. The safetensors file holds the weights and, as
JSON in its header, the model's configuration: no code, a third of the size or, in half precision, a sixth. What comes
back is a checkpoint (in single precision) that every fairseq command reads.
"""

import argparse
import json
import sys
from pathlib import Path

if not __package__:  # run as a script: find the packages beside this folder
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longmem_fairseq.safe_load import load_safely
from preprocess.checkpoint_file import write_checkpoint, write_whole


def to_safetensors(checkpoint: str, path: str, half: bool = False) -> None:
    """Write the weights and the model configuration of a fairseq checkpoint.

    Matrices that are one (tied embeddings; fairseq's half precision stores them twice) are written once; with ``half``
    all floating-point tensors as float16.

    Raises:
        FileNotFoundError: where the checkpoint does not exist.
        ValueError: where it is none of fairseq, or holds code.
    """
    try:
        state = load_safely(checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint} cannot be read: {error}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise ValueError(f"{checkpoint} is no fairseq checkpoint: it lacks the weights (model)")
    if not state.get("cfg"):  # of before fairseq 0.11, whose options fairseq brings into today's form
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
    write_whole(Path(path), lambda part: save_file(weights, part, metadata=metadata))


def to_fairseq(path: str, checkpoint: str) -> None:
    """Write a fairseq checkpoint, in float32, from what :func:`to_safetensors` wrote.

    Raises:
        ValueError: where the file is no such file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from error
    if metadata.get("format") != "fairseq":
        raise ValueError(f"{path} was not written by this script: its header has no fairseq model")
    weights = {name: x.float() if x.is_floating_point() else x for name, x in weights.items()}
    for name, other in json.loads(metadata["tied"]).items():
        weights[name] = weights[other]
    write_checkpoint(Path(checkpoint), json.loads(metadata["model"]), {"_name": "language_modeling"}, weights, {})


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a .pt checkpoint or a .safetensors file")
    parser.add_argument("destination", help="a file of the other kind")
    parser.add_argument("--half", action="store_true", help="write float16 weights into the safetensors file")
    args = parser.parse_args()
    try:
        if args.destination.endswith(".safetensors"):
            to_safetensors(args.source, args.destination, args.half)
        else:
            to_fairseq(args.source, args.destination)
    except (OSError, ValueError) as error:
        sys.exit(f"{parser.prog}: {error}")


if __name__ == "__main__":
    main()

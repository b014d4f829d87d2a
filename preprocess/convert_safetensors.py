"""A fairseq language model as one safetensors file, and back.

    python preprocess/convert_safetensors.py checkpoint.pt model.safetensors [--half]
    python preprocess/convert_safetensors.py model.safetensors checkpoint.pt

fairseq's checkpoints are pickles with the optimizer's state in them. The safetensors file holds the weights and, as
JSON in its header, the model's configuration: no code, a third of the size or, in half precision, a sixth. What comes
back is a checkpoint (in single precision) that every fairseq command reads.
"""

import argparse
import json
import os
import sys

import torch
from fairseq import checkpoint_utils
from omegaconf import OmegaConf
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def to_safetensors(checkpoint: str, path: str, half: bool = False) -> None:
    """Write the weights and the model configuration of a fairseq checkpoint.

    Matrices that are one (tied embeddings; fairseq's half precision stores them twice) are written once; with ``half``
    all floating-point tensors as float16.
    """
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
    save_file(weights, path + ".part", metadata=metadata)
    os.replace(path + ".part", path)


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
    state = {
        "args": None,
        "cfg": {"task": {"_name": "language_modeling"}, "model": json.loads(metadata["model"])},
        "model": weights,
        # What fairseq expects to find in any checkpoint.
        "optimizer_history": [{"optimizer_name": "none", "lr_scheduler_state": {}, "num_updates": 0}],
        "extra_state": {"train_iterator": {"epoch": 1}},
    }
    torch.save(state, checkpoint + ".part")
    os.replace(checkpoint + ".part", checkpoint)


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

"""Measure whether a backbone copies: its loss on a random sequence that is repeated three times in its window.

A memory helps a model that predicts the continuation of a name when the name occurs again. Such a model is surprised by
the first copy of a random sequence, but not by the second. If a model cannot copy within its window, its keys hold
nothing that is worth searching for further back.

    python -m examples.quickstart.copying --path BACKBONE.pt --data DATA [--window 256]
"""

import argparse
import os
from typing import List

import torch
from fairseq.data import Dictionary
from torch import Tensor

import longmem_fairseq  # noqa: F401  (registers the models)
from longmem_fairseq.backbones.base import Backbone
from longmem_fairseq.backbones.loading import load_backbone


def random_copies(dictionary: Dictionary, length: int, copies: int, rows: int, seed: int) -> Tensor:
    """Draw random sequences and repeat each of them behind an end-of-sentence.

    Args:
        dictionary: Dictionary whose symbols are drawn.
        length: Number of tokens in one copy.
        copies: Number of copies in each row.
        rows: Number of sequences.
        seed: Seed of the random numbers.

    Returns:
        Token ids, shape (rows, 1 + copies * length), int64.
    """
    generator = torch.Generator().manual_seed(seed)
    symbols = torch.randint(dictionary.nspecial, len(dictionary), (rows, length), generator=generator)
    return torch.cat([torch.full((rows, 1), dictionary.eos()), *[symbols] * copies], dim=1)


@torch.no_grad()
def copying_losses(
    backbone: Backbone, dictionary: Dictionary, window: int = 256, copies: int = 3, rows: int = 32, seed: int = 0
) -> List[float]:
    """Compute the mean cross-entropy, in nats, of each copy of random sequences.

    Args:
        backbone: Backbone to measure.
        dictionary: Dictionary of the backbone.
        window: Number of tokens in the window.
        copies: Number of copies in the window.
        rows: Number of sequences.
        seed: Seed of the random numbers.

    Returns:
        One loss for each copy, in order.
    """
    length = (window - 1) // copies
    tokens = random_copies(dictionary, length, copies, rows, seed)  # (B, 1 + T)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    device = backbone.device
    encoded = backbone.encode(inputs.to(device))
    logits = backbone.output(backbone.final_hidden(encoded)).float()  # (B, T, V)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")  # (B, T)
    return losses.view(rows, copies, length).mean(dim=(0, 2)).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.copying", description=__doc__.split("\n")[0])
    parser.add_argument("--path", required=True, help="checkpoint of the backbone")
    parser.add_argument("--data", required=True, help="directory that contains its dict.txt")
    parser.add_argument("--window", type=int, default=256, help="number of tokens in the window (default: %(default)s)")
    args = parser.parse_args()
    dictionary = Dictionary.load(os.path.join(args.data, "dict.txt"))
    losses = copying_losses(load_backbone(args.path, dictionary, memory_layer=0), dictionary, args.window)
    print("random sequence, loss in nats:", ", ".join(f"copy {i + 1}: {loss:.2f}" for i, loss in enumerate(losses)))


if __name__ == "__main__":
    main()

"""Does a backbone copy? Loss on a random sequence of symbols that is repeated three times in its window.

A memory is of use to a model that, having seen a name once, predicts its continuation when it begins again. Such a
model is surprised by the first copy of a random sequence and no longer by the second; the keys of one that is not
able to copy within its window hold nothing that is worth finding further back.

    python examples/quickstart/copying.py --path BACKBONE.pt --data DATA [--window 256]
"""

import argparse
import os
import sys

import torch
from fairseq.data import Dictionary

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", ".."))
import longmem_fairseq  # noqa: E402,F401  (registers the models)
from longmem_fairseq.backbones.loading import load_backbone  # noqa: E402


@torch.no_grad()
def copying_losses(backbone, dictionary, window: int = 256, copies: int = 3, rows: int = 32, seed: int = 0):
    """Mean cross-entropy (nats) of each copy of random sequences, list of ``copies`` floats."""
    generator = torch.Generator().manual_seed(seed)
    length = (window - 1) // copies
    symbols = torch.randint(dictionary.nspecial, len(dictionary), (rows, length), generator=generator)
    device = backbone.decoder.embed_tokens.weight.device
    tokens = torch.cat([torch.full((rows, 1), dictionary.eos()), *[symbols] * copies], dim=1).to(device)  # (B, T)
    x = backbone(tokens[:, :-1]).hidden[-1]
    if backbone.decoder.layer_norm is not None:
        x = backbone.decoder.layer_norm(x)
    logits = backbone.output_layer(x).float().transpose(0, 1)  # (B, T, V)
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # (B, T)
    return losses.view(rows, copies, length).mean(dim=(0, 2)).tolist()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--path", required=True, help="checkpoint of the backbone")
    parser.add_argument("--data", required=True, help="folder with its dict.txt")
    parser.add_argument("--window", type=int, default=256, help="tokens of the window (default %(default)s)")
    args = parser.parse_args()
    dictionary = Dictionary.load(os.path.join(args.data, "dict.txt"))
    losses = copying_losses(load_backbone(args.path, dictionary, memory_layer=0), dictionary, args.window)
    print("random sequence, loss in nats:", ", ".join(f"copy {i + 1}: {loss:.2f}" for i, loss in enumerate(losses)))


if __name__ == "__main__":
    main()

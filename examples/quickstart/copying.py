"""Measure whether a backbone copies, and which of its layers do.

A memory helps a model that predicts the continuation of a name when the name occurs again. Such a model is surprised by
the first copy of a random sequence, but not by the second. If a model cannot copy within its window, its keys hold
nothing that is worth searching for further back.

    python -m examples.quickstart.copying --path BACKBONE.pt --data DATA [--window 256] [--layers]

With ``--layers``, the memory is every layer in turn: the first copy of the sequence is remembered, and the heads of the
side layer, as they start from the layer's weights, search it with the tokens of the second copy. A head that copies
finds the token that follows the same token in the first copy. The layer whose best heads find it most often is a good
``--retrieval-layer-index``; if several layers have a head that finds it at least half of the time, they are a list to
try.
"""

import argparse
import os
from typing import List

import torch
from fairseq.data import Dictionary
from torch import Tensor
from tqdm import tqdm

import longmem_fairseq  # noqa: F401  (registers the models)
from longmem_fairseq.backbones.base import Backbone
from longmem_fairseq.backbones.loading import load_backbone
from longmem_fairseq.modules.query_groups import group_queries, ungroup
from longmem_fairseq.modules.side_layer import SideNetworkOptions

_BEST_HEADS = 3  # by whose mean layers are compared
_COPIES = 0.5  # share of the queries from which on a head copies


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
    losses = []
    for row in tokens[:, None]:  # one at a time: the logits of a large vocabulary are the most of the memory
        encoded = backbone.encode(row[:, :-1].to(backbone.device))
        logits = backbone.output(backbone.final_hidden(encoded)).float()[0]  # (T, V)
        losses.append(torch.nn.functional.cross_entropy(logits, row[0, 1:].to(backbone.device), reduction="none"))
    return torch.stack(losses).view(rows, copies, length).mean(dim=(0, 2)).tolist()


@torch.no_grad()
def copying_heads(
    backbone: Backbone, dictionary: Dictionary, window: int = 256, rows: int = 8, seed: int = 0
) -> Tensor:
    """Measure how often each head of each layer finds what follows the same token in an earlier copy.

    Args:
        backbone: Backbone to measure.
        dictionary: Dictionary of the backbone.
        window: Number of tokens in the window, which holds two copies.
        rows: Number of sequences.
        seed: Seed of the random numbers.

    Returns:
        Shares of the queries whose best key is the right one, shape (N, H), float32. By chance it is one of
        ``(window - 1) // 2`` keys.
    """
    length = (window - 1) // 2
    tokens = random_copies(dictionary, length, 2, rows, seed)[:, :-1].to(backbone.device)  # (B, 2 * length)
    hidden = backbone.encode(tokens).hidden
    # The first copy is at 1 to length; token i of the second copy follows at length + i, and token i + 1 answers it.
    answers = torch.arange(1, length, device=backbone.device)
    shares = []
    for number in tqdm(range(backbone.num_layers), desc="layers", leave=False, disable=None):
        layer = backbone.side_layer(reads_memory=True, options=SideNetworkOptions()).to(backbone.device).eval()
        layer.start_from(backbone.layers[number])
        keys, _ = backbone.memory_keys_and_values(hidden[number], number)  # (B, H_kv, T, d)
        recorder = _QueryRecorder()
        layer(hidden[number], torch.zeros_like(hidden[number]), recorder)
        queries = recorder.queries[:, :, length + 1 :].float()  # (B, H, length - 1, d)
        scores = group_queries(queries, keys.size(1)) @ keys[:, :, 1 : length + 1].float().mT
        best = ungroup(scores, queries.size(1)).argmax(dim=-1)  # (B, H, length - 1)
        shares.append((best == answers).float().mean(dim=(0, 2)))
    return torch.stack(shares)


class _QueryRecorder:
    """A memory reader that keeps the queries and reads nothing."""

    queries: Tensor

    def __call__(self, queries: Tensor, scaling: float):
        self.queries = queries
        return torch.zeros_like(queries), queries.new_zeros(queries.size(0), dtype=torch.bool)


def heads_table(shares: Tensor, reduction: int = 2) -> str:
    """Return the shares of :func:`copying_heads` as a table, and the layers to remember.

    Args:
        shares: Shares by layer and head, shape (N, H).
        reduction: Number of backbone layers per layer of the side network, R.

    Returns:
        One line a layer with its best heads first. The layer that the last line names is the best of those that a side
        layer starts from (m = R * s + 1); the line before names all of them that copy, where they are several.
    """
    best, heads = shares.sort(dim=1, descending=True)
    lines = ["layer  best heads (how often the nearest key is the one to copy)"]
    for number in range(len(shares)):
        parts = (f"{head}: {share:.1%}" for head, share in zip(heads[number].tolist(), best[number].tolist()))
        lines.append(f"{number:5}  " + ", ".join(list(parts)[:6]))
    fitting = [m for m in range(len(shares)) if reduction == 1 or m % reduction == 1]
    chosen = max(fitting, key=lambda m: float(best[m, :_BEST_HEADS].mean()))
    copying = [m for m in fitting if float(best[m, 0]) >= _COPIES]
    if len(copying) > 1:
        option = f"--retrieval-layer-index {','.join(map(str, copying))}"
        lines.append(f"{len(copying)} side layers start from layers that copy; try {option} too")
    lines.append(f"the side layer that starts from layer {chosen} copies best: --retrieval-layer-index {chosen}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.copying", description=__doc__.split("\n")[0])
    parser.add_argument("--path", required=True, help="checkpoint of the backbone")
    parser.add_argument("--data", required=True, help="directory that contains its dict.txt")
    parser.add_argument("--window", type=int, default=256, help="number of tokens in the window (default: %(default)s)")
    parser.add_argument("--layers", action="store_true", help="also show which layers and heads copy")
    args = parser.parse_args()
    dictionary = Dictionary.load(os.path.join(args.data, "dict.txt"))
    backbone = load_backbone(args.path, dictionary)
    losses = copying_losses(backbone, dictionary, args.window)
    print("random sequence, loss in nats:", ", ".join(f"copy {i + 1}: {loss:.2f}" for i, loss in enumerate(losses)))
    if args.layers:
        print(heads_table(copying_heads(backbone, dictionary, args.window)))


if __name__ == "__main__":
    main()

"""Synthetic documents of repeated random spans, as a further part (``train1``) of the pretraining data.

    python -m examples.pretrained.repetitions --data DATA [--tokens 2400000] [--seed 1]

A document consists of a few spans of random symbols (8 to 60 long) in random order, each repeated several times.
Nothing in it can be predicted except that a continuation seen once follows again, so a small share of such documents
teaches a small model to copy within the few minutes of its pretraining. fairseq reads ``train1`` together with
``train``.
"""

import argparse
import os

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder


def repetitions(rng: np.random.Generator, symbols: np.ndarray, length: int, eos: int) -> np.ndarray:
    """Draw one document.

    Args:
        rng: Source of the random numbers.
        symbols: Token ids to draw from, shape (symbols,), int64.
        length: Approximate number of tokens.
        eos: Token id of the end-of-sentence that ends the document.

    Returns:
        Token ids, shape (about length,), int64.
    """
    pieces, total = [], 0
    while total < length:
        spans = [rng.choice(symbols, rng.integers(8, 61)) for _ in range(rng.integers(1, 4))]
        order = rng.integers(0, len(spans), len(spans) * rng.integers(2, 5))
        pieces += [spans[i] for i in order]
        total += sum(len(spans[i]) for i in order)
    return np.concatenate([*pieces, [eos]])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m examples.pretrained.repetitions", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--data", required=True, help="directory that contains dict.txt, train.bin and train.idx")
    parser.add_argument("--tokens", type=int, default=2_400_000, help="total number of tokens (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of the random numbers (default: %(default)s)")
    args = parser.parse_args()
    dictionary = Dictionary.load(os.path.join(args.data, "dict.txt"))
    symbols = np.arange(dictionary.nspecial, len(dictionary))
    rng = np.random.default_rng(args.seed)
    prefix = os.path.join(args.data, "train1")
    builder = MMapIndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16 if len(dictionary) < 65500 else np.int32)
    written = 0
    while written < args.tokens:
        document = repetitions(rng, symbols, 4096, dictionary.eos())
        builder.add_item(torch.from_numpy(document))
        written += len(document)
    builder.finalize(prefix + ".idx")
    print(f"{written:,} tokens of repetitions in {prefix}.bin")


if __name__ == "__main__":
    main()

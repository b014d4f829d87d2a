"""Documents that state facts and ask for them later, as fairseq data of the shipped backbone's symbols.

    python examples/recall/facts.py --destdir DIR [--quick]

A fact is a pair of symbols, a *name* and a *value*, amid random filler. Later the name comes again, a *question*, and
its value is the answer. Names are unique in their document and values are drawn anew for every document, so weights
cannot know an answer: it has to be read from the document's past, at the one place that states it. The kinds of symbols
(1,500 names, 200 values, 32 fillers) are disjoint.

Training documents are dense, so that minutes suffice: 256 or 500 facts and nothing else, then four questions about each
amid filler. Test documents state one fact in 128 tokens over 60,000 tokens and then ask for all of them.
"""

import argparse
import os

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

SHIPPED = os.path.join(os.path.dirname(__file__), "..", "pretrained", "mini", "dict.txt")
KINDS = (1500, 200, 32)  # names, values, fillers
N_VALUES = KINDS[1]


def symbols(dictionary: Dictionary):
    """Names, values and fillers: disjoint arrays of symbols, int64."""
    shuffled = np.random.default_rng(0).permutation(np.arange(dictionary.nspecial, len(dictionary)))
    return np.split(shuffled[: sum(KINDS)], np.cumsum(KINDS)[:-1])


def spread(rng, facts: np.ndarray, length: int, fillers: np.ndarray) -> np.ndarray:
    """Facts (n, 2) at random places, in order, amid fillers: ``length`` tokens, or none but facts if they fill it."""
    places = np.sort(rng.choice(length // 2, len(facts), replace=False)) * 2
    tokens = rng.choice(fillers, length)
    tokens[places[:, None] + np.arange(2)] = facts
    return tokens


def document(rng, kinds, facts: int, stated_in: int, questions: int, asked_in: int, eos: int) -> np.ndarray:
    """One document: ``facts`` stated in so many tokens, ``questions`` asked in so many more, each fact's in turn."""
    names, values, fillers = kinds
    stated = np.stack([rng.choice(names, facts, replace=False), rng.choice(values, facts)], axis=1)  # (facts, 2)
    rounds = [rng.permutation(facts) for _ in range(-(-questions // facts))]
    asked = stated[np.concatenate(rounds)[:questions]]
    return np.concatenate([spread(rng, stated, stated_in, fillers), spread(rng, asked, asked_in, fillers), [eos]])


def questions_of(tokens: np.ndarray, names: np.ndarray):
    """Positions of the answers in a document, and tokens from each back to where the fact was stated."""
    first, answers, distances = {}, [], []
    for position in np.flatnonzero(np.isin(tokens, names)):
        fact = first.setdefault(int(tokens[position]), int(position))
        if fact != position:
            answers.append(int(position) + 1)
            distances.append(int(position) - fact)
    return np.array(answers, dtype=np.int64), np.array(distances, dtype=np.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--destdir", required=True)
    parser.add_argument("--quick", action="store_true", help="train on the shorter documents, and test on 8,192 tokens")
    args = parser.parse_args()
    os.makedirs(args.destdir, exist_ok=True)
    dictionary = Dictionary.load(SHIPPED)
    dictionary.save(os.path.join(args.destdir, "dict.txt"))
    kinds, eos = symbols(dictionary), dictionary.eos()
    long = (100, 6_144, 100, 2_048) if args.quick else (470, 60_000, 470, 4_096)
    once, again = (256, 512, 1_024, 2_048), (500, 1_000, 2_000, 8_000)
    kept = [once, once] if args.quick else [once, again]
    splits = {"train": kept * 100, "valid": kept, "test": [long] * 4}
    for seed, (split, shapes) in enumerate(splits.items()):
        rng = np.random.default_rng(seed + 1)
        prefix = os.path.join(args.destdir, split)
        builder = MMapIndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        for shape in shapes:
            builder.add_item(torch.from_numpy(document(rng, kinds, *shape, eos)))
        builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    main()

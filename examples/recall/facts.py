"""Documents that state facts and ask for them later, as fairseq data of the shipped backbone's symbols.

    python examples/recall/facts.py --destdir DIR [--quick]

A fact is four symbols, a *name* of two and a *value* of two, amid random filler. Later the name comes again, a
*question*, and its value is the answer. First names are unique in their document and values are drawn anew for every
document, so weights cannot know an answer: it has to be read from the document's past, at the one place that states
it. The kinds of symbols (1,500 first names, 400 family names, 200 for values, 1,500 fillers) are disjoint.

Training documents of 2,048 tokens are dense: 256 facts, then all of them again in another order, or 128 of them amid as
many fillers. Test documents state one fact in 64 tokens over 60,000 tokens and then ask for 512 of them, at all
distances.
"""

import argparse
import os

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

SHIPPED = os.path.join(os.path.dirname(__file__), "..", "pretrained", "mini", "dict.txt")
FACT = 4  # symbols: first name, family name, value, value
KINDS = (1500, 400, 200, 1500)  # first names, family names, values, fillers
N_VALUES = KINDS[2]


def symbols(dictionary: Dictionary):
    """First names, family names, values and fillers: disjoint arrays of symbols, int64."""
    shuffled = np.random.default_rng(0).permutation(np.arange(dictionary.nspecial, len(dictionary)))
    return np.split(shuffled[: sum(KINDS)], np.cumsum(KINDS)[:-1])


def spread(rng, facts: np.ndarray, length: int, fillers: np.ndarray) -> np.ndarray:
    """Facts (n, 4) at random places, in order, amid fillers: ``length`` tokens, or none but facts if they fill it."""
    places = np.sort(rng.choice(length // FACT, len(facts), replace=False)) * FACT
    tokens = rng.choice(fillers, length)
    tokens[places[:, None] + np.arange(FACT)] = facts
    return tokens


def document(rng, kinds, facts: int, stated_in: int, questions: int, asked_in: int, eos: int) -> np.ndarray:
    """One document: ``facts`` stated in so many tokens, ``questions`` of them asked in so many more."""
    first, family, values, fillers = kinds
    columns = [rng.choice(first, facts, replace=False), rng.choice(family, facts), *rng.choice(values, (2, facts))]
    stated = np.stack(columns, axis=1)  # (facts, 4)
    asked = stated[rng.choice(facts, questions, replace=False)]
    return np.concatenate([spread(rng, stated, stated_in, fillers), spread(rng, asked, asked_in, fillers), [eos]])


def questions_of(tokens: np.ndarray, names: np.ndarray):
    """Positions of the answers' first symbols in a document, and tokens from each back to where the fact stands."""
    first, answers, distances = {}, [], []
    for position in np.flatnonzero(np.isin(tokens, names)):
        fact = first.setdefault(int(tokens[position]), int(position))
        if fact != position:
            answers.append(int(position) + 2)
            distances.append(int(position) - fact)
    return np.array(answers, dtype=np.int64), np.array(distances, dtype=np.int64)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--destdir", required=True)
    parser.add_argument("--quick", action="store_true", help="test documents of 8,192 tokens instead of 64,096")
    args = parser.parse_args()
    os.makedirs(args.destdir, exist_ok=True)
    dictionary = Dictionary.load(SHIPPED)
    dictionary.save(os.path.join(args.destdir, "dict.txt"))
    kinds, eos = symbols(dictionary), dictionary.eos()
    long = (100, 6_144, 100, 2_048) if args.quick else (940, 60_000, 512, 4_096)
    dense, half = (256, 1_024, 256, 1_024), (128, 1_024, 128, 1_024)
    splits = {"train": [dense, half] * 320, "valid": [dense, half] * 2, "test": [long] * 4}
    for seed, (split, shapes) in enumerate(splits.items()):
        rng = np.random.default_rng(seed + 1)
        prefix = os.path.join(args.destdir, split)
        builder = MMapIndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        for shape in shapes:
            builder.add_item(torch.from_numpy(document(rng, kinds, *shape, eos)))
        builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    main()

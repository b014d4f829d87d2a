"""Documents that state facts and ask for them later, as fairseq data of the shipped backbone's symbols.

    python -m examples.recall.facts --destdir DIR [--quick]

A fact is a pair of symbols, a *name* and a *value*, in random filler. Later the name comes again, as a *question*, and
its value is the answer. Names are unique in their document and values are drawn for every document, so weights cannot
know an answer: it has to be read from the document's past, at the one place that states it. The kinds of symbols
(1,500 names, 200 values, 32 fillers) are disjoint.

Training documents are dense, so that minutes suffice: 256 or 500 facts without filler, then four questions about each
in filler. Test documents state one fact in 128 tokens over 60,000 tokens and then ask for all of them.
"""

import argparse
import os
from typing import List, Sequence, Tuple

import numpy as np
import torch
from fairseq.data import Dictionary
from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

SHIPPED = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "pretrained", "mini", "dict.txt")
KINDS = (1500, 200, 32)  # names, values, fillers
N_VALUES = KINDS[1]


def symbols(dictionary: Dictionary) -> List[np.ndarray]:
    """Choose names, values and fillers.

    Args:
        dictionary: Dictionary of the model.

    Returns:
        Token ids of names, values and fillers, disjoint, int64.
    """
    shuffled = np.random.default_rng(0).permutation(np.arange(dictionary.nspecial, len(dictionary)))
    return np.split(shuffled[: sum(KINDS)], np.cumsum(KINDS)[:-1])


def spread(rng: np.random.Generator, facts: np.ndarray, length: int, fillers: np.ndarray) -> np.ndarray:
    """Put facts at random places in filler, in order; without filler if they fill the length.

    Args:
        rng: Random generator.
        facts: Names and values, shape (n, 2), int64.
        length: Number of tokens.
        fillers: Token ids of the fillers.

    Returns:
        Token ids, shape (length,), int64.
    """
    places = np.sort(rng.choice(length // 2, len(facts), replace=False)) * 2
    tokens = rng.choice(fillers, length)
    tokens[places[:, None] + np.arange(2)] = facts
    return tokens


def document(
    rng: np.random.Generator,
    kinds: Sequence[np.ndarray],
    facts: int,
    stated_in: int,
    questions: int,
    queried_in: int,
    eos: int,
) -> np.ndarray:
    """Make one document; its questions go round all facts before one comes again.

    Args:
        rng: Random generator.
        kinds: Token ids of names, values and fillers.
        facts: Number of facts.
        stated_in: Number of tokens of the part that states the facts.
        questions: Number of questions.
        queried_in: Number of tokens of the part that has the questions.
        eos: Token id of end-of-sentence.

    Returns:
        Token ids, shape (stated_in + queried_in + 1,), int64.
    """
    names, values, fillers = kinds
    stated = np.stack([rng.choice(names, facts, replace=False), rng.choice(values, facts)], axis=1)  # (facts, 2)
    rounds = [rng.permutation(facts) for _ in range(-(-questions // facts))]
    repeated = stated[np.concatenate(rounds)[:questions]]
    return np.concatenate([spread(rng, stated, stated_in, fillers), spread(rng, repeated, queried_in, fillers), [eos]])


def questions_of(tokens: np.ndarray, names: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Find the questions of a document.

    Args:
        tokens: Token ids of the document, shape (length,).
        names: Token ids of the names.

    Returns:
        Positions of the answers, and numbers of tokens from each back to where its fact is stated, int64.
    """
    first, answers, distances = {}, [], []
    for position in np.flatnonzero(np.isin(tokens, names)):
        fact = first.setdefault(int(tokens[position]), int(position))
        if fact != position:
            answers.append(int(position) + 1)
            distances.append(int(position) - fact)
    return np.array(answers, dtype=np.int64), np.array(distances, dtype=np.int64)


def main():
    parser = argparse.ArgumentParser(prog="python -m examples.recall.facts", description=__doc__.split("\n")[0])
    parser.add_argument("--destdir", required=True, help="directory for the data")
    parser.add_argument("--quick", action="store_true", help="train on the shorter documents, and test on 8,192 tokens")
    args = parser.parse_args()
    os.makedirs(args.destdir, exist_ok=True)
    dictionary = Dictionary.load(SHIPPED)
    dictionary.save(os.path.join(args.destdir, "dict.txt"))
    kinds, eos = symbols(dictionary), dictionary.eos()
    # Facts, tokens that state them, questions, tokens that ask them.
    long = (100, 6_144, 100, 2_048) if args.quick else (470, 60_000, 470, 4_096)
    once, again = (256, 512, 1_024, 2_048), (500, 1_000, 2_000, 8_000)
    shapes = [once, once] if args.quick else [once, again]
    splits = {"train": shapes * 100, "valid": shapes, "test": [long] * 4}
    for seed, (split, documents) in enumerate(splits.items()):
        rng = np.random.default_rng(seed + 1)
        prefix = os.path.join(args.destdir, split)
        builder = MMapIndexedDatasetBuilder(prefix + ".bin", dtype=np.uint16)
        for shape in documents:
            builder.add_item(torch.from_numpy(document(rng, kinds, *shape, eos)))
        builder.finalize(prefix + ".idx")


if __name__ == "__main__":
    main()

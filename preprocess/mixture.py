"""A mixture of subsets with a token budget: which documents of a collection to keep.

Each document has a random number in [0, 1) that follows from the seed and its place in the input alone, so it is kept
or not whatever the shard, the worker or the order it is read in. A survey of the collection (survey.py) tells how its
text is spread over these numbers, and so below which number the documents of a subset add up to its share.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from preprocess.errors import InputError
from preprocess.survey import Survey, draw


@dataclass(frozen=True)
class Selection:
    """Which documents to keep: those whose number is below their subset's threshold.

    Args:
        seed: of the numbers.
        thresholds: by subset; a subset that is not named is left out.
    """

    seed: int
    thresholds: dict[str, float]

    def keeps(self, key: str, subset: str) -> bool:
        """Whether the document with this key is part of the selection."""
        threshold = self.thresholds.get(subset, 0.0)
        return threshold > 0.0 and draw(self.seed, key, "keep") < threshold


def parse_weights(arguments: Sequence[str]) -> dict[str, float]:
    """``NAME=W`` arguments as a mapping; raises InputError for what is not a positive number."""
    weights = {}
    for argument in arguments:
        name, equals, number = argument.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not equals or not name or not (0 < weight < math.inf):
            raise InputError(f"--subset-weights {argument} is not NAME=W with a positive number W")
        if name in weights:
            raise InputError(f"--subset-weights names {name} twice")
        weights[name] = weight
    return weights


def plan(survey: Survey, weights: dict[str, float], budget: int | None, seed: int) -> tuple[Selection, dict]:
    """The documents that make the mixture.

    Args:
        survey: of the whole collection.
        weights: share of each subset in the mixture's tokens, up to a common factor; a subset that is not named is left
            out. Empty keeps the collection's own proportions.
        budget: tokens of the mixture; None takes as many as the smallest subset allows without repeating a document.
        seed: of the draw.

    Returns:
        The selection, and by subset what it is expected to give, for the manifest.

    Raises:
        InputError: a subset is unknown, or too small for its share.
    """
    known = survey.subsets
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise InputError(
            f"--subset-weights names {unknown[0]}, the --train documents are of {', '.join(sorted(known))}"
        )
    weights = weights or {name: subset.tokens for name, subset in known.items()}
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    scarce = min(shares, key=lambda name: known[name].tokens / shares[name])
    most = int(known[scarce].tokens / shares[scarce])
    if budget is None:
        budget = most
    elif budget > most:
        raise InputError(
            f"--token-budget {budget} is more than the {most} tokens that can be had without repeating documents of "
            f"{scarce} (about {known[scarce].tokens} tokens): lower it, or the weight of {scarce}"
        )
    thresholds, expected = {}, {}
    for name, share in sorted(shares.items()):
        subset = known[name]
        wanted = budget * share / subset.tokens_per_character  # characters
        thresholds[name] = threshold_for(subset.histogram, wanted)
        expected[name] = {"share": share, "available_tokens": subset.tokens, "threshold": thresholds[name]}
    return Selection(seed, thresholds), {"token_budget": budget, "seed": seed, "subsets": expected}


def threshold_for(histogram: np.ndarray, wanted: float) -> float:
    """The number below which the characters in a ``histogram`` (BINS,) of documents' numbers add up to ``wanted``."""
    below = np.cumsum(histogram)
    if wanted >= below[-1]:
        return 1.0
    place = int(np.searchsorted(below, wanted, side="right"))
    inside = (wanted - (below[place - 1] if place else 0)) / histogram[place]
    return (place + inside) / len(histogram)

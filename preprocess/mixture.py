"""A mixture of subsets with a token budget: the thresholds below which documents are kept.

A survey of the collection (survey.py) has the histogram of its text over the documents' random numbers (selection.py),
and so the number below which the documents of a subset add up to its share.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from preprocess.document_source import DocumentSource
from preprocess.encoder_pool import EncoderPool
from preprocess.errors import InputError
from preprocess.package_modules import files
from preprocess.selection import Selection
from preprocess.survey import ENCODED_BYTES, Survey, read_survey, survey_identity


def parse_weights(arguments: Sequence[str]) -> dict[str, float]:
    """Parse the weights of subsets.

    Args:
        arguments: Arguments of the form ``NAME=W``.

    Returns:
        The weight of each subset by its name.

    Raises:
        InputError: A weight is not a positive number, or a name appears twice.
    """
    weights = {}
    for argument in arguments:
        name, equals, number = files.printable(argument).rpartition("=")
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


def take_survey(sources: Sequence[DocumentSource], pool: EncoderPool, path: Path) -> Survey:
    """Survey a whole collection, or read the survey of it that was saved before.

    Args:
        sources: Files of the collection.
        pool: Processes that parse and encode.
        path: Path of the file to read or write; another shard's process may be writing it at the same time.

    Returns:
        The survey.

    Raises:
        InputError: The file holds something else, or a document is bad.
    """
    identity = survey_identity(sources, pool.fingerprint, pool.settings.seed)
    if path.exists():
        return read_survey(path, identity)
    survey = Survey()
    rate = ENCODED_BYTES / max(1, sum(source.size for source in sources))
    for part, _ in pool.work("survey", sources, "survey", rate):
        survey.add(part)
    files.write_text(path, json.dumps({"identity": identity, "subsets": survey.to_json()}))
    return survey


def plan(survey: Survey, weights: dict[str, float], budget: int | None, seed: int) -> tuple[Selection, dict]:
    """Select the documents of a mixture.

    Args:
        survey: Survey of the whole collection.
        weights: Share of each subset in the mixture's tokens, up to a common factor; other subsets are left out. If
            empty, all subsets in the collection's proportions.
        budget: Number of tokens in the mixture; if None, as many as the scarcest subset allows without repeating a
            document.
        seed: Seed of all random choices.

    Returns:
        The selection, and a description of the mixture for the manifest.

    Raises:
        InputError: A subset is unknown, or too small for its share.
    """
    subsets = survey.subsets
    unknown = sorted(set(weights) - set(subsets))
    if unknown:
        raise InputError(
            f"--subset-weights names {unknown[0]}, the --train documents are of {', '.join(sorted(subsets))}"
        )
    weights = weights or {name: subset.tokens for name, subset in subsets.items()}
    total = sum(weights.values())
    shares = {name: weight / total for name, weight in weights.items()}
    scarcest = min(shares, key=lambda name: subsets[name].tokens / shares[name])
    limit = int(subsets[scarcest].tokens / shares[scarcest])
    if budget is None:
        budget = limit
    elif budget > limit:
        raise InputError(
            f"--token-budget {budget} is more than the {limit} tokens that are available without repeating documents "
            f"of {scarcest} (about {subsets[scarcest].tokens} tokens): lower it, or the weight of {scarcest}"
        )
    thresholds, described = {}, {}
    for name, share in sorted(shares.items()):
        subset = subsets[name]
        thresholds[name] = threshold_for(subset.histogram, budget * share / subset.tokens_per_character)
        described[name] = {"share": share, "available_tokens": subset.tokens, "threshold": thresholds[name]}
    return Selection(seed, thresholds), {"token_budget": budget, "seed": seed, "subsets": described}


def threshold_for(histogram: np.ndarray, characters: float) -> float:
    """Find the threshold below which documents add up to a number of characters.

    Args:
        histogram: Characters by the random number of their document, shape (BINS,), int64.
        characters: Number of characters to keep.

    Returns:
        A threshold in (0, 1], linear within a bin.
    """
    below = np.cumsum(histogram)
    if characters >= below[-1]:
        return 1.0
    place = int(np.searchsorted(below, characters, side="right"))
    inside = (characters - (below[place - 1] if place else 0)) / histogram[place]
    return (place + inside) / len(histogram)

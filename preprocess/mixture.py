"""A mixture of subsets with a token budget: which documents of a collection to keep.

Each document has a random number in [0, 1) that follows from the seed and its place in the input alone, so it is kept
or not whatever the shard, the worker or the order it is read in. The collection is read once to measure it
(``Survey``): characters by subset, tokens per character from a sample, and how the characters are spread over the
numbers. From that, ``plan`` finds the number below which the documents of a subset add up to its share of the budget.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preprocess.documents import Parsed, Source
from preprocess.errors import InputError

BINS = 1 << 14  # of the documents' numbers
WINDOW = 2048  # characters of a passage that is encoded to know the tokens per character
SURVEY_BYTES = 64_000_000  # smaller collections are encoded whole, so the tokens per character are exact


def draw(seed: int, key: str, purpose: str) -> float:
    """The number in [0, 1) that belongs to a document's ``key``; independent for each ``purpose``."""
    digest = hashlib.blake2b(f"{seed}\0{purpose}\0{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


@dataclass
class SubsetSurvey:
    """What is known of one subset."""

    documents: int = 0
    characters: int = 0
    sampled_characters: int = 0
    sampled_tokens: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))  # (BINS,) characters

    @property
    def tokens_per_character(self) -> float:
        """Including the end-of-document symbol of each document."""
        return self.sampled_tokens / self.sampled_characters + self.documents / self.characters

    @property
    def tokens(self) -> int:
        """An estimate of the tokens in the subset."""
        return round(self.characters * self.tokens_per_character)


@dataclass
class SurveyPart:
    """The survey of one block, by subset."""

    counts: dict[str, tuple[int, int]]  # documents, characters
    bins: dict[str, dict[int, int]]  # bin: characters; a block touches few of them
    samples: dict[str, tuple[int, int]]  # characters, tokens

    @classmethod
    def of(cls, parsed: Parsed, tokenizer, seed: int, rate: float) -> "SurveyPart":
        """Measure the documents of a block, encoding about ``rate`` of them but at least one window of each subset."""
        texts: dict[str, list[str]] = {}
        bins: dict[str, dict[int, int]] = {}
        for key, document in zip(parsed.keys, parsed.documents, strict=True):
            texts.setdefault(document.subset, []).append(document.text)
            place = int(draw(seed, key, "keep") * BINS)
            found = bins.setdefault(document.subset, {})
            found[place] = found.get(place, 0) + len(document.text)
        samples = {}
        for subset, its_texts in texts.items():
            windows = its_texts if rate >= 1 else _windows(its_texts, rate, draw(seed, parsed.keys[0], subset))
            samples[subset] = sum(map(len, windows)), sum(len(tokenizer.encode_array(text)) for text in windows)
        counts = {subset: (len(its_texts), sum(map(len, its_texts))) for subset, its_texts in texts.items()}
        return cls(counts, bins, samples)


def _windows(texts: list[str], rate: float, offset: float) -> list[str]:
    """Windows at equal distances in the concatenated ``texts``, the first where ``offset`` in [0, 1) says."""
    ends = np.cumsum([len(text) for text in texts])
    distance = min(WINDOW / rate, ends[-1])
    starts = (np.arange(int(ends[-1] / distance)) + offset) * distance
    windows = []
    for start, place in zip(starts.astype(int), np.searchsorted(ends, starts, side="right"), strict=True):
        within = start - (ends[place] - len(texts[place]))
        windows.append(texts[place][within : within + WINDOW])
    return windows


class Survey:
    """The measured collection: ``subsets`` by name."""

    def __init__(self):
        self.subsets: dict[str, SubsetSurvey] = {}

    def add(self, part: SurveyPart) -> None:
        """Add the survey of a block."""
        for name, (documents, characters) in part.counts.items():
            subset = self.subsets.setdefault(name, SubsetSurvey())
            subset.documents += documents
            subset.characters += characters
            subset.sampled_characters += part.samples[name][0]
            subset.sampled_tokens += part.samples[name][1]
            for place, length in part.bins[name].items():
                subset.histogram[place] += length

    def to_json(self) -> dict:
        return {
            name: {**vars(subset), "histogram": subset.histogram.tolist()}
            for name, subset in sorted(self.subsets.items())
        }

    @classmethod
    def from_json(cls, record: dict) -> "Survey":
        survey = cls()
        for name, fields in record.items():
            survey.subsets[name] = SubsetSurvey(
                **{**fields, "histogram": np.array(fields["histogram"], dtype=np.int64)}
            )
        return survey


def survey_identity(sources: Sequence[Source], tokenizer_fingerprint: str, seed: int) -> str:
    """Tells whether a survey belongs to these files, tokenizer and seed, on whatever machine it was made."""
    files = [[source.subset, source.name, source.size] for source in sources]
    return hashlib.sha256(json.dumps([files, tokenizer_fingerprint, seed]).encode()).hexdigest()


def read_survey(path: Path, identity: str) -> Survey:
    """A saved survey; raises InputError if it is damaged or of another collection."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        found, subsets = record["identity"], record["subsets"]
        survey = Survey.from_json(subsets)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"--survey {path} cannot be read ({error}): delete it and run again to make it anew") from None
    if found != identity:
        raise InputError(f"--survey {path} was made from other --train files, tokenizer or --seed: name another file")
    return survey


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

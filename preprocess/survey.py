"""The contents of a collection by subset, measured in one reading: needed to make a mixture of it.

Documents and characters are counted, and how the characters are spread over the documents' random numbers, by which a
mixture chooses. The tokens are estimated from a sample, or counted where the collection is small.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, field
from pathlib import Path

import numpy as np

from preprocess.blocks import ParsedBlock
from preprocess.document_source import DocumentFormat, DocumentSource
from preprocess.errors import InputError
from preprocess.package_modules import files
from preprocess.selection import draw
from preprocess.tokenizer import Tokenizer

BINS = 1 << 14  # of the documents' random numbers
WINDOW = 2048  # characters of a passage that is encoded to estimate the tokens per character
ENCODED_BYTES = 64_000_000  # of a collection that are encoded, about; all of a smaller one


@dataclass
class SubsetSurvey:
    """The measurements of one subset.

    Args:
        documents: Number of documents.
        characters: Number of characters.
        sampled_characters: Number of characters in the sample.
        sampled_tokens: Number of tokens in the sample, without end-of-document symbols.
        histogram: Characters by the random number of their document, shape (BINS,), int64.
    """

    documents: int = 0
    characters: int = 0
    sampled_characters: int = 0
    sampled_tokens: int = 0
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(BINS, np.int64))

    @property
    def tokens_per_character(self) -> float:
        """Return the tokens per character, with the end-of-document symbol of each document."""
        return self.sampled_tokens / self.sampled_characters + self.documents / self.characters

    @property
    def tokens(self) -> int:
        """Return an estimate of the tokens in the subset."""
        return round(self.characters * self.tokens_per_character)


@dataclass
class SurveyPart:
    """The survey of one block, by subset.

    Args:
        counts: Number of documents and of characters.
        bins: Characters by bin of the histogram; a block touches few bins.
        samples: Number of characters and of tokens in the sample.
    """

    counts: dict[str, tuple[int, int]]
    bins: dict[str, dict[int, int]]
    samples: dict[str, tuple[int, int]]

    @classmethod
    def of(cls, parsed: ParsedBlock, tokenizer: Tokenizer, seed: int, rate: float) -> SurveyPart:
        """Measure the documents of a block.

        Args:
            parsed: The documents of the block.
            tokenizer: Tokenizer that encodes the sample.
            seed: Seed of all random choices.
            rate: Fraction of the text to encode, about; at least one window of each subset is encoded.

        Returns:
            The survey of the block.
        """
        texts: dict[str, list[str]] = {}
        bins: dict[str, dict[int, int]] = {}
        for key, document in zip(parsed.keys, parsed.documents):
            texts.setdefault(document.subset, []).append(document.text)
            place = int(draw(seed, key, "keep") * BINS)
            characters = bins.setdefault(document.subset, {})
            characters[place] = characters.get(place, 0) + len(document.text)
        counts, samples = {}, {}
        for subset, subset_texts in texts.items():
            counts[subset] = len(subset_texts), sum(map(len, subset_texts))
            windows = subset_texts
            if rate < 1:
                windows = _windows(subset_texts, rate, draw(seed, parsed.keys[0], subset))
            samples[subset] = sum(map(len, windows)), sum(map(len, tokenizer.encode_arrays(windows)))
        return cls(counts, bins, samples)


def _windows(texts: list[str], rate: float, offset: float) -> list[str]:
    """Cut windows at equal distances from the concatenated texts, the first at ``offset``, a fraction in [0, 1)."""
    ends = np.cumsum([len(text) for text in texts])
    distance = min(WINDOW / rate, ends[-1])
    starts = (np.arange(int(ends[-1] / distance)) + offset) * distance
    windows = []
    for start, place in zip(starts.astype(int), np.searchsorted(ends, starts, side="right")):
        within = start - (ends[place] - len(texts[place]))
        windows.append(texts[place][within : within + WINDOW])
    return windows


class Survey:
    """The survey of a collection; ``subsets`` maps the name of each subset to its measurements."""

    def __init__(self):
        self.subsets: dict[str, SubsetSurvey] = {}

    def add(self, part: SurveyPart) -> None:
        """Add the survey of a block.

        Args:
            part: Survey of the block.
        """
        for name, (documents, characters) in part.counts.items():
            subset = self.subsets.setdefault(name, SubsetSurvey())
            subset.documents += documents
            subset.characters += characters
            subset.sampled_characters += part.samples[name][0]
            subset.sampled_tokens += part.samples[name][1]
            for place, length in part.bins[name].items():
                subset.histogram[place] += length

    def to_json(self) -> dict:
        """Return the survey as plain JSON types."""
        return {
            name: {**vars(subset), "histogram": subset.histogram.tolist()}
            for name, subset in sorted(self.subsets.items())
        }

    @classmethod
    def from_json(cls, record: dict) -> Survey:
        """Rebuild a survey.

        Args:
            record: Value returned by :meth:`to_json`.

        Returns:
            The survey.

        Raises:
            ValueError: A measurement is not a number that a survey can have.
        """
        survey = cls()
        for name, fields in record.items():
            histogram = np.array(fields["histogram"], dtype=np.int64)
            subset = survey.subsets[name] = SubsetSurvey(**{**fields, "histogram": histogram})
            counts = [subset.documents, subset.characters, subset.sampled_characters, subset.sampled_tokens + 1]
            if histogram.shape != (BINS,) or histogram.min() < 0 or set(map(type, counts)) != {int} or min(counts) < 1:
                raise ValueError(f"the measurements of {name} are not positive numbers and a histogram of {BINS} bins")
        return survey


def survey_identity(sources: Sequence[DocumentSource], tokenizer_fingerprint: str, seed: int) -> str:
    """Identify the survey of a collection, whatever machine it was made on.

    Args:
        sources: Files of the collection.
        tokenizer_fingerprint: Fingerprint of the tokenizer.
        seed: Seed of all random choices.

    Returns:
        A SHA-256 in hexadecimal.
    """
    entries = [[source.subset, source.name, source.size] for source in sources]
    marks = [astuple(source.format) for source in sources[:1] if source.format != DocumentFormat()]
    return hashlib.sha256(json.dumps([entries, tokenizer_fingerprint, seed, *marks]).encode()).hexdigest()


def read_survey(path: Path, identity: str) -> Survey:
    """Read a saved survey.

    Args:
        path: Path of the file.
        identity: Expected :func:`survey_identity`.

    Returns:
        The survey.

    Raises:
        InputError: The file is damaged, or the survey of another collection.
    """
    try:
        record = files.read_json(path)
        saved_identity = record["identity"]
        survey = Survey.from_json(record["subsets"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"--survey {path} cannot be read ({error}): delete it and run again to measure again"
        ) from None
    if saved_identity != identity:
        raise InputError(f"--survey {path} was made from other --train files, tokenizer or --seed: name another file")
    return survey

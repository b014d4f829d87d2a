"""What a collection holds, by subset, from one reading: needed to make a mixture of it.

Counted are documents and characters, and how the characters are spread over the documents' random numbers, by which a
mixture chooses. The tokens are estimated from a sample, or counted where the collection is small.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from preprocess.documents import Parsed, Source
from preprocess.errors import InputError

BINS = 1 << 14  # of the documents' numbers
WINDOW = 2048  # characters of a passage that is encoded to know the tokens per character
ENCODED_BYTES = 64_000_000  # about so much is encoded; of smaller collections, all


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
        for key, document in zip(parsed.keys, parsed.documents):
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
    for start, place in zip(starts.astype(int), np.searchsorted(ends, starts, side="right")):
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


def take_survey(sources: Sequence[Source], pool, path: Path) -> Survey:
    """Read the whole collection, or the survey of it that was saved in ``path`` before.

    Args:
        sources: the collection.
        pool: an ``EncoderPool``.
        path: where to save it; another shard's process may be doing the same.

    Raises:
        InputError: ``path`` holds something else, or a document is bad.
    """
    identity = survey_identity(sources, pool.fingerprint, pool.settings.seed)
    if path.exists():
        return read_survey(path, identity)
    survey = Survey()
    rate = ENCODED_BYTES / max(1, sum(source.size for source in sources))
    for part, _ in pool.work("survey", sources, "survey", rate):
        survey.add(part)
    temporary = Path(f"{path}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps({"identity": identity, "subsets": survey.to_json()}), encoding="utf-8")
    os.replace(temporary, path)
    return survey

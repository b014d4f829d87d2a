"""Rare words and names in a text: a memory may know more about them than the model does."""

import re
from collections import Counter
from typing import Iterable, List, NamedTuple

import numpy as np

# Kinds of words. "again": the word occurred earlier in the document.
OTHER, RARE, RARE_AGAIN, NAME, NAME_AGAIN = range(5)
KINDS = ("other", "rare words, first time", "rare words, again", "names, first time", "names, again")
MOST = 5  # occurrences in the reference: a word with more is not rare

_WORD = re.compile(r"[^\W\d_]+(?:['\u2019-][^\W\d_]+)*")
_OPENING = r"[\"'\u201c\u2018(\[_*]*"
# Between two words: the end of a sentence or of a paragraph, with quotation marks around it, or a dash.
_SENTENCE_END = re.compile(rf"[.!?:\u2026][\"'\u201d\u2019)\]]*\s*{_OPENING}$|\n\s*{_OPENING}$|--?\W*$")


class _Word(NamedTuple):
    """A word of a text.

    Attributes:
        start: Index of its first character.
        end: Index behind its last character.
        key: The word in lower case.
        capital: Whether it is written as a name is.
        inside: Whether it is written as a name is and does not start a sentence.
    """

    start: int
    end: int
    key: str
    capital: bool
    inside: bool


def count_words(texts: Iterable[str]) -> Counter:
    """Count how often each word, in lower case, occurs in some texts."""
    counts: Counter = Counter()
    for text in texts:
        counts.update(word.lower() for word in _WORD.findall(text))
    return counts


def kinds_of_characters(text: str, reference: Counter) -> np.ndarray:
    """Return the kind of the word that each character belongs to.

    A *name* is a capitalized word of two letters or more that occurs inside a sentence at least once and never in lower
    case. A *rare* word is any other word with at most five occurrences in the reference.

    Args:
        text: Text of a document.
        reference: Counts of the words of other texts.

    Returns:
        Kinds, shape (characters,), uint8; OTHER between words.
    """
    words = _words(text)
    lower = {word.key for word in words if text[word.start].islower()}
    names = {word.key for word in words if word.capital and word.inside} - lower
    kinds, seen = np.zeros(len(text), dtype=np.uint8), set()
    for word in words:
        again = word.key in seen
        seen.add(word.key)
        if word.capital and word.key in names:
            kinds[word.start : word.end] = NAME_AGAIN if again else NAME
        elif reference[word.key] <= MOST:
            kinds[word.start : word.end] = RARE_AGAIN if again else RARE
    return kinds


def _words(text: str) -> List[_Word]:
    words, before = [], 0
    for match in _WORD.finditer(text):
        word, start = match.group(), match.start()
        capital = len(word) > 1 and word[0].isupper() and any(map(str.islower, word))
        # Only the text between the last word and this one can end a sentence.
        inside = capital and not _SENTENCE_END.search(text[before:start]) if before else False
        words.append(_Word(start, match.end(), word.lower(), capital, inside))
        before = match.end()
    return words

"""Suffix identification (ChapterBreak): which of six beginnings of chapters follows the chapters so far?

The answer is the candidate with the likeliest tokens behind the context (Sun, Thai and Iyyer, 2022).
"""

import glob
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from torch import Tensor

from ..files import parse_json
from .base import Evaluation
from .command_line import name_of
from .records import read_file, text_of, texts_of
from .reporting.finished_items import digest
from .reporting.statistic import ACCURACY
from .reporting.system_scores import SystemScores
from .reporting.table import Table

ALL = "all"
LENGTHS = (256, 1024, 4096, 16384, 65536)
_BREAK = "\n\n"  # between the context and a suffix


class ChapterBoundary(NamedTuple):
    """A chapter boundary with candidates for what follows.

    Attributes:
        name: Name of the boundary.
        work: Name of the work that it is from.
        context: Text before the boundary.
        suffixes: The true beginning of the next chapter, then false ones.
    """

    name: str
    work: str
    context: str
    suffixes: List[str]


def read_boundaries(path: str, books: Optional[Sequence[str]] = None) -> List[ChapterBoundary]:
    """Read the chapter boundaries of a file: the official JSON, or JSON lines that refer to books.

    Args:
        path: Path of a file ``{split: {work: [{"ctx", "pos", "negs"}]}}``, or of lines of ``book``, ``ctx_end``,
            ``gold`` and ``negatives``.
        books: Paths of the directories of the books that lines refer to; by default those beside the file's own.

    Raises:
        ValueError: The file has neither layout.
        FileNotFoundError: A book is missing.
    """
    text = read_file(path)
    try:
        if path.endswith(".jsonl"):
            return _from_books(list(map(parse_json, filter(None, text.split("\n")))), path, books)
        boundaries = []
        for split, works in parse_json(text).items():
            for work, rows in works.items():
                for i, row in enumerate(rows):
                    suffixes = [text_of(row["pos"]), *texts_of(row["negs"])]
                    boundaries.append(ChapterBoundary(f"{split} {work} {i}", work, text_of(row["ctx"]), suffixes))
        return boundaries
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has neither the official layout (split, work, ctx, pos, negs) nor lines of book, ctx_end, gold "
            "and negatives"
        ) from error


def _from_books(rows: List[Dict[str, Any]], path: str, books: Optional[Sequence[str]]) -> List[ChapterBoundary]:
    texts: Dict[str, str] = {}
    siblings = os.path.join(os.path.dirname(os.path.abspath(path)), "..", "*")
    for name in {text_of(row["book"]) for row in rows}:
        matches = [match for directory in books or [siblings] for match in glob.glob(os.path.join(directory, name))]
        if not matches:
            raise FileNotFoundError(f"{path} refers to {name}: name its directory with --books")
        texts[name] = read_file(matches[0])
    boundaries = []
    for row in rows:
        name, context = f"{row['book']} {row['boundary']}", texts[row["book"]][: row["ctx_end"]]
        suffixes = [text_of(row["gold"]), *texts_of(row["negatives"])]
        boundaries.append(ChapterBoundary(name, row["book"], context, suffixes))
    return boundaries


class ChapterBreak(Evaluation):
    """Score the true beginning of the next chapter against false ones."""

    name, title = "chapterbreak", "Identification of the next chapter's beginning"

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--data", required=True, metavar="FILE", help="the official JSON, or JSON lines (docs/evaluation.md)"
        )
        parser.add_argument("--valid", metavar="FILE", help="the same, to tune the neural cache on its contexts")
        parser.add_argument(
            "--books",
            nargs="+",
            metavar="DIR",
            help="directories of the books that JSON lines refer to (default: those beside the file's own)",
        )
        parser.add_argument(
            "--lengths",
            nargs="+",
            default=[*map(str, LENGTHS), ALL],
            metavar="N",
            help="tokens of context, 'all' for everything (256 1024 4096 16384 65536 all)",
        )
        parser.add_argument(
            "--suffix-tokens", type=int, default=128, metavar="N", help="tokens of a suffix that are scored (128)"
        )

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        invalid = [n for n in args.lengths if n != ALL and not (n.isdigit() and int(n))]
        if invalid:
            raise ValueError(f"--lengths {invalid[0]} is neither a number of tokens above 0 nor '{ALL}'")
        if not 0 < args.suffix_tokens < scorer.size:
            raise ValueError(
                f"--suffix-tokens {args.suffix_tokens} must be from 1 to {scorer.size - 1}, to fit into the window of "
                f"{scorer.size} tokens"
            )
        boundaries = read_boundaries(args.data, args.books)[: args.limit]
        self.boundaries = {boundary.name: boundary for boundary in boundaries}
        self.lengths = sorted((n for n in set(args.lengths) if n != ALL), key=int) + [ALL] * (ALL in args.lengths)

    def describe(self) -> Dict[str, Any]:
        return {
            "data": name_of(self.args.data),
            "data_sha256": digest([self.args.data]),
            "lengths": self.lengths,
            "suffix_tokens": self.args.suffix_tokens,
            "valid": None if self.args.valid is None else name_of(self.args.valid),
        }

    def tuning_documents(self) -> List[Tensor]:
        if self.args.valid is None:
            return []
        contexts: Dict[str, str] = {}  # the longest of each work
        for boundary in read_boundaries(self.args.valid, self.args.books):
            contexts[boundary.work] = max(contexts.get(boundary.work, ""), boundary.context, key=len)
        return [self.scorer.tokenizer.encode(context) for context in contexts.values()]

    def items(self) -> List[str]:
        return list(self.boundaries)

    def score(self, item: str) -> Dict[str, Any]:
        tokenizer, boundary = self.scorer.tokenizer, self.boundaries[item]
        context = tokenizer.encode(boundary.context + _BREAK)
        suffixes = [tokenizer.encode(text)[: self.args.suffix_tokens] for text in boundary.suffixes]
        used = {n: len(context) if n == ALL else min(int(n), len(context)) for n in self.lengths}
        scores = {}  # by number of tokens of context: lengths beyond a short context are scored once
        for length in used.values():
            if length not in scores:
                scores[length] = self._score(context[len(context) - length :], suffixes)
        return {"context_tokens": len(context), "scores": {n: scores[length] for n, length in used.items()}}

    def _score(self, context: Tensor, suffixes: List[Tensor]) -> Dict[str, List[float]]:
        """Return the mean log-probability of a token of each suffix by system."""
        room = max(map(len, suffixes))
        memorized = max(0, len(context) - (self.scorer.size - room))
        state = self.scorer.new_state(at_most=memorized)
        self.scorer.memorize(state, context[:memorized])
        rows = self.scorer.window(state, context[memorized:], room).score(suffixes)
        return {system: [round(float(row[system].mean()), 6) for row in rows] for system in self.scorer.systems}

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        by_length: Dict[str, Dict[str, SystemScores]] = {length: {} for length in self.lengths}
        by_work: Dict[str, Dict[str, SystemScores]] = {}
        for item, result in results.items():
            for length, scores in result["scores"].items():
                columns = [by_length[length]]
                if length == self.lengths[-1]:
                    columns.append(by_work.setdefault(self.boundaries[item].work, {}))
                for system, (true, *false) in scores.items():
                    for column in columns:
                        system_scores = column.setdefault(system, SystemScores({}, ACCURACY))
                        system_scores.items[item] = (float(true > max(false)), 1)
        return [
            Table("Accuracy by tokens of context", by_length, "lines"),
            Table(f"Accuracy by work, context {self.lengths[-1]}", by_work, None, upright=True),
        ]

    def notes(self) -> List[str]:
        boundaries = self.boundaries.values()
        candidates = sorted({len(boundary.suffixes) for boundary in boundaries})
        chance = ", ".join(f"{100 / n:.1f} %" for n in candidates)
        return [
            f"{len(boundaries):,} chapter boundaries of {len({boundary.work for boundary in boundaries}):,} works in "
            f"{name_of(self.args.data)}; {' or '.join(map(str, candidates))} candidates each (chance: {chance}).",
            f"Suffixes are scored up to {self.args.suffix_tokens} tokens, by the mean log-probability of a token, "
            "behind a paragraph break.",
            f"The window of {self.scorer.size} tokens holds the end of the context and the suffix; what is before is "
            "in the memory and the cache, and the backbone and memory off do not see it.",
        ]

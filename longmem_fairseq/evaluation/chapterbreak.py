"""Suffix identification (ChapterBreak): which of six beginnings of chapters follows the chapters so far?

The candidate whose tokens are the likeliest after the context is the answer (Sun, Thai and Iyyer, 2022).
"""

import glob
import json
import os
from typing import Any, Dict, List, NamedTuple, Optional, Sequence

from torch import Tensor

from .command import Evaluation, name_of
from .reporting.finished_items import digest
from .reporting.statistics import ACCURACY, Sample
from .reporting.table import Table

ALL = "all"
LENGTHS = (256, 1024, 4096, 16384, 65536)
_BREAK = "\n\n"  # between the context and a suffix


class Example(NamedTuple):
    """A chapter boundary.

    Attributes:
        name: of the example; work: what it is of.
        context: all before the boundary.
        suffixes: the true next beginning, then the false ones.
    """

    name: str
    work: str
    context: str
    suffixes: List[str]


def read_examples(path: str, books: Optional[Sequence[str]] = None) -> List[Example]:
    """The examples of a file: the official JSON, or JSON lines that refer to books.

    Args:
        path: ``{split: {work: [{"ctx", "pos", "negs"}]}}``, or lines of ``book``, ``ctx_end``, ``gold``, ``negatives``.
        books: directories of the books that lines refer to; by default those beside the file's own.

    Raises:
        ValueError: the file is of neither layout.
        FileNotFoundError: a book is missing.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read()
    try:
        if path.endswith(".jsonl"):
            return _by_reference(list(map(json.loads, text.splitlines())), path, books)
        return [
            Example(f"{split} {work} {i}", work, row["ctx"], [row["pos"], *row["negs"]])
            for split, works in json.loads(text).items()
            for work, rows in works.items()
            for i, row in enumerate(rows)
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} has neither the official layout (split, work, ctx, pos, negs) nor lines of book, ctx_end, gold "
            "and negatives"
        ) from error


def _by_reference(rows: List[Dict[str, Any]], path: str, books: Optional[Sequence[str]]) -> List[Example]:
    texts: Dict[str, str] = {}
    for name in {row["book"] for row in rows}:
        around = os.path.join(os.path.dirname(os.path.abspath(path)), "..", "*")
        found = [place for directory in books or [around] for place in glob.glob(os.path.join(directory, name))]
        if not found:
            raise FileNotFoundError(f"{path} refers to {name}: name its directory with --books")
        with open(found[0], encoding="utf-8", newline="") as file:
            texts[name] = file.read()
    return [
        Example(
            f"{row['book']} {row['boundary']}",
            row["book"],
            texts[row["book"]][: row["ctx_end"]],
            [row["gold"], *row["negatives"]],
        )
        for row in rows
    ]


class ChapterBreak(Evaluation):
    """Scores the true beginning of the next chapter against false ones."""

    name, title = "chapterbreak", "Identification of the next chapter's beginning"

    def add_arguments(self, parser) -> None:
        parser.add_argument("--data", required=True, metavar="FILE", help="the official JSON, or our JSON lines")
        parser.add_argument("--valid", metavar="FILE", help="for validation: the cache is tuned on its contexts")
        parser.add_argument(
            "--books", nargs="+", metavar="DIR", help="books that our JSON lines refer to (default: beside the file)"
        )
        parser.add_argument(
            "--lengths",
            nargs="+",
            default=[*map(str, LENGTHS), ALL],
            metavar="N",
            help="tokens of context, 'all' for everything (256 1024 4096 16384 65536 all)",
        )
        parser.add_argument("--suffix-tokens", type=int, default=128, metavar="N", help="tokens of a suffix that count")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        wrong = [n for n in args.lengths if n != ALL and not (n.isdigit() and int(n))]
        if wrong:
            raise ValueError(f"--lengths {wrong[0]} is neither a number of tokens above 0 nor '{ALL}'")
        if not 0 < args.suffix_tokens < scorer.size:
            raise ValueError(
                f"--suffix-tokens {args.suffix_tokens} must be from 1 to {scorer.size - 1}, to fit into the window of "
                f"{scorer.size} tokens"
            )
        self.examples = {example.name: example for example in read_examples(args.data, args.books)[: args.limit]}
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
        works: Dict[str, str] = {}
        for example in read_examples(self.args.valid, self.args.books):
            works[example.work] = max(works.get(example.work, ""), example.context, key=len)
        return [self.scorer.tokenizer.encode(context) for context in works.values()]

    def items(self) -> List[str]:
        return list(self.examples)

    def score(self, item: str) -> Dict[str, Any]:
        tokenizer, example = self.scorer.tokenizer, self.examples[item]
        context = tokenizer.encode(example.context + _BREAK)
        suffixes = [tokenizer.encode(text)[: self.args.suffix_tokens] for text in example.suffixes]
        room, found = max(map(len, suffixes)), {}
        for length in self.lengths:
            used = len(context) if length == ALL else min(int(length), len(context))
            if str(used) not in found:
                found[str(used)] = self._score(context[len(context) - used :], suffixes, room)
        used = {n: str(len(context) if n == ALL else min(int(n), len(context))) for n in self.lengths}
        return {"context_tokens": len(context), "scores": {length: found[used[length]] for length in self.lengths}}

    def _score(self, context: Tensor, suffixes: List[Tensor], room: int) -> Dict[str, List[float]]:
        """Mean log-probability of a token of each suffix by each system."""
        here = max(0, len(context) - (self.scorer.size - room))
        past = self.scorer.new_state(at_most=here)
        self.scorer.memorize(past, context[:here])
        rows = self.scorer.window(past, context[here:], room).score(suffixes)
        return {system: [round(float(row[system].mean()), 6) for row in rows] for system in self.scorer.systems}

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        by_length: Dict[str, Dict[str, Sample]] = {length: {} for length in self.lengths}
        by_work: Dict[str, Dict[str, Sample]] = {}
        for item, result in results.items():
            for length, scores in result["scores"].items():
                places = [by_length[length]]
                if length == self.lengths[-1]:
                    places.append(by_work.setdefault(self.examples[item].work, {}))
                for system, (true, *false) in scores.items():
                    for place in places:
                        sample = place.setdefault(system, Sample({}, ACCURACY))
                        sample.items[item] = (float(true > max(false)), 1)
        return [
            Table("Accuracy by tokens of context", by_length, "lines"),
            Table(f"Accuracy by work, context {self.lengths[-1]}", by_work, None, upright=True),
        ]

    def notes(self) -> List[str]:
        candidates = sorted({len(example.suffixes) for example in self.examples.values()})
        chance = ", ".join(f"{100 / n:.1f} %" for n in candidates)
        return [
            f"{len(self.examples):,} chapter boundaries of {len({e.work for e in self.examples.values()}):,} works in "
            f"{name_of(self.args.data)}; {' or '.join(map(str, candidates))} candidates each (chance: {chance}).",
            f"Suffixes count up to {self.args.suffix_tokens} tokens, by the mean log-probability of a token, after a "
            "paragraph break.",
            f"The window of {self.scorer.size} tokens holds the end of the context and the suffix; what is before is "
            "in the memory and the cache, and the backbone and memory off do not see it.",
        ]

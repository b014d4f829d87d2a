"""Language modeling of long documents: perplexity by length and by position, and that of rare words and names.

The first table has the lengths of the published tables (PG-22 and ArXiv).
"""

import hashlib
import math
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..data.text_meter import TextSize
from ..files import printable
from .base import Evaluation
from .command_line import add_memory_sizes, memory_sizes, name_of
from .reporting.statistic import PERPLEXITY
from .reporting.system_scores import SystemScores
from .reporting.table import Table, TextLoss, text_tables
from .scoring.document_stream import DocumentStream
from .scoring.systems import BACKBONE, OFF, with_cache, with_memory, with_sliding_window, with_window
from .words import KINDS, MOST, count_words, kinds_of_characters

LENGTHS = ((0, "< 5k"), (5e3, "5-10k"), (1e4, "10-100k"), (1e5, "100-500k"), (5e5, "500k-1M"), (1e6, "> 1M"))
POSITIONS = ((0, "0-1k"), (2**10, "1-4k"), (2**12, "4-16k"), (2**14, "16-64k"), (2**16, "64-256k"), (2**18, "> 256k"))
_BLOCK = 1024  # minimum number of tokens of an item

ReadTexts = Callable[[Sequence[str]], Iterable[Tuple[str, str]]]


class Book(NamedTuple):
    """An encoded document.

    Attributes:
        name: Name of the document.
        tokens: Token ids with the end-of-sentence, shape (length,), int64.
        sizes: Words and bytes of each block of its tokens; None where they are not known.
        kinds: Kind of the word that each token ends in, shape (length,), uint8; None where words cannot be located.
    """

    name: str
    tokens: Tensor
    sizes: Optional[List[TextSize]]
    kinds: Optional[np.ndarray]


class Books(Evaluation):
    """Score documents from start to end.

    Args:
        read_texts: Function that reads the (name, text) of the documents at some paths.
    """

    name, title = "books", "Language modeling of long documents"

    def __init__(self, read_texts: ReadTexts):
        self.read_texts = read_texts
        self.stream, self._position = None, (None, 0)

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--data",
            nargs="+",
            required=True,
            metavar="PATH",
            help="documents: text files, directories of text files, or JSON lines; also compressed",
        )
        parser.add_argument("--valid", nargs="+", metavar="PATH", help="documents to tune the neural cache on")
        parser.add_argument(
            "--reference",
            nargs="+",
            metavar="PATH",
            help="text that tells which words are rare, ideally the training data (default: the other documents)",
        )
        add_memory_sizes(parser)
        parser.add_argument(
            "--windows",
            nargs="*",
            type=int,
            metavar="N",
            help="tokens of longer windows of the backbone alone (default: the window it was trained with, if longer)",
        )
        parser.add_argument(
            "--sliding-windows",
            nargs="*",
            type=int,
            metavar="N",
            help="tokens of windows of the backbone alone that move by half of them, so that every token has at least "
            "N/2 before it, for twice the time of a window (default: --tokens-per-sample)",
        )
        parser.add_argument("--document-tokens", type=int, metavar="N", help="maximum number of tokens of a document")

    def prepare(self, args, scorer) -> None:
        self.scorer, self.args = scorer, args
        self.sizes = memory_sizes(args, scorer)
        if args.document_tokens is not None and args.document_tokens < 1:
            raise ValueError(f"--document-tokens {args.document_tokens} is less than 1: raise it")
        scorer.memory_size = self.sizes[-1]
        trained = scorer.backbone.trained_window or 0
        default = [trained] if trained > scorer.size and trained % scorer.size == 0 else []
        self.windows = default if args.windows is None else sorted(args.windows)
        default = [scorer.size] if scorer.size % 2 == 0 else []
        self.sliding = default if args.sliding_windows is None else sorted(args.sliding_windows)
        DocumentStream(scorer, self.sizes[:1], self.windows, self.sliding)  # refuses windows that do not fit
        self.block = math.lcm(scorer.size, *self.windows, *(window // 2 for window in self.sliding))
        self.block *= -(-_BLOCK // self.block)
        texts = list(self.read_texts(args.data))
        if len({name for name, _ in texts}) < len(texts):
            raise ValueError(f"--data has two documents of the name {_repeated_name(texts)}: rename one")
        self.digest = hashlib.sha256("".join(printable(name) + text for name, text in texts).encode()).hexdigest()
        reference = None if args.reference is None else count_words(text for _, text in self._reference())
        counts = {name: count_words([text]) for name, text in texts} if reference is None else {}
        total = sum(counts.values(), count_words([]))
        self.books = {
            name: self._encode(name, text, total - counts[name] if reference is None else reference)
            for name, text in texts[: args.limit]
        }
        self.located = all(book.kinds is not None for book in self.books.values())

    def _reference(self) -> Iterable[Tuple[str, str]]:
        texts = self.read_texts(self.args.reference)
        return tqdm(texts, desc="counting words", unit=" documents", leave=False, disable=None, delay=2)

    def _encode(self, name: str, text: str, reference) -> Book:
        tokenizer = self.scorer.tokenizer
        tokens = tokenizer.encode(text)
        ends = tokenizer.ends(text, tokens)
        kinds = None
        if ends is not None:
            kinds = np.append(kinds_of_characters(text, reference)[np.maximum(ends - 1, 0)], 0)
        tokens = torch.cat([tokens, torch.tensor([tokenizer.eos])])
        blocks = tokens[: self.args.document_tokens].split(self.block)
        return Book(name, tokens, tokenizer.measure(blocks), kinds)

    def describe(self) -> Dict[str, Any]:
        return {
            "data": [name_of(path) for path in self.args.data],
            "memory_sizes": self.sizes,
            "windows": self.windows,
            "sliding_windows": self.sliding,
            "reference": [name_of(path) for path in self.args.reference or []],
            "valid": [name_of(path) for path in self.args.valid or []],
            "data_sha256": self.digest,
        }

    def tuning_documents(self) -> List[Tensor]:
        return [self.scorer.tokenizer.encode(text) for _, text in self.read_texts(self.args.valid or [])]

    def items(self) -> List[str]:
        items = []
        for book in self.books.values():
            length = len(book.tokens[: self.args.document_tokens])
            for begin in range(0, length, self.block):
                items.append(f"{book.name}:{begin}-{min(begin + self.block, length)}")
        return items

    def score(self, item: str) -> Dict[str, Any]:
        name, begin, end = _parse(item)
        _, tokens, sizes, kinds = self.books[name]
        if self._position != (name, begin):  # the first block of a document, or where an earlier run stopped
            self.stream = DocumentStream(self.scorer, self.sizes, self.windows, self.sliding)
            self.stream.replay(tokens[:begin])
        block = tokens[begin:end]
        losses = {system: -x.double().numpy() for system, x in self.stream.read(block).items()}
        self._position = (name, end)
        result = {
            "tokens": len(block),
            "size": None if sizes is None else list(sizes[begin // self.block]),
            "loss": {system: float(x.sum()) for system, x in losses.items()},
        }
        for kind, title in enumerate(KINDS if kinds is not None else ()):
            here = kinds[begin:end] == kind
            if here.any():
                sums = {system: float(x[here].sum()) for system, x in losses.items()}
                result.setdefault("kinds", {})[title] = {"tokens": int(here.sum()), "loss": sums}
        return result

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        lengths: Dict[str, Dict[str, SystemScores]] = {"all": {}, **{title: {} for _, title in LENGTHS}}
        positions = {title: {} for _, title in POSITIONS}
        kinds = {title: {} for title in KINDS}
        documents = {name: {} for name in self.books}
        for item, result in results.items():
            name, begin, _ = _parse(item)
            columns = [
                lengths["all"],
                lengths[_bucket(LENGTHS, len(self.books[name].tokens))],
                positions[_bucket(POSITIONS, begin)],
                documents[name],
            ]
            for column in columns:
                _add(column, item, result)
            for title, part in result.get("kinds", {}).items():
                _add(kinds[title], item, part)
        last = self.sizes[-1]
        on, cache = with_memory(last), BACKBONE + with_cache(last)
        pairs = [
            (on, OFF),
            (on, BACKBONE),
            (cache, BACKBONE),
            (on, cache),
            (on + with_cache(last), cache),
            (on + with_cache(last), on),
            *((on, with_window(window)) for window in self.windows),
            *((on, with_sliding_window(window)) for window in self.sliding),
        ]
        text_losses = [TextLoss(item, result["loss"], result.get("size")) for item, result in results.items()]
        tables = []
        for title, columns, plot in (
            ("by length of the document", lengths, "bars"),
            ("by kind of word", kinds, "bars"),
            ("by position in the document", positions, "lines"),
            ("by document", documents, None),
        ):
            scored = {column: rows for column, rows in columns.items() if rows}
            if scored:
                tables.append(Table(f"Perplexity {title}", scored, plot, pairs, upright=columns is documents))
        return tables + text_tables("All documents", text_losses, pairs)

    def notes(self) -> List[str]:
        tokens = sum(len(book.tokens[: self.args.document_tokens]) for book in self.books.values())
        data, reference = (", ".join(map(name_of, paths or [])) for paths in (self.args.data, self.args.reference))
        words = (
            "Words: a name is capitalized inside a sentence and nowhere in lower case; a rare word occurs at most "
            f"{MOST} times in {reference or 'the other documents'}; 'again': it occurred earlier in the document."
        )
        return [
            f"{len(self.books):,} documents of {data}, {tokens:,} tokens with an end-of-sentence each; every token "
            f"is scored once, in segments of {self.scorer.size} tokens.",
            "Memory and cache of N tokens hold the document's last N tokens before the segment; a sliding window of N "
            "moves by N/2 tokens, so that every token has at least N/2 before it.",
            words if self.located else "Words could not be located: the tokenizer changes text.",
            f"Intervals: bootstrap over blocks of {self.block:,} tokens.",
        ]


def _add(rows: Dict[str, SystemScores], item: str, part: Dict[str, Any]) -> None:
    for system, loss in part["loss"].items():
        rows.setdefault(system, SystemScores({}, PERPLEXITY)).items[item] = (loss, part["tokens"])


def _bucket(buckets, value: float) -> str:
    return [title for begin, title in buckets if value >= begin][-1]


def _parse(item: str) -> Tuple[str, int, int]:
    """Return the document of an item, and where in it the block begins and ends."""
    name, place = item.rsplit(":", 1)
    begin, end = map(int, place.split("-"))
    return name, begin, end


def _repeated_name(texts) -> str:
    names = [name for name, _ in texts]
    return next(name for name in names if names.count(name) > 1)

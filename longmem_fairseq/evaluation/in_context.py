"""In-context learning: sentences are classified after demonstrations, some in the window and many in the memory."""

import csv
import json
import os
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from .command import Evaluation
from .reporting.finished_items import digest
from .reporting.statistics import ACCURACY, Sample
from .reporting.table import PAIRS, Table
from .scoring.systems import BACKBONE, OFF, ON
from .scoring.window import Continuation

REVIEW, INPUT = "Review: {text} Sentiment:", "Input: {text} Type:"
CONTENT_FREE = ("N/A", "[MASK]", "")  # of contextual calibration (Zhao et al., 2021)
CALIBRATED, MAJORITY = ", calibrated", "majority of the training set"
_TUNING_EXAMPLES = 400  # of each set


class Task(NamedTuple):
    """A data set: its template, its label words in the order of its codes, and its files in the original layout."""

    template: str
    labels: Tuple[str, ...]
    train: str
    test: str


_POLARITY, _DEGREES = ("negative", "positive"), ("terrible", "bad", "okay", "good", "great")
TASKS = {
    "sst2": Task(REVIEW, _POLARITY, "SST-2/train.tsv", "SST-2/dev.tsv"),
    "mr": Task(REVIEW, _POLARITY, "mr/train.csv", "mr/test.csv"),
    "subj": Task(INPUT, ("subjective", "objective"), "subj/train.csv", "subj/test.csv"),
    "sst5": Task(REVIEW, _DEGREES, "sst-5/train.csv", "sst-5/test.csv"),
    "mpqa": Task(REVIEW, _POLARITY, "mpqa/train.csv", "mpqa/test.csv"),
}


class Example(NamedTuple):
    """A sentence and the number of its label."""

    text: str
    label: int


def find_file(directory: str, name: str, split: str) -> str:
    """The file of a set's ``train`` or ``test`` split: ours (``sst2.train.jsonl``) or the original one.

    Raises:
        FileNotFoundError: there is neither.
    """
    places = [os.path.join(directory, f"{name}.{split}.jsonl"), os.path.join(directory, getattr(TASKS[name], split))]
    for place in places:
        if os.path.isfile(place):
            return place
    raise FileNotFoundError(f"--data {directory} has neither {' nor '.join(map(os.path.basename, places))} of {name}")


def read_examples(path: str, labels: Tuple[str, ...]) -> List[Example]:
    """The examples of a file: JSON lines with ``text`` and ``label``; ``code,text`` as CSV; sentences and codes as TSV.

    Raises:
        ValueError: a line is none of this, or of another label.
    """
    kind, found = os.path.splitext(path)[1], []
    with open(path, encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            rows = ((row["text"], row["label"]) for row in map(json.loads, file))
        elif kind == ".tsv":
            next(file)  # the names of the columns
            rows = (line.rstrip("\r\n").rsplit("\t", 1) for line in file)
        else:
            rows = (row[::-1] for row in csv.reader(file))
        try:
            for text, label in rows:
                number = labels.index(label) if label in labels else int(label)
                found.append(Example(text.strip(), range(len(labels))[number]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}, example {len(found) + 1}, is no sentence with a label ({', '.join(labels)}) or its code"
            ) from error
    return found


class InContext(Evaluation):
    """Classifies test sentences by the likeliest label word."""

    name, title = "in_context", "In-context learning with demonstrations in the memory"

    def __init__(self):
        self._filled, self._past = None, None

    def add_arguments(self, parser) -> None:
        parser.add_argument("--data", required=True, metavar="DIR", help="directory of the sets, ours or the original")
        parser.add_argument("--sets", nargs="+", choices=list(TASKS), default=list(TASKS), help="by default all")
        parser.add_argument(
            "--demonstrations", nargs="+", type=int, default=[4, 20], metavar="K", help="in the window (4 20)"
        )
        parser.add_argument(
            "--in-memory", nargs="+", type=int, default=[0, 200, 2000], metavar="N", help="in the memory (0 200 2000)"
        )
        parser.add_argument("--seeds", type=int, default=6, metavar="N", help="draws of demonstrations (6)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        for option in ("demonstrations", "in_memory"):
            if min(getattr(args, option)) < 0:
                raise ValueError(f"--{option.replace('_', '-')} {min(getattr(args, option))} is less than none")
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds} is less than 1")
        self.files = {name: [find_file(args.data, name, split) for split in ("train", "test")] for name in args.sets}
        self.train, self.test = (
            {name: read_examples(files[i], TASKS[name].labels) for name, files in self.files.items()} for i in (0, 1)
        )
        wanted = max(args.demonstrations) + max(args.in_memory)
        for name, examples in self.train.items():
            if len(examples) < wanted:
                raise ValueError(
                    f"{name} has {len(examples)} training examples, fewer than the {wanted} of --demonstrations and "
                    "--in-memory: lower them"
                )
        self.labels = {name: [self._encode(f" {label}") for label in TASKS[name].labels] for name in args.sets}
        self.prompts = {name: [self._prompt(name, example.text) for example in self.test[name]] for name in args.sets}
        self.free = {name: [self._prompt(name, text) for text in CONTENT_FREE] for name in args.sets}
        # The same for all items, so that what the window holds does not depend on which are tested.
        self.room = {
            name: max(map(len, self.prompts[name] + self.free[name])) + max(map(len, self.labels[name]))
            for name in args.sets
        }

    def _encode(self, text: str) -> Tensor:
        return self.scorer.tokenizer.encode_continuation(text)

    def _prompt(self, name: str, text: str) -> Tensor:
        return self._encode(" " + TASKS[name].template.format(text=text))

    def _text(self, name: str, examples: List[Example], begins: bool) -> Tensor:
        """Tokens of demonstrations, end to end; only what begins a document has no space before it."""
        task, parts = TASKS[name], []
        for example in examples:
            text = f"{task.template.format(text=example.text)} {task.labels[example.label]}."
            parts.append(self.scorer.tokenizer.encode(text) if begins and not parts else self._encode(" " + text))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def _drawn(self, name: str, seed: int) -> Tuple[List[Example], List[Example]]:
        """Training examples for the window and, disjoint from them, for the memory, as many as are ever wanted."""
        order = np.random.default_rng(seed).permutation(len(self.train[name]))
        examples, k = [self.train[name][i] for i in order], max(self.args.demonstrations)
        return examples[:k], examples[k : k + max(self.args.in_memory)]

    def describe(self) -> Dict[str, Any]:
        return {
            "sets": self.args.sets,
            "demonstrations": self.args.demonstrations,
            "in_memory": self.args.in_memory,
            "data_sha256": {name: digest(files) for name, files in self.files.items()},
        }

    def tuning_documents(self) -> List[Tensor]:
        return [self._text(name, examples[:_TUNING_EXAMPLES], True) for name, examples in self.train.items()]

    def items(self) -> List[str]:
        return [
            f"{name} seed {seed} memory {n} window {k} tested {len(self._tested(name))}"
            for name in self.args.sets
            for seed in range(self.args.seeds)
            for n in sorted(self.args.in_memory)
            for k in sorted(self.args.demonstrations)
        ]

    def _tested(self, name: str) -> List[Example]:
        return self.test[name][: self.args.limit]

    def score(self, item: str) -> Dict[str, Any]:
        name, seed, n, k = _parse(item)
        shown, remembered = self._drawn(name, seed)
        prefix = self._text(name, shown[:k], begins=n == 0)
        past = self._memory(name, seed, remembered[:n])
        window = self.scorer.window(past, prefix, self.room[name])
        prompts = self.prompts[name][: self.args.limit] + self.free[name]
        labels = self.labels[name]
        rows = window.score([Continuation(label, prompt) for prompt in prompts for label in labels])
        scores = {
            system: [
                [round(float(row[system].sum()), 4) for row in rows[i : i + len(labels)]]
                for i in range(0, len(rows), len(labels))
            ]
            for system in self.scorer.systems
        }
        tested = len(prompts) - len(CONTENT_FREE)
        return {
            "gold": [example.label for example in self._tested(name)],
            "scores": {system: found[:tested] for system, found in scores.items()},
            "content_free": {system: found[tested:] for system, found in scores.items()},
            "prefix_tokens": len(prefix),
            "in_window": window.shared,
        }

    def _memory(self, name: str, seed: int, examples: List[Example]):
        """The memory of these demonstrations, filled once and read for all test sentences and sizes of the window."""
        key = (name, seed, len(examples))
        if self._filled != key:
            text = self._text(name, examples, begins=True)
            self._past = self.scorer.new_state(at_most=len(text) + self.scorer.size)
            self.scorer.memorize(self._past, text)
            self._filled = key
        return self._past

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        settings = [(k, n) for k in sorted(self.args.demonstrations) for n in sorted(self.args.in_memory)]
        averages: Dict[str, Dict[str, Sample]] = {f"{k} + {n:,}": {} for k, n in settings}
        pairs = [*PAIRS, *((ON + CALIBRATED, other + CALIBRATED) for other in (OFF, BACKBONE))]
        tables = []
        for k, n in settings:
            columns: Dict[str, Dict[str, Sample]] = {}
            for name in self.args.sets:
                wanted = {(name, seed, n, k) for seed in range(self.args.seeds)}
                runs = [result for item, result in results.items() if _parse(item) in wanted]
                columns[name] = {}
                for system, right in self._right(name, runs).items():  # (seeds, tested)
                    counts = np.stack([right, np.ones_like(right)], axis=-1).swapaxes(0, 1)  # (tested, seeds, 2)
                    columns[name][system] = Sample({str(i): x for i, x in enumerate(counts)}, ACCURACY)
                    average = averages[f"{k} + {n:,}"].setdefault(system, Sample({}, ACCURACY))
                    # Each set counts the same, however many of its sentences are tested.
                    average.items.update({f"{name} {i}": x / len(counts) for i, x in enumerate(counts)})
            title = f"Accuracy with {k} demonstrations in the window and {n:,} in the memory, ± over seeds"
            tables.append(Table(title, columns, None, pairs))
        title = "Accuracy, mean of the sets, by demonstrations in window + memory"
        return [Table(title, averages, "lines", pairs), *tables]

    def _right(self, name: str, runs: List[Dict[str, Any]]) -> Dict[str, np.ndarray]:
        """Whether each system's answer is right, shape (seeds, tested), float64; raw and calibrated."""
        gold = np.array([run["gold"] for run in runs])  # (seeds, tested)
        found = {}
        for suffix, calibrated in (("", False), (CALIBRATED, True)):
            for system in self.scorer.systems:
                scores = np.array([run["scores"][system] for run in runs])  # (seeds, tested, labels)
                if calibrated:
                    free = np.array([run["content_free"][system] for run in runs])  # (seeds, 3, labels)
                    scores = scores - calibration(free)[:, None]
                found[system + suffix] = (scores.argmax(-1) == gold).astype(np.float64)
        counts = np.bincount([example.label for example in self.train[name]])
        found[MAJORITY] = (gold == counts.argmax()).astype(np.float64)
        return found

    def notes(self) -> List[str]:
        fits = [
            f"the window of {self.scorer.size} tokens has room for {max(0, self.scorer.size - room)} of {name}"
            for name, room in self.room.items()
        ]
        return [
            f"{self.args.seeds} draws of demonstrations from the training sets; templates '{REVIEW} {{label}}. ' and, "
            f"for subj, '{INPUT} {{label}}. '; the answer is the likeliest label word.",
            "Demonstrations in the memory are memorised once a draw, and come before those in the window.",
            f"Tokens of demonstrations: {', '.join(fits)}; what does not fit is memorised for memory and cache, and "
            "the backbone and memory off do not see it.",
            f"Calibrated: divided by what the label words get for {', '.join(map(repr, CONTENT_FREE))} in place of the "
            "sentence (Zhao et al., 2021).",
        ]


def calibration(free: np.ndarray) -> np.ndarray:
    """Log-probability of each label for no content: free (..., inputs, labels) log-probabilities -> (..., labels)."""
    probabilities = np.exp(free - free.max(-1, keepdims=True))
    return np.log((probabilities / probabilities.sum(-1, keepdims=True)).mean(-2))


def _parse(item: str) -> Tuple[str, int, int, int]:
    """Set, seed, demonstrations in the memory, in the window."""
    name, _, seed, _, n, _, k = item.split()[:7]
    return name, int(seed), int(n), int(k)

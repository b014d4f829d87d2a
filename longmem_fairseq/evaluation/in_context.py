"""In-context learning: sentences are classified after demonstrations, some in the window and many in the memory."""

import csv
import os
from typing import Any, Dict, List, NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor

from ..files import parse_json
from .base import Evaluation
from .records import text_of
from .reporting.finished_items import digest
from .reporting.statistic import ACCURACY
from .reporting.system_scores import SystemScores
from .reporting.table import PAIRS, Table
from .scoring.systems import BACKBONE, OFF, ON
from .scoring.text_state import TextState
from .scoring.window import Continuation

REVIEW, INPUT = "Review: {text} Sentiment:", "Input: {text} Type:"
CONTENT_FREE = ("N/A", "[MASK]", "")  # inputs of contextual calibration (Zhao et al., 2021)
CALIBRATED, MAJORITY = ", calibrated", "majority of the training set"
_TUNING_SENTENCES = 400  # of each task


class ClassificationTask(NamedTuple):
    """A data set of labeled sentences.

    Attributes:
        template: Template of a prompt.
        labels: Label words, in the order of their codes.
        train: Path of the training file in the original layout.
        test: Path of the test file in the original layout.
    """

    template: str
    labels: Tuple[str, ...]
    train: str
    test: str


_POLARITY, _DEGREES = ("negative", "positive"), ("terrible", "bad", "okay", "good", "great")
TASKS = {
    "sst2": ClassificationTask(REVIEW, _POLARITY, "SST-2/train.tsv", "SST-2/dev.tsv"),
    "mr": ClassificationTask(REVIEW, _POLARITY, "mr/train.csv", "mr/test.csv"),
    "subj": ClassificationTask(INPUT, ("subjective", "objective"), "subj/train.csv", "subj/test.csv"),
    "sst5": ClassificationTask(REVIEW, _DEGREES, "sst-5/train.csv", "sst-5/test.csv"),
    "mpqa": ClassificationTask(REVIEW, _POLARITY, "mpqa/train.csv", "mpqa/test.csv"),
}


class LabeledSentence(NamedTuple):
    """A sentence and the number of its label.

    Attributes:
        text: The sentence.
        label: Index of its label among those of its task.
    """

    text: str
    label: int


def find_file(directory: str, name: str, split: str) -> str:
    """Find the file of a task's split: ours (``sst2.train.jsonl``) or the original one.

    Args:
        directory: Path of the directory of all tasks.
        name: Name of the task.
        split: ``train`` or ``test``.

    Raises:
        FileNotFoundError: The directory has neither file.
    """
    paths = [os.path.join(directory, f"{name}.{split}.jsonl"), os.path.join(directory, getattr(TASKS[name], split))]
    for path in paths:
        if os.path.isfile(path):
            return path
    raise FileNotFoundError(f"--data {directory} has neither {' nor '.join(map(os.path.basename, paths))} of {name}")


def read_sentences(path: str, labels: Tuple[str, ...]) -> List[LabeledSentence]:
    """Read labeled sentences: JSON lines of ``text`` and ``label``; CSV of code and text; TSV of text and code.

    Args:
        path: Path of a file whose extension tells its layout.
        labels: Label words, in the order of their codes.

    Raises:
        ValueError: A line is not a sentence with one of the labels.
    """
    kind, sentences = os.path.splitext(path)[1], []
    with open(path, encoding="utf-8", newline="") as file:
        if kind == ".jsonl":
            rows = ((row["text"], row["label"]) for row in map(parse_json, file))
        elif kind == ".tsv":
            next(file)  # the names of the columns
            rows = (line.rstrip("\r\n").rsplit("\t", 1) for line in file)
        else:
            rows = (row[::-1] for row in csv.reader(file))
        try:
            for text, label in rows:
                number = labels.index(label) if label in labels else int(str(label))
                sentences.append(LabeledSentence(text_of(text).strip(), range(len(labels))[number]))
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{path}, example {len(sentences) + 1}, is not a sentence with a label ({', '.join(labels)}) or its "
                "code"
            ) from error
    return sentences


class InContext(Evaluation):
    """Classify test sentences by the likeliest label word."""

    name, title = "in_context", "In-context learning with demonstrations in the memory"

    def __init__(self):
        self._memorized, self._state = None, None  # demonstrations that the state has read

    def add_arguments(self, parser) -> None:
        parser.add_argument("--data", required=True, metavar="DIR", help="directory of the sets, ours or the original")
        parser.add_argument("--sets", nargs="+", choices=list(TASKS), default=list(TASKS), help="sets (default: all)")
        parser.add_argument(
            "--demonstrations",
            nargs="+",
            type=int,
            default=[4, 20],
            metavar="K",
            help="demonstrations in the window (4 20)",
        )
        parser.add_argument(
            "--in-memory",
            nargs="+",
            type=int,
            default=[0, 200, 2000],
            metavar="N",
            help="demonstrations in the memory (0 200 2000)",
        )
        parser.add_argument("--seeds", type=int, default=6, metavar="N", help="draws of demonstrations (6)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        for option in ("demonstrations", "in_memory"):
            if min(getattr(args, option)) < 0:
                raise ValueError(f"--{option.replace('_', '-')} {min(getattr(args, option))} is less than 0: raise it")
        if args.seeds < 1:
            raise ValueError(f"--seeds {args.seeds} is less than 1: raise it")
        self.files = {name: [find_file(args.data, name, split) for split in ("train", "test")] for name in args.sets}
        self.train, self.test = (
            {name: read_sentences(files[i], TASKS[name].labels) for name, files in self.files.items()} for i in (0, 1)
        )
        required = max(args.demonstrations) + max(args.in_memory)
        for name, sentences in self.train.items():
            if len(sentences) < required:
                raise ValueError(
                    f"{name} has {len(sentences)} training examples, fewer than the {required} of --demonstrations and "
                    "--in-memory: lower them"
                )
        self.labels, self.prompts, self.free, self.room = {}, {}, {}, {}
        for name in args.sets:
            self.labels[name] = [self._encode(f" {label}") for label in TASKS[name].labels]
            self.prompts[name] = [self._prompt(name, sentence.text) for sentence in self.test[name]]
            self.free[name] = [self._prompt(name, text) for text in CONTENT_FREE]
            # The same for all items, so that what the window holds does not depend on which are tested.
            longest_prompt = max(map(len, self.prompts[name] + self.free[name]))
            self.room[name] = longest_prompt + max(map(len, self.labels[name]))

    def _encode(self, text: str) -> Tensor:
        return self.scorer.tokenizer.encode_continuation(text)

    def _prompt(self, name: str, text: str) -> Tensor:
        return self._encode(" " + TASKS[name].template.format(text=text))

    def _text(self, name: str, sentences: List[LabeledSentence], at_start: bool) -> Tensor:
        """Encode demonstrations, end to end; only the first one of a document has no space before it."""
        task, parts = TASKS[name], []
        for sentence in sentences:
            text = f"{task.template.format(text=sentence.text)} {task.labels[sentence.label]}."
            parts.append(self.scorer.tokenizer.encode(text) if at_start and not parts else self._encode(" " + text))
        return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)

    def _draw(self, name: str, seed: int) -> Tuple[List[LabeledSentence], List[LabeledSentence]]:
        """Draw demonstrations for the window and, disjoint from them, for the memory: as many as any item needs."""
        order = np.random.default_rng(seed).permutation(len(self.train[name]))
        sentences, k = [self.train[name][i] for i in order], max(self.args.demonstrations)
        return sentences[:k], sentences[k : k + max(self.args.in_memory)]

    def describe(self) -> Dict[str, Any]:
        return {
            "sets": self.args.sets,
            "demonstrations": self.args.demonstrations,
            "in_memory": self.args.in_memory,
            "data_sha256": {name: digest(files) for name, files in self.files.items()},
        }

    def tuning_documents(self) -> List[Tensor]:
        return [self._text(name, sentences[:_TUNING_SENTENCES], True) for name, sentences in self.train.items()]

    def items(self) -> List[str]:
        return [
            f"{name} seed {seed} memory {n} window {k} tested {len(self._tested(name))}"
            for name in self.args.sets
            for seed in range(self.args.seeds)
            for n in sorted(self.args.in_memory)
            for k in sorted(self.args.demonstrations)
        ]

    def _tested(self, name: str) -> List[LabeledSentence]:
        return self.test[name][: self.args.limit]

    def score(self, item: str) -> Dict[str, Any]:
        name, seed, n, k = _parse(item)
        in_window, in_memory = self._draw(name, seed)
        prefix = self._text(name, in_window[:k], at_start=n == 0)
        state = self._state_behind(name, seed, in_memory[:n])
        window = self.scorer.window(state, prefix, self.room[name])
        prompts = self.prompts[name][: self.args.limit] + self.free[name]
        labels = self.labels[name]
        rows = window.score([Continuation(label, prompt) for prompt in prompts for label in labels])
        scores = {}
        for system in self.scorer.systems:
            sums = [round(float(row[system].sum()), 4) for row in rows]
            scores[system] = [sums[i : i + len(labels)] for i in range(0, len(rows), len(labels))]
        tested = len(prompts) - len(CONTENT_FREE)
        return {
            "gold": [sentence.label for sentence in self._tested(name)],
            "scores": {system: by_prompt[:tested] for system, by_prompt in scores.items()},
            "content_free": {system: by_prompt[tested:] for system, by_prompt in scores.items()},
            "prefix_tokens": len(prefix),
            "in_window": window.shared,
        }

    def _state_behind(self, name: str, seed: int, sentences: List[LabeledSentence]) -> TextState:
        """Return the state behind these demonstrations, memorized once for all test sentences and window sizes."""
        key = (name, seed, len(sentences))
        if self._memorized != key:
            text = self._text(name, sentences, at_start=True)
            self._state = self.scorer.new_state(at_most=len(text) + self.scorer.size)
            self.scorer.memorize(self._state, text)
            self._memorized = key
        return self._state

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        settings = [(k, n) for k in sorted(self.args.demonstrations) for n in sorted(self.args.in_memory)]
        averages: Dict[str, Dict[str, SystemScores]] = {f"{k} + {n:,}": {} for k, n in settings}
        pairs = [*PAIRS, *((ON + CALIBRATED, other + CALIBRATED) for other in (OFF, BACKBONE))]
        tables = []
        for k, n in settings:
            columns: Dict[str, Dict[str, SystemScores]] = {}
            for name in self.args.sets:
                keys = {(name, seed, n, k) for seed in range(self.args.seeds)}
                runs = [result for item, result in results.items() if _parse(item) in keys]
                columns[name] = {}
                for system, right in self._right(name, runs).items():  # (seeds, tested)
                    counts = np.stack([right, np.ones_like(right)], axis=-1).swapaxes(0, 1)  # (tested, seeds, 2)
                    columns[name][system] = SystemScores({str(i): x for i, x in enumerate(counts)}, ACCURACY)
                    average = averages[f"{k} + {n:,}"].setdefault(system, SystemScores({}, ACCURACY))
                    # Each set has the same weight, however many of its sentences are tested.
                    average.items.update({f"{name} {i}": x / len(counts) for i, x in enumerate(counts)})
            title = f"Accuracy with {k} demonstrations in the window and {n:,} in the memory, ± over seeds"
            tables.append(Table(title, columns, None, pairs))
        title = "Accuracy, mean of the sets, by demonstrations in window + memory"
        return [Table(title, averages, "lines", pairs), *tables]

    def _right(self, name: str, runs: List[Dict[str, Any]]) -> Dict[str, np.ndarray]:
        """Return whether each system's answer is right, raw and calibrated, shape (seeds, tested), float64."""
        gold = np.array([run["gold"] for run in runs])  # (seeds, tested)
        right = {}
        for suffix in ("", CALIBRATED):
            for system in self.scorer.systems:
                scores = np.array([run["scores"][system] for run in runs])  # (seeds, tested, labels)
                if suffix == CALIBRATED:
                    free = np.array([run["content_free"][system] for run in runs])  # (seeds, 3, labels)
                    scores = scores - calibration(free)[:, None]
                right[system + suffix] = (scores.argmax(-1) == gold).astype(np.float64)
        counts = np.bincount([sentence.label for sentence in self.train[name]])
        right[MAJORITY] = (gold == counts.argmax()).astype(np.float64)
        return right

    def notes(self) -> List[str]:
        fits = [
            f"the window of {self.scorer.size} tokens has room for {max(0, self.scorer.size - room)} of {name}"
            for name, room in self.room.items()
        ]
        return [
            f"{self.args.seeds} draws of demonstrations from the training sets; templates '{REVIEW} {{label}}. ' and, "
            f"for subj, '{INPUT} {{label}}. '; the answer is the likeliest label word.",
            "Demonstrations in the memory are memorized once a draw, and come before those in the window.",
            f"Tokens of demonstrations: {', '.join(fits)}; what does not fit is memorized for memory and cache, and "
            "the backbone and memory off do not see it.",
            "Calibrated: divided by the probabilities of the label words with "
            f"{', '.join(map(repr, CONTENT_FREE))} in place of the sentence (Zhao et al., 2021).",
        ]


def calibration(free: np.ndarray) -> np.ndarray:
    """Return the log-probability of each label without content.

    Args:
        free: Log-probabilities of the labels behind content-free inputs, shape (..., inputs, labels).

    Returns:
        Log-probabilities, shape (..., labels).
    """
    probabilities = np.exp(free - free.max(-1, keepdims=True))
    return np.log((probabilities / probabilities.sum(-1, keepdims=True)).mean(-2))


def _parse(item: str) -> Tuple[str, int, int, int]:
    """Return the set, the seed, and the numbers of demonstrations in the memory and in the window of an item."""
    name, _, seed, _, n, _, k = item.split()[:7]
    return name, int(seed), int(n), int(k)

"""BABILong (Kuratov et al., 2024): questions about facts that are hidden in books, by task and length of the text."""

import os
import re
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor

from ..files import parse_json
from .base import Evaluation
from .command_line import check_max_new_tokens, name_of
from .records import read_file, text_of
from .reporting.finished_items import digest
from .reporting.statistic import ACCURACY
from .reporting.system_scores import SystemScores
from .reporting.table import Table
from .scoring.generate import generate

_PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
# Words that may be answers, by task.
LABELS: Dict[str, Tuple[str, ...]] = {
    **dict.fromkeys(("qa1", "qa2", "qa3", "qa4"), _PLACES),
    "qa5": ("Bill", "Fred", "Jeff", "Mary", "apple", "football", "milk"),
}
_LENGTH = r"\d+[kM]"
# The files of RMT-team/babilong on Hugging Face: LENGTH/TASK-00000-of-00001.parquet, and data/TASK/LENGTH.json.
_LAYOUTS = (
    re.compile(rf"(?:^|/)(?P<length>{_LENGTH})/(?P<task>qa\d+)(?:-\d+-of-\d+)?\.(?:json|parquet)$"),
    re.compile(rf"(?:^|/)(?P<task>qa\d+)/(?P<length>{_LENGTH})\.json$"),
)
_EXAMPLES = 20  # in the report


class Sample(NamedTuple):
    """A question about a text.

    Attributes:
        input: Text with the facts.
        question: Question about them.
        target: Right answer, a word.
    """

    input: str
    question: str
    target: str


def prompt_of(question: str) -> str:
    """Return what follows a text so that the next word is the answer to a question."""
    return f"\nQuestion: {question}\nAnswer:"


def is_right(answer: str, sample: Sample, task: str) -> bool:
    """Decide whether an answer is right as BABILong's leaderboard does.

    Of the words that may be answers, the answer's first sentence must name the right one alone, where those that the
    question names do not count.

    Args:
        answer: Generated text.
        sample: Sample that it answers.
        task: Task of the sample.
    """
    sentence, question = answer.lower().split(".")[0], sample.question.lower()
    named = {label.lower() for label in LABELS[task] if label.lower() in sentence}
    return named - {label for label in named if label in question} == {sample.target.lower()}


def tokens_of(length: str) -> int:
    """Return the number of tokens that a length such as ``4k`` or ``1M`` names."""
    return int(length[:-1]) * (1_000 if length.endswith("k") else 1_000_000)


def find_files(directory: str) -> Dict[Tuple[str, str], str]:
    """Find the files of BABILong below a directory.

    Args:
        directory: Path of the directory.

    Returns:
        Path of the file by task and length, tasks first, then shorter lengths.

    Raises:
        ValueError: There are none, or two of one task and length.
    """
    files: Dict[Tuple[str, str], str] = {}
    for parent, _, names in os.walk(directory):
        for path in (os.path.join(parent, name) for name in names):
            relative = os.path.relpath(path, directory).replace(os.sep, "/")
            match = next(filter(None, (layout.search(relative) for layout in _LAYOUTS)), None)
            if match is None or match["task"] not in LABELS:
                continue
            key = match["task"], match["length"]
            if key in files:
                raise ValueError(f"{directory} has {key[0]} with {key[1]} twice, {files[key]} and {path}: remove one")
            files[key] = path
    if not files:
        raise ValueError(
            f"{directory} has no files of BABILong (LENGTH/qaN-*.parquet or qaN/LENGTH.json, N from 1 to 5): name "
            "another directory"
        )
    return dict(sorted(files.items(), key=lambda entry: (entry[0][0], tokens_of(entry[0][1]))))


def read_samples(path: str) -> List[Sample]:
    """Read a file of BABILong.

    Args:
        path: Path of a Parquet file, or of a JSON list.

    Raises:
        ValueError: It is not such a file, or pyarrow is missing.
        OSError: It cannot be read.
    """
    try:
        rows = _parquet_rows(path) if path.endswith(".parquet") else parse_json(read_file(path))
        return [Sample(*(text_of(row[name]) for name in Sample._fields)) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of BABILong: {error}") from error


def _parquet_rows(path: str) -> List[Dict[str, Any]]:
    try:
        from pyarrow import ArrowInvalid, parquet
    except ImportError:
        raise ValueError("Parquet needs pyarrow: pip install 'longmem_fairseq[parquet]'") from None
    try:
        return parquet.read_table(path, columns=list(Sample._fields)).to_pylist()
    except ArrowInvalid as error:
        raise ValueError(str(error).splitlines()[0]) from error


class BabiLong(Evaluation):
    """Memorize the text, and generate the answer to its question."""

    name, title = "babilong", "BABILong: questions about facts hidden in books"

    def __init__(self):
        self._read: Tuple[str, List[Sample]] = ("", [])  # the file that was read last

    def add_arguments(self, parser) -> None:
        parser.add_argument(
            "--data", required=True, metavar="DIR", help="BABILong as on Hugging Face, or as generate.py makes it"
        )
        parser.add_argument("--valid", metavar="DIR", help="other samples, to tune the neural cache on")
        parser.add_argument("--tasks", nargs="+", metavar="qaN", help="tasks to evaluate (default: all of qa1 to qa5)")
        parser.add_argument("--lengths", nargs="+", metavar="N", help="lengths to evaluate, such as 0k 4k 1M (all)")
        parser.add_argument(
            "--max-new-tokens", type=int, default=10, metavar="N", help="maximum number of tokens of an answer (10)"
        )
        parser.add_argument("--beam", type=int, default=1, metavar="N", help="hypotheses (1: greedy)")

    def prepare(self, args, scorer) -> None:
        self.args, self.scorer = args, scorer
        check_max_new_tokens(args, scorer)
        files = find_files(args.data)
        for place, option, chosen in ((0, "--tasks", args.tasks), (1, "--lengths", args.lengths)):
            present = list(dict.fromkeys(key[place] for key in files))
            for value in chosen or []:
                if value not in present:
                    raise ValueError(f"{option} {value} is not in {args.data}, which has {', '.join(present)}")
            files = {key: path for key, path in files.items() if chosen is None or key[place] in chosen}
        self.files = files
        self.counts = {key: len(self._samples(path)) for key, path in files.items()}

    def _samples(self, path: str) -> List[Sample]:
        if self._read[0] != path:
            self._read = path, read_samples(path)[: self.args.limit]
        return self._read[1]

    def describe(self) -> Dict[str, Any]:
        return {
            "data": name_of(self.args.data),
            "data_sha256": digest(self.files.values()),
            "tasks": sorted({task for task, _ in self.files}),
            "lengths": sorted({length for _, length in self.files}, key=tokens_of),
            "max_new_tokens": self.args.max_new_tokens,
            "beam": self.args.beam,
            "valid": None if self.args.valid is None else name_of(self.args.valid),
        }

    def tuning_documents(self) -> List[Tensor]:
        paths = [] if self.args.valid is None else find_files(self.args.valid).values()
        encode = self.scorer.tokenizer.encode
        return [encode(f"{s.input}{prompt_of(s.question)} {s.target}\n") for path in paths for s in read_samples(path)]

    def items(self) -> List[str]:
        return [f"{task} {length} {i}" for (task, length), n in self.counts.items() for i in range(n)]

    def score(self, item: str) -> Dict[str, Any]:
        task, length, number = item.split(" ")
        sample = self._samples(self.files[task, length])[int(number)]
        scorer, tokenizer = self.scorer, self.scorer.tokenizer
        context, question = tokenizer.encode(sample.input), tokenizer.encode_continuation(prompt_of(sample.question))
        room = len(question) + self.args.max_new_tokens + 1
        memorized = min(len(context), max(0, len(context) + room - scorer.size))
        state = scorer.new_state(at_most=memorized)
        scorer.memorize(state, context[:memorized])
        prompt = torch.cat([context[memorized:], question])
        answers = {}
        for system in scorer.systems:
            (answer,) = generate(scorer, system, state, [prompt], self.args.max_new_tokens, self.args.beam)
            answers[system] = tokenizer.decode(answer).strip()
        right = {system: int(is_right(answer, sample, task)) for system, answer in answers.items()}
        return {"tokens": len(context), "target": sample.target, "answers": answers, "right": right}

    def tables(self, results: Dict[str, Any]) -> List[Table]:
        lengths = sorted({length for _, length in self.files}, key=tokens_of)
        titles = ["all tasks", *sorted({task for task, _ in self.files})]
        columns: Dict[str, Dict[str, Dict[str, SystemScores]]] = {
            title: {length: {} for length in lengths} for title in titles
        }
        for item, result in results.items():
            task, length, _ = item.split(" ")
            for title in ("all tasks", task):
                for system, right in result["right"].items():
                    rows = columns[title][length]
                    rows.setdefault(system, SystemScores({}, ACCURACY)).items[item] = (right, 1)
        tables = []
        for title, by_length in columns.items():
            scored = {length: rows for length, rows in by_length.items() if rows}
            plot = "lines" if title == "all tasks" else None
            tables.append(Table(f"Accuracy, {title}, by length of the text", scored, plot, compared=True))
        return tables

    def notes(self) -> List[str]:
        return [
            f"{sum(self.counts.values()):,} questions of {name_of(self.args.data)}; lengths as the data name them, in "
            "thousands (k) and millions (M) of tokens.",
            f"The text is memorized as far as the window of {self.scorer.size} tokens does not hold its end, the "
            "question and the answer; the backbone and memory off do not see what is memorized.",
            "An answer is right as on BABILong's leaderboard: of the words that may be answers, its first sentence "
            "names the right one alone, those in the question left out.",
        ]

    def figures(self, results: Dict[str, Any]) -> Dict[str, Any]:
        """Return the first answers."""
        examples = [{"item": item, "target": x["target"], **x["answers"]} for item, x in results.items()]
        return {"examples": examples[:_EXAMPLES]}

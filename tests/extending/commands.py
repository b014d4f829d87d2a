"""fairseq's commands with an extension that a user directory registers, and the comparison with a reference."""

import copy
import json
import math
import re
from pathlib import Path
from typing import Callable, Dict, List, Protocol, Sequence, Tuple

import pytest
import torch
from torch import Tensor

from tests.conftest import VALID_LENGTHS, T
from tests.fairseq_runs import finish, make_dictionary, random_documents, start, weights
from tests.models.reference import Reference as StockReference
from tests.models.reference import Setting
from tests.models.tiny import HEADS, stock_config, stock_model, write_checkpoint
from tests.repository import ROOT

EOS, FIRST = 2, 4  # ids of end-of-sentence and of the symbol w0
BOOK = [7 * i % 23 for i in range(50)]  # symbols w0, w1...: more than three segments
PROMPTS = ([1, 8, 15], [7, 14, 21, 5, 12])
NEW_TOKENS = 2 * T  # the window of an answer is full several times
ADAPT = (
    "--arch longmem_lm --criterion longmem_cross_entropy --retrieval-layer-index 1 "
    "--memory-size 64 --k 8 --chunk-size 4"
).split()
TRAIN = (
    f"--tokens-per-sample {T} --batch-size 4 --max-update 3 --optimizer adam --lr 0.01 --num-workers 0 "
    "--no-epoch-checkpoints --log-format json --log-interval 1"
).split()
GENERATE = (
    "--memory-text book.txt --input prompts.txt --buffer-size 2 --batch-size 2 --beam 2 --nbest 2 "
    f"--min-len {NEW_TOKENS} --max-len-b {NEW_TOKENS}"
).split()


class Commands:
    """fairseq's commands on the tiny data, with a package in place of ``--user-dir longmem_fairseq``.

    Args:
        directory: Directory that the commands run in.
        data: Directory of the data.
        name: Name of the package.
        registration: Source of the package, which imports longmem_fairseq and registers the extension.
    """

    def __init__(self, directory: Path, data: Path, name: str, registration: str):
        self.directory, self.data, self.package = directory, data, directory / name
        self.package.mkdir()
        (self.package / "__init__.py").write_text(registration)

    def start(self, program: str, *arguments):
        options = ["--user-dir", self.package, "--task", "longmem_language_modeling", "--cpu"]
        environment = {"PYTHONPATH": str(ROOT)}  # the extensions are classes of the test files
        return start(program, self.data, *options, *arguments, cwd=self.directory, environment=environment)

    def run(self, program: str, *arguments, succeeds: bool = True) -> str:
        return finish(self.start(program, *arguments), succeeds)

    def start_training(self, name: str, *arguments):
        return self.start("train", *TRAIN, "--save-dir", self.directory / name, *arguments)

    def train(self, name: str, *arguments) -> Path:
        """Run three updates and return the checkpoint, which is named checkpoint_last.pt."""
        finish(self.start_training(name, *arguments))
        return self.directory / name / "checkpoint_last.pt"

    def start_evaluation(self, checkpoint: Path, results: str, *arguments):
        results = self.directory / results
        return self.start(
            "eval_lm", "--path", checkpoint, "--gen-subset", "valid", "--results-path", results, *arguments
        )

    def perplexities(self, results: str) -> Dict[str, Tuple[float, float]]:
        """Return the perplexity of each document, with and without memory."""
        rows = map(json.loads, (self.directory / results / "documents.jsonl").read_text().splitlines())
        return {row["name"]: (row["perplexity"], row["perplexity_without_memory"]) for row in rows}

    def evaluate(self, checkpoint: Path, results: str, *arguments) -> Dict[str, Tuple[float, float]]:
        finish(self.start_evaluation(checkpoint, results, *arguments))
        return self.perplexities(results)

    def start_generation(self, checkpoint: Path, *arguments):
        """Answer ``PROMPTS`` behind ``BOOK``."""
        words = [" ".join(f"w{symbol}" for symbol in symbols) for symbols in (BOOK, *PROMPTS)]
        (self.directory / "book.txt").write_text(words[0])
        (self.directory / "prompts.txt").write_text("\n".join(words[1:]) + "\n")
        return self.start("interactive", "--path", checkpoint, *GENERATE, *arguments)

    def generate(self, checkpoint: Path, *arguments) -> "Answers":
        return answers_of(finish(self.start_generation(checkpoint, *arguments)))


Answers = List[Tuple[int, List[int], List[float]]]


class Reference(Protocol):
    """A model that reads one document."""

    def read(self, tokens: List[int]) -> Tensor:
        """Read the next segment, write it into the memory, and return its logits, shape (T, V)."""


def answers_of(output: str) -> Answers:
    """Return (number of the prompt, token ids, log probabilities to base 2) of each hypothesis that was printed."""
    texts = re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, re.MULTILINE)
    scores = re.findall(r"^P-\d+\t(.*)$", output, re.MULTILINE)
    assert len(texts) == len(scores) == 2 * len(PROMPTS), output[-3000:]
    return [
        (int(prompt), [*tokens(text.split()), EOS], [float(x) for x in line.split()])
        for (prompt, text), line in zip(texts, scores)
    ]


def tokens(words: Sequence[str]) -> List[int]:
    """Return the token ids of symbols such as ``w0``."""
    return [FIRST + int(word[1:]) for word in words]


def segments(inputs: Sequence[int]) -> List[List[int]]:
    return [list(inputs[i : i + T]) for i in range(0, len(inputs), T)]


def check_perplexities(perplexities: Dict[str, Tuple[float, float]], new_reference: Callable[[], Reference]) -> None:
    """Compare the perplexities of the validation documents with those of a reference."""
    for number, document in enumerate(random_documents(VALID_LENGTHS, seed=1)):
        expected = perplexity(new_reference(), document)
        assert perplexities[f"valid:{number}"][0] == pytest.approx(expected, rel=1e-4)
    assert any(with_memory != pytest.approx(without, rel=1e-4) for with_memory, without in perplexities.values())


def perplexity(reference: Reference, document: Sequence[int]) -> float:
    """Return the perplexity of a document, given as token ids."""
    document = [int(token) for token in document]
    logits = torch.cat([reference.read(segment) for segment in segments([EOS, *document[:-1]])])
    return math.exp(-float(logits.double().log_softmax(-1).gather(1, torch.tensor(document)[:, None]).mean()))


def check_answers(answers: Answers, new_reference: Callable[[], Reference]) -> None:
    """Compare the scores of generated tokens with those of a reference that reads the book and then the answer."""
    for prompt, answer, scores in answers:
        assert len(answer) == len(scores) == NEW_TOKENS + 1
        reference = new_reference()
        for segment in segments([EOS, *(FIRST + symbol for symbol in BOOK)]):
            reference.read(segment)
        inputs = [EOS, *(FIRST + symbol for symbol in PROMPTS[prompt]), *answer[:-1]]
        logits = windows(reference, inputs)[-len(answer) :]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0] / math.log(2)
        torch.testing.assert_close(torch.tensor(scores).double(), expected, atol=5e-4, rtol=1e-4)


def windows(reference: Reference, inputs: Sequence[int]) -> Tensor:
    """Return the logits of inputs that are read one by one: the older half of a full window moves into the memory."""
    logits, window, new = [], [], 0
    for token in inputs:
        if len(window) == T:
            logits.append(copy.deepcopy(reference).read(window)[-new:])
            reference.read(window[: T // 2])
            window, new = window[T // 2 :], 0
        window, new = [*window, token], new + 1
    return torch.cat([*logits, copy.deepcopy(reference).read(window)[-new:]])


def stock_backbone(path: Path) -> str:
    """Write the checkpoint of a transformer_lm with random weights and return its path."""
    return write_checkpoint(path, stock_model(dictionary=make_dictionary()), stock_config())


def stock_reference(checkpoint: Path, kind=StockReference) -> StockReference:
    """Return a reference of a model adapted from ``stock_backbone`` with ``ADAPT`` and ``--save-backbone``."""
    gelu = torch.nn.functional.gelu
    setting = Setting(HEADS, gelu, "learned", reduction=2, memory_layers=(1,), chunk=4, k=8, memory=64, padding=1)
    return kind({name[len("decoder.") :]: value for name, value in weights(checkpoint).items()}, setting)

"""fairseq's commands with an extension that a user directory registers, and the parsing of their results."""

import json
import math
import re
from pathlib import Path
from typing import Callable, Dict, List, Sequence, Tuple

import torch
from torch import Tensor

from tests.conftest import T
from tests.fairseq_runs import finish, start
from tests.repository import ROOT

EOS, FIRST = 2, 4  # ids of end-of-sentence and of the symbol w0
BOOK = [7 * i % 23 for i in range(50)]  # symbols w0, w1...: more than three segments
PROMPTS = ([1, 8, 15], [7, 14, 21, 5, 12])
NEW_TOKENS = 6  # prompt and answer fit into one segment
ADAPT = (
    "--arch longmem_lm --criterion longmem_cross_entropy --retrieval-layer-index 1 "
    "--memory-size 64 --k 8 --chunk-size 4"
).split()
TRAIN = (
    f"--tokens-per-sample {T} --batch-size 4 --max-update 3 --optimizer adam --lr 0.01 --num-workers 0 "
    "--no-epoch-checkpoints --log-format json --log-interval 1"
).split()
GENERATE = (
    f"--memory-text book.txt --input prompts.txt --beam 2 --nbest 2 --max-len-b {NEW_TOKENS} --buffer-size 2 "
    "--batch-size 2"
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
Reader = Callable[[Sequence[int]], Tensor]


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


def perplexity(read: Reader, document: Sequence[int]) -> float:
    """Return the perplexity of a document.

    Args:
        read: Function that reads the next segment and returns its logits, shape (T, V).
        document: Token ids.
    """
    document = [int(token) for token in document]
    logits = torch.cat([read(segment) for segment in segments([EOS, *document[:-1]])])
    return math.exp(-float(logits.double().log_softmax(-1).gather(1, torch.tensor(document)[:, None]).mean()))


def check_answers(answers: Answers, new_reader: Callable[[], Reader]) -> None:
    """Compare the scores of generated tokens with those of a reference that reads the book and then the answer.

    Args:
        answers: Hypotheses.
        new_reader: Function that returns a reader with an empty memory, as for :func:`perplexity`.
    """
    book = segments([EOS, *(FIRST + symbol for symbol in BOOK)])
    for prompt, answer, scores in answers:
        read = new_reader()
        for segment in book:
            read(segment)
        inputs = [EOS, *(FIRST + symbol for symbol in PROMPTS[prompt]), *answer[:-1]]
        assert len(inputs) <= T and len(answer) == len(scores)
        logits = read(inputs)[-len(answer) :]
        expected = logits.double().log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0] / math.log(2)
        torch.testing.assert_close(torch.tensor(scores).double(), expected, atol=5e-4, rtol=1e-4)

"""The recall example in its quick form: facts up to 8,000 tokens back are recalled, and not without the memory."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

from examples.recall.facts import document, questions_of
from tests.repository import ROOT


def test_questions():
    """Each question comes with the distance to the one place that states its answer."""
    kinds = [np.arange(10, 40), np.arange(40, 60), np.arange(60, 99)]
    tokens = document(np.random.default_rng(0), kinds, 20, 100, 30, 70, eos=2)
    answers, distances = questions_of(tokens, kinds[0])
    assert len(tokens) == 171 and len(answers) == 30
    assert len(set(tokens[answers[:20] - 1])) == 20  # each fact comes once before one comes again
    for answer, distance in zip(answers, distances):
        assert (tokens[answer - 1 : answer + 1] == tokens[answer - 1 - distance : answer + 1 - distance]).all()
        assert 0 < answer - distance <= 100 < answer


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    directory: Path = tmp_path_factory.mktemp("recall")
    run = subprocess.run(
        ["bash", "examples/recall/run.sh", str(directory), "--quick"], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert (directory / "report.png").stat().st_size > 1000
    return json.loads((directory / "report.json").read_text())


def test_recall(report):
    """Of 200 values one is right: this short training recalls most (three in four), and none without the memory."""
    far = [row for row in report["accuracy"] if row["from"] >= 1024]
    questions = sum(row["questions"] for row in far)
    on, off = (sum(row[key] * row["questions"] for row in far) / questions for key in ("memory_on", "memory_off"))
    assert questions >= 300
    assert on >= 40 and off <= 2, report

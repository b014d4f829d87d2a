"""Test every step and the report of the quick start, on a few small documents and for a few updates."""

import json
import math
import os
import subprocess
import sysconfig
from pathlib import Path

import pytest

from examples.quickstart.standard_library import split, standard_library
from tests.repository import ROOT

MODULES = ("bisect", "cmd", "code", "codeop", "colorsys", "copyreg", "heapq", "keyword", "linecache", "struct", "types")


def run(demo: Path, text: Path):
    environment = {**os.environ, "TEXT": str(text), "DEMO": str(demo), "UPDATES": "2"}
    return subprocess.run(["bash", "examples/quickstart.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("quickstart")
    (base / "text").mkdir()
    for name in MODULES:
        source = Path(sysconfig.get_path("stdlib"), f"{name}.py").read_text()
        (base / "text" / f"{name}.py").write_text(source[:3000])
    first = run(base / "demo", base / "text")
    assert first.returncode == 0, first.stdout + first.stderr
    return base / "demo"


def test_report(demo):
    report = json.loads((demo / "report.json").read_text())
    assert list(report["memory"]) == ["0", "1024", "4096", "16384", "65536"]
    values = [report["backbone"], *report["memory"].values()]
    assert all(1 < value < 200 for value in values)
    # No document is longer than 4,096 tokens, so a larger memory makes no difference.
    assert report["memory"]["4096"] == report["memory"]["65536"]
    assert "LongMem, memory of 16,384 tokens" in (demo / "report.md").read_text()
    # The same losses over the bytes and words of the same text: those of all systems differ by one factor.
    factors = []
    for name, value in zip(["backbone", *(f"memory-{size}" for size in report["memory"])], values):
        text, nats = report["by_text"][name], math.log(value)
        factors.append((nats / text["bits_per_byte"], math.log(text["perplexity_per_word"]) / nats))
    for per_byte, per_word in factors:
        assert per_byte == pytest.approx(factors[0][0], rel=1e-3) and per_word == pytest.approx(factors[0][1], rel=1e-3)
    assert (demo / "report.png").stat().st_size > 1000


def test_a_second_call_repeats_nothing(demo):
    before = (demo / "checkpoints" / "checkpoint_last.pt").stat().st_mtime_ns
    again = run(demo, demo.parent / "text")
    assert again.returncode == 0 and "3. Memory-augmented adaptation" not in again.stdout
    assert (demo / "checkpoints" / "checkpoint_last.pt").stat().st_mtime_ns == before


def test_other_documents_are_not_mixed_in(demo):
    other = run(demo, demo.parent)
    assert other.returncode == 1 and "remove it, or name another directory with DEMO" in other.stderr


def test_split():
    """Each module is in one split, long ones are held out, and the longest is in the test split."""
    documents = list(standard_library())
    parts = split(documents)
    names = [name for part in parts.values() for name, _ in part]
    assert sorted(names) == sorted(name for name, _ in documents)
    longest = max(documents, key=lambda d: len(d[1]))
    assert longest in parts["test"] and all(len(text) >= 50_000 for _, text in parts["test"] + parts["valid"])
    few = split([("a", "line\n" * 100), ("b", "word " * 100)])
    assert "".join(dict(few[part]).get("a", "") for part in few) == "line\n" * 100

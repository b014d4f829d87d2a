"""Test every step and the report of examples/smollm2/run.sh, on a tiny Llama, a few documents and for two updates."""

import json
import os
import subprocess

import pytest

from examples.smollm2.report import SYSTEMS
from tests.examples.huggingface_models import source_texts, write_llama
from tests.repository import ROOT


def run(base, *arguments, **environment):
    settings = {"TEXT": str(base / "text"), "SMOLLM2": str(base / "out"), "UPDATES": "2", "OMP_NUM_THREADS": "2"}
    settings.update({"MEMORIES": "4096", "BLOCKS": "1024"})
    return subprocess.run(
        ["bash", "examples/smollm2/run.sh", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **settings, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    base = tmp_path_factory.mktemp("smollm2")
    (base / "text").mkdir()
    for name, text in source_texts().items():
        (base / "text" / f"{name}.py").write_text(text)
    write_llama(base / "model", 2048)
    done = run(base, base / "model")
    assert done.returncode == 0, done.stdout + done.stderr
    return base


def test_report(base):
    report = json.loads((base / "out" / "report.json").read_text())
    assert list(report["backbone"]) == ["1024"] and list(report["memory"]) == ["4096"]
    # With random weights no system predicts much: the tokenizer has about 600 tokens.
    perplexities = [x for system in ("backbone", *SYSTEMS) for x in report[system].values()]
    assert len(perplexities) == 4 and all(100 < value < 1500 for value in perplexities)
    assert report["memory_layer"] in (1, 3) and report["copying"].startswith("random sequence, loss in nats: copy 1")
    assert report["updates"] == 2 and report["training_seconds"] > 0 and 0.4 < report["gate"] < 0.6
    assert int(report["training_peak"].replace(",", "").split(" MiB")[0]) > 100
    assert int(report["parameters_trained"].replace(",", "")) > 1000
    table = (base / "out" / "report.md").read_text()
    assert "| LongMem, window of 1,024 alone: memory of 4,096 tokens |" in table
    assert "| LongMem, 1,024 tokens carried: memory of 4,096 tokens |" in table
    assert (base / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_other_documents_are_not_mixed_in(base):
    other = run(base, base / "text")
    assert other.returncode == 1 and "remove it, or name another directory with SMOLLM2" in other.stderr


def test_a_second_call_repeats_nothing(base):
    before = {path: path.stat().st_mtime_ns for path in (base / "out").rglob("*") if path.suffix in (".pt", ".log")}
    again = run(base, base / "model")
    assert again.returncode == 0 and not any(f"== {step}." in again.stdout for step in range(1, 5))
    assert {path: path.stat().st_mtime_ns for path in before} == before

"""Test the scripts for GPUs as whole commands on tiny shapes, and the comparisons in their reports."""

import json
import os
import subprocess
import sys

import pytest

from examples.benchmark import gpu_report
from tests.repository import ROOT


def run(script, *arguments, **environment):
    return subprocess.run(
        ["bash", str(ROOT / "examples" / "benchmark" / script), *map(str, arguments)],
        env={
            **os.environ,
            "PYTHON": sys.executable,
            "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_gpu_check_tiny(tmp_path):
    """Every part runs, and the report states that it is of a tiny run."""
    done = run("gpu_check.sh", tmp_path, "--tiny")
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tiny"] and {part["status"] for part in report["parts"]} == {"passed"}
    results = {part["part"]: part["result"] for part in report["parts"]}
    assert {"environment", "tests", "throughput-eval-8", "search", "throughput-train-8", "training"} == set(results)
    assert results["throughput-train-8"]["options"]["mode"] == "train"
    text = (tmp_path / "report.md").read_text()
    assert "nothing here has run on a GPU" in text and "perplexity of the test documents after 3 updates" in text
    assert "Which search should be the default" in text
    assert str(ROOT) not in text + json.dumps(report), "the report contains no directory of this machine"


def test_gpu_check_refusals(tmp_path):
    done = run("gpu_check.sh", tmp_path, "--small")
    assert done.returncode == 2 and "--small is unknown" in done.stdout
    done = run("gpu_check.sh")
    assert done.returncode and "usage: gpu_check.sh OUT" in done.stdout


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Write a few documents for each split; return them as options of gpu_result.sh."""
    directory = tmp_path_factory.mktemp("texts")
    words = (ROOT / "README.md").read_text(encoding="utf-8").split()
    options = []
    for split, numbers in (("train", (3, 5, 7, 11)), ("valid", (13,)), ("test", (17, 19))):
        (directory / split).mkdir()
        for n in numbers:
            (directory / split / f"{n}.txt").write_text(" ".join(words[i * n % len(words)] for i in range(1500)))
        options += [f"--{split}", directory / split]
    return options


def test_gpu_result_tiny(texts, tmp_path):
    """Run from documents to the report; an interrupted run continues, and a finished one repeats nothing."""
    done = run("gpu_result.sh", tmp_path, *texts, "--tiny", BUDGET="5")
    assert done.returncode == 3 and "out of time in data: call the same command again" in done.stdout
    done = run("gpu_result.sh", tmp_path, *texts, "--tiny")
    assert done.returncode == 0, done.stdout[-6000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert list(report["memory"]) == ["0", "1024"] and report["backbone"] > 1
    assert len(report["gates"]) == 2 and all(0 < gate < 1 for gate in report["gates"]) and report["distance"] > 0
    assert len(report["documents"]) == 2 and set(report["documents"][0]) == {"name", "tokens", "backbone", "0", "1024"}
    text = (tmp_path / "report.md").read_text()
    assert "A tiny run" in text and "| LongMem, memory of 1,024 tokens |" in text
    assert (tmp_path / "report.png").stat().st_size > 1000
    before = (tmp_path / "seconds.txt").read_text()
    assert run("gpu_result.sh", tmp_path, *texts, "--tiny").returncode == 0
    assert (tmp_path / "seconds.txt").read_text() == before


def test_gpu_result_refusals(texts, tmp_path):
    done = run("gpu_result.sh", tmp_path / "out", *texts[:4], "--tiny")
    assert done.returncode == 2 and "usage: gpu_result.sh OUT --train" in done.stdout
    assert not (tmp_path / "out").exists()


def throughput(name, mode="eval", **row):
    row = {"memory_size": 65536, "ratio_to_off": 0.95, "extra_ms": 2.0, "roofline_ms": 1.0, **row}
    full = [{"window": 4096, "speed_of_longmem": 1.6, "memory_of_longmem": 0.7}] if mode == "eval" else []
    off = {"memory_size": 0, "ratio_to_off": 1.0}
    return {"part": name, "result": {"options": {"mode": mode}, "rows": [off, row], "full_attention": full}}


def test_targets():
    """Each figure is compared with its upper or lower limit; parts without figures have no targets."""
    parts = [
        throughput("throughput-eval-8"),
        throughput("throughput-train-8", "train", ratio_to_off=0.8, roofline_ms=0.5),
        {"part": "throughput-eval-1", "result": None},
        {"part": "tests", "result": None},
    ]
    rows = {(row["part"], row["target"]): (row["found"], row["limit"], row["met"]) for row in gpu_report.targets(parts)}
    assert rows == {
        ("throughput-eval-8", "65k of memory: speed of memory off"): (0.95, "at least 0.9", True),
        ("throughput-eval-8", "65k: extra time of its roofline"): (2.0, "at most 3", True),
        ("throughput-eval-8", "full attention over 4,096: LongMem's speed"): (1.6, "at least 1.54", True),
        ("throughput-eval-8", "full attention over 4,096: LongMem's memory"): (0.7, "at most 0.65", False),
        ("throughput-train-8", "65k of memory: speed of memory off"): (0.8, "at least 0.85", False),
        ("throughput-train-8", "65k: extra time of its roofline"): (4.0, "at most 3", False),
    }


def test_fastest_search():
    """The product alone is not a search, and an approximate index is not exact."""
    searches = (("product alone", 1.0, None), ("topk", 3.0, 0.0), ("two-level", 2.0, 1e-6), ("wrong", 1.5, 0.4))
    rows = [{"tokens": 64, "backend": name, "milliseconds": time, "worst": worst} for name, time, worst in searches] + [
        {"tokens": 64, "backend": "IVF", "milliseconds": 1.2, "recall": 0.9}
    ]
    (fastest,) = gpu_report.fastest([{"part": "search", "result": {"rows": rows}}])
    assert fastest["backend"] == "two-level"
    assert gpu_report.fastest([{"part": "search", "result": None}]) == []


def test_the_report_of_all_parts_shows_what_failed(tmp_path, capsys):
    work = tmp_path / "work"
    work.mkdir()
    printed = "noise\n## Table\n\n| a |\n| --: |\n| 1 |\n"
    for name, status, log in (("good", "0 3 60", printed), ("bad", "124 9 9", "why\n")):
        (work / f"{name}.status").write_text(status)
        (work / f"{name}.log").write_text(log)
    (work / "good.json").write_text('{"rows": [1]}')
    assert gpu_report.main(str(work), str(tmp_path)) == 1
    text = (tmp_path / "report.md").read_text()
    assert "| good | passed | 3 | 60 |" in text and "## Table" in text and "noise" not in text
    assert "## bad: too long" in text and "why" in text
    parts = {part["part"]: part for part in json.loads((tmp_path / "report.json").read_text())["parts"]}
    assert parts["good"]["result"] == {"rows": [1]} and parts["bad"]["result"] is None
    (work / "bad.status").write_text("0 9 9")
    assert gpu_report.main(str(work), str(tmp_path)) == 0

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
    throughputs = {"throughput-full-8", "throughput-train-8"}
    assert {"environment", "tests", "search", "profile-8", "training", *throughputs} == set(results)
    assert {path.stem for path in (tmp_path / "logs").iterdir()} == set(results)
    assert results["throughput-train-8"]["options"]["mode"] == "train"
    full = [row["attention"] for row in results["throughput-full-8"]["full_attention"]]
    assert full == ["window:32", "context:48"] and results["profile-8"]["kernels"]
    text = (tmp_path / "report.md").read_text()
    assert "nothing here has run on a GPU" in text and "perplexity of the test documents after 3 updates" in text
    assert "Which search should be the default" in text
    texts = [text, json.dumps(report), *(path.read_text() for path in (tmp_path / "logs").iterdir())]
    assert not any(str(ROOT) in x for x in texts), "the report contains no directory of this machine"


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


def row(size, speed, graphs="off", share=0.6):
    return {"memory_size": size, "tokens_per_second": speed, "cuda_graphs": graphs, "roofline_share": share}


def throughput(name, mode, lanes, rows, full=()):
    options = {"mode": mode, "batch": lanes, "positions": "alibi"}
    return {"part": name, "result": {"options": options, "rows": rows, "full_attention": list(full)}}


def test_targets():
    """Each figure is compared with its limit, the best of those with and without graphs; others have no target."""
    context = {"attention": "context:65536", "speed_of_longmem": 4.5, "memory_of_longmem": 0.3}
    window = {"attention": "window:4096", "speed_of_longmem": 0.5, "memory_of_longmem": 0.3}
    search = {"tokens": 65536, "backend": "triton", "milliseconds": 0.5, "worst": 0.0}
    parts = [
        throughput("throughput-eval-8", "eval", 8, [row(0, 100.0), row(65536, 80.0), row(65536, 94.0, "on")]),
        throughput("throughput-full-8", "eval", 8, [row(0, 100.0, share=0.5), row(65536, 90.0)], [window, context]),
        throughput("throughput-eval-1", "eval", 1, [row(0, 200000.0), row(1048576, 160000.0)]),
        throughput("throughput-train-8", "train", 8, [row(65536, 80.0)]),
        throughput("throughput-generate-1", "generate", 1, [row(0, 80.0)]),
        {"part": "throughput-train-1", "result": None},
        {"part": "search", "result": {"rows": [search, {**search, "tokens": 4096}]}},
        {"part": "tests", "result": None},
    ]
    rows = {(x["part"], x["target"]): (x["found"], x["limit"], x["met"]) for x in gpu_report.targets(parts)}
    assert rows == {
        ("throughput-eval-8", "65,536 tokens of memory: speed of memory off"): (0.94, "at least 0.92", True),
        ("throughput-eval-8", "memory off: share of the roofline"): (0.6, "at least 0.55", True),
        ("throughput-full-8", "65,536 tokens of memory: speed of memory off"): (0.9, "at least 0.92", False),
        ("throughput-full-8", "memory off: share of the roofline"): (0.5, "at least 0.55", False),
        ("throughput-full-8", "full attention to 65,536 tokens: LongMem's speed"): (4.5, "at least 4", True),
        ("throughput-full-8", "full attention to 65,536 tokens: LongMem's memory"): (0.3, "at most 0.25", False),
        ("throughput-eval-1", "1,048,576 tokens of memory: speed of memory off"): (0.8, "at least 0.75", True),
        ("throughput-eval-1", "memory off: tokens/s"): (200000.0, "at least 1.88e+05", True),
        ("throughput-generate-1", "memory off: share of the roofline"): (0.6, "at least 0.667", False),
        ("search", "exact search in 65,536 tokens, ms a lane"): (0.5, "at most 0.4", False),
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

"""The benchmarks of throughput and search as whole commands on tiny shapes, their refusals, and the joined report."""

import json
import subprocess
import sys

import pytest

from examples.benchmark import gpu_report, throughput
from tests.repository import ROOT

TINY = "--layers 2 --dim 16 --heads 2 --vocab 50 --retrieval-layer-index 1 --segment 16 --k 8 --steps 2 --threads 1"


def run(script, *arguments):
    command = [sys.executable, str(ROOT / "examples" / "benchmark" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_throughput(tmp_path):
    done = run("throughput.py", *TINY.split(), "--memory-sizes", 0, 64, "--batch", 2, "--full-windows", 32,
               "--memory-search", "torch", "--tflops", 1, "--gbps", 10, "--json", tmp_path / "t.json")  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "t.json").read_text())
    off, on = result["rows"]
    assert [off["memory_size"], on["memory_size"]] == [0, 64]
    assert on["tokens_per_second"] == pytest.approx(2 * 16 / on["seconds_per_step"])
    assert on["ratio_to_off"] == pytest.approx(on["tokens_per_second"] / off["tokens_per_second"])
    # 2 lanes, 2 heads, 16 chunks of 4 tokens, width 8: keys and values, means, and one chunk a lane for the tail.
    assert off["bank_bytes"] == 0 and on["bank_bytes"] == 2 * 2 * 16 * (2 * 4 * 8 * 4 + 4 * 8) + 2 * 2 * 2 * 4 * 8 * 4
    assert min(off["peak_memory_bytes"], on["peak_memory_bytes"]) > 2**26  # PyTorch alone takes more
    (full,) = result["full_attention"]
    assert full["speed_of_longmem"] == pytest.approx(on["tokens_per_second"] / full["tokens_per_second"])
    assert "| 64 |" in done.stdout and "full attention" in done.stdout


def test_search(tmp_path):
    done = run("search.py", "--tokens", 8192, "--heads", 1, "--queries", 8, "--steps", 3, "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert {row["backend"] for row in rows} == {"torch product alone", "torch topk", "torch two-level", "faiss knn"}
    assert all(row["milliseconds"] >= row["fastest"] > 0 for row in rows)
    assert all((row["worst"] is None) == (row["backend"] == "torch product alone") for row in rows)


@pytest.mark.parametrize(
    "changes, message",
    [
        (["--memory-sizes", "8"], "--memory-sizes 8 is smaller than one segment of 16 tokens"),
        (["--mode", "train", "--full-windows", "32"], "leave it out with --mode train"),
        (["--heads", "3"], "--dim must be a multiple of --heads"),
        (["--steps", "0"], "--steps 0 is less than 1"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(SystemExit, match=message):
        throughput.parse([*TINY.split(), *changes])


def test_the_work_of_search_and_reading():
    work = throughput.memory_work(throughput.parse([*TINY.split(), "--batch", "3", "--dtype", "bfloat16"]), 64)
    queries = 3 * 2 * 16
    assert work["search_operations"] == queries * 16 * 8 * 2  # 16 chunks, width 8
    assert work["read_operations"] == queries * 8 * 8 * 4
    assert work["search_bytes"] == 4 * (3 * 2 * 16 * 8 + queries * 8)
    assert work["read_bytes"] == queries * 8 * 8 * 2 * 2


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

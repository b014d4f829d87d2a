"""Test the benchmark of memories on disk with a small memory, and its refusals."""

import json

import pytest

from examples.benchmark import memory_file_speed


def test_memory_file(tmp_path, capsys):
    sizes = "--tokens 100 --heads 2 --head-dim 8 --rounds 2".split()
    memory_file_speed.main([*sizes, "--directory", str(tmp_path), "--json", str(tmp_path / "m.json")])
    rows = {row["dtype"]: row for row in json.loads((tmp_path / "m.json").read_text())["rows"]}
    assert list(rows) == ["float16", "bfloat16", "float32"]
    numbers = 2 * 100 * 2 * 8
    assert rows["float32"]["mib"] * 2**20 - rows["float16"]["mib"] * 2**20 == pytest.approx(2 * numbers, abs=16)
    assert all(row["save_seconds"] > 0 and row["load_seconds"] > 0 for row in rows.values())
    assert "| float16 |" in capsys.readouterr().out and [path.name for path in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--tokens 0", "--tokens 0 is less than 1"),
        ("--tokens 3", "less than one chunk of 4"),
        ("--directory no/such", "--directory no/such does not exist"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        memory_file_speed.parse(options.split())

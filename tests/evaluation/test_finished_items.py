"""Finished items survive an interruption, and results of different runs do not mix."""

import json

import pytest

from longmem_fairseq.evaluation.reporting.finished_items import FinishedItems, digest

RUN = {"memory_size": 4096, "data": "x"}


def test_a_run_goes_on(tmp_path):
    first = FinishedItems(str(tmp_path / "new"), RUN)
    first.add("a", {"right": 1})
    first.add("b", {"right": 0})
    with open(first.path, "a") as file:
        file.write('{"item": "c", "resu')  # killed while writing
    again = FinishedItems(str(tmp_path / "new"), RUN)
    assert "a" in again and "c" not in again and again["b"] == {"right": 0}
    again.add("c", {"right": 1})
    last = FinishedItems(str(tmp_path / "new"), RUN)
    assert dict(last.of(["c", "d", "a"])) == {"c": {"right": 1}, "a": {"right": 1}}


def test_another_run_is_refused(tmp_path):
    records = FinishedItems(str(tmp_path), RUN)
    assert not list(tmp_path.iterdir()), "nothing is written before there is a result"
    records.add("a", 1)
    with pytest.raises(ValueError, match=r"memory_size: 4096 there, 16384 here.*--results-path"):
        FinishedItems(str(tmp_path), {**RUN, "memory_size": 16384})
    with pytest.raises(ValueError, match="k: null there, 8 here"):
        FinishedItems(str(tmp_path), {**RUN, "k": 8})
    assert [json.loads(line) for line in open(records.path)] == [{"run": RUN}, {"item": "a", "result": 1}]


@pytest.mark.parametrize("content", ["nonsense\n", '{"item": "a"}\n', '{"run": {}}\n{"x": 1}\n'])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "items.jsonl").write_text(content)
    with pytest.raises(ValueError, match="not a file of results"):
        FinishedItems(str(tmp_path), {})


def test_digest(tmp_path):
    for name, text in (("a", "1"), ("b", "2"), ("c", "1")):
        (tmp_path / name).write_text(text)
    a, b, c = (str(tmp_path / name) for name in "abc")
    assert digest([a, b]) == digest([c, b]) != digest([b, a])

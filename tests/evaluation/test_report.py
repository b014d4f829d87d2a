"""Tables as Markdown and JSON, and plots."""

import math
from pathlib import Path

import pytest

from longmem_fairseq.evaluation.reporting.markdown import as_markdown
from longmem_fairseq.evaluation.reporting.plots import draw
from longmem_fairseq.evaluation.reporting.report_files import as_json, write_report
from longmem_fairseq.evaluation.reporting.statistic import ACCURACY, PERPLEXITY
from longmem_fairseq.evaluation.reporting.system_scores import SystemScores
from longmem_fairseq.evaluation.reporting.table import Table

RIGHT = {name: SystemScores({"1": (x, 1), "2": (x, 1)}, ACCURACY) for name, x in (("memory on", 1), ("memory off", 0))}
LIKELY = {
    name: SystemScores({"1": (math.log(x), 1)}, PERPLEXITY)
    for name, x in (("memory on", 8), ("memory off", 10), ("backbone", 9))
}


def table(**options):
    return Table("Title", {"accuracy": RIGHT, "perplexity": LIKELY}, **options)


def test_markdown():
    assert as_markdown(table()).split("\n") == [
        "**Title**",
        "",
        "| system | accuracy | perplexity |",
        "| --- | ---: | ---: |",
        "| memory on | 100.0 % [100.0, 100.0] | 8.00 [8.00, 8.00] |",
        "| memory off | 0.0 % [0.0, 0.0] | 10.00 [10.00, 10.00] |",
        "| backbone |  | 9.00 [9.00, 9.00] |",
        "",
        "| difference | accuracy | perplexity |",
        "| --- | ---: | ---: |",
        "| memory on against memory off | +100.0 [+100.0, +100.0] | -20.0 % [-20.0, -20.0] |",
        "| memory on against backbone |  | -11.1 % [-11.1, -11.1] |",
    ]
    assert as_markdown(table(upright=True)).split("\n")[2:] == [
        "|  | memory on | memory off | backbone |",
        "| --- | ---: | ---: | ---: |",
        "| accuracy | 100.0 % [100.0, 100.0] | 0.0 % [0.0, 0.0] |  |",
        "| perplexity | 8.00 [8.00, 8.00] | 10.00 [10.00, 10.00] | 9.00 [9.00, 9.00] |",
    ]
    seeds = SystemScores({"1": ((1, 1), (0, 1))}, ACCURACY)
    assert "| a | 50.0 % ± 70.7 [0.0, 100.0] |" in as_markdown(Table("t", {"x": {"a": seeds}}))


def test_json_has_no_nan():
    nothing = SystemScores({"1": (0, 0)}, ACCURACY)
    content = as_json(Table("t", {"x": {"a": nothing}}, pairs=[("a", "a")]))
    assert content["figures"]["x"]["a"] == {
        "value": None,
        "low": None,
        "high": None,
        "statistic": "accuracy",
        "deviation": None,
        "items": 1,
    }
    assert content["differences"][0]["value"] is None


def test_plots(tmp_path):
    path = tmp_path / "plot.png"
    draw([table(plot="bars"), table(plot="lines"), table()], str(path))
    assert path.read_bytes()[:4] == b"\x89PNG" and len(list(tmp_path.iterdir())) == 1


def test_a_report_is_whole_or_not_there(tmp_path, monkeypatch):
    write_report(str(tmp_path), {"a": 1}, "text", [table(plot="bars")])
    kept = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(kept) == {"report.json", "report.md", "report.png"}

    def fails(figure, path, **options):
        Path(path).write_bytes(b"a part")
        raise OSError("disk full")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", fails)
    with pytest.raises(OSError, match="report.png cannot be written: disk full"):
        write_report(str(tmp_path), {"a": 2}, "other", [table(plot="bars")])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == kept

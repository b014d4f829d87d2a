"""The comparison, as a command on a backbone and a LongMem: everything runs, continues, and is in one report."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from longmem_fairseq.evaluation.compare import main, merge, named, read_plan
from longmem_fairseq.evaluation.dialogue import Dialogue
from longmem_fairseq.evaluation.qa import QuestionAnswering
from longmem_fairseq.evaluation.reporting.statistic import ACCURACY, PERPLEXITY
from longmem_fairseq.evaluation.reporting.system_scores import SystemScores
from longmem_fairseq.evaluation.reporting.table import PAIRS, Table
from tests.repository import ROOT

PLAN = {
    "books": {
        "evaluation": "books",
        "arguments": ["--data", "{data}/books", "--valid", "{data}/books", *"--memory-sizes 64 --windows".split()],
    },
    "icl": {
        "evaluation": "in_context",
        "arguments": [
            "--data",
            "{data}/icl",
            *"--sets sst2 --demonstrations 1 --in-memory 3 --seeds 2 --chunk-size 2".split(),
        ],
    },
    "chapters": {
        "evaluation": "chapterbreak",
        "arguments": [
            "--data",
            "{data}/chapters.json",
            "--valid",
            "{data}/chapters.json",
            *"--suffix-tokens 5 --lengths 16 all".split(),
        ],
    },
    "dialogue": {
        "evaluation": "dialogue",
        "arguments": ["--data", "{data}/dialogue.jsonl", "--valid", "{data}/dialogue.jsonl", "--max-new-tokens", "4"],
    },
    "qa": {
        "evaluation": "qa",
        "arguments": [
            "--data",
            "{data}/qa.jsonl",
            "--train",
            "{data}/qa.jsonl",
            *"--demonstrations 0 --max-new-tokens 4".split(),
        ],
    },
}


@pytest.fixture(scope="module")
def data(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("everything")
    for name in ("books", "icl"):
        (directory / name).mkdir()
    (directory / "books" / "one.txt").write_text(text[:800])
    rows = [{"text": f"{word} film", "label": label} for word, label in zip("abcde", ["positive", "negative"] * 3)]
    for split in ("train", "test"):
        (directory / "icl" / f"sst2.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chapters = {"x": {"work": [{"ctx": text[:500], "pos": "He slept well.", "negs": ["It rained.", "They ran."]}] * 2}}
    (directory / "chapters.json").write_text(json.dumps(chapters))
    turns = [{"speaker": speaker, "text": "It is late ."} for speaker in "AB"]
    (directory / "dialogue.jsonl").write_text(json.dumps({"id": "c", "sessions": [{"turns": turns}] * 2}) + "\n")
    row = {"id": "1", "title": "T", "context": "Rex is a dog .", "question": "Who ?", "answers": ["Rex"]}
    (directory / "qa.jsonl").write_text(json.dumps(row) + "\n")
    (directory / "plan.json").write_text(json.dumps(PLAN))
    return directory


@pytest.fixture(scope="module")
def arguments(files, data, tmp_path_factory):
    return [
        str(x)
        for x in (
            "--path",
            f"alone={files.backbone}",
            f"first={files.longmem}",
            "--data",
            data,
            "--plan",
            data / "plan.json",
            "--tokenizer",
            files.directory,
            "--results-path",
            tmp_path_factory.mktemp("comparison"),
            *"--tokens-per-sample 32 --tuning-tokens 64 --cpu".split(),
        )
    ]


@pytest.fixture(scope="module")
def outcome(arguments):
    line = [sys.executable, "-m", "examples.compare.evaluate", *arguments]
    done = subprocess.run(line, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return SimpleNamespace(directory=Path(arguments[arguments.index("--results-path") + 1]), output=done.stdout)


def test_one_report(outcome):
    """Each evaluation's main figures are those of the checkpoints' own reports."""
    report = json.loads((outcome.directory / "report.json").read_text())
    assert list(report["evaluations"]) == list(PLAN) and list(report["models"]) == ["alone", "first"]
    assert outcome.output.strip() == (outcome.directory / "report.md").read_text().strip()
    assert (outcome.directory / "report.png").stat().st_size > 50_000
    for step, evaluation in report["evaluations"].items():
        merged = evaluation["tables"][0]
        for name in report["models"]:
            single = json.loads((outcome.directory / "runs" / name / step / "report.json").read_text())["tables"][0]
            for column, rows in single["figures"].items():
                for row, cell in rows.items():
                    same = row.startswith("backbone") and ("cache" not in row or step == "books")
                    owner = "alone" if same else name  # of the same backbone; elsewhere memories differ in size
                    merged_value = merged["figures"][column][f"{owner}: {row}"]["value"]
                    assert merged_value == pytest.approx(cell["value"], rel=1e-3)
        pairs = {(row["system"], row["against"]) for row in merged["differences"]}
        on = "memory 64" if step == "books" else "memory on"
        assert {(f"first: {on}", "first: memory off"), (f"first: {on}", "alone: backbone")} <= pairs


def test_it_does_nothing_twice(outcome, arguments, data):
    kept = {path: path.stat().st_mtime_ns for path in outcome.directory.rglob("items.jsonl")}
    assert len(kept) == 2 * len(PLAN)
    others = dict.fromkeys(("books", "in_context", "chapterbreak"))
    text = main({"qa": QuestionAnswering, "dialogue": Dialogue, **others}, "", [*arguments, "--only", "dialogue", "qa"])
    parts = outcome.output.split("\n## ")
    assert f"{text}\n".split("\n## ")[1:] == parts[-2:]
    assert {path: path.stat().st_mtime_ns for path in kept} == kept


def test_plan(tmp_path, data):
    evaluations = dict.fromkeys(("books", "in_context", "chapterbreak", "dialogue", "qa"), None)
    shipped = str(ROOT / "examples/compare/plan.json")
    (step,) = read_plan(str(data / "plan.json"), str(data), evaluations, ["qa"])
    assert step.arguments[:2] == ["--data", f"{data}/qa.jsonl"]
    with pytest.raises(FileNotFoundError, match=r"books needs .*books_test, which does not exist: .* --only"):
        read_plan(shipped, str(tmp_path), evaluations)
    with pytest.raises(ValueError, match="--only x is not in .*, which has books, arxiv, in_context"):
        read_plan(shipped, str(tmp_path), evaluations, ["x"])
    with pytest.raises(ValueError, match="there is no evaluation books: qa"):
        read_plan(str(data / "plan.json"), str(data), {"qa": None}, ["books"])
    (tmp_path / "plan").write_text('{"a": ["--data"]}')
    with pytest.raises(ValueError, match="is not a plan"):
        read_plan(str(tmp_path / "plan"), str(tmp_path), evaluations)
    assert named(["a=x=y", "b=z"], "--path") == {"a": "x=y", "b": "z"}
    with pytest.raises(ValueError, match="--path c.pt has no name: write NAME=c.pt"):
        named(["c.pt"], "--path")
    with pytest.raises(ValueError, match="two are named a"):
        named(["a=1", "a=2"], "--path")


def test_rows_and_pairs():
    """Two LongMems on one backbone: it appears once; the second's systems are compared with the first's."""

    def outcome(fingerprint, value):
        rows = {row: SystemScores({"1": (value, 2)}, ACCURACY) for row in ("backbone", "memory off", "memory on")}
        model = {"dictionary_sha256": "d", "backbone_fingerprint": fingerprint}
        return SimpleNamespace(report={"model": model}, tables=[Table("t", {"x": rows})])

    (table,) = merge({"a": outcome("1", 0), "b": outcome("1", 1), "c": outcome("2", 2)})
    assert table.rows == [
        "a: backbone",
        "a: memory off",
        "a: memory on",
        "b: memory off",
        "b: memory on",
        "c: backbone",
        "c: memory off",
        "c: memory on",
    ]
    assert {pair: cells["x"].value for pair, cells in table.differences.items()} == {
        ("a: memory on", "a: memory off"): 0,
        ("a: memory on", "a: backbone"): 0,
        ("b: memory on", "b: memory off"): 0,
        ("b: memory on", "a: backbone"): 50,
        ("b: memory off", "a: memory off"): 50,
        ("b: memory on", "a: memory on"): 50,
        ("c: memory on", "c: memory off"): 0,
        ("c: memory on", "c: backbone"): 0,
        ("c: backbone", "a: backbone"): 100,
        ("c: memory off", "a: memory off"): 100,
        ("c: memory off", "b: memory off"): 50,
        ("c: memory on", "a: memory on"): 100,
        ("c: memory on", "b: memory on"): 50,
    }


def test_perplexities_of_two_tokenizers_are_not_compared():
    def outcome(dictionary, statistic):
        columns = {"x": {"memory on": SystemScores({"1": (1, 2), "2": (2, 2)}, statistic)}}
        model = {"dictionary_sha256": dictionary, "backbone_fingerprint": str(columns)}
        return SimpleNamespace(report={"model": model}, tables=[Table("t", columns)])

    between = ("b: memory on", "a: memory on")
    for statistic, dictionaries, expected in (
        (PERPLEXITY, ("1", "1"), True),
        (PERPLEXITY, ("1", "2"), False),
        (ACCURACY, ("1", "2"), True),
    ):
        (table,) = merge({name: outcome(d, statistic) for name, d in zip("ab", dictionaries)})
        assert (between in table.pairs) == expected and set(PAIRS) <= {(a[3:], b[3:]) for a, b in table.pairs}

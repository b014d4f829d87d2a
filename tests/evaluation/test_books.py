"""The books evaluation as a user runs it: its figures, its files, and continuing after an interruption."""

import json
import math
import os
import re

import pytest
import torch

from longmem_fairseq.evaluation.books import Books
from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.files import printable
from longmem_fairseq.hub import LongMem
from preprocess.documents import iter_documents

SHORT = os.fsdecode(b"sh\xf6rt.txt")  # not UTF-8


def books():
    return Books(lambda paths: ((document.name, document.text) for document in iter_documents(paths)))


@pytest.fixture(scope="module")
def data(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("books")
    (directory / "long.txt").write_text(text * 3)  # 2,048 to 4,096 tokens
    (directory / SHORT).write_text(text[300:1500])
    return directory


@pytest.fixture(scope="module")
def arguments(files, data):
    return [
        "--path",
        files.longmem,
        "--tokenizer",
        files.directory,
        "--data",
        data,
        "--valid",
        data / SHORT,
        *"--cpu --memory-sizes 64 128 --tuning-tokens 150".split(),
    ]


def evaluate(arguments, directory, *more):
    arguments = [str(x) for x in (*arguments, *more, "--results-path", directory)]
    return run(books(), parser_of(books()).parse_args(arguments))


@pytest.fixture(scope="module")
def outcome(arguments, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    return directory, evaluate(arguments, directory)


def test_report(outcome, data, files):
    directory, finished = outcome
    report = json.loads((directory / "report.json").read_text())
    assert report == json.loads(json.dumps(finished.report)) and (directory / "report.png").stat().st_size > 10_000
    assert (directory / "report.md").read_text() == report["markdown"]
    lengths, kinds, positions, documents, by_text = report["tables"]
    assert list(lengths["figures"]) == ["all", "< 5k"] and list(positions["figures"]) == ["0-1k", "1-4k"]
    assert list(documents["figures"]) == ["long.txt", printable(SHORT)]
    assert list(lengths["figures"]["all"]) == [
        "backbone",
        "backbone, window 64",
        "backbone, sliding window 32",
        "memory off",
        "memory 64",
        "memory 128",
        "backbone + cache 64",
        "memory 64 + cache 64",
        "backbone + cache 128",
        "memory 128 + cache 128",
    ]
    model = LongMem.from_pretrained(str(files.longmem), data=str(files.directory), device="cpu")
    assert printable(SHORT) in report["markdown"]
    for name in ("long.txt", SHORT):
        tokens = torch.cat([model.encode((data / name).read_text()), torch.tensor([2])])
        model.encode = lambda text, tokens=tokens: tokens
        expected = model.score("").perplexity  # with the checkpoint's memory of 128 tokens
        del model.encode
        assert documents["figures"][printable(name)]["memory 128"]["value"] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def test_a_sliding_window(outcome, data, files):
    """A plain loop over windows of 32 that move by 16, from block to block of a document."""
    model = LongMem.from_pretrained(str(files.longmem), data=str(files.directory), device="cpu")
    losses = []
    tokens = torch.cat([model.encode((data / "long.txt").read_text()), torch.tensor([2])])
    source = torch.cat([torch.tensor([2]), tokens[:-1]])
    for begin in range(0, len(tokens), 16):
        first = max(0, begin - 16)
        logits = files.models[0](source[None, first : begin + 16])[0][0, begin - first :]
        losses.append(torch.nn.functional.cross_entropy(logits, tokens[begin : begin + 16], reduction="none"))
    value = outcome[1].tables[3].columns["long.txt"]["backbone, sliding window 32"].interval().value
    assert value == pytest.approx(math.exp(torch.cat(losses).mean()), rel=1e-4)


def test_times(outcome):
    """Each system has read every token, and its time includes that of what it shares with others."""
    _, finished = outcome
    times, tokens = finished.report["times"], 0
    for _, n in finished.tables[0].columns["all"]["memory 64"].items.values():
        tokens += n
    assert set(times) == set(finished.tables[0].rows)
    assert {row["tokens"] for row in times.values()} == {tokens}
    assert times["memory 64 + cache 64"]["seconds"] > times["memory 64"]["seconds"] > 0
    assert "| system | seconds | tokens | tokens/s |" in finished.report["markdown"]


def test_figures_add_up(outcome):
    """All tokens are in one length, one position, one kind of word."""
    directory, finished = outcome
    items = [json.loads(line)["result"] for line in (directory / "items.jsonl").read_text().splitlines()[1:]]
    blocks = [item for item in items if "loss" in item]
    for table in finished.tables[:3]:
        columns = {name: rows for name, rows in table.columns.items() if name != "all"}
        sums = [sum(x) for x in zip(*(part for rows in columns.values() for part in rows["memory 64"].items.values()))]
        expected = [sum(b["loss"]["memory 64"] for b in blocks), sum(b["tokens"] for b in blocks)]
        assert sums == pytest.approx(expected)
    value = finished.tables[0].columns["all"]["memory 64"].interval().value
    assert value == pytest.approx(math.exp(expected[0] / expected[1]))


def test_per_word_and_byte(outcome, data):
    """All tokens, end-of-sentences included, over the words and bytes of the files."""
    directory, finished = outcome
    table = finished.tables[-1]
    losses = sum(loss for loss, _ in finished.tables[0].columns["all"]["memory 64"].items.values())
    texts = [(data / name).read_text() for name in ("long.txt", SHORT)]
    words, size = (sum(map(len, parts)) for parts in ([t.split() for t in texts], [t.encode() for t in texts]))
    assert table.title == "All documents, by word and byte"
    figures = {column: rows["memory 64"].interval().value for column, rows in table.columns.items()}
    assert figures == {
        "perplexity per word": pytest.approx(math.exp(losses / words)),
        "bits per byte": pytest.approx(losses / math.log(2) / size),
    }


def test_it_goes_on_where_it_was_interrupted(outcome, arguments, tmp_path):
    """From any item on the results are those of an uninterrupted run: memories and caches are filled again."""
    directory, finished = outcome
    lines = (directory / "items.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) > 5
    (tmp_path / "items.jsonl").write_text("".join(lines[:4]) + lines[4][:30])
    again = evaluate(arguments, tmp_path)
    for table, expected in zip(again.tables, finished.tables):
        for column, rows in expected.columns.items():
            for system, sample in rows.items():
                value = table.columns[column][system].interval().value
                assert value == pytest.approx(sample.interval().value, rel=1e-4)


def test_an_interruption_is_told(arguments, tmp_path, monkeypatch):
    scored = []

    def interrupted(self, item):
        if scored:
            raise KeyboardInterrupt
        scored.append(item)
        return {"tokens": 1, "loss": {}}

    monkeypatch.setattr(Books, "score", interrupted)
    with pytest.raises(SystemExit, match="interrupted; the same command continues from"):
        main(books(), [str(x) for x in (*arguments, "--no-cache", "--results-path", tmp_path)])
    assert [json.loads(line).get("item") for line in (tmp_path / "items.jsonl").open()] == [None, *scored]
    assert [path.name for path in tmp_path.iterdir()] == ["items.jsonl"]


def test_limits(outcome, arguments, tmp_path):
    directory, finished = outcome
    limited = evaluate(arguments, tmp_path, "--limit", 1, "--document-tokens", 1000)
    assert limited.report["items"] == 1 and "1 documents" in limited.report["notes"][0]
    assert len(evaluate(arguments, tmp_path).tables[0].columns["all"]["backbone"]) == finished.report["items"]


def test_a_backbone_alone(arguments, files, tmp_path):
    finished = evaluate([*arguments[:1], files.backbone, *arguments[2:]], tmp_path, "--tokens-per-sample", 32)
    assert list(finished.tables[0].columns["all"]) == [
        "backbone",
        "backbone, window 64",
        "backbone, sliding window 32",
        "backbone + cache 64",
        "backbone + cache 128",
    ]


def test_errors_are_one_sentence(arguments, data, tmp_path, capsys):
    def refuses(sentence, *more, without=()):
        left = [x for i, x in enumerate(arguments) if x not in without and (i == 0 or arguments[i - 1] not in without)]
        with pytest.raises(SystemExit) as stopped:
            main(books(), [str(x) for x in (*left, *more, "--results-path", tmp_path)])
        assert re.search(sentence, str(stopped.value)) and "\n" not in str(stopped.value)

    refuses("no file or directory", "--data", tmp_path / "none")
    refuses("--memory-sizes 16 is smaller than one segment of 32", "--memory-sizes", 16)
    refuses("--windows 40 is not a multiple", "--windows", 40)
    refuses("--sliding-windows 66 is not an even number of tokens of at most 64", "--sliding-windows", 66)
    refuses("name documents with --valid", without=("--valid",))
    refuses("--cache-lambda and --cache-theta belong together", "--cache-lambda", 0.5)
    refuses("--cache-lambda 1.5 must be", "--cache-lambda", 1.5, "--cache-theta", 1)
    refuses("--no-cache contradicts", "--cache-lambda", 0.5, "--cache-theta", 1, "--no-cache")
    refuses("--limit 0 is less than 1", "--limit", 0)
    refuses("--model-overrides 5 is not a Python dictionary", "--model-overrides", 5)
    refuses("give it as --memory-size", "--model-overrides", "{'memory_size': 64}")
    refuses("not have the setting memry_dtype", "--model-overrides", "{'memry_dtype': 'float16'}")
    assert not (tmp_path / "report.json").exists()
    evaluate(arguments, tmp_path, "--no-cache", "--limit", 1)
    refuses("results of another run .*name another --results-path")

"""Suffix identification, against direct calls of the models, in both layouts."""

import json

import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.evaluation.chapterbreak import ChapterBreak, read_boundaries
from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of

T, SUFFIX = 32, 9


@pytest.fixture(scope="module")
def data(tmp_path_factory, text):
    directory = tmp_path_factory.mktemp("chapters")
    (directory / "books").mkdir()
    (directory / "sets").mkdir()
    (directory / "books" / "one.txt").write_text(text)
    suffixes = ["The old man went home and slept.", "Nothing was said about it again", "Then it began to rain hard"]
    rows = [
        {
            "book": "one.txt",
            "boundary": i,
            "ctx_end": end,
            "gold": suffixes[i],
            "negatives": suffixes[:i] + suffixes[i + 1 :],
        }
        for i, end in enumerate((60, 700))
    ]
    (directory / "sets" / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    official = {
        "pg19": {
            "one.txt": [{"ctx": text[: row["ctx_end"]], "pos": row["gold"], "negs": row["negatives"]} for row in rows]
        }
    }
    (directory / "sets" / "official.json").write_text(json.dumps(official))
    return directory / "sets"


def evaluate(files, data, directory, name="lines.jsonl", *more):
    evaluation = ChapterBreak()
    arguments = [
        "--path",
        files.longmem,
        "--tokenizer",
        files.directory,
        "--data",
        data / name,
        "--results-path",
        directory,
        *"--cpu --lengths 16 all 64".split(),
        "--suffix-tokens",
        SUFFIX,
        *"--cache-lambda 0.2 --cache-theta 0.1".split(),
        *more,
    ]
    return evaluation, run(evaluation, parser_of(evaluation).parse_args([str(x) for x in arguments]))


@pytest.fixture(scope="module")
def outcome(files, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report")
    evaluation, finished = evaluate(files, data, directory)
    items = [json.loads(line) for line in (directory / "items.jsonl").open()][1:]
    return finished, {row["item"]: row["result"] for row in items}


@torch.no_grad()
def plainly(longmem, context, suffix, room):
    """Return the mean log-probability of a suffix with the memory on and off, without batches."""
    stream = torch.cat([torch.tensor([2]), context, suffix])
    here = max(0, len(context) - (T - room))  # inputs that are memorized
    longmem.reset_memory()
    start = 0
    for end in [*range(T, here, T), here] if here else []:
        longmem(stream[None, start:end], segments=Segments([0], [0], [start], [end - start], 1))
        start = end
    logits, extra = longmem(
        stream[None, here:-1], segments=Segments([0], [0], [here], [len(stream) - 1 - here], 1), without_memory=True
    )
    return [
        float(x[0].log_softmax(-1)[-len(suffix) :].gather(1, suffix[:, None]).mean())
        for x in (logits, extra["logits_without_memory"])
    ]


def test_scores(outcome, files, loaded, text):
    _, items = outcome
    longmem, encode = files.models[1], loaded.tokenizer.encode
    for boundary, end in ((0, 60), (1, 700)):
        rows = json.loads(json.dumps(items[f"one.txt {boundary}"]))
        context = encode(text[:end] + "\n\n")
        assert rows["context_tokens"] == len(context)
        suffixes = ["The old man went home and slept.", "Nothing was said about it again", "Then it began to rain hard"]
        order = [boundary] + [i for i in range(3) if i != boundary]
        tokens = [encode(suffixes[i])[:SUFFIX] for i in order]
        room = max(map(len, tokens))
        for length in ("16", "64", "all"):
            used = context if length == "all" else context[-int(length) :]
            for i, suffix in enumerate(tokens):
                on, off = plainly(longmem, used, suffix, room)
                assert rows["scores"][length]["memory on"][i] == pytest.approx(on, abs=1e-3)
                assert rows["scores"][length]["memory off"][i] == pytest.approx(off, abs=1e-3)
    assert len(encode(text[:60] + "\n\n")) < 64, "of a short context all longer lengths are one"
    assert items["one.txt 0"]["scores"]["64"] == items["one.txt 0"]["scores"]["all"]
    assert items["one.txt 1"]["scores"]["64"]["memory on"] != items["one.txt 1"]["scores"]["all"]["memory on"]


def test_accuracy(outcome):
    finished, items = outcome
    for length in ("16", "64", "all"):
        for system, sample in finished.tables[0].columns[length].items():
            scores = [result["scores"][length][system] for result in items.values()]
            right = sum(row[0] > max(row[1:]) for row in scores)
            assert sample.interval().value == pytest.approx(50 * right)
    assert list(finished.tables[0].columns) == ["16", "64", "all"] and "chance: 33.3 %" in finished.report["notes"][0]


def test_both_layouts_are_one(outcome, files, data, tmp_path):
    lines, official = (read_boundaries(str(data / name)) for name in ("lines.jsonl", "official.json"))
    assert [example[2:] for example in lines] == [example[2:] for example in official]
    _, finished = evaluate(files, data, tmp_path, "official.json", "--limit", 1)
    assert finished.report["items"] == 1
    same = finished.tables[0].columns["all"]["memory on"].items
    assert same == {"pg19 one.txt 0": outcome[0].tables[0].columns["all"]["memory on"].items["one.txt 0"]}


def test_the_cache_is_tuned_on_the_longest_contexts(data, loaded):
    evaluation = ChapterBreak()
    arguments = ["--path", "x", "--results-path", "y", "--data", str(data / "lines.jsonl"), "--valid"]
    args = parser_of(evaluation).parse_args([*arguments, str(data / "official.json"), "--suffix-tokens", "9"])
    evaluation.prepare(args, loaded)
    (document,) = evaluation.tuning_documents()
    assert loaded.tokenizer.decode(document) == (data.parent / "books" / "one.txt").read_text()[:700]


def test_errors(files, data, tmp_path):
    def refuses(sentence, *more):
        arguments = ["--path", files.longmem, "--tokenizer", files.directory, "--results-path", tmp_path, "--cpu"]
        with pytest.raises(SystemExit, match=sentence):
            main(ChapterBreak(), [str(x) for x in (*arguments, "--suffix-tokens", 9, *more)])

    (tmp_path / "other.json").write_text('{"a": [1]}')
    refuses("other.json has neither the official layout", "--data", tmp_path / "other.json")
    refuses("refers to one.txt: name its directory with --books", "--data", data / "lines.jsonl", "--books", tmp_path)
    refuses("none.json cannot be used: No such file", "--data", tmp_path / "none.json")
    refuses("--lengths 1k is neither", "--data", data / "official.json", "--lengths", "1k")
    refuses("--suffix-tokens 40 must be from 1 to 31", "--data", data / "official.json", "--suffix-tokens", 40)

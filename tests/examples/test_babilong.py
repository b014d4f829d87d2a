"""BABILong: stories whose answers follow from their facts, the public files, the leaderboard's accuracy, the script."""

import json
import os
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pyarrow
import pytest
from pyarrow import parquet

from examples.babilong import generate
from examples.babilong.stories import WORLDS, tell
from longmem_fairseq.evaluation.babilong import BabiLong, Sample, find_files, is_right, prompt_of, read_samples
from longmem_fairseq.evaluation.command import main, run
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.evaluation.scoring import generate as generation
from preprocess import binarize_documents, convert_safetensors
from tests.evaluation.conftest import files, restored_loggers, text  # noqa: F401  (fixtures)
from tests.repository import ROOT

SHIPPED = ROOT / "examples" / "pretrained" / "mini"
MOVE = r"(\w+) (?:walked|went over|headed|hurried) (?:to|for) the (\w+)\."
TAKE, DROP = r"(\w+) (?:took|picked up|got hold of) the (\w+)( there)?\.", r"(\w+) (?:put down|left) the (\w+)"
GIVE = r"(\w+) (?:gave|handed|passed) the (\w+) to (\w+)\."


def answer_of(task, facts, question):
    """The answer by another way: the facts are read from the last one back, or things followed one by one."""
    words = question.rstrip("?").split()
    if task == "qa1":
        return next(m[2] for m in (re.match(MOVE, fact) for fact in reversed(facts)) if m and m[1] == words[-1])
    if task in ("qa2", "qa3"):
        thing, places, holder, trail = words[3], {}, None, []
        for fact in facts:
            if m := re.match(MOVE, fact):
                places[m[1]] = m[2]
            elif (m := re.match(TAKE, fact)) and m[2] == thing:
                holder = m[1]
            elif (m := re.match(DROP, fact)) and m[2] == thing:
                holder = None
            if holder is not None and trail[-1:] != [places[holder]]:
                trail.append(places[holder])
        return trail[-1] if task == "qa2" else trail[-2] * (trail[-1] == words[-1])
    if task == "qa4":
        relations = {}
        for fact in facts:
            other, direction, place = re.match(r"The (\w+) is (\w+) of the (\w+)", fact).groups()
            opposite = {"north": "south", "south": "north", "east": "west", "west": "east"}[direction]
            relations[f"What is {direction} of the {place}?"] = relations[f"What is the {place} {opposite} of?"] = other
            relations[f"What is {opposite} of the {other}?"] = relations[f"What is the {other} {direction} of?"] = place
        return relations[question]
    for giver, thing, receiver in (m.groups() for m in (re.match(GIVE, fact) for fact in reversed(facts)) if m):
        for form, answer in (
            (f"Who gave the {thing}?", giver),
            (f"Who received the {thing}?", receiver),
            (f"Who gave the {thing} to {receiver}?", giver),
            (f"Who did {giver} give the {thing} to?", receiver),
            (f"What did {giver} give to {receiver}?", thing),
        ):
            if form == question:
                return answer


@pytest.mark.parametrize("task", WORLDS)
def test_stories(task):
    rng = random.Random(0)
    for _ in range(100):
        story = tell(task, rng)
        assert answer_of(task, story.facts, story.question) == story.answer, story
        assert is_right(f"{story.answer}.", Sample("", story.question, story.answer), task)


def test_the_accuracy_is_that_of_the_leaderboard():
    sample = Sample("", "Where was the milk before the kitchen?", "garden")
    assert is_right(" Garden", sample, "qa3") and is_right(
        "Before the kitchen it was in the garden. Office.", sample, "qa3"
    )
    assert not any(is_right(answer, sample, "qa3") for answer in ("", "kitchen", "garden or office", "I see. garden"))


@pytest.fixture(scope="module")
def data(tmp_path_factory, text):  # noqa: F811
    directory = tmp_path_factory.mktemp("babilong")
    (directory / "book.txt").write_text(text * 4)
    generate.main(arguments(directory, "--lengths", "0k", "1k", "--samples", "2", "--tasks", "qa1", "qa5"))
    generate.main(arguments(directory, "--documents", "3", "--document-tokens", "1500", "2000"))
    return directory


def arguments(directory, *more):
    return ["--books", str(directory / "book.txt"), "--tokenizer", str(SHIPPED), "--destdir", str(directory), *more]


def test_facts_are_hidden_in_books(data):
    tokenizer = generate.TextTokenizer.load(str(SHIPPED), generate.Dictionary.load(str(SHIPPED / "dict.txt")))
    for sample in read_samples(str(data / "qa5" / "1k.json")):
        assert 1_000 - generate.LONGEST <= len(tokenizer.encode(sample.input)) <= 1_000
    facts = [tell("qa1", random.Random(seed)).facts for seed in range(3)]
    passage = [f"Sentence {i}." for i in range(10)]
    for story in facts:
        hidden = re.findall(r"[^.]+\.", generate.hide(story, passage, random.Random(1)))
        assert [s.strip() for s in hidden if "Sentence" not in s] == story
        assert [s.strip() for s in hidden if "Sentence" in s] == passage


def test_documents_to_adapt_on(data):
    """Each asks for what it told before, in the form of the evaluation."""
    questions = 0
    for document in map(json.loads, (data / "train.jsonl").open()):
        for match in re.finditer(r"\nQuestion: (.*?)\nAnswer: (\w+)", document["text"]):
            questions += 1
            assert match[0] == f"{prompt_of(match[1])} {match[2]}"
            assert match[2] in document["text"][: match.start()]
    assert questions > 5


def test_public_layouts(data, tmp_path):
    rows = read_samples(str(data / "qa1" / "1k.json"))
    (tmp_path / "1k").mkdir()
    table = pyarrow.table({name: [getattr(row, name) for row in rows] for name in Sample._fields})
    parquet.write_table(table, tmp_path / "1k" / "qa1-00000-of-00001.parquet")
    (tmp_path / "data" / "qa1").mkdir(parents=True)
    (tmp_path / "data" / "qa1" / "16k.json").write_text(json.dumps([row._asdict() for row in rows]))
    (tmp_path / "1k" / "qa11-00000-of-00001.parquet").write_bytes(b"")  # not one of the five
    layouts = find_files(str(tmp_path))
    assert list(layouts) == [("qa1", "1k"), ("qa1", "16k")]
    assert [read_samples(path) for path in layouts.values()] == [rows, rows]


def test_report(files, data, tmp_path, monkeypatch):  # noqa: F811
    """Accuracy by task and length, of answers that are right half of the time with the memory on."""
    prompts, generated = [], generation.generate

    def answers(scorer, system, state, prompts_of_it, *more):
        (prompt,) = prompts_of_it
        prompts.append((state.tokens, len(prompt)))
        if len(prompts) == len(scorer.systems):  # once, with the memory on
            assert len(generated(scorer, system, state, [prompt], 4)) == 1
        sample = samples[(len(prompts) - 1) // len(scorer.systems)]
        return [scorer.tokenizer.encode(sample.target if system == "memory on" and sample.right else "none")]

    samples = [
        SimpleNamespace(target=sample.target, right=i % 2 == 0)
        for path in find_files(str(data)).values()
        for i, sample in enumerate(read_samples(path))
    ]
    monkeypatch.setattr("longmem_fairseq.evaluation.babilong.generate", answers)
    options = ["--path", files.longmem, "--tokenizer", files.directory, "--data", data, "--results-path", tmp_path]
    options += ["--cpu", "--no-cache", "--tokens-per-sample", 64, "--max-new-tokens", 4]
    evaluation = BabiLong()
    outcome = run(evaluation, parser_of(evaluation).parse_args(list(map(str, options))))
    for table in outcome.tables:
        assert list(table.columns) == ["0k", "1k"]
        for rows in table.columns.values():
            assert {system: scores.interval().value for system, scores in rows.items()} == {
                "backbone": 0,
                "memory off": 0,
                "memory on": 50,
            }
    assert [table.title for table in outcome.tables] == [
        f"Accuracy, {name}, by length of the text" for name in ("all tasks", "qa1", "qa5")
    ]
    assert max(length for _, length in prompts) + 5 <= 64 and max(memorized for memorized, _ in prompts) > 800


def test_errors(files, data, tmp_path):  # noqa: F811
    def refuses(sentence, *more):
        options = ["--path", files.longmem, "--tokenizer", files.directory, "--data", data, "--results-path", tmp_path]
        with pytest.raises(SystemExit, match=sentence):
            main(BabiLong(), [str(x) for x in (*options, "--cpu", "--no-cache", *more)])

    refuses("--lengths 64k is not in .*, which has 0k, 1k", "--lengths", "64k")
    refuses("has no files of BABILong", "--data", tmp_path)
    (tmp_path / "qa1").mkdir()
    (tmp_path / "qa1" / "0k.json").write_text('[{"input": 1}]')
    refuses("0k.json is not a file of BABILong", "--data", tmp_path)
    for sentence, *more in (
        ("there is nothing to make",),
        ("--lengths 4000 is not a number with k or M", "--lengths", "4000"),
        ("--document-tokens 5 2 is not a range", "--documents", "1", "--document-tokens", "5", "2"),
    ):
        with pytest.raises(SystemExit, match=sentence):
            generate.main(arguments(data, *more))


STUB = """#!/bin/sh
case "$1" in -c) exec "$PYTHON" "$@" ;; esac
"$PYTHON" -c "import json, sys; print(json.dumps(sys.argv[1:]))" "$(basename "$0")" "$@" >>"$RECORDED"
"""


def test_the_commands_of_the_script(data, tmp_path):
    """Its steps, recorded in place of run: what each writes the next one reads, and their parsers accept them."""
    (tmp_path / "bin").mkdir()
    for name in ("python", "fairseq-train"):
        (tmp_path / "bin" / name).write_text(STUB)
        (tmp_path / "bin" / name).chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    stub = {"PATH": path, "PYTHON": sys.executable, "RECORDED": str(tmp_path / "recorded"), "LENGTHS": "0k 1k"}
    script(data, tmp_path / "out", **stub)
    commands = [json.loads(line) for line in (tmp_path / "recorded").read_text().splitlines()]
    documents, binarized, converted, training, samples, evaluation = commands
    made = generate.parser().parse_args(documents[3:])
    assert f"{made.destdir}/train.jsonl" in binarized and made.documents == 500
    assert binarized[-1] in training and converted[-1] in training
    made, evaluated = generate.parser().parse_args(samples[3:]), parser_of(BabiLong()).parse_args(evaluation[3:])
    assert str(made.destdir) == evaluated.data and evaluated.lengths == made.lengths == ["0k", "1k"]
    assert evaluated.path == f"{training[training.index('--save-dir') + 1]}/checkpoint_last.pt"
    for module, options in ((binarize_documents, binarized), (convert_safetensors, converted)):
        assert {option for option in options if option.startswith("--")} <= help_of(module)


@pytest.mark.skipif(os.environ.get("LONGMEM_SLOW") != "1", reason="a minute long: set LONGMEM_SLOW=1")
def test_script(data, tmp_path):
    """All steps, with as little as possible of each."""
    script(data, tmp_path / "out", UPDATES="1", DOCUMENTS="8", LENGTHS="0k 1k", SAMPLES="1", TASKS="qa1")
    report = json.loads((tmp_path / "out" / "results" / "report.json").read_text())
    assert report["items"] == 2 and report["model"]["memory_size"] == 131072
    assert set(report["tables"][0]["figures"]["1k"]) == {"backbone", "memory off", "memory on"}


def script(data, out, **environment):
    command = ["bash", "examples/babilong/run.sh", str(data / "book.txt"), str(data / "book.txt"), str(out)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def help_of(module):
    """The options that the source of a command names."""
    return set(re.findall(r"--[a-z][a-z-]*", (ROOT / f"{module.__name__.replace('.', '/')}.py").read_text()))

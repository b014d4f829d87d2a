"""The examples' scripts start, and the commands of docs/evaluation.md have no other options than these."""

import json
import re
import runpy
import shlex
import sys

import pytest

from longmem_fairseq.evaluation import compare
from longmem_fairseq.evaluation.babilong import BabiLong
from longmem_fairseq.evaluation.books import Books
from longmem_fairseq.evaluation.chapterbreak import ChapterBreak
from longmem_fairseq.evaluation.command_line import parser_of
from longmem_fairseq.evaluation.dialogue import Dialogue
from longmem_fairseq.evaluation.in_context import InContext
from longmem_fairseq.evaluation.needle import Needle
from longmem_fairseq.evaluation.qa import QuestionAnswering
from tests.repository import ROOT

EVALUATIONS = {
    "books": lambda: Books(None),
    "chapterbreak": ChapterBreak,
    "dialogue": Dialogue,
    "in_context": InContext,
    "needle": lambda: Needle(None),
    "qa": QuestionAnswering,
}


def parser(name):
    if name == "compare":
        return compare.parser("plan.json")
    return parser_of(BabiLong() if name == "babilong" else EVALUATIONS[name]())


SCRIPTS = {f"examples/{name}/evaluate.py": name for name in [*EVALUATIONS, "compare"] if name != "needle"}
SCRIPTS["examples/recall/needle.py"] = "needle"
SCRIPTS["examples/babilong/evaluate.py"] = "babilong"  # not in the shipped plan, since it needs other training


@pytest.mark.parametrize("script, name", SCRIPTS.items())
def test_script(script, name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "--help"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stopped.value.code == 0
    assert capsys.readouterr().out.split() == parser(name).format_help().split()


def test_commands_of_the_documentation():
    page = (ROOT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    section = page.split("\n## Six evaluations\n")[1].split("\n## ")[0]
    blocks = re.findall(r"```sh\n(.*?)```", section, re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").strip().split("\n")
    seen = set()
    for words in map(shlex.split, lines):
        python, option, module, *arguments = words
        name = SCRIPTS[module.replace(".", "/") + ".py"]
        assert (python, option) == ("python", "-m") and parser(name).parse_args(arguments).path
        seen.add(name)
    assert seen == {*EVALUATIONS, "compare"}
    for option in set(re.findall(r"`(--[\w-]+)", section)):
        assert any(option in parser(name).format_help().split() for name in seen), f"no evaluation has {option}"


def test_shipped_plan(tmp_path):
    """Its arguments are those of the evaluations it names."""
    plan = json.loads((ROOT / "examples/compare/plan.json").read_text())
    for step in plan.values():
        arguments = ["--path", "x", "--results-path", "y", *step["arguments"]]
        assert parser(step["evaluation"]).parse_args(arguments).path
    assert {step["evaluation"] for step in plan.values()} == set(EVALUATIONS)

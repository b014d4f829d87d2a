"""The README's commands: all are parsed, those marked ``<!-- test -->`` are run.

``<!-- test: slow -->`` marks those that run only when ``LONGMEM_SLOW=1``. The mark stands on the line before the fence.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple

import pytest

from tests.repository import ROOT, copy_repository

TIME_LIMIT = {"test": 600, "slow": 3600}  # seconds for one block
FENCE = re.compile(r"^(?:<!-- (test(?:: slow)?) -->\n)?```bash\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# Names that a reader's machine may have and this one need not; everything else must be found here.
SYSTEM_COMMANDS = {"apt-get", "git", "nvidia-smi", "sudo"}
PREFIXES = {"!", "do", "else", "then", "time"}  # words before a command
CLOSERS = {"done", "fi", "for"}  # lines that hold no command


class Block(NamedTuple):
    line: int  # of the README, counted from 1
    mark: str  # "", "test" or "slow"
    text: str


def blocks(markdown: str) -> List[Block]:
    return [
        Block(markdown.count("\n", 0, found.start(2)) + 1, (found[1] or "").split()[-1] if found[1] else "", found[2])
        for found in FENCE.finditer(markdown)
    ]


def commands(block: str) -> Iterator[List[str]]:
    """The simple commands of a piece of shell, as words, without redirections, assignments and comments."""
    block = block.replace("\\\n", " ")
    block = re.sub(r"\s\d?>>?(&\d|\s*[^\s;|&]+)|\s<\s*[^\s;|&<>]+", " ", block)
    lexer = shlex.shlex(block, posix=True, punctuation_chars=";|&()\n")
    lexer.whitespace, lexer.commenters, lexer.whitespace_split = " \t", "", True
    words: List[str] = []
    comment = False
    for token in [*lexer, "\n"]:
        comment = (comment or token.startswith("#")) and "\n" not in token
        if comment:
            continue
        if set(token) <= set(";|&()\n"):
            while words and (words[0] in PREFIXES or re.match(r"\w+=", words[0])):
                words.pop(0)
            if words and words[0] not in CLOSERS:
                yield words
            words = []
        else:
            words.append(token)


README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = blocks(README)


def environment(root: Path) -> Dict[str, str]:
    """That of the running Python, with its commands and the package of ``root`` first."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "MAKE", "MFLAGS"))}
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])
    env["PYTHONPATH"] = str(root)
    if list(Path(sys.prefix).glob(".installed-*")):
        env["VENV"] = sys.prefix  # `make` finds its environment there instead of making another
    return env


def run(command: List[str], cwd: Path, seconds: float, **options) -> subprocess.CompletedProcess:
    """Run a command to its end, or end it and all that it started when the time is up."""
    with subprocess.Popen(
        command,
        cwd=cwd,
        env=environment(cwd),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        **options,
    ) as process:
        try:
            output, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, _ = process.communicate()
            output += f"\nended after {seconds} seconds"
    return subprocess.CompletedProcess(command, process.returncode, output)


def test_commands_of_a_block():
    block = "A=1 make x  # why\ncat <in | python a.py --k 2 \\\n --text 'a # b; c' >log 2>&1 && done_it\nB=$(ls -l)\n"
    assert list(commands(block)) == [
        ["make", "x"],
        ["cat"],
        ["python", "a.py", "--k", "2", "--text", "a # b; c"],
        ["done_it"],
        ["ls", "-l"],
    ]


def test_marks_are_read():
    text = "```bash\na\n```\n<!-- test -->\n```bash\nb\n```\n\n<!-- test: slow -->\n```bash\nc\nd\n```\n"
    assert blocks(text) == [Block(2, "", "a\n"), Block(6, "test", "b\n"), Block(11, "slow", "c\nd\n")]


def test_every_mark_belongs_to_a_block():
    marks = re.findall(r"^.*<!--\s*test.*$", README, re.MULTILINE)
    assert len(marks) == sum(bool(block.mark) for block in BLOCKS), f"a mark without a bash block below it: {marks}"
    assert any(block.mark == "test" for block in BLOCKS)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line{block.line}")
def test_block_is_shell(block):
    done = run(["bash", "-n", "-c", block.text], ROOT, 60)
    assert done.returncode == 0, done.stdout


def test_fairseq_accepts_its_options():
    found = [words for block in BLOCKS for words in commands(block.text) if words[0].startswith("fairseq-")]
    assert found
    for words in found:
        for i, word in enumerate(words[:-1]):
            if word == "--user-dir":  # wherever the reader's is
                words[i + 1] = str(ROOT / "longmem_fairseq")
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "parse_fairseq_commands.py"],
        input=json.dumps(found),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment(ROOT),
    )
    refused = {shlex.join(words): why for words, why in zip(found, json.loads(done.stdout)) if why}
    assert not refused


def test_scripts_and_their_options_exist():
    options: Dict[str, set] = {}
    for block in BLOCKS:
        for words in commands(block.text):
            if words[0] in ("python", "python3") and words[1].endswith(".py"):
                assert (ROOT / words[1]).is_file(), f"README.md:{block.line}: {words[1]} does not exist"
                options.setdefault(words[1], set()).update(w.split("=")[0] for w in words[2:] if w.startswith("--"))
            elif words[0] in ("bash", "sh"):
                assert (ROOT / words[1]).is_file(), f"README.md:{block.line}: {words[1]} does not exist"
    for script, used in options.items():
        done = run([sys.executable, script, "--help"], ROOT, 120)
        assert done.returncode == 0, done.stdout
        unknown = used - set(re.findall(r"--[\w-]+", done.stdout))
        assert not unknown, f"{script} has no {sorted(unknown)}"


def test_other_commands_exist():
    for block in BLOCKS:
        for words in commands(block.text):
            if words[0] in SYSTEM_COMMANDS:
                continue
            known = run(["bash", "-c", 'type -t "$1"', "bash", words[0]], ROOT, 60)
            assert known.returncode == 0, f"README.md:{block.line}: no command {words[0]}"
            if words[0] == "make":
                done = run([*words, "--dry-run"], ROOT, 60)
                assert done.returncode == 0, f"README.md:{block.line}: {shlex.join(words)}: {done.stdout}"


def test_pins_are_those_of_setup_py():
    pinned = set(re.findall(r"[\w-]+==[\w.]+", README))
    known = set(re.findall(r"[\w-]+==[\w.]+", (ROOT / "setup.py").read_text(encoding="utf-8")))
    assert pinned and pinned <= known


def test_every_guarantee_names_its_tests():
    """The last column of the table: files or directories below ``tests/``, and functions in them."""
    rows = re.findall(r"^\|.*\| (.*) \|$", README.split("## Guarantees")[1].split("\n## ")[0], re.MULTILINE)[2:]
    assert len(rows) > 10
    for row in rows:
        named = re.findall(r"`([\w/]*(?:\.py)?)(?:::(\w+))?`", row)
        assert named, f"no test is named in: {row}"
        path = None
        for place, function in named:
            path = ROOT / "tests" / place if place else path
            assert path.exists(), f"{path} does not exist"
            assert not function or f"def {function}(" in path.read_text(encoding="utf-8"), f"{path} has no {function}"


def test_links_into_the_repository_resolve():
    links = [link for link in re.findall(r"\]\(([^)#\s]+)", README) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_marked_blocks_run(tmp_path):
    """In order, in one copy of the repository, as a reader would who follows the page."""
    root = copy_repository(tmp_path / "longmem_fairseq")
    wanted = {"test", "slow"} if os.environ.get("LONGMEM_SLOW") == "1" else {"test"}
    for block in BLOCKS:
        if block.mark in wanted:
            shell = ["bash", "-euo", "pipefail", "-c", block.text]
            done = run(shell, root, TIME_LIMIT[block.mark], stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"README.md:{block.line} ended with {done.returncode}:\n{done.stdout[-4000:]}"

"""README, docs/ and the pages of examples/: blocks are parsed, those marked ``<!-- test -->`` run, and links resolve.

``<!-- test: slow -->`` marks blocks that run only with ``LONGMEM_SLOW=1``. A mark stands on the line before the fence.
"""

import ast
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Set, Tuple

import pytest

from tests.repository import ROOT, copy_repository

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "examples").rglob("*.md"))]
README_WORDS, README_LINES = 2300, 230  # the README is for the first ten minutes
TIME_LIMIT = {"test": 600, "slow": 3600}  # seconds for one block
FENCE = re.compile(r"^(?:<!-- (test(?:: slow)?) -->\n)?```(bash|sh|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SHELLS = ("bash", "sh")
# Names that a reader's machine may have and this one need not; everything else must be found here.
SYSTEM_COMMANDS = {"apt-get", "git", "nvidia-smi", "sudo"}
PREFIXES = {"!", "do", "else", "then", "time"}  # words before a command
CLOSERS = {"done", "fi", "for"}  # lines that hold no command


class Block(NamedTuple):
    page: str  # path relative to the repository
    line: int  # first line of the block's text in the page, counted from 1
    language: str  # "bash", "sh" or "python"
    mark: str  # "", "test" or "slow"
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


class Link(NamedTuple):
    page: Path
    target: str


def blocks(markdown: str, page: str) -> List[Block]:
    return [
        Block(page, markdown.count("\n", 0, match.start(3)) + 1, match[2], (match[1] or "").split(" ")[-1], match[3])
        for match in FENCE.finditer(markdown)
    ]


def commands(block: str) -> Iterator[List[str]]:
    """Yield the simple commands of a piece of shell as words, without redirections, assignments and comments."""
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


def prose(markdown: str) -> str:
    """Return a page without its blocks of code and without inline code."""
    return re.sub(r"`[^`\n]*`", "", re.sub(r"^```.*?^```$", "", markdown, flags=re.MULTILINE | re.DOTALL))


def links(markdown: str) -> List[str]:
    """Return the targets of a page's links and pictures, those to other sites left out."""
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(markdown)) if "://" not in link]


def anchors(markdown: str) -> Set[str]:
    """Return the names that GitHub gives to a page's headings."""
    names: Set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", re.sub(r"^```.*?^```$", "", markdown, flags=re.M | re.S), re.MULTILINE):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        count = sum(1 for other in names if re.fullmatch(rf"{re.escape(name)}(-\d+)?", other))
        names.add(f"{name}-{count}" if count else name)
    return names


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


BLOCKS = [block for page in PAGES for block in blocks(text(page), name(page))]
COMMANDS: List[Tuple[Block, List[str]]] = [
    (block, words) for block in BLOCKS if block.language in SHELLS for words in commands(block.text)
]
LINKS = [Link(page, target) for page in PAGES for target in links(text(page))]


def environment(root: Path) -> Dict[str, str]:
    """Return the environment of the running Python, with its commands and the package of ``root`` first."""
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


def answer(script: str, question):
    """Send a question to a helper script of the tests as JSON and return its answer."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / script],
        input=json.dumps(question),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        cwd=ROOT,
        env=environment(ROOT),
    )
    return json.loads(done.stdout)


def test_commands_of_a_block():
    block = "A=1 make x  # why\ncat <in | python a.py --k 2 \\\n --text 'a # b; c' >log 2>&1 && done_it\nB=$(ls -l)\n"
    assert list(commands(block)) == [
        ["make", "x"],
        ["cat"],
        ["python", "a.py", "--k", "2", "--text", "a # b; c"],
        ["done_it"],
        ["ls", "-l"],
    ]
    assert list(commands("for i in 0 1; do    # each; once\n  make $i && make b\ndone\n")) == [
        ["make", "$i"],
        ["make", "b"],
    ]


def test_marks_are_read():
    page = (
        "```bash\na\n```\n<!-- test -->\n```python\nb\n```\n\n<!-- test: slow -->\n```sh\nc\nd\n```\n```text\ne\n```\n"
    )
    assert blocks(page, "a.md") == [
        Block("a.md", 2, "bash", "", "a\n"),
        Block("a.md", 6, "python", "test", "b\n"),
        Block("a.md", 11, "sh", "slow", "c\nd\n"),
    ]


def test_links_and_anchors_are_read():
    page = "# `make x`: a-b, c\n[a](b.md#c) ![d](e.png) [f](https://g.h) `[i](j)`\n"
    page += "```sh\n# no heading\n[k](l)\n```\n# A\n# A\n"
    assert links(page) == ["b.md#c", "e.png"]
    assert anchors(page) == {"make-x-a-b-c", "a", "a-1"}


def test_every_mark_belongs_to_a_block():
    marks = [mark for page in PAGES for mark in re.findall(r"^.*<!--\s*test.*$", text(page), re.MULTILINE)]
    assert len(marks) == sum(bool(block.mark) for block in BLOCKS), f"a mark without a block below it: {marks}"
    assert {block.language for block in BLOCKS if block.mark == "test"} >= {"bash", "python"}


def test_the_readme_is_short():
    readme = text(ROOT / "README.md")
    assert len(readme.split()) <= README_WORDS and readme.count("\n") <= README_LINES


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language in SHELLS], ids=lambda block: block.place
)
def test_block_is_shell(block):
    done = run(["bash", "-n", "-c", block.text], ROOT, 60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: block.place
)
def test_block_is_python(block):
    """It compiles, and the names that it imports from this repository exist."""
    for node in ast.walk(ast.parse(block.text, block.place)):
        if not isinstance(node, ast.ImportFrom) or node.level:
            continue
        if node.module.split(".")[0] in ("longmem_fairseq", "preprocess"):
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name), f"{block.place}: {node.module} has no {alias.name}"


def classes(source: str) -> Dict[str, str]:
    """Return the classes of a Python file by their names, without comments and positions."""
    return {node.name: ast.dump(node) for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}


def test_examples_of_extending_are_those_that_are_tested():
    tested = {}
    for path in (ROOT / "tests" / "extending").glob("*.py"):
        tested.update(classes(text(path)))
    shown = {}
    for block in BLOCKS:
        if block.page == "docs/extending.md" and block.language == "python":
            shown.update(classes(block.text))
    assert len(shown) > 5
    for class_name, source in shown.items():
        assert tested.get(class_name) == source, f"docs/extending.md: {class_name} differs from tests/extending"


def test_fairseq_accepts_its_options():
    # Hydra has no parser of options: tests/tasks/test_training.py runs that command with the file of the page.
    fairseq = [list(words) for _, words in COMMANDS if words[0].startswith("fairseq-") and "hydra" not in words[0]]
    assert fairseq
    for words in fairseq:
        for i, word in enumerate(words[:-1]):
            if word == "--user-dir":  # wherever the reader's is
                words[i + 1] = str(ROOT / "longmem_fairseq")
    complaints = answer("parse_fairseq_commands.py", fairseq)
    refused = {shlex.join(words): complaint for words, complaint in zip(fairseq, complaints) if complaint}
    assert not refused


def test_scripts_and_their_options_exist():
    options: Dict[str, Set[str]] = {}
    for block, words in COMMANDS:
        if words[0] in ("python", "python3") and words[1] == "-m":
            file = ROOT / (words[2].replace(".", "/") + ".py")
            assert file.is_file(), f"{block.place}: {words[2]} does not exist"
            options.setdefault(words[2], set()).update(w.split("=")[0] for w in words[3:] if w.startswith("--"))
        elif words[0] in ("python", "python3"):
            assert words[1] == "-c", f"{block.place}: {words[1]} is run as python -m"
        elif words[0] in SHELLS:
            assert (ROOT / words[1]).is_file(), f"{block.place}: {words[1]} does not exist"
    for script, (status, output) in answer("script_helps.py", sorted(options)).items():
        assert status == 0, f"python -m {script} --help: {output}"
        unknown = options[script] - set(re.findall(r"--[\w-]+", output))
        assert not unknown, f"{script} has no {sorted(unknown)}"


def test_other_commands_exist():
    names = sorted({words[0] for _, words in COMMANDS} - SYSTEM_COMMANDS)
    missing = run(["bash", "-c", 'for x; do type -t "$x" >/dev/null || echo "$x"; done', "bash", *names], ROOT, 60)
    assert missing.stdout == ""
    for words in {tuple(words) for _, words in COMMANDS if words[0] == "make"}:
        done = run([*words, "--dry-run"], ROOT, 60)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stdout}"


def test_pins_are_those_of_the_code():
    pinned = {pin for page in PAGES for pin in re.findall(r"[\w-]+==[\w.]+", text(page))}
    code = text(ROOT / "setup.py") + text(ROOT / "examples" / "smollm2" / "run.sh")
    known = set(re.findall(r"[\w-]+==[\w.]+", code))
    assert pinned and pinned <= known


def test_every_guarantee_names_its_tests():
    """The last column of the table: files or directories below ``tests/``, and functions in them."""
    rows = re.findall(r"^\|.*\| (.*) \|$", text(ROOT / "docs" / "guarantees.md"), re.MULTILINE)[2:]
    assert len(rows) > 10
    for row in rows:
        tests = re.findall(r"`([\w/]*(?:\.py)?)(?:::(\w+))?`", row)
        assert tests, f"no test is named in: {row}"
        path = None
        for place, function in tests:
            path = ROOT / "tests" / place if place else path
            assert path.exists(), f"{path} does not exist"
            assert not function or f"def {function}(" in text(path), f"{path} has no {function}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_maps_of_the_code_name_files(page):
    """A table whose first column is headed "file in `directory/`" names files or directories below it."""
    for directory, rows in re.findall(r"^\| files? in `([\w/]+)` \|.*\n\|.*\n((?:\|.*\n)+)", text(page), re.MULTILINE):
        for row in rows.splitlines():
            for path in re.findall(r"`([\w/.]+)`", row.split("|")[1]):
                assert (ROOT / directory / path).exists(), f"{name(page)}: {directory}{path} does not exist"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page):
    for link in (link for link in LINKS if link.page == page):
        path, _, anchor = link.target.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link.target} does not exist"
        assert not anchor or anchor in anchors(text(target)), f"{name(page)}: {link.target} has no such heading"


def test_every_page_is_in_the_index():
    index = set(links(text(ROOT / "docs" / "README.md")))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"} <= index


def test_marked_blocks_run(tmp_path):
    """In order, in one copy of the repository, as a reader would who follows the pages."""
    root = copy_repository(tmp_path / "longmem_fairseq")
    marks = {"test", "slow"} if os.environ.get("LONGMEM_SLOW") == "1" else {"test"}
    for block in BLOCKS:
        if block.mark in marks:
            shell = ["bash", "-euo", "pipefail", "-c", block.text]
            command = [sys.executable, "-c", block.text] if block.language == "python" else shell
            done = run(command, root, TIME_LIMIT[block.mark], stdin=subprocess.DEVNULL)
            assert done.returncode == 0, f"{block.place} ended with {done.returncode}:\n{done.stdout[-4000:]}"

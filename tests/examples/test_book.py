"""Test the book example as a command on a tiny model."""

import importlib
import json
import re

import pytest

from tests.examples.commands import run_example
from tests.text_models import sentencepiece_model

PAGES = [f"Page {i}.\n" + "".join(f"{i * j} is {i} times {j}.\n" for j in range(7)) for i in range(1, 8)]
LENGTH = max(map(len, PAGES))
BOOK = "".join(page.ljust(LENGTH) for page in PAGES)


def command(directory, *arguments):
    (directory / "book").write_text(BOOK)
    book = ["--text", directory / "book", "--page-length", LENGTH]
    return run_example("book.continue", "--path", directory, "--cpu", *book, *arguments)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return sentencepiece_model(tmp_path_factory.mktemp("book"))


def test_a_page_is_continued(directory):
    done = command(
        directory, "--page", 4, "--max-new-tokens", 9, "--memory-size", 300, "--beam", 2, "--json", directory / "out"
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((directory / "out").read_text())
    assert result["book"] == "book, page 4 of 7" and done.stdout.startswith(result["book"])
    off, before, whole = result["rows"]
    assert [row["memory"] for row in result["rows"]] == ["off", "the pages before", "the whole book"]
    assert off["memory_tokens"] == off["memorize_seconds"] == 0
    assert 0 < before["memory_tokens"] < whole["memory_tokens"] <= 302  # full, with an incomplete chunk
    assert len({row["perplexity"] for row in result["rows"]}) == 3, "each memory changes the perplexity"
    assert all(row["continuation"] and row["generate_seconds"] > 0 for row in result["rows"])
    assert PAGES[4].splitlines()[1] in done.stdout, "the page that really follows"
    assert len(re.findall(r"^\| (?:off|the )", done.stdout, re.MULTILINE)) == 3


def test_pages(tmp_path):
    (tmp_path / "book").write_text(BOOK)
    example = importlib.import_module("examples.book.continue")
    options = ["--path", "x", "--text", str(tmp_path / "book"), "--page-length", str(LENGTH)]
    book = example.open_book(example.parse([*options, "--page", "3"]))
    assert book.before + book.page + book.following + "".join(p.ljust(LENGTH) for p in PAGES[4:]) == book.text == BOOK
    assert book.page == PAGES[2].ljust(LENGTH)
    with pytest.raises(ValueError, match=f"--page 7 is not from 2 to 6: book has 7 pages of {LENGTH} characters"):
        example.open_book(example.parse([*options, "--page", "7"]))
    assert example.pages("abcdefg", 3) == ["abc", "defg"] and example.pages("abcdefgh", 3) == ["abc", "def", "gh"]
    assert example.pages("a", 3) == ["a"]

"""Bars show where somebody watches."""

import sys

from longmem_fairseq.progress import token_bar


def shown(capsys):
    with token_bar(10, "memorizing a book", delay=0) as bar:
        bar.update(10)
    return "memorizing a book" in capsys.readouterr().err


def test_bars(capsys, monkeypatch):
    assert not shown(capsys), "a file is watched by nobody"
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    assert shown(capsys), "a notebook is"
    monkeypatch.delitem(sys.modules, "ipykernel")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert shown(capsys), "and a terminal"

"""Test the command that compares a token memory with a cache of constant weight."""

import re

from tests.evaluation.conftest import SHIPPED
from tests.examples.commands import run_example


def test_token_memory(tmp_path):
    """On texts that repeat themselves, every way to copy wins much, and fitting lowers what it starts with."""
    lines = ["The old man walked to the harbor and looked at the ships that had come in the night."]
    lines += ["No letter had arrived, so he went home again and lit the fire under the black kettle."]
    for i, name in enumerate("abc"):
        (tmp_path / name).write_text("\n".join(lines[(i + j) % 2] for j in range(40)))
    texts = ["--fit", tmp_path / "a", tmp_path / "b", "--test", tmp_path / "c", "--tokens", 700, "--memory-size", 512]
    done = run_example("benchmark.token_memory", "--path", SHIPPED, *texts, "--epochs", 4)
    assert done.returncode == 0, done.stderr
    rows = [row.split("|") for row in done.stdout.splitlines()[2:]]
    assert [row[1].split("(")[0].strip() for row in rows] == [
        "p_LM alone",
        "+ cache, one weight",
        "+ token memory as it is in the model",
        "+ token memory, fitted",
    ]
    alone, cache, start, fitted = (float(row[2]) for row in rows)
    assert cache < alone and fitted < start < alone
    gain, low, high = map(float, re.findall(r"[-+][\d.]+", rows[3][3]))
    assert low <= gain <= high < 0 and abs(gain - 100 * (fitted / alone - 1)) < 1

"""Test the benchmark of generation as a whole command on a tiny model, and its refusals."""

import json

import pytest

from examples.benchmark import generation_speed
from tests.examples.commands import run_example
from tests.text_models import sentencepiece_model

SIZES = "--prompt 10 --new-tokens 4 --memory-sizes 0 30 --beams 1 3 --rounds 2 --command-rounds 1 --threads 1"


def test_generation(tmp_path):
    directory = sentencepiece_model(tmp_path)
    (tmp_path / "text").write_text("The text that is memorized and continued.\n" * 9)
    done = run_example(
        "benchmark.generation_speed",
        "--path",
        directory,
        "--text",
        tmp_path / "text",
        *SIZES.split(),
        "--long-prompt",
        100,
        "--json",
        tmp_path / "g.json",
        "--markdown",
        tmp_path / "g.md",
    )
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "g.json").read_text())
    rows = {(row["variant"], row["beam"]): row for row in result["rows"]}
    names = ["stock, backbone alone", "memory off", "memory of 30"]
    assert list(rows) == [(name, beam) for name in names for beam in (1, 3)]
    for (name, beam), row in rows.items():
        assert row["token_ms_fastest"] <= row["token_ms"] <= row["token_ms_slowest"]
        assert row["prompt_tokens_per_second"] == pytest.approx(10_000 / row["prompt_ms"])
        if name != names[0]:
            assert row["token_ms_of_stock"] == pytest.approx(row["token_ms"] / rows[names[0], beam]["token_ms"])
    long = result["long_prompt"]
    assert long["tokens"] == 100 and long["ratio"] == long["interactive_median"] / long["eval_lm_median"] > 0
    assert (tmp_path / "g.md").read_text() == done.stdout and "| memory of 30 | 3 |" in done.stdout


@pytest.mark.parametrize(
    "options, sentence",
    [
        ("--prompt 0", "--prompt 0 is less than 1"),
        ("--beams 1 0", "--beams 0 is less than 1"),
        ("--rounds -1", "--rounds -1 is less than 1"),
    ],
)
def test_refusals(options, sentence):
    with pytest.raises(SystemExit, match=sentence):
        generation_speed.parse(["--path", "x", *options.split()])


def test_prompts_that_stock_fairseq_cannot_take(tmp_path):
    directory = sentencepiece_model(tmp_path)
    (tmp_path / "text").write_text("word " * 100)
    arguments = f"--path {directory} --text {tmp_path / 'text'} --memory-sizes 0 --long-prompt 0".split()
    with pytest.raises(SystemExit, match="--prompt 30 and --new-tokens 5 exceed .* 24 positions.* at most --prompt 18"):
        generation_speed.run(generation_speed.parse([*arguments, "--prompt", "30", "--new-tokens", "5"]))
    with pytest.raises(SystemExit, match="but 1,000 are needed: name a longer one with --text"):
        generation_speed.run(generation_speed.parse([*arguments, "--prompt", "1000", "--new-tokens", "5"]))

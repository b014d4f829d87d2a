"""fairseq's own commands and task, without the plugin, on the model that users train as a backbone.

The documents are eight lines: eight words in a circle, from each of them on. Only the first word of a line is unknown.
"""

import math
import re
from pathlib import Path

import pytest

from tests.fairseq_runs import run

WORDS = [f"w{i}" for i in range(8)]
LINES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(8)]
FIRST_WORD = math.log2(8) / 9  # bits per token of a line of eight words and an end-of-sentence
TASK = ["data", "--task", "language_modeling"]
READ = [*TASK, "--path", "model/checkpoint_last.pt", "--cpu"]
CONTINUE = "--beam 2 --max-len-b 20 --lenpen 0".split()


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A data directory made by fairseq-preprocess, and a transformer_lm trained on it, line by line."""
    directory = tmp_path_factory.mktemp("stock")
    (directory / "train.txt").write_text("".join(f"{line}\n" for line in LINES * 20))
    (directory / "test.txt").write_text("".join(f"{line}\n" for line in LINES))
    texts = "--only-source --trainpref train.txt --validpref test.txt --testpref test.txt --destdir data".split()
    run("preprocess", *texts, cwd=directory)
    run(
        "train",
        *TASK,
        *"--arch transformer_lm --decoder-layers 2 --decoder-embed-dim 32 --decoder-input-dim 32".split(),
        *"--decoder-output-dim 32 --decoder-ffn-embed-dim 64 --decoder-attention-heads 2 --dropout 0".split(),
        *"--share-decoder-input-output-embed --sample-break-mode eos --tokens-per-sample 16 --batch-size 16".split(),
        *"--max-epoch 16 --optimizer adam --lr 0.01 --cpu --save-dir model --no-epoch-checkpoints".split(),
        *"--num-workers 0 --log-format simple".split(),
        cwd=directory,
    )
    return directory


def test_training_and_evaluation_line_by_line(directory):
    output = run("eval_lm", *READ, *"--sample-break-mode eos --batch-size 8 --gen-subset test".split(), cwd=directory)
    loss = float(re.search(r"Loss \(base 2\): ([\d.]+)", output)[1])
    assert FIRST_WORD <= loss + 5e-5 and loss < FIRST_WORD + 0.03


def test_generation(directory):
    options = "--sample-break-mode eos --batch-size 8 --gen-subset test --prefix-size 3".split()
    output = run("generate", *READ, *options, *CONTINUE, cwd=directory)
    lines = re.findall(r"^D-(\d+)\t\S+\t(.*)$", output, re.MULTILINE)
    assert sorted((int(number), line) for number, line in lines) == list(enumerate(LINES))


def test_interactive(directory):
    (directory / "prompts.txt").write_text("w3 w4 w5\nw6\n")
    output = run("interactive", *READ, *CONTINUE, "--input", "prompts.txt", cwd=directory)
    assert re.findall(r"^D-\d+\t\S+\t(.*)$", output, re.MULTILINE) == [LINES[3], LINES[6]]

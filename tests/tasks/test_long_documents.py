"""A document that is longer than 16 bits can count, with neighbors around one segment long, through the commands."""

import json
import re

import pytest

from tests.fairseq_runs import TASK, figures, make_dictionary, random_documents, run, write_data
from tests.models.tiny import stock_config, stock_model, write_checkpoint

T = 256
LENGTHS = [70_001, 1, T - 1]  # of the first shard of the data
MORE = [T, T + 1, 2]  # of the second
STEPS = -(-LENGTHS[0] // T)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    directory = tmp_path_factory.mktemp("long")
    documents = random_documents(LENGTHS)
    first = write_data(directory / "first", train=documents, valid=documents)
    return first, write_data(directory / "second", train=random_documents(MORE, seed=1))


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """Trained for one epoch on each shard; the log and the checkpoint."""
    directory = tmp_path_factory.mktemp("trained")
    backbone = write_checkpoint(
        directory / "backbone.pt", stock_model("alibi_lm", dictionary=make_dictionary()), stock_config("alibi_lm")
    )
    log = run(
        "train",
        ":".join(map(str, data)),
        *TASK,
        "--arch",
        "longmem_gpt2_tiny",
        "--pretrained-model-path",
        backbone,
        "--criterion",
        "longmem_cross_entropy",
        "--memory-size",
        2 * T,
        *f"--k 8 --tokens-per-sample {T} --batch-size 2 --num-workers 3 --max-epoch 2 --validate-interval 2".split(),
        *"--optimizer adam --lr 0.01 --cpu --no-epoch-checkpoints --log-format json --log-interval 1".split(),
        "--save-dir",
        directory,
        cwd=directory,
    )
    return log, directory / "checkpoint_last.pt"


def test_training_and_validation_read_every_token_once(trained):
    log, _ = trained
    assert f"train: 3 documents, {sum(LENGTHS):,} tokens" in log and f"train: 3 documents, {sum(MORE):,} tokens" in log
    read = figures(log, "train_inner", "wpb")
    assert (len(read), sum(read[:STEPS]), sum(read[STEPS:])) == (STEPS + 2, sum(LENGTHS), sum(MORE))
    (mean,) = figures(log, "valid", "wpb")
    assert mean == pytest.approx(sum(LENGTHS) / STEPS, abs=0.06)  # it is rounded


def test_evaluation_scores_every_token_once_of_all_shards(trained, data, tmp_path):
    output = run(
        "eval_lm",
        ":".join(map(str, data)),
        *TASK,
        "--path",
        trained[1],
        *"--gen-subset train --cpu".split(),
        "--max-tokens",
        2 * T,
        "--num-workers",
        3,
        "--results-path",
        tmp_path,
        cwd=tmp_path,
    )
    assert re.findall(r"Evaluated ([\d,]+) tokens", output) == [f"{sum(LENGTHS) + sum(MORE):,}"]
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == LENGTHS + MORE
    assert [row["name"] for row in rows] == [f"{shard}/train:{i}" for shard in ("first", "second") for i in range(3)]

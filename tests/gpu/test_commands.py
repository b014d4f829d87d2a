"""Test fairseq's commands on a GPU: precisions, resuming, checkpoints that change devices, faiss and generation.

Each command starts a process, so there are few; the results are compared with those of the same command on the CPU.
"""

import os
import re

import pytest
import torch

from longmem_fairseq.memory.search.faiss import has_faiss_gpu
from tests.conftest import T
from tests.fairseq_runs import TASK, figures, run, weights

CPU = ["--cpu"]
PRECISIONS = {"float32": [], "fp16": ["--fp16"], "bf16": ["--train-dtype", "bfloat16"], "amp": ["--amp"]}
IN_EVALUATION = {**PRECISIONS, "bf16": ["--inference-dtype", "bfloat16"]}
needs_faiss = pytest.mark.skipif(not has_faiss_gpu(), reason="the installed faiss has no GPU support")


@pytest.fixture(scope="module")
def options(tiny_options):
    """Arguments of a training on the GPU with four lanes and without dropout."""
    return [x for x in tiny_options if x != "--cpu"] + ["--dropout", 0, "--batch-size", 4, "--num-workers", 0]


def train(options, directory, *more):
    return run("train", *options, "--memory-search", "torch", "--save-dir", directory, *more, cwd=directory)


def evaluate(data, checkpoint, cwd, *more) -> float:
    """Return the loss, in base 2, of the validation documents."""
    output = run(
        "eval_lm", data, *TASK, "--path", checkpoint, "--gen-subset", "valid", "--batch-size", 2, *more, cwd=cwd
    )
    return float(re.search(r"Loss \(base 2\): ([\d.]+)", output)[1])


@pytest.fixture(scope="module")
def trained(options, tiny_data, tmp_path_factory):
    """Train for two epochs in a precision, once; return the function that gives the directory and the log."""
    runs = {}

    def train_once(name):
        if name not in runs:
            directory = tmp_path_factory.mktemp(name)
            runs[name] = directory, train(options, directory, *PRECISIONS[name])
        return runs[name]

    return train_once


@pytest.mark.parametrize("name", PRECISIONS)
def test_training(trained, tiny_data, tmp_path, name):
    """The training learns and saves finite weights; the CPU evaluates them, in float32, to the same loss."""
    directory, log = trained(name)
    losses = figures(log, "train_inner", "loss")
    assert len(losses) == 42 and losses[-1] < losses[0] and all(loss == loss for loss in losses)
    saved = weights(directory / "checkpoint_last.pt")
    assert all(x.isfinite().all() for x in saved.values() if x.is_floating_point())
    assert any((x != 0).any() for key, x in saved.items() if key.endswith("gate_bias")), "the gate learned"
    gpu = evaluate(tiny_data, directory / "checkpoint_last.pt", tmp_path, *IN_EVALUATION[name])
    cpu = evaluate(tiny_data, directory / "checkpoint_last.pt", tmp_path, *CPU)
    assert gpu == pytest.approx(cpu, abs=2e-3 if name == "float32" else 3e-2)


def test_precisions_agree(trained):
    """All precisions start with the same loss and end near each other."""
    losses = {name: figures(trained(name)[1], "train_inner", "loss") for name in PRECISIONS}
    for name in PRECISIONS:
        assert losses[name][0] == pytest.approx(losses["float32"][0], abs=2e-2)
        assert losses[name][-1] == pytest.approx(losses["float32"][-1], abs=0.3)


@pytest.mark.parametrize("precision", ["fp16", "amp"])
def test_overflowing_gradients_leave_the_memory_as_it_is(options, trained, tmp_path, precision):
    """A scale that overflows is lowered, and the batches that were tried again are in the memory once."""
    scale = {"fp16": ["--fp16-init-scale", 2**20], "amp": ["--amp-init-scale", 2**20]}[precision]
    output = train(options, tmp_path, *PRECISIONS[precision], *scale)
    assert "overflow" in output.lower()
    expected = figures(trained(precision)[1], "train_inner", "mem_fill")
    assert figures(output, "train_inner", "mem_fill")[-1] == pytest.approx(expected[-1], abs=0.1)


@pytest.mark.parametrize("name", ["float32", "fp16"])
def test_resuming(options, trained, tmp_path, name):
    """A training that is stopped after 10 updates and resumed has the losses of an uninterrupted one."""
    train(options, tmp_path, *PRECISIONS[name], "--max-update", 10)
    log = train(options, tmp_path, *PRECISIONS[name])
    expected = figures(trained(name)[1], "train_inner", "loss")
    losses = figures(log, "train_inner", "loss")
    assert len(losses) == len(expected) - 10
    # A GPU does not add in the same order twice.
    assert losses == pytest.approx(expected[10:], abs=5e-3 if name == "float32" else 5e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
def test_two_gpus_do_what_one_does(options, trained, tmp_path):
    """By NCCL, with half of the lanes on each."""
    halved = [2 if previous == "--batch-size" else x for previous, x in zip([None, *options], options)]
    log = train(halved, tmp_path, "--distributed-world-size", 2, "--distributed-port", 29555)
    expected = figures(trained("float32")[1], "train_inner", "loss")
    assert figures(log, "train_inner", "loss") == pytest.approx(expected, abs=2e-2)


def test_checkpoint_of_the_cpu_on_the_gpu(tiny_data, tiny_longmem, tmp_path):
    losses = [evaluate(tiny_data, tiny_longmem.checkpoint, tmp_path, *where) for where in ([], CPU)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


@needs_faiss
def test_search_by_faiss(options, trained, tiny_data, tmp_path):
    """With --use-gpu-to-search, as in the released training script, the same chunks are found."""
    output = run("train", *options, "--use-gpu-to-search", "--save-dir", tmp_path, cwd=tmp_path)
    expected = figures(trained("float32")[1], "train_inner", "loss")
    assert figures(output, "train_inner", "loss") == pytest.approx(expected, abs=2e-2)


def test_generation(tiny_data, tiny_longmem, tmp_path):
    """fairseq-interactive gives the same hypotheses and scores as on the CPU."""
    words = [f"w{i % 24}" for i in range(3 * T + 5)]
    (tmp_path / "prompts.txt").write_text(f"{' '.join(words)}\nw3 w4\n")
    hypotheses = []
    for where in ([], CPU):
        output = run(
            "interactive",
            tiny_data,
            *TASK,
            "--path",
            tiny_longmem.checkpoint,
            *"--input prompts.txt --beam 3 --max-len-b 20 --buffer-size 2 --batch-size 2".split(),
            *where,
            cwd=tmp_path,
        )
        hypotheses.append(re.findall(r"^H-(\d+)\t(\S+)\t(.*)$", output, re.MULTILINE))
    assert len(hypotheses[0]) == 2
    for (index, score, text), (cpu_index, cpu_score, cpu_text) in zip(*hypotheses):
        assert (index, text) == (cpu_index, cpu_text)
        assert float(score) == pytest.approx(float(cpu_score), abs=1e-3)


def test_a_gpu_is_used(trained):
    """The other comparisons would also hold if everything had run on the CPU."""
    assert "on cuda" in trained("float32")[1] and os.path.getsize(trained("float32")[0] / "checkpoint_last.pt")
    assert torch.cuda.is_available()

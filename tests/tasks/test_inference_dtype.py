"""--inference-dtype bfloat16 in fairseq's commands and from Python."""

import hashlib
import json
import math
import re

import pytest
import torch
from fairseq import checkpoint_utils

from longmem_fairseq.hub import LongMem
from longmem_fairseq.tasks.options import check_options
from tests.conftest import VALID_LENGTHS
from tests.fairseq_runs import TASK, finish, random_documents, start
from tests.tasks.test_longmem_language_modeling import make_task
from tests.tasks.test_options import config

TEXT = " ".join(f"w{n % 24}" for n in range(40))


@pytest.fixture(scope="module")
def models(tiny_data, tiny_longmem):
    """The model from Python by precision."""
    return {
        dtype: LongMem.from_pretrained(
            str(tiny_longmem.checkpoint), data=str(tiny_data), device="cpu", inference_dtype=dtype
        )
        for dtype in ("float32", "bfloat16")
    }


def losses(model, documents):
    """Mean loss of each document, natural logarithm."""
    model.encode = lambda text: torch.from_numpy(documents[int(text)]).long()
    try:
        return [-model.score(str(i)).log_probabilities.mean().item() for i in range(len(documents))]
    finally:
        del model.encode


def test_commands_and_python_agree_and_are_close_to_float32(models, tiny_data, tiny_longmem, tmp_path):
    (tmp_path / "prompts").write_text(TEXT + "\n")
    options = [tiny_data, *TASK, "--path", tiny_longmem.checkpoint, "--cpu", "--inference-dtype", "bfloat16"]
    before = hashlib.sha256(tiny_longmem.checkpoint.read_bytes()).digest()
    evaluate = ["--gen-subset", "valid", "--batch-size", 1, "--results-path", "results"]  # shapes decide the rounding
    evaluation = start("eval_lm", *options, *evaluate, cwd=tmp_path)
    prompts = ["--input", "prompts", "--beam", 2, "--max-len-b", 30]
    generation = start("interactive", *options, *prompts, cwd=tmp_path)

    documents = random_documents(VALID_LENGTHS, seed=1)
    exact, half = (losses(models[dtype], documents) for dtype in ("float32", "bfloat16"))
    total = [sum(x * n for x, n in zip(loss, VALID_LENGTHS)) / sum(VALID_LENGTHS) for loss in (exact, half)]
    assert half != exact
    assert math.exp(total[1]) == pytest.approx(math.exp(total[0]), rel=1e-3)

    finish(evaluation)
    rows = [json.loads(line) for line in (tmp_path / "results" / "documents.jsonl").read_text().splitlines()]
    for row, loss, other in zip(rows, half, exact):
        assert row["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert row["perplexity"] != pytest.approx(math.exp(other), rel=1e-5)
    (answer,) = re.findall(r"^H-0\t\S+\t(.*)$", finish(generation), re.MULTILINE)
    assert answer.split() == models["bfloat16"].generate(TEXT, beam=2, max_new_tokens=30).split()
    assert hashlib.sha256(tiny_longmem.checkpoint.read_bytes()).digest() == before


@pytest.mark.parametrize("memory_dtype", ["auto", "float16"])
def test_the_memory_has_a_precision_of_its_own(tiny_data, tiny_longmem, memory_dtype):
    model = LongMem.from_pretrained(
        str(tiny_longmem.checkpoint),
        data=str(tiny_data),
        device="cpu",
        inference_dtype="bfloat16",
        memory_dtype=memory_dtype,
    )
    model.memorize(TEXT)
    assert model.memory.bank.keys.dtype == {"auto": torch.float32, "float16": torch.float16}[memory_dtype]


@torch.no_grad()
def test_the_backbone_alone(tiny_data, tiny_backbone):
    """A stock transformer_lm, loaded as the commands do it."""
    means = []
    for dtype in ("float32", "bfloat16"):
        task = make_task(tiny_data, path=str(tiny_backbone), inference_dtype=dtype)
        (model,), _ = checkpoint_utils.load_model_ensemble([str(tiny_backbone)], task=task)
        assert str(model.decoder.layers[0].fc1.weight.dtype) == f"torch.{dtype}"
        tokens = torch.from_numpy(random_documents([16], seed=1)[0])[None]
        means.append(model.eval()(tokens)[0].log_softmax(-1).gather(2, tokens[..., None]).mean().item())
    assert means[0] != means[1] and means[1] == pytest.approx(means[0], rel=1e-3)


def test_a_checkpoint_from_before_the_option_that_was_trained_in_half_precision(tiny_data, tiny_longmem, tmp_path):
    state = torch.load(tiny_longmem.checkpoint, weights_only=False)
    state["cfg"]["common"]["fp16"] = True
    for option in ("inference_dtype", "fp16"):
        del state["cfg"]["task"][option]
    torch.save(state, tmp_path / "old.pt")
    model = LongMem.from_pretrained(
        str(tmp_path / "old.pt"), data=str(tiny_data), device="cpu", inference_dtype="bfloat16"
    )
    assert model.model.decoder.layers[0].fc1.weight.dtype == torch.bfloat16


def test_contradictions_are_refused(tiny_data):
    with pytest.raises(ValueError, match="^--inference-dtype bfloat16 and --fp16 are two precisions: leave one out$"):
        check_options(config(inference_dtype="bfloat16", fp16=True, path="model.pt"))
    with pytest.raises(ValueError, match="--inference-dtype bfloat16 is not supported by fairseq-train"):
        make_task(tiny_data, inference_dtype="bfloat16")

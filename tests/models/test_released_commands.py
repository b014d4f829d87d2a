"""fairseq's commands on checkpoints of the released LongMem, and on what the converter makes of them."""

import os
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from longmem_fairseq.hub import LongMem
from longmem_fairseq.released.released_model import load_released
from preprocess.convert_released import main as convert
from tests.fairseq_runs import TASK, make_dictionary, run, weights, write_split
from tests.models.released_reference import (
    COPY,
    Shape,
    backbone_settings,
    random_weights,
    save,
    side_settings,
)

T = 16
EVALUATE = ["--gen-subset", "test", "--cpu", "--tokens-per-sample", T]
SEGMENTS = "{'tokens_per_sample': 16}"  # a checkpoint brings its own segment length


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """Files of a released model, what they are converted to, and data in their dictionary."""
    directory = tmp_path_factory.mktemp("released")
    shape = Shape(vocabulary=40, memory_size=128)
    make_dictionary(36).save(str(directory / "dict.txt"))
    rng = np.random.default_rng(0)
    documents = [np.append(rng.integers(4, 40, length), 2) for length in (200, 75, 130)]
    for split in ("train", "valid", "test"):
        write_split(directory / split, documents)
    write_split(directory / "single", documents[:1])
    backbone, side = random_weights(shape)
    files = SimpleNamespace(
        data=directory,
        documents=documents,
        shape=shape,
        backbone=save(directory / "backbone.pt", backbone, backbone_settings(shape)),
        side=save(directory / "sidenet.pt", side, side_settings(shape)),
        bare=save(
            directory / "bare.pt",
            {key: x for key, x in side.items() if not key.startswith(COPY)},
            {**side_settings(shape), "pretrained_model_path": str(directory / "backbone.pt")},
        ),
        plain=directory / "plain",
        converted=directory / "longmem.pt",
    )
    convert([str(files.side), str(files.plain)])
    convert([str(files.plain), str(files.converted)])
    return files


def loss_of(output) -> float:
    """Loss in base 2 as fairseq-eval-lm printed it."""
    return float(re.search(r"Loss \(base 2\): ([\d.]+)", output)[1])


@torch.no_grad()
def loss_in_python(model, documents) -> float:
    """The same of documents read one after the other, each with a memory of its own."""
    losses = []
    for document in map(torch.from_numpy, documents):
        model.reset_memory()
        source = torch.cat([torch.tensor([2]), document[:-1]])
        for begin in range(0, len(document), T):
            logits = model(source[None, begin : begin + T])[0][0]
            losses.append(F.cross_entropy(logits, document[begin : begin + T], reduction="none"))
    return torch.cat(losses).mean().item() / np.log(2)


@pytest.mark.parametrize("name", ["side", "converted"])
def test_evaluation_by_document(released, name, tmp_path):
    """By default each document has its memory, whatever the number of lanes."""
    output = run(
        "eval_lm",
        released.data,
        *TASK,
        "--path",
        getattr(released, name),
        *EVALUATE,
        "--model-overrides",
        SEGMENTS,
        "--batch-size",
        3,
        cwd=tmp_path,
    )
    model = load_released(released.side, memory_scope="document", memory_dtype="float32")
    assert "Evaluated 408 tokens" in output
    assert loss_of(output) == pytest.approx(loss_in_python(model, released.documents), abs=1e-3)


def test_evaluation_with_one_memory(released, tmp_path):
    """--memory-scope shared computes what the released code does."""
    output = run(
        "eval_lm",
        released.data,
        *TASK,
        "--path",
        released.side,
        *EVALUATE,
        "--gen-subset",
        "single",
        "--model-overrides",
        SEGMENTS,
        "--memory-scope",
        "shared",
        cwd=tmp_path,
    )
    shared = loss_in_python(load_released(released.side), released.documents[:1])
    assert loss_of(output) == pytest.approx(shared, abs=1e-4)
    apart = load_released(released.side, memory_scope="document", memory_dtype="float32")
    assert abs(shared - loss_in_python(apart, released.documents[:1])) > 1e-3  # eviction differs


def test_evaluation_of_the_backbone(released, tmp_path):
    """The backbone is a model of its own for fairseq-eval-lm, given the package and its task."""
    output = run(
        "eval_lm",
        released.data,
        *TASK,
        "--path",
        released.backbone,
        *EVALUATE,
        "--gen-subset",
        "single",
        "--model-overrides",
        SEGMENTS,
        cwd=tmp_path,
    )
    model = load_released(released.side, use_external_memory=False)
    losses = []
    document = torch.from_numpy(released.documents[0])
    source = torch.cat([torch.tensor([2]), document[:-1]])
    for begin in range(0, len(document), T):
        backbone = model.decoder.backbone
        last = backbone(source[None, begin : begin + T]).hidden[-1].transpose(0, 1)  # behind the final LayerNorm
        losses.append(F.cross_entropy(backbone.output(last)[0], document[begin : begin + T], reduction="none"))
    assert loss_of(output) == pytest.approx(torch.cat(losses).mean().item() / np.log(2), abs=1e-3)


def test_generation(released, tmp_path):
    """fairseq-interactive, with the backbone from a file of its own; prompts longer than a segment go into memory."""
    words = [f"w{i % 36}" for i in range(3 * T + 5)]
    (tmp_path / "prompts.txt").write_text(" ".join(words) + "\n")
    answers = []
    for path, backbone in ((released.bare, released.backbone), (released.converted, None)):
        overrides = {"tokens_per_sample": T, **({"pretrained_model_path": str(backbone)} if backbone else {})}
        output = run(
            "interactive",
            released.data,
            *TASK,
            "--path",
            path,
            "--cpu",
            "--input",
            tmp_path / "prompts.txt",
            *"--beam 2 --max-len-b 8".split(),
            "--model-overrides",
            str(overrides),
            cwd=tmp_path,
        )
        answers.append(re.search(r"^H-0\t(\S+)\t(.+)$", output, re.MULTILINE).groups())
    (score, answer), (same_score, same_answer) = answers
    assert answer == same_answer and float(score) == pytest.approx(float(same_score), abs=1e-3)
    model = LongMem.from_pretrained(str(released.side), data=str(released.data), tokens_per_sample=T)
    assert model.generate(" ".join(words), beam=2, max_new_tokens=8).split() == answer.split()


@pytest.mark.parametrize(
    "backbone, start",
    [("backbone", "side"), ("side", "bare"), ("converted", "converted")],
    ids=["released files", "side network without its backbone", "converted"],
)
def test_training_on(released, backbone, start, tmp_path):
    """A released side network is a start for further training; its backbone stays as it is."""
    run(
        "train",
        released.data,
        *TASK,
        *"--arch longmem_released --retrieval-layer-index 3".split(),
        "--pretrained-model-path",
        getattr(released, backbone),
        "--finetune-from-model",
        getattr(released, start),
        *f"--criterion longmem_cross_entropy --memory-size 128 --k 8 --tokens-per-sample {T} --batch-size 2".split(),
        *"--max-update 1 --optimizer sgd --lr 0.0 --cpu --save-backbone".split(),
        "--save-dir",
        tmp_path,
        "--no-epoch-checkpoints",
        "--disable-validation",
        cwd=tmp_path,
    )
    trained, began = weights(tmp_path / "checkpoint_last.pt"), weights(released.converted)
    assert set(trained) == set(began)
    for name, tensor in began.items():
        torch.testing.assert_close(trained[name], tensor, rtol=0, atol=0, msg=name)


def test_other_architecture_refused(released, tmp_path):
    output = run(
        "train",
        released.data,
        *TASK,
        "--arch",
        "longmem_gpt2_tiny",
        "--pretrained-model-path",
        released.backbone,
        "--finetune-from-model",
        released.side,
        *f"--criterion longmem_cross_entropy --memory-size 128 --k 8 --tokens-per-sample {T} --batch-size 2".split(),
        *"--optimizer sgd --cpu".split(),
        "--save-dir",
        tmp_path,
        cwd=tmp_path,
        succeeds=False,
    )
    assert "train it further with --arch longmem_released" in output


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_checkpoint_is_not_run(released, tmp_path):
    side = random_weights(released.shape)[1]
    settings = {**side_settings(released.shape), "activation_fn": Payload(tmp_path / "created")}
    run(
        "eval_lm",
        released.data,
        *TASK,
        "--path",
        save(tmp_path / "malicious.pt", side, settings),
        *EVALUATE,
        cwd=tmp_path,
        succeeds=False,
    )
    assert not (tmp_path / "created").exists()


@torch.no_grad()
def test_plain_files(released, tmp_path):
    """The converted directory computes the same, and says nothing of whose machine it came from."""
    tokens = torch.randint(4, 40, (4, 2, 10))
    one, other = load_released(released.side), load_released(released.plain)
    assert all(torch.equal(one(segment)[0], other(segment)[0]) for segment in tokens)
    assert sorted(path.name for path in released.plain.iterdir()) == [
        "backbone.safetensors",
        "config.json",
        "side_network.safetensors",
    ]
    side = load_file(released.plain / "side_network.safetensors")
    assert not [name for name in side if "backbone." in name]
    for path in [*released.plain.iterdir(), released.converted]:
        assert b"author" not in path.read_bytes()
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match='config.json does not have this format: it must contain "format": "longmem"'):
        load_released(tmp_path)


def test_from_python_with_text(released):
    """The hub takes released files too."""
    one, other = (
        LongMem.from_pretrained(str(path), data=str(released.data)) for path in (released.side, released.converted)
    )
    for model in (one, other):
        model.memorize(" ".join(f"w{i % 36}" for i in range(60)), name="text")
    assert one.score("w1 w2 w3").perplexity == pytest.approx(other.score("w1 w2 w3").perplexity)


def test_half_precision(released):
    """Products in bfloat16, with the backbone in the checkpoint and beside it."""
    text = " ".join(f"w{i % 36}" for i in range(60))
    options = {"data": str(released.data), "tokens_per_sample": T}
    exact = LongMem.from_pretrained(str(released.side), **options).score(text).perplexity
    for path in (released.side, released.bare, released.converted):
        half = LongMem.from_pretrained(str(path), inference_dtype="bfloat16", **options).score(text).perplexity
        assert half != exact and half == pytest.approx(exact, rel=5e-3)


def test_refusals_of_the_converter(released, tmp_path):
    with pytest.raises(
        SystemExit, match="preprocess.convert_released: error: .*backbone.pt does not hold a side network"
    ):
        convert([str(released.backbone), str(tmp_path / "plain")])
    with pytest.raises(SystemExit, match="bare.pt does not hold its backbone: name the backbone's file"):
        convert([str(released.bare), str(tmp_path / "plain")])
    convert([str(released.bare), str(tmp_path / "plain"), "--backbone", str(released.backbone)])
    with pytest.raises(SystemExit, match="needs a checkpoint, and .* is a directory"):
        convert([str(released.plain), str(tmp_path / "x.pt"), "--backbone", str(released.backbone)])

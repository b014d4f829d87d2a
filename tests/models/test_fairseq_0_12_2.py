"""What differs in fairseq 0.12.2, the last of its authors' releases: the files it writes, the names it brings.

It runs on Python up to 3.10 and is not installed here, so that its files are made as it writes them.
"""

import ast

import pytest
import torch

from longmem_fairseq.backbones.loading import backbone_fingerprint, load_backbone
from tests.models.checkpoints import load, save
from tests.models.tiny import POSITIONS, VOCABULARY, documents, read
from tests.repository import ROOT


def as_fairseq_0_12_2(state):
    """A checkpoint as fairseq-train 0.12.2 writes it: the uninitialized buffer of its sinusoidal positions, and what
    else lies in the file."""
    model = dict(state["model"])
    if "decoder.embed_positions.weight" not in model:
        model["decoder.embed_positions._float_tensor"] = torch.tensor([float("nan")])
    sections = ["common", "common_eval", "distributed_training", "dataset", "optimization", "checkpoint", "bmuf"]
    return {
        **state,
        "model": model,
        "task_state": {},
        "cfg": {
            **{name: {"_name": None} for name in sections},
            "_name": None,
            "model": state["cfg"]["model"],
            "task": {"_name": "language_modeling", "data": "data", "tokens_per_sample": POSITIONS},
        },
        "optimizer_history": [
            {
                "criterion_name": "CrossEntropyCriterion",
                "optimizer_name": "FairseqAdam",
                "lr_scheduler_state": {"lr": 0.01},
                "num_updates": 3,
            }
        ],
        "extra_state": {
            "metrics": {"default": [[0, "loss", "AverageMeter", {"val": 6.4, "sum": 1, "count": 1, "round": 3}]]},
            "previous_training_time": 0.5,
            "train_iterator": {"version": 2, "epoch": 2, "iterations_in_epoch": 0},
            "val_loss": 6.3,
            "best": 6.3,
        },
        "last_optimizer_state": {"state": {}, "param_groups": [{"lr": 0.01, "betas": (0.9, 0.999), "params": [0]}]},
    }


@pytest.mark.parametrize("learned", [True, False], ids=["learned", "sinusoidal"])
def test_its_checkpoints_are_backbones(write_backbone, learned):
    """It is the same backbone, with the same fingerprint, so that checkpoints may be exchanged."""
    path = write_backbone(decoder_learned_pos=learned)
    actual = load_backbone(path, VOCABULARY, [1])
    state = as_fairseq_0_12_2(torch.load(path))
    assert ("decoder.embed_positions._float_tensor" in state["model"]) != learned
    torch.save(state, path)
    expected = load_backbone(path, VOCABULARY, [1])
    assert expected.fingerprint == actual.fingerprint
    x = torch.arange(4, 22).view(2, 9)
    assert torch.equal(expected(x).hidden[-1], actual(x).hidden[-1])


def test_its_fingerprints_are_the_same(write_backbone):
    """There the positions of every backbone have that buffer; it is never read, so it makes no other backbone."""
    backbone = load_backbone(write_backbone(decoder_learned_pos=False), VOCABULARY, [1])
    for number in (0.0, float("nan")):
        backbone.decoder.embed_positions.register_buffer("_float_tensor", torch.tensor([number]))
        assert "embed_positions._float_tensor" in backbone.decoder.state_dict()
        assert backbone_fingerprint(backbone) == backbone.fingerprint


def test_checkpoints_of_longmem_come_and_go(train, write_backbone, tmp_path):
    """Its sinusoidal positions have an uninitialized buffer, which is in no checkpoint of later versions."""
    made = train(write_backbone(decoder_learned_pos=False), "--save-backbone")
    made.model.eval()
    path = save(made, tmp_path / "c.pt")
    state = torch.load(path)
    state["model"]["decoder.backbone.decoder.embed_positions._float_tensor"] = torch.tensor([float("nan")])
    torch.save(state, path)
    docs = documents([20, 13])
    for a, b in zip(read(load(path), docs, 7), read(made.model, docs, 7)):
        assert torch.equal(a, b)
    assert made.cfg.model.base_layers == 0  # which it asks every model for before it saves


def test_only_names_of_its_omegaconf_are_imported():
    """It needs omegaconf 2.0, whose errors are fewer."""
    known = {
        "omegaconf": {"II", "MISSING", "DictConfig", "ListConfig", "OmegaConf", "open_dict"},
        "omegaconf.errors": {"ConfigAttributeError", "ConfigKeyError", "OmegaConfBaseException", "ValidationError"},
    }
    imports = 0
    for path in (ROOT / "longmem_fairseq").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in known:
                imports += 1
                assert {name.name for name in node.names} <= known[node.module], f"{path}:{node.lineno}"
    assert imports > 3

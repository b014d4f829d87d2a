"""Test the table of sizes in docs/backbones.md: parameters, bytes of memory, and the formulas of peak memory."""

import argparse
import json

import pytest
import torch

from examples.benchmark import sizes
from longmem_fairseq.backbones.loading import describe_backbone
from longmem_fairseq.models.longmem_lm import LongMemModel
from longmem_fairseq.released.released_checkpoint import SIDE_NETWORK
from tests.fairseq_runs import make_dictionary
from tests.models.tiny import batches, documents, longmem, task_of
from tests.repository import ROOT

OPTIONS = argparse.Namespace(segment=1024, batch=1, memory_size=65536)


@pytest.fixture(scope="module")
def table():
    """Read the table: the cells of each size."""
    lines = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip().replace(",", "") for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows if row[0] in sizes.GPT2}


@pytest.mark.parametrize("name", sizes.GPT2)
def test_the_table_of_the_documentation(table, name):
    backbone, side, memory, evaluation, _, training, _ = table[name]
    figures = sizes.computed(name, OPTIONS)
    assert (figures["backbone"], figures["side_network"]) == (int(backbone), int(side))
    half, single = memory.split(" / ")
    assert f"{figures['mib_per_1k_half']:.2f}" == half and f"{figures['mib_per_1k_single']:.2f}" == single
    assert f"{figures['evaluation_gib']:.2f}" == evaluation and f"{figures['training_gib']:.2f}" == training


def test_parameters_of_the_released_model():
    """Count the parameters of LongMem-558M, built with this project's settings for it."""
    config = dict(
        _name="parallel_lm",
        decoder_layers=24,
        decoder_embed_dim=1024,
        decoder_ffn_embed_dim=4096,
        decoder_attention_heads=16,
        decoder_normalize_before=True,
        activation_fn="gelu_accurate",
    )
    dictionary = make_dictionary(51200 - 4)
    description = json.dumps(describe_backbone(argparse.Namespace(**config), len(dictionary)))
    cfg = argparse.Namespace(
        save_backbone=True,
        backbone_config=description,
        tokens_per_sample=1024,
        retrieval_layer_index=17,
        **SIDE_NETWORK,
    )
    with torch.device("meta"):
        model = LongMemModel.build_model(cfg, task_of(dictionary))
    assert (sizes.parameters(model, True), sizes.parameters(model, False)) == (151_083_024, 407_072_768)


def test_activations_that_training_keeps(tmp_path):
    """Count what the side layers save for the backward pass and compare it with the formula."""
    T, D, F, layers = 64, 48, 192, 12
    backbone = dict(
        decoder_layers=layers,
        decoder_embed_dim=D,
        decoder_input_dim=D,
        decoder_output_dim=D,
        decoder_ffn_embed_dim=F,
        activation_fn="gelu_accurate",
        max_target_positions=T,
    )
    model = longmem(tmp_path, backbone=backbone, memory_size=4 * T, k=4, chunk_size=4, tokens_per_sample=T).train()
    *before, (tokens, segments) = batches(documents([3 * T]), T)
    for earlier, places in before:
        model(earlier, segments=places)
    stored = {p.untyped_storage().data_ptr() for p in model.parameters()}
    (memory,) = model.decoder.memories
    stored |= {x.untyped_storage().data_ptr() for x in (memory.bank.keys, memory.bank.values)}
    saved = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in stored:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(tokens, segments=segments)
    saved_bytes = sum(x.untyped_storage().nbytes() for x in saved.values())
    assert saved_bytes == pytest.approx(layers // 2 * 4 * T * (9 * D + 5 * F), rel=0.1)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_measuring(monkeypatch, capsys, mode):
    monkeypatch.setitem(sizes.GPT2, "small", (2, 16, 2, 1))
    monkeypatch.setattr(sizes, "SYMBOLS", 60)
    sizes.print_measured("small", mode, argparse.Namespace(segment=8, batch=2, memory_size=32))
    assert 0 <= int(capsys.readouterr().out) < 2**30


def test_refusals():
    with pytest.raises(SystemExit, match="--memory-size 8 must be 0 or at least a segment of 16 tokens"):
        sizes.main(["--segment", "16", "--memory-size", "8"])

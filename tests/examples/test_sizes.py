"""Test the table of sizes in docs/backbones.md: parameters, bytes of memory, and the formulas of peak memory."""

import argparse
import json

import pytest
import torch

from examples.benchmark import sizes
from examples.benchmark.model_shapes import SHAPES, gpt2, llama
from longmem_fairseq.backbones.loading import describe_backbone
from longmem_fairseq.models.longmem_lm import LongMemModel
from longmem_fairseq.released.released_checkpoint import SIDE_NETWORK
from tests.fairseq_runs import make_dictionary
from tests.models.tiny import batches, documents, longmem, task_of
from tests.repository import ROOT

OPTIONS = argparse.Namespace(
    segment=1024, batch=1, memory_size=65536, retrieval_layer_index=None, backbone_dtype="float32"
)
# Parameters of the published models.
PUBLISHED = {
    "gpt2": 124_439_808,
    "gpt2-medium": 354_823_168,
    "gpt2-large": 774_030_080,
    "gpt2-xl": 1_557_611_200,
    "SmolLM2-135M": 134_515_008,
    "SmolLM2-360M": 361_821_120,
    "SmolLM2-1.7B": 1_711_376_384,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.2-3B": 3_212_749_824,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-4B": 4_022_468_096,
    "Mistral-7B-v0.3": 7_248_023_552,
}


@pytest.fixture(scope="module")
def table():
    """Read the table: the cells of each size."""
    lines = (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8").splitlines()
    rows = [[cell.strip().replace(",", "") for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows if row[0] in SHAPES}


@pytest.mark.parametrize("name", SHAPES)
def test_the_table_of_the_documentation(table, name):
    pretrained, side, memory, evaluation, _, training, _ = table[name]
    figures = sizes.computed(name, OPTIONS)
    half = sizes.computed(name, argparse.Namespace(**{**vars(OPTIONS), "backbone_dtype": "bfloat16"}))
    assert figures["pretrained"] == half["pretrained"] == PUBLISHED[name] == int(pretrained)
    assert figures["side_network"] == half["side_network"] == int(side)
    assert memory == f"{figures['mib_per_1k_half']:.2f} / {figures['mib_per_1k_single']:.2f}"
    assert evaluation == f"{figures['evaluation_gib']:.2f} / {half['evaluation_gib']:.2f}"
    assert training == f"{figures['training_gib']:.2f} / {half['training_gib']:.2f}"


def test_symbols_that_the_dictionary_adds():
    """Qwen2.5 7B has an output projection of its own, so that a symbol more takes two rows."""
    shape = SHAPES["Qwen2.5-7B"]
    assert shape.symbols == 152_064 + 4 + 4 and shape.added_parameters == 2 * 8 * 3584
    assert sizes.computed("Qwen2.5-7B", OPTIONS)["backbone"] == PUBLISHED["Qwen2.5-7B"] + 2 * 8 * 3584


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


T, D, F, LAYERS = 64, 48, 192, 12
GPT2 = dict(decoder_input_dim=D, decoder_output_dim=D, activation_fn="gelu_accurate")
LLAMA = dict(decoder_attention_heads=6, decoder_kv_heads=2, decoder_head_dim=16)


@pytest.mark.parametrize(
    "model, settings",
    [
        ("transformer_lm", GPT2),
        ("llama_lm", {**LLAMA, "qk_norm": False}),
        ("llama_lm", {**LLAMA, "qk_norm": True}),
    ],
)
def test_activations_that_training_keeps(tmp_path, model, settings):
    """Count what the side layers save for the backward pass and compare it with the formula."""
    backbone = dict(
        decoder_layers=LAYERS, decoder_embed_dim=D, decoder_ffn_embed_dim=F, max_target_positions=T, **settings
    )
    longmem_model = longmem(
        tmp_path, model=model, backbone=backbone, memory_size=4 * T, k=4, chunk_size=4, tokens_per_sample=T
    ).train()
    *before, (tokens, segments) = batches(documents([3 * T]), T)
    for earlier, places in before:
        longmem_model(earlier, segments=places)
    (memory,) = longmem_model.decoder.lane_state.memories
    shared = [*longmem_model.parameters(), memory.bank.keys, memory.bank.values]
    if model == "llama_lm":  # one table of sines and cosines for all layers
        shared += longmem_model.decoder.backbone.decoder.rotary._tables[tokens.device]  # noqa: SLF001
    stored = {x.untyped_storage().data_ptr() for x in shared}
    saved = {}

    def keep(x):
        if x.untyped_storage().data_ptr() not in stored:
            saved[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        longmem_model(tokens, segments=segments)
    saved_bytes = sum(x.untyped_storage().nbytes() for x in saved.values())
    expected = LAYERS // 2 * 4 * T * sizes.kept_by_side_layer(longmem_model.decoder.backbone)
    assert saved_bytes == pytest.approx(expected, rel=0.1)


def test_each_memory_layer_takes_as_much_as_one():
    one, three = (
        sizes.computed("gpt2", argparse.Namespace(**{**vars(OPTIONS), "retrieval_layer_index": layers}))
        for layers in ("9", "5,7,9")
    )
    for figure in ("bank_gib", "mib_per_1k_half", "mib_per_1k_single"):
        assert three[figure] == pytest.approx(3 * one[figure])


@pytest.mark.parametrize("backbone_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mode", ["eval", "train"])
@pytest.mark.parametrize("shape", [gpt2(2, 16, 2, 50), llama(2, 16, 24, 2, 1, 50, 8, tied=False)])
def test_measuring(monkeypatch, capsys, shape, mode, backbone_dtype):
    monkeypatch.setitem(SHAPES, "tiny", shape)
    options = argparse.Namespace(
        segment=8, batch=2, memory_size=32, retrieval_layer_index=1, backbone_dtype=backbone_dtype
    )
    sizes.print_measured("tiny", mode, options)
    assert abs(int(capsys.readouterr().out)) < 2**30  # Linux counts pages roughly


def test_refusals():
    with pytest.raises(SystemExit, match="--memory-size 8 must be 0 or at least a segment of 16 tokens"):
        sizes.main(["--segment", "16", "--memory-size", "8"])

"""Options of longmem_lm on fairseq's command line: what they set, what is explained, what is refused."""

import logging
import re
from argparse import SUPPRESS

import pytest
import torch
from fairseq.models import ARCH_MODEL_REGISTRY

from longmem_fairseq.memory.search.faiss import has_faiss_gpu
from longmem_fairseq.models.longmem_lm import LongMemConfig, LongMemModel
from longmem_fairseq.models.memory_layers import default_memory_layer
from tests.models.tiny import LAYERS, POSITIONS, longmem

ARCHITECTURES = {
    "longmem_gpt2_tiny": (4, 3),
    "longmem_gpt2_mini": (6, 5),
    "longmem_gpt2_small": (12, 9),
    "longmem_gpt2_medium": (24, 17),
    "longmem_gpt2_large": (36, 25),
    "longmem_gpt2_xl": (48, 33),
}  # name: layers of its backbone, layer that is remembered

RELEASED_SCRIPT = [
    *"--use-external-memory --memory-size 65536 --k 64 --chunk-size 4 --retrieval-layer-index 17".split(),
    *"--layer-reduction-factor 2 --reload-ptm-layer --use-gpu-to-search --gpt-encoder-path gpt2_bpe".split(),
    *"--sample-break-mode none --tokens-per-sample 1024 --data-no-shuffle".split(),
    *"--no-token-positional-embeddings --fp16".split(),
]


def messages(caplog):
    return [record.getMessage() for record in caplog.records if record.name.startswith("longmem_fairseq.models")]


# --- what they set


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_architectures(parse, arch):
    """Each sets every option to its default."""
    assert ARCH_MODEL_REGISTRY[arch] is LongMemModel
    cfg = parse(arch=arch).model
    assert cfg._name == arch
    for name, entry in LongMemConfig.__dataclass_fields__.items():
        if name != "_name" and not str(entry.default).startswith("${"):
            assert cfg[name] == entry.default, name
    assert cfg.tokens_per_sample == 1024, "from the task"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_memory_layer_follows_from_the_backbones_depth(train, write_backbone, arch):
    """An odd layer about two thirds up: side layer m // 2 starts from it. Checkpoints contain the number."""
    layers, memory_layer = ARCHITECTURES[arch]
    built = train(write_backbone(decoder_layers=layers), arch=arch, default_layer=True)
    decoder = built.model.decoder
    assert memory_layer == 2 * (memory_layer // 2) + 1 and 0.6 < (memory_layer + 1) / layers <= 1
    assert len(decoder.layers) == layers // 2 and decoder.backbone.memory_layers == (memory_layer,)
    assert decoder.reading_layers == (memory_layer // 2,)
    assert built.cfg.model.retrieval_layer_index == memory_layer


@pytest.mark.parametrize("value, setting", [(" 3, 1", "1,3"), ([3, 1], "1,3"), ("3", 3), (2, 2), ([0], 0)])
def test_memory_layers_are_saved_in_one_form(tmp_path, value, setting):
    """A number, as in files of earlier versions, or text with several, ascending."""
    model = longmem(tmp_path, retrieval_layer_index=value)
    assert model.cfg.retrieval_layer_index == setting
    assert model.decoder.reading_layers == tuple(m // 2 for m in model.decoder.backbone.memory_layers)


@pytest.mark.parametrize("layers, reduction, expected", [(12, 1, 8), (12, 3, 10), (6, 6, 1), (1, 1, 0), (30, 2, 21)])
def test_the_memory_layer_fits_any_reduction(layers, reduction, expected):
    assert default_memory_layer(layers, reduction) == expected


def test_positions_are_the_backbones(train, write_backbone):
    with pytest.raises(ValueError, match="--max-target-positions 64 is not supported by a model with a memory"):
        train(write_backbone(), "--max-target-positions", 64)


def test_options_without_an_effect_are_not_in_the_help(parse):
    hidden = {name for name, x in LongMemConfig.__dataclass_fields__.items() if x.metadata.get("help") == SUPPRESS}
    assert hidden == {
        "memory_index_parameters",
        "side_activation_fn",
        "side_layer_norm_eps",
        "normalize_last_hidden",
        "backbone_config",
        "backbone_fingerprint",
        "gpt_encoder_path",
        "no_token_positional_embeddings",
        "base_layers",
    }


@pytest.mark.parametrize("option", ["use-external-memory", "reload-ptm-layer"])
def test_what_is_on_can_be_turned_off(parse, option):
    name = option.replace("-", "_")
    assert parse().model[name] is True
    assert parse(f"--{option}").model[name] is True, "the released script's option does what it says"
    assert parse(f"--no-{option}").model[name] is False
    assert parse(f"--no-{option}", f"--{option}").model[name] is True


def test_values(parse):
    cfg = parse(
        "--pretrained-model-path",
        "b.pt",
        "--memory-size",
        128,
        "--k",
        12,
        "--chunk-size",
        6,
        "--retrieval-layer-index",
        2,
        "--layer-reduction-factor",
        3,
        *"--memory-search torch --memory-dtype float16".split(),
        "--dropout",
        0.1,
        "--attention-dropout",
        0.2,
        "--checkpoint-activations",
        "--save-backbone",
    ).model
    expected = {
        "pretrained_model_path": "b.pt",
        "memory_size": 128,
        "k": 12,
        "chunk_size": 6,
        "retrieval_layer_index": "2",
        "layer_reduction_factor": 3,
        "memory_search": "torch",
        "memory_dtype": "float16",
        "dropout": 0.1,
        "attention_dropout": 0.2,
        "checkpoint_activations": True,
        "save_backbone": True,
    }
    assert {name: cfg[name] for name in expected} == expected


@pytest.mark.parametrize("option, value", [("--memory-dtype", "int8"), ("--k", "many")])
def test_values_that_do_not_exist_are_refused_by_the_parser(parse, capsys, option, value):
    with pytest.raises(SystemExit):
        parse(option, value)
    assert option in capsys.readouterr().err


def test_every_option_has_a_help_text():
    for name, entry in LongMemConfig.__dataclass_fields__.items():
        if name != "_name" and not str(entry.default).startswith("${") and entry.metadata["help"] != SUPPRESS:
            assert len(entry.metadata["help"]) > 20, name


# --- the released script


def test_the_released_scripts_options_mean_the_same(parse):
    cfg = parse("--pretrained-model-path", "b.pt", *RELEASED_SCRIPT, arch="longmem_gpt2_medium")
    expected = {
        "use_external_memory": True,
        "memory_size": 65536,
        "k": 64,
        "chunk_size": 4,
        "retrieval_layer_index": "17",
        "layer_reduction_factor": 2,
        "reload_ptm_layer": True,
        "use_gpu_to_search": True,
        "pretrained_model_path": "b.pt",
        "gpt_encoder_path": "gpt2_bpe",
        "no_token_positional_embeddings": True,
        "tokens_per_sample": 1024,
    }
    assert {name: cfg.model[name] for name in expected} == expected
    assert cfg.common.fp16 and cfg.task.data_no_shuffle


def test_the_released_scripts_model_is_built(train, write_backbone, caplog):
    """Without a GPU, but for the two options that need one; what has no effect is logged, one line an option."""
    path = write_backbone(decoder_layers=24, max_target_positions=1024)
    line = [x for x in RELEASED_SCRIPT if x not in ("--use-gpu-to-search", "--fp16")]
    with caplog.at_level(logging.INFO):
        built = train(path, *line, arch="longmem_gpt2_medium")
    decoder = built.model.decoder
    assert len(decoder.layers) == 12 and decoder.reading_layers == (8,) and decoder.backbone.memory_layers == (17,)
    assert built.model.memory_tokens == 65536 + 4
    explained = [line for line in messages(caplog) if "no effect" in line]
    assert [re.match(r"--(\S+) has no effect", line)[1] for line in explained] == [
        "gpt-encoder-path",
        "no-token-positional-embeddings",
    ]


def test_nothing_is_explained_where_nothing_is_asked(train, write_backbone, caplog):
    with caplog.at_level(logging.INFO):
        train(write_backbone())
    assert not [line for line in messages(caplog) if "no effect" in line]


@pytest.mark.skipif(has_faiss_gpu() and torch.cuda.is_available(), reason="this machine can search on a GPU")
def test_a_gpu_search_that_cannot_be_had_is_an_error(train, write_backbone):
    with pytest.raises(ValueError, match="--use-gpu-to-search needs a GPU and a faiss built for it: .*faiss-gpu"):
        train(write_backbone(), "--use-gpu-to-search")


# --- what is refused


@pytest.mark.parametrize(
    "options, message",
    [
        (["--k", 10], "--k 10 is not a positive multiple of --chunk-size 3"),
        (["--k", 0], "--k 0 is not a positive multiple of --chunk-size 3"),
        (["--k", -3], "--k -3 is not a positive multiple of --chunk-size 3"),
        (["--chunk-size", 0], "--k 6 is not a positive multiple of --chunk-size 0"),
        (["--chunk-size", -3], "--k 6 is not a positive multiple of --chunk-size -3"),
        (["--base-layers", 2], "--base-layers 2: a side network cannot have BASE layers, leave it out"),
        (
            ["--memory-size", 6],
            "--memory-size 6 is smaller than one segment of --tokens-per-sample 7 tokens: raise it, or turn the memory "
            "off with --memory-size 0",
        ),
        (["--token-memory", -1], "--token-memory -1 is negative: set it to 0 or more tokens"),
        (["--token-memory", 9, "--token-memory-k", 0], "--token-memory-k 0 is less than one entry: raise it"),
        (
            ["--token-memory", 9, "--memory-size", 0],
            "--token-memory 9 is a part of the memory, which is off .*: leave it out, or turn the memory on",
        ),
        (
            ["--token-memory", 9, "--memory-scope", "shared"],
            "--token-memory 9 keeps the lanes' documents apart, which --memory-scope shared joins: set",
        ),
        (["--memory-size", -1], "--memory-size -1 is smaller than one segment of --tokens-per-sample 7 tokens"),
        (
            ["--chunk-size", 32, "--k", 32],
            "--memory-size 16 is smaller than one chunk of --chunk-size 32 tokens: raise the first or lower the second",
        ),
        (
            ["--retrieval-layer-index", LAYERS],
            f"--retrieval-layer-index {LAYERS} is outside the backbone, whose layers are 0 to {LAYERS - 1}",
        ),
        (
            ["--retrieval-layer-index", f"1,{LAYERS}"],
            f"--retrieval-layer-index {LAYERS} is outside the backbone, whose layers are 0 to {LAYERS - 1}",
        ),
        (["--retrieval-layer-index", "3,1,3"], "--retrieval-layer-index 3,1,3 names layer 3 twice: leave one out"),
        (
            ["--retrieval-layer-index", "3,2"],
            "--retrieval-layer-index 2,3: layers 2 and 3 would both be read by side layer 1 .--layer-reduction-factor "
            "2.: leave one out",
        ),
        *(
            (
                ["--retrieval-layer-index", value],
                f"--retrieval-layer-index {value} is neither the number of a layer nor numbers separated by commas: "
                "write it as 17 or 13,17,21",
            )
            for value in ("one", "1.5", "1,,3", "1,", "True")
        ),
        (
            ["--retrieval-layer-index", "1,3", "--memory-scope", "shared"],
            "--retrieval-layer-index 1,3 names 2 layers, but --memory-scope shared holds one: name one of them, or set "
            "--memory-scope document",
        ),
        (["--retrieval-layer-index", -1], f"--retrieval-layer-index -1 is outside the backbone, .* 0 to {LAYERS - 1}"),
        (
            ["--layer-reduction-factor", 3],
            f"the backbone's {LAYERS} layers are not divisible by --layer-reduction-factor 3",
        ),
        (["--layer-reduction-factor", 0], "not divisible by --layer-reduction-factor 0"),
        (["--layer-reduction-factor", -2], "not divisible by --layer-reduction-factor -2"),
        (["--layer-reduction-factor", 2 * LAYERS], f"not divisible by --layer-reduction-factor {2 * LAYERS}"),
        (
            ["--tokens-per-sample", POSITIONS + 1, "--memory-size", 64],
            f"--tokens-per-sample {POSITIONS + 1} is longer than the backbone's {POSITIONS} positions: lower it",
        ),
    ],
)
def test_bad_values_are_refused_in_one_sentence(train, write_backbone, options, message):
    with pytest.raises(ValueError, match=message) as caught:
        train(write_backbone(), *options)
    assert "\n" not in str(caught.value)


def test_without_a_backbone(train):
    with pytest.raises(ValueError, match="needs a backbone: name its checkpoint with --pretrained-model-path"):
        train(None)
    with pytest.raises(ValueError, match="the backbone none.pt does not exist: .*--pretrained-model-path"):
        train("none.pt")


def test_another_task_is_refused(train, write_backbone):
    """As the released script names: with it, nobody would know whose past is remembered."""
    with pytest.raises(ValueError, match="this task does not tell: use --task longmem_language_modeling"):
        train(write_backbone(), task="language_modeling")


def test_segments_may_be_of_any_length_without_learned_positions(train, write_backbone):
    path = write_backbone(model="alibi_lm")
    train(path, "--tokens-per-sample", 50 * POSITIONS, "--memory-size", 100 * POSITIONS)


def test_bad_values_of_a_memory_that_is_off_do_not_matter(train, write_backbone, caplog):
    for off in (["--memory-size", 0], ["--no-use-external-memory"]):
        with caplog.at_level(logging.INFO):
            model = train(write_backbone(), "--k", 10, *off).model
        assert not model.decoder.has_memory and model.memory_tokens == 0
        assert "the memory is off" in messages(caplog)
        caplog.clear()

"""Checkpoints of longmem_lm: without the backbone or with it, moved, old, of another backbone, in half precision."""

import copy
import os
from types import SimpleNamespace

import pytest
import torch

from longmem_fairseq.backbones.loading import BackboneError
from tests.fairseq_runs import make_dictionary, run
from tests.models.checkpoints import load, save
from tests.models.tiny import batches, documents, randomize, read

T = 7
DOCS = documents([3 * T, 2 * T])


@pytest.fixture
def built(train, write_backbone):
    """A model as fairseq-train builds it, its side network random, on a backbone that was just written."""

    def built(*options, arch="longmem_gpt2_tiny", **config):
        made = train(write_backbone(**config), *options, arch=arch)
        randomize(made.model.decoder.layers, 3)
        made.model.eval()
        return made

    return built


def same_logits(a, b):
    return all(torch.equal(x, y) for x, y in zip(read(a, DOCS, T), read(b, DOCS, T)))


# --- without the backbone


def test_holds_the_side_network_alone_and_the_backbones_fingerprint_as_text(built):
    """Averaging and moving averages compute with every tensor of a checkpoint."""
    made = built()
    assert set(made.model.state_dict()) == {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert made.cfg.model.backbone_fingerprint == made.model.decoder.backbone.fingerprint


@pytest.mark.parametrize("layers", ["1", "3,1"])
def test_comes_back_with_the_same_logits(built, tmp_path, layers):
    made = built("--retrieval-layer-index", layers)
    assert same_logits(load(save(made, tmp_path / "c.pt")), made.model)


def test_gates_of_older_checkpoints(built, tmp_path):
    """They were saved under another name, and at their full size; a gate for each token starts as the same function."""
    made = built()
    path = save(made, tmp_path / "c.pt")
    checkpoint = torch.load(path, weights_only=False)
    name = "decoder.layers.0.self_attn."
    weights = checkpoint["model"]
    weights[f"{name}memory_gate"] = weights.pop(f"{name}gate_bias") * 32
    torch.save(checkpoint, path)
    assert same_logits(load(path), made.model)
    for_tokens = load(path, gate="token")
    assert same_logits(for_tokens, made.model)
    randomize(for_tokens.decoder.layers, 4)
    state = {key: x for key, x in for_tokens.state_dict().items() if key in weights or "gate" in key}
    with pytest.raises(ValueError, match="^--gate head does not fit the checkpoint.*set --gate token$"):
        made.model.load_state_dict(state)


@pytest.mark.parametrize(
    "trained, changed, saved, needed", [("1", "1,3", "0", "0 and 1"), ("1,3", "3", "0 and 1", "1")]
)
def test_other_reading_layers_are_refused(built, tmp_path, trained, changed, saved, needed):
    path = save(built("--retrieval-layer-index", trained), tmp_path / "c.pt")
    sentence = f"index {changed} and .* let side layer {needed} read, but the checkpoint was trained .* {saved}: give"
    with pytest.raises(ValueError, match=sentence) as caught:
        load(path, retrieval_layer_index=changed)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "model, config",
    [
        ("alibi_lm", {}),
        ("llama_lm", {}),
        ("transformer_lm", {"decoder_learned_pos": False}),
        ("transformer_lm", {"share_decoder_input_output_embed": False}),
        ("transformer_lm", {"decoder_input_dim": 8, "decoder_output_dim": 8}),
        ("transformer_lm", {"no_decoder_final_norm": True}),
    ],
)
@pytest.mark.parametrize("options", [[], ["--save-backbone"]])
def test_every_kind_of_backbone_comes_back(built, tmp_path, model, config, options):
    made = built(*options, model=model, **config)
    assert same_logits(load(save(made, tmp_path / "c.pt")), made.model)


def test_a_backbone_that_moved_is_found_by_an_override(built, tmp_path):
    made = built()
    path = save(made, tmp_path / "c.pt")
    os.rename(tmp_path / "backbone.pt", tmp_path / "moved.pt")
    with pytest.raises(BackboneError, match="backbone.pt does not exist: .*--pretrained.*--model-overrides"):
        load(path)
    assert same_logits(load(path, pretrained_model_path=str(tmp_path / "moved.pt")), made.model)


@pytest.mark.parametrize("other", [{"seed": 1}, {"activation_fn": "relu"}])
def test_another_backbone_is_refused(built, write_backbone, tmp_path, other):
    """Of the same sizes, so that its weights would load without a word."""
    path = save(built(), tmp_path / "c.pt")
    expected = write_backbone("other.pt", **other)
    with pytest.raises(BackboneError, match="trained on a backbone with fingerprint [0-9a-f]{12}, but .*other.pt has"):
        load(path, pretrained_model_path=expected)
    write_backbone(**other)  # in place of the right one
    with pytest.raises(BackboneError, match="name the right one with --pretrained-model-path .*--model-overrides") as e:
        load(path)
    assert "\n" not in str(e.value)


def test_a_backbone_written_anew_by_another_training_command_is_the_same(built, write_backbone, tmp_path):
    made = built()
    path = save(made, tmp_path / "c.pt")
    write_backbone(dropout=0.3)
    assert same_logits(load(path), made.model)


# --- with the backbone


def test_stands_alone_with_the_backbone(built, tmp_path, monkeypatch):
    made = built("--save-backbone")
    path = save(made, tmp_path / "c.pt")
    os.remove(tmp_path / "backbone.pt")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loaded = load(path)
    assert same_logits(loaded, made.model)
    assert loaded.decoder.backbone.fingerprint == made.model.decoder.backbone.fingerprint
    assert not any(p.requires_grad for p in loaded.decoder.backbone.parameters())


def test_stands_alone_under_the_models_plain_name_too(built, tmp_path):
    """--arch longmem_lm, which fairseq builds from a copy of the configuration, and saves the original."""
    made = built("--save-backbone", arch="longmem_lm")
    path = save(made, tmp_path / "c.pt")
    os.remove(tmp_path / "backbone.pt")
    assert same_logits(load(path), made.model)


def test_training_goes_on_from_it(built, train, tmp_path):
    """A resumed training names the backbone again; the weights and the fingerprint must agree."""
    made = built("--save-backbone")
    state = made.model.state_dict()
    again = train(tmp_path / "backbone.pt", "--save-backbone")
    again.model.load_state_dict(copy.deepcopy(state), strict=True)
    assert same_logits(again.model.eval(), made.model)
    without = train(tmp_path / "backbone.pt")
    without.model.load_state_dict(copy.deepcopy(state), strict=True)
    assert same_logits(without.model.eval(), made.model)


def test_training_does_not_go_on_with_another_backbone(built, train, write_backbone):
    state = built("--save-backbone").model.state_dict()
    other = train(write_backbone("other.pt", seed=1), "--save-backbone")
    with pytest.raises(BackboneError, match="copy of its backbone differs from .*other.pt"):
        other.model.load_state_dict(state)


def test_the_description_of_the_backbone_is_in_every_checkpoint(built, tmp_path):
    for options in ([], ["--save-backbone"]):
        path = save(built(*options), tmp_path / "c.pt")
        assert '"decoder_layers": 4' in torch.load(path, weights_only=False)["cfg"]["model"]["backbone_config"]


def test_with_other_data_it_is_refused(built, tmp_path):
    path = save(built("--save-backbone"), tmp_path / "c.pt")
    (tmp_path / "other").mkdir()
    make_dictionary(40).save(str(tmp_path / "other" / "dict.txt"))
    with pytest.raises(ValueError, match="dictionary"):
        load(path, data=str(tmp_path / "other"))


def test_as_fairseq_train_writes_it(tiny_data, tiny_options, tmp_path):
    """The whole way once: train on a copy of the backbone, and delete that."""
    backbone = tmp_path / "copy.pt"
    backbone.write_bytes((tiny_data.parent / "backbone" / "checkpoint_last.pt").read_bytes())
    run(
        "train",
        *tiny_options,
        "--pretrained-model-path",
        backbone,
        *"--save-backbone --batch-size 4 --num-workers 0 --max-update 2 --disable-validation".split(),
        "--save-dir",
        tmp_path,
        cwd=tmp_path,
    )
    backbone.unlink()
    path = tmp_path / "checkpoint_last.pt"
    weights = torch.load(path, weights_only=False)["model"]
    loaded = load(path)
    assert all(torch.equal(value, weights[name]) for name, value in loaded.state_dict().items())
    assert read(loaded, DOCS, 16)[0].isfinite().all()


# --- precision, age, wrappers


@pytest.mark.parametrize("options", [[], ["--save-backbone"]])
def test_half_precision(built, tmp_path, options):
    """As --fp16 saves it: everything half, but the fingerprint whole, so that the backbone is still recognized."""
    made = built(*options)
    full = copy.deepcopy(made.model)
    made.model.half()
    loaded = load(save(made, tmp_path / "c.pt"))
    assert loaded.decoder.backbone.fingerprint == full.decoder.backbone.fingerprint
    for a, b in zip(read(loaded, DOCS, T), read(full, DOCS, T)):
        assert a.dtype == torch.float32
        assert float((a - b).abs().mean() / b.std()) < 0.05


@pytest.mark.parametrize("options", [[], ["--save-backbone"]])
def test_older_checkpoints_have_the_fingerprint_as_a_tensor(built, write_backbone, tmp_path, options):
    """It is compared as before, and passed on as text."""
    made = built(*options)
    path = save(made, tmp_path / "c.pt")
    state, fingerprint = torch.load(path, weights_only=False), made.model.decoder.backbone.fingerprint
    del state["cfg"]["model"]["backbone_fingerprint"]
    state["model"]["decoder.backbone_fingerprint"] = torch.tensor(list(bytes.fromhex(fingerprint)), dtype=torch.uint8)
    torch.save(state, path)
    loaded = load(path)
    assert same_logits(loaded, made.model) and loaded.decoder.backbone.fingerprint == fingerprint
    assert "decoder.backbone_fingerprint" not in loaded.state_dict()
    write_backbone(seed=1)
    if not options:
        with pytest.raises(BackboneError, match="trained on a backbone with fingerprint"):
            load(path)


@pytest.mark.parametrize("options", [[], ["--save-backbone"]])
def test_an_average_of_checkpoints_is_a_checkpoint(built, tmp_path, options):
    """Averaged as fairseq's scripts/average_checkpoints.py does it: every tensor, whole numbers rounded down."""
    made = built(*options)
    paths = []
    for scale in (0.5, 1.5):
        other = copy.deepcopy(made.model)
        for parameter in other.parameters():
            parameter.data *= scale if parameter.requires_grad else 1
        paths.append(save(SimpleNamespace(model=other, cfg=made.cfg, task=made.task), tmp_path / f"{scale}.pt"))
    states = [torch.load(path, weights_only=False) for path in paths]
    for name in states[0]["model"]:
        total = sum(state["model"][name].clone() for state in states)
        states[0]["model"][name] = total / 2 if total.is_floating_point() else total // 2
    torch.save(states[0], tmp_path / "average.pt")
    averaged = load(tmp_path / "average.pt")
    assert averaged.decoder.backbone.fingerprint == made.model.decoder.backbone.fingerprint
    for (name, weight), other in zip(averaged.named_parameters(), made.model.parameters()):
        torch.testing.assert_close(weight, other, msg=name)


def test_fields_that_came_later_take_their_defaults(built, tmp_path):
    made = built()
    path = save(made, tmp_path / "c.pt")
    state = torch.load(path, weights_only=False)
    for name in ("memory_search", "memory_dtype", "checkpoint_activations", "save_backbone", "backbone_config"):
        del state["cfg"]["model"][name]
    torch.save(state, path)
    assert same_logits(load(path), made.model)


def test_fields_that_are_no_more_do_not_matter(built, tmp_path):
    made = built()
    assert same_logits(load(save(made, tmp_path / "c.pt", of_a_former_version=7)), made.model)


def test_settings_of_the_memory_can_be_overridden_in_evaluation(built, tmp_path):
    made = built()
    path = save(made, tmp_path / "c.pt")
    off = load(path, memory_size=0)
    assert not off.decoder.has_memory
    (a, _), (b, _) = read(off, DOCS, T), read(made.model, DOCS, T)
    assert torch.equal(a[:T], b[:T]) and not torch.equal(a[T:], b[T:])
    searched = load(path, memory_search="torch", memory_size=64, k=9)
    assert searched.cfg.memory_search == "torch" and searched.memory_tokens == 67
    read(searched, DOCS, T)


def test_a_checkpoint_of_unfitting_settings_is_refused(built, tmp_path):
    path = save(built(), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="--layer-reduction-factor 1 let side layer 1 read, but .* in side layer 0: "):
        load(path, layer_reduction_factor=1)
    with pytest.raises(ValueError, match="--k 7 is not a positive multiple of --chunk-size 3"):
        load(path, k=7)


def test_below_a_wrapper_too(built):
    """Distributed training and averages of weights ask for the state with a prefix."""
    state = torch.nn.Sequential(built().model).state_dict()
    assert not any("backbone." in name for name in state)
    assert all(name.startswith("0.decoder.") for name in state)
    kept = torch.nn.Sequential(built("--save-backbone").model).state_dict()
    assert any(name.startswith("0.decoder.backbone.decoder.") for name in kept)


def test_a_copy_in_use_is_independent(built):
    """fairseq's moving average of weights is a deep copy of the model."""
    made = built()
    expected = read(made.model, DOCS, T)
    copied = copy.deepcopy(made.model)
    (tokens, segments), *_ = batches(documents([T], seed=9), T)
    copied(tokens, segments=segments)
    again = read(made.model, DOCS, T)
    assert all(torch.equal(a, b) for a, b in zip(expected, again))

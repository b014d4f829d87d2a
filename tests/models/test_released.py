"""Checkpoints of the released LongMem: its numbers, its rules on other shapes, other settings, safety."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.backbones.loading import BackboneError, load_backbone
from longmem_fairseq.modules.joint_attention import GATE_PACE
from longmem_fairseq.released.released_model import load_released
from tests.models.released_reference import (
    COPY,
    Reference,
    Shape,
    backbone_settings,
    random_weights,
    save,
    side_settings,
)

RECORDED = Path(__file__).parent / "released"
CASES = {"b1_c4": ({}, 5e-5), "b2_c4_fp32": ({"memory_dtype": "float32"}, 2e-6)}
SEGMENTS = 9


class Recorded(dict):
    """One case of what the released code computed, by name; ``tokens`` is a list of the segments."""

    def __init__(self, case):
        arrays = np.load(RECORDED / "expected.npz")
        super().__init__({name[len(case) + 1 :]: arrays[name] for name in arrays.files if name.startswith(case + "/")})
        self.settings, self.tolerance = CASES[case]
        self.tokens = [torch.from_numpy(self[f"tokens_{i}"].astype(np.int64)) for i in range(SEGMENTS)]

    def load(self, **settings):
        return load_released(RECORDED / "sidenet.pt", **{**self.settings, **settings})


@pytest.fixture(params=CASES)
def recorded(request):
    return Recorded(request.param)


def same_sets(extra, expected) -> bool:
    """Whether for each head and query the same chunks were read; expected (H, T * B, K / C)."""
    retrieved = extra["memory"].retrieved
    if retrieved is None:
        return expected.size == 0
    B, H, T, n = retrieved.shape
    actual = retrieved.permute(1, 2, 0, 3).reshape(H, T * B, n).numpy()
    return np.array_equal(np.sort(actual), np.sort(expected))


@torch.no_grad()
@pytest.mark.parametrize("exact", [True, False])
def test_numbers_of_the_released_code(recorded, exact):
    model = recorded.load(exact=exact)
    for i, tokens in enumerate(recorded.tokens):
        logits, extra = model(tokens)
        assert np.abs(logits.numpy() - recorded[f"logits_{i}"]).max() <= recorded.tolerance
        assert same_sets(extra, recorded[f"knn_{i}"])
        keys, values, means = (x.float().numpy() for x in model.memory_contents())
        assert keys.shape[1] == recorded[f"mem_dstore_idx_{i}"]
    # One bit of float16 is 0.001 here: without ``exact`` a key may fall on the other side of it.
    atol = 1e-6 if exact else 2e-3
    for held, name in ((keys, "mem_keys_8"), (values, "mem_vals_8")):
        np.testing.assert_allclose(held, recorded[name][:, : keys.shape[1]].astype(np.float32), rtol=0, atol=atol)
    np.testing.assert_allclose(means, recorded["mem_index_8"], rtol=0, atol=2e-6)


@torch.no_grad()
def test_reading_only_and_reset(recorded):
    model = recorded.load()
    for tokens in recorded.tokens:
        model(tokens)
    before = model.memory_contents()
    tokens = torch.from_numpy(recorded["tokens_ro"].astype(np.int64))
    for _ in range(2):
        logits, extra = model(tokens, read_only=True)
        assert np.abs(logits.numpy() - recorded["logits_ro"]).max() <= recorded.tolerance
        assert same_sets(extra, recorded["knn_ro"])
    assert all(torch.equal(a, b) for a, b in zip(before, model.memory_contents()))
    model.reset_memory()
    assert model.memory_contents() is None
    logits, extra = model(tokens)
    assert np.abs(logits.numpy() - recorded["logits_after_reset"]).max() <= recorded.tolerance
    assert extra["memory"].retrieved is None


@pytest.mark.parametrize("exact", [True, False])
def test_gradients_of_the_released_code(exact):
    recorded = Recorded("b2_c4_fp32")
    model = recorded.load(exact=exact)
    with torch.no_grad():
        for tokens in recorded.tokens[:3]:
            model(tokens)
    tokens = recorded.tokens[3]
    logits, _ = model(tokens)
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(float(recorded["grad_loss"]), rel=1e-6)
    loss.backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = {name[len("grad/") :]: x for name, x in recorded.items() if "/" in name}
    gradients = {
        name.replace("memory_bias", "gate_bias"): x * (GATE_PACE if "memory_bias" in name else 1)
        for name, x in gradients.items()
    }
    assert set(gradients) == set(parameters)
    for name, expected in gradients.items():
        difference = np.abs(parameters[name].grad.numpy() - expected).max()
        assert difference <= 1e-4 * np.abs(expected).max(), name
    assert all(p.grad is None for p in model.decoder.backbone.parameters())


def test_backward_through_several_segments(recorded):
    """What was read stays as it was until the backward pass, though the memory is written further."""

    def gradients(backward_at_once):
        model, losses = recorded.load(), []
        for tokens in recorded.tokens[:4]:
            logits, _ = model(tokens)
            losses.append(logits.square().mean())
            if backward_at_once:
                losses[-1].backward()
        if not backward_at_once:
            sum(losses).backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for one, other in zip(gradients(True), gradients(False)):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_the_reference_of_the_rules_below_gives_the_recorded_numbers(case):
    recorded = Recorded(case)
    state = torch.load(RECORDED / "sidenet.pt", weights_only=False)
    cfg = state["cfg"]["model"]
    shape = Shape(
        width=cfg["decoder_embed_dim"],
        heads=cfg["decoder_attention_heads"],
        side_layers=cfg["decoder_layers"],
        reduction=cfg["layer_reduction_factor"],
        retrieval_layer=cfg["retrieval_layer_index"],
        chunk_size=cfg["chunk_size"],
        k=cfg["k"],
        memory_size=cfg["memory_size"],
        vocabulary=200,
    )
    reference = Reference(state["model"], shape, half=not recorded.settings)
    for i, tokens in enumerate(recorded.tokens):
        logits = reference(tokens.numpy())
        assert np.abs(logits - recorded[f"logits_{i}"]).max() <= recorded.tolerance
        assert len(reference.memory) == recorded[f"mem_dstore_idx_{i}"]


# Shapes that the recorded cases do not have: odd chunks, heads that are no power of two, other layers and reductions.
shapes = st.builds(
    lambda heads, head_dim, side_layers, reduction, layer, chunk, chunks, memory: Shape(
        width=heads * head_dim,
        heads=heads,
        side_layers=side_layers,
        reduction=reduction,
        retrieval_layer=layer % (side_layers * reduction),
        chunk_size=chunk,
        k=chunk * chunks,
        memory_size=max(memory, chunk),
    ),
    heads=st.sampled_from([1, 2, 3, 4, 6]),
    head_dim=st.sampled_from([4, 8]),
    side_layers=st.integers(1, 3),
    reduction=st.integers(1, 3),
    layer=st.integers(0, 8),
    chunk=st.integers(1, 5),
    chunks=st.integers(1, 4),
    memory=st.integers(20, 70),
)


@torch.no_grad()
@settings(max_examples=40)
@given(
    shape=shapes,
    rows=st.integers(1, 3),
    lengths=st.lists(st.integers(1, 13), min_size=3, max_size=8),
    dtype=st.sampled_from(["float32", "float16"]),
    exact=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rules_of_the_released_code_on_any_shape(tmp_path_factory, shape, rows, lengths, dtype, exact, seed):
    path = tmp_path_factory.mktemp("released") / "sidenet.pt"
    side = random_weights(shape, seed)[1]
    model = load_released(save(path, side, side_settings(shape)), memory_dtype=dtype, exact=exact)
    reference = Reference(side, shape, half=dtype == "float16")
    rng = np.random.default_rng(seed)
    for length in lengths:
        tokens = rng.integers(4, shape.vocabulary, (rng.integers(1, rows + 1), length))
        read_only = rng.random() < 0.2
        logits, extra = model(torch.from_numpy(tokens), read_only=read_only)
        expected = reference(tokens, read_only=read_only)
        retrieved = extra["memory"].retrieved
        assert (retrieved is None) == (not reference.scores)
        clear = True  # where two chunks score alike, either may be read
        for (row, head, t), scores in reference.scores.items():
            n = min(shape.k // shape.chunk_size, len(scores))
            order = np.argsort(-scores, kind="stable")
            if n < len(scores) and scores[order[n - 1]] - scores[order[n]] < 1e-4:
                clear = False
                continue
            read = retrieved[row, head, t].tolist()
            assert set(read[:n]) == set(order[:n].tolist()) and read[n:] == [-1] * (len(read) - n)
        if clear:
            # A bit of float16 may fall otherwise than in float64.
            np.testing.assert_allclose(logits.numpy(), expected, rtol=0, atol=5e-3 if dtype == "float16" else 1e-4)
        contents = model.memory_contents()
        held = contents[0].size(1) if contents is not None else 0
        assert held == len(reference.memory)
        for i, chunk in enumerate(reference.memory):
            for actual, expected in zip(contents, chunk):
                np.testing.assert_allclose(actual[:, i].numpy(), expected.astype(np.float32), rtol=2e-3, atol=2e-4)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A backbone's file, and two side networks': with and without the backbone's copy."""
    directory = tmp_path_factory.mktemp("files")
    backbone, side = random_weights(Shape())
    bare = {key: value for key, value in side.items() if not key.startswith(COPY)}
    return {
        "backbone": save(directory / "backbone.pt", backbone, backbone_settings(Shape())),
        "other backbone": save(directory / "other.pt", random_weights(Shape(), 1)[0], backbone_settings(Shape())),
        "side network": save(directory / "sidenet.pt", side, side_settings(Shape())),
        "bare": save(directory / "bare.pt", bare, side_settings(Shape())),
    }


@torch.no_grad()
def test_backbone_from_its_own_file(files):
    tokens = torch.randint(4, 30, (2, 9))
    expected = load_released(files["side network"])(tokens)[0]
    for name in ("side network", "bare"):
        assert torch.equal(load_released(files[name], files["backbone"])(tokens)[0], expected)
    with pytest.raises(BackboneError, match="copy of its backbone differs from .*other.pt, first in decoder"):
        load_released(files["side network"], files["other backbone"])
    with pytest.raises(ValueError, match="bare.pt does not hold its backbone: name the backbone's file"):
        load_released(files["bare"])


@pytest.mark.parametrize("scope", ["shared", "document"])
def test_one_layer_is_remembered(files, scope):
    sentence = "--retrieval-layer-index 1,3 names 2 layers, but a model of the released LongMem reads one: name one"
    with pytest.raises(ValueError, match=sentence):
        load_released(files["side network"], retrieval_layer_index="1,3", memory_scope=scope)


@torch.no_grad()
def test_lanes_of_their_own(files):
    """With memory_scope="document" no row hears of another."""
    segments = torch.randint(4, 30, (5, 3, 10), generator=torch.Generator().manual_seed(0))
    together = load_released(files["side network"], memory_scope="document", memory_dtype="float32")
    alone = load_released(files["side network"], memory_scope="document", memory_dtype="float32")
    shared = load_released(files["side network"], memory_dtype="float32")
    for tokens in segments:
        logits = together(tokens)[0]
        torch.testing.assert_close(logits[1:2], alone(tokens[1:2])[0], rtol=0, atol=1e-5)
        mixed = shared(tokens)[0]
    assert (mixed - logits).abs().max() > 0.1
    with pytest.raises(ValueError, match="4 rows do not continue the 3 lanes of the memory: call reset_memory"):
        together(torch.randint(4, 30, (4, 10)))
    together.reset_memory()
    together(torch.randint(4, 30, (4, 10)))


@torch.no_grad()
@pytest.mark.parametrize("scope", ["document", "shared"])
def test_padding_is_not_remembered(files, scope):
    model = load_released(files["side network"], memory_scope=scope)
    tokens = torch.randint(4, 30, (1, 12))
    padded = F.pad(tokens, (0, 5), value=model.decoder.dictionary.pad())
    logits = model(padded)[0]
    contents = model.memory_contents()
    model.reset_memory()
    torch.testing.assert_close(logits[:, :12], model(tokens)[0], rtol=0, atol=1e-5)
    for with_padding, without in zip(contents, model.memory_contents()):
        torch.testing.assert_close(with_padding, without, rtol=1e-3, atol=1e-5)


def test_gate_of_a_side_network_without_memory(tmp_path):
    side = random_weights(Shape())[1]
    side.pop("decoder.layers.1.self_attn.memory_bias")
    settings = {**side_settings(Shape()), "use_external_memory": False}
    model = load_released(save(tmp_path / "sidenet.pt", side, settings))
    model(torch.randint(4, 30, (1, 12)))
    assert model.memory_contents() is None and not model.decoder.layers[1].self_attn.gate_bias.any()


class Payload:
    """Pickled, it is a call that creates a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_in_a_file_is_not_run(tmp_path, files):
    created = tmp_path / "created"
    side = random_weights(Shape())[1]
    malicious = save(tmp_path / "malicious.pt", side, {**side_settings(Shape()), "activation_fn": Payload(created)})
    with pytest.raises(ValueError, match="malicious.pt cannot be read: it asks for posix.mkdir"):
        load_released(malicious)
    with pytest.raises(BackboneError, match="malicious.pt is not a readable .*: it asks for posix.mkdir"):
        load_released(files["side network"], malicious)
    with pytest.raises(BackboneError, match="malicious.pt is not a readable .*: it asks for posix.mkdir"):
        load_backbone(malicious, load_released(files["side network"]).decoder.dictionary)
    assert not created.exists()
    torch.load(malicious, weights_only=False)
    assert created.exists()  # so it would have been, had the code been run


@pytest.mark.parametrize(
    "change, message",
    [
        ({"chunk_size": 3}, "--k 8 is not a positive multiple of --chunk-size 3"),
        ({"memory": 5}, "unknown setting memory: the settings are .*memory_size"),
        ({"memory_size": 2}, "--memory-size 2"),
    ],
)
def test_settings_refused(files, change, message):
    with pytest.raises(ValueError, match=message):
        load_released(files["side network"], **change)(torch.randint(4, 30, (1, 5)))


def test_files_refused(files, tmp_path):
    with pytest.raises(ValueError, match="backbone.pt does not hold a side network of the released LongMem"):
        load_released(files["backbone"])
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        load_released(tmp_path / "nowhere.pt")
    (tmp_path / "text.pt").write_text("text")
    with pytest.raises(ValueError, match="text.pt cannot be read: it is damaged, or of another format"):
        load_released(tmp_path / "text.pt")
    backbone, side = random_weights(Shape())
    rotary = save(tmp_path / "rotary.pt", backbone, backbone_settings(Shape()))
    state = torch.load(rotary, weights_only=False)
    state["cfg"]["model"].newgpt_mode = "rotary"
    torch.save(state, rotary)
    with pytest.raises(BackboneError, match="rotary.pt cannot be the backbone: newgpt_mode=rotary is not supported"):
        load_backbone(rotary, load_released(files["side network"]).decoder.dictionary)
    side["decoder.layers.0.fc1.weight"] = side["decoder.layers.0.fc1.weight"][:, :5]
    with pytest.raises(ValueError, match="do not fit its settings: size mismatch for decoder.layers.0.fc1.weight"):
        load_released(save(tmp_path / "odd.pt", side, side_settings(Shape())))


def test_no_path_of_the_authors_remains(files):
    model = load_released(files["side network"])
    assert "author" not in repr(model.cfg)

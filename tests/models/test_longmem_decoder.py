"""The whole model against the slow reference, lane by lane, and what it returns."""

import math

import numpy as np
import pytest
import torch

from longmem_fairseq.data.segments import Segments
from tests.models.reference import Reference, Setting
from tests.models.tiny import HEADS, LAYERS, LONGMEM, VOCABULARY, batches, documents, longmem, read

T = LONGMEM["tokens_per_sample"]

ACTIVATIONS = {
    "gelu": torch.nn.functional.gelu,
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu_accurate": lambda x: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}
# name: (model, positions, changes of the backbone, changes of LongMem)
VARIANTS = {
    "learned positions": ("transformer_lm", "learned", {}, {}),
    "sinusoidal positions": ("transformer_lm", "sinusoidal", {"decoder_learned_pos": False}, {}),
    "no positions": ("transformer_lm", "none", {"no_token_positional_embeddings": True}, {}),
    "ALiBi": ("alibi_lm", "alibi", {}, {}),
    "unscaled embeddings": ("transformer_lm", "learned", {"no_scale_embedding": True}, {}),
    "untied output": ("transformer_lm", "learned", {"share_decoder_input_output_embed": False}, {}),
    "narrow embeddings": ("transformer_lm", "learned", {"decoder_input_dim": 8, "decoder_output_dim": 8}, {}),
    "normalized embeddings": ("transformer_lm", "learned", {"layernorm_embedding": True}, {}),
    "no final norm": ("transformer_lm", "learned", {"no_decoder_final_norm": True}, {}),
    "relu": ("transformer_lm", "learned", {"activation_fn": "relu"}, {}),
    "tanh": ("transformer_lm", "learned", {"activation_fn": "tanh"}, {}),
    "GPT-2's gelu": ("transformer_lm", "learned", {"activation_fn": "gelu_accurate"}, {}),
    "R = 1": ("transformer_lm", "learned", {}, {"layer_reduction_factor": 1, "retrieval_layer_index": 3}),
    "R = 3": (
        "alibi_lm",
        "alibi",
        {"decoder_layers": 6},
        {"layer_reduction_factor": 3, "retrieval_layer_index": 4},
    ),
    "R = N": ("transformer_lm", "learned", {}, {"layer_reduction_factor": 4, "retrieval_layer_index": 0}),
    "second layer reads": ("transformer_lm", "learned", {}, {"retrieval_layer_index": 2}),
    "both layers read": ("transformer_lm", "learned", {}, {"retrieval_layer_index": "1,3"}),
    "three of four layers read": (
        "alibi_lm",
        "alibi",
        {},
        {"layer_reduction_factor": 1, "retrieval_layer_index": "3, 0,1"},
    ),
    "one token a chunk": ("transformer_lm", "learned", {}, {"chunk_size": 1, "k": 5}),
    "reads all": ("transformer_lm", "learned", {}, {"k": 30}),
    "memory of a segment": ("transformer_lm", "learned", {}, {"memory_size": 7, "k": 3}),
    "carried tokens": ("transformer_lm", "learned", {}, {"carry_window": 9}),
    "carried sinusoidal": ("transformer_lm", "sinusoidal", {"decoder_learned_pos": False}, {"carry_window": 3}),
    "carried keys": ("alibi_lm", "alibi", {}, {"carry_window": 9}),
    "carried keys without positions": (
        "transformer_lm",
        "none",
        {"no_token_positional_embeddings": True},
        {"carry_window": 2},
    ),
    "torch search": ("alibi_lm", "alibi", {}, {"memory_search": "torch"}),
}


def setting_of(model, positions, backbone):
    cfg = model.cfg
    return Setting(
        heads=HEADS,
        activation=ACTIVATIONS[backbone.get("activation_fn", "gelu")],
        positions=positions,
        reduction=cfg.layer_reduction_factor,
        memory_layers=model.decoder.backbone.memory_layers,
        chunk=cfg.chunk_size,
        k=cfg.k,
        memory=cfg.memory_size,
        padding=VOCABULARY.pad(),
        scaled=not backbone.get("no_scale_embedding", False),
        carry=cfg.carry_window,
    )


def weights_of(model):
    """All weights, the backbone's too, without the leading ``decoder.``."""
    return {name[len("decoder.") :]: value for name, value in torch.nn.Module.state_dict(model).items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_reference(tmp_path, variant):
    """Two lanes of unlike length: the memory is empty, then part-full, then evicts."""
    kind, positions, backbone, changes = VARIANTS[variant]
    model = longmem(tmp_path, model=kind, backbone=backbone, **changes).double()
    docs = documents([4 * T + 3, 2 * T + 1])
    logits_of_documents = read(model, docs, T)
    for doc, logits in zip(docs, logits_of_documents):
        reference = Reference(weights_of(model), setting_of(model, positions, backbone))
        expected = torch.cat([reference.read(piece.tolist()) for piece in doc.split(T)])
        # Products with remembered keys are taken in float32, as the search's are.
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["learned positions", "both layers read"])
def test_gradients_equal_the_references(tmp_path, variant):
    """Of the last segment of a document, for every weight of the side network, gates included."""
    kind, positions, backbone, changes = VARIANTS[variant]
    model = longmem(tmp_path, model=kind, backbone=backbone, **changes).double()
    (doc,) = documents([3 * T])
    weights = {name: x.clone().requires_grad_("backbone" not in name) for name, x in weights_of(model).items()}
    reference = Reference(weights, setting_of(model, positions, backbone))
    for piece, (tokens, segments) in zip(doc.split(T), batches([doc], T)):
        actual, expected = model(tokens, segments=segments)[0][0], reference.read(piece.tolist())
    actual.square().sum().backward()
    expected.square().sum().backward()
    gradients = {name: x.grad for name, x in model.decoder.named_parameters() if x.grad is not None}
    assert gradients.keys() == {name for name, x in weights.items() if x.grad is not None}
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, weights[name].grad, rtol=1e-4, atol=1e-4)


def test_the_memory_matters_in_these_comparisons(tmp_path):
    """Else the test above would prove nothing: without the memory the logits are others, from the second segment on."""
    model = longmem(tmp_path)
    without = longmem(tmp_path, memory_size=0)
    docs = documents([4 * T])
    (a,), (b,) = read(model, docs, T), read(without, docs, T)
    assert torch.equal(a[:T], b[:T])
    assert ((a[T:] - b[T:]).abs().amax(dim=1) > 1e-3).all()


@pytest.mark.parametrize("option", [{"memory_size": 0}, {"use_external_memory": False}])
def test_the_memory_off(tmp_path, option):
    model = longmem(tmp_path, **option)
    tokens, segments = next(batches(documents([T, T]), T))
    logits, extra = model(tokens, segments=segments, without_memory=True)
    assert extra["memory"] is None
    assert torch.equal(extra["logits_without_memory"], logits)
    assert not model.needs_replay(Segments([0], [0], [7], [7], 1)).any(), "segments may come in any order"
    model(tokens, segments=Segments([0, 1], [0, 1], [70, 70], [T, T], 2))
    assert model.memory_tokens == 0


def test_logits_without_memory_equal_those_of_a_model_with_the_memory_off(tmp_path):
    model, off = longmem(tmp_path), longmem(tmp_path, memory_size=0)
    docs = documents([3 * T])
    expected = read(off, docs, T)[0].split(T)
    for (tokens, segments), logits in zip(batches(docs, T), expected):
        with torch.no_grad():
            actual = model(tokens, segments=segments, without_memory=True)[1]["logits_without_memory"]
        assert torch.equal(actual[0], logits) and not actual.requires_grad


def test_features_are_what_the_output_layer_is_given(tmp_path):
    model = longmem(tmp_path)
    tokens, segments = next(batches(documents([T]), T))
    features, extra = model(tokens, segments=segments, features_only=True)
    assert features.shape == (1, T, model.decoder.layer_norm.normalized_shape[0])
    torch.testing.assert_close(model.decoder.output_layer(features), model(tokens, segments=segments)[0])
    assert len(extra["inner_states"]) == LAYERS // 2 + 1


def test_the_memory_is_no_part_of_the_state(tmp_path):
    model = longmem(tmp_path)
    before = set(model.state_dict())
    read(model, documents([3 * T]), T)
    assert set(model.state_dict()) == before
    assert not any("mem" in name and "gate_bias" not in name for name in before)
    names = {name for name, _ in model.named_buffers()}
    assert not any("bank" in name or "memor" in name for name in names)


def test_figures_of_a_batch(tmp_path):
    """The reader that forward returns is that of this batch."""
    model = longmem(tmp_path)
    parts = list(batches(documents([4 * T]), T))
    fills = [model(tokens, segments=segments)[1]["memory"].fill for tokens, segments in parts]
    N, C = 16 // 3, 3
    assert fills == pytest.approx([min(N, i * T // C) / N for i in range(4)])
    assert np.diff(fills)[0] > 0

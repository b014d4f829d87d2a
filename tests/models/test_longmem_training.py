"""Training: the side network learns, the backbone never changes; precision, recomputation, where it starts."""

import copy

import pytest
import torch

from tests.models.tiny import LAYERS, LONGMEM, batches, build_longmem, documents, longmem, read

T = LONGMEM["tokens_per_sample"]


def losses(model, docs):
    """Train on documents once; the gradients of each step."""
    model.train()
    gradients = []
    for tokens, segments in batches(docs, T):
        model.zero_grad()
        logits, _ = model(tokens, segments=segments)
        logits.float().logsumexp(dim=-1).sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    return gradients


def test_side_network_learns_and_backbone_never_changes(tmp_path):
    model = longmem(tmp_path)
    backbone = {name: value.clone() for name, value in model.decoder.backbone.state_dict().items()}
    side = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    assert not any("backbone" in name for name in side)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    model.train()
    for tokens, segments in batches(documents([4 * T, 3 * T]), T):
        optimizer.zero_grad()
        model(tokens, segments=segments)[0].logsumexp(dim=-1).sum().backward()
        optimizer.step()
    assert all(torch.equal(value, backbone[name]) for name, value in model.decoder.backbone.state_dict().items())
    assert not any(p.grad is not None for p in model.decoder.backbone.parameters())
    assert not any(module.training for module in model.decoder.backbone.modules())
    for name, p in model.named_parameters():
        if p.requires_grad:
            assert not torch.equal(p, side[name]), f"{name} does not learn"


def test_every_trained_parameter_has_a_gradient_at_every_step(tmp_path):
    """Also the gate, while all memories are empty: distributed training waits for it."""
    model = longmem(tmp_path)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    for gradients in losses(model, documents([2 * T, 2 * T])):
        assert set(gradients) == trained
    for gradients in losses(longmem(tmp_path, memory_size=0), documents([T])):
        assert set(gradients) == trained
    options = {"token_memory": 9, "gate": "token", "memory_dropout": 0.5}
    mixed = {name for name, p in longmem(tmp_path, **options).named_parameters() if p.requires_grad}
    for gradients in losses(longmem(tmp_path, **options), documents([2 * T, 2 * T])):
        assert set(gradients) == mixed > trained


@pytest.mark.parametrize("kind, layers", [("transformer_lm", 1), ("alibi_lm", "1,3"), ("llama_lm", "1,3")])
def test_recomputed_activations_give_the_same_gradients(tmp_path, kind, layers):
    docs = documents([4 * T, 2 * T + 3])
    options = {"model": kind, "retrieval_layer_index": layers}
    kept = losses(longmem(tmp_path, **options), docs)
    recomputed = losses(longmem(tmp_path, **options, checkpoint_activations=True), docs)
    assert len(kept) == len(recomputed) == 4
    for a, b in zip(kept, recomputed):
        assert a.keys() == b.keys()
        for name in a:
            assert torch.equal(a[name], b[name]), name


def test_gradients_equal_finite_differences(tmp_path):
    """Of the gate and of the queries that read the memory."""
    model = longmem(tmp_path).double()
    docs = documents([2 * T])
    first, second = list(batches(docs, T))

    def loss():
        model.decoder.reset_memory()
        model.eval()(first[0], segments=first[1])
        return model(second[0], segments=second[1])[0].logsumexp(dim=-1).sum()

    attention = model.decoder.layers[0].self_attn
    loss().backward()
    queries = attention.q_proj
    for parameter, index in ((attention.gate_bias, (1,)), (queries.bias, (5,)), (queries.weight, (2, 3))):
        step = 1e-4
        with torch.no_grad():
            parameter[index] += step
            above = loss()
            parameter[index] -= 2 * step
            below = loss()
            parameter[index] += step
        numeric = float(above - below) / (2 * step)
        assert float(parameter.grad[index]) == pytest.approx(numeric, rel=1e-2, abs=1e-4)


@pytest.mark.parametrize("R", [1, 2, 4])
def test_starts_from_backbone_layers(tmp_path, R):
    longmem(tmp_path)  # writes the backbone
    model = build_longmem(tmp_path / "backbone.pt", layer_reduction_factor=R, zero_init_side_layers=False)
    decoder, backbone = model.decoder, model.decoder.backbone.decoder
    assert len(decoder.layers) == LAYERS // R
    for j, layer in enumerate(decoder.layers):
        expected = backbone.layers[min(R * j + 1, LAYERS - 1)].state_dict()
        state = layer.state_dict()
        gate = state.pop("self_attn.gate_bias", None)
        assert (gate is not None) == (j == 1 // R)
        assert gate is None or not gate.any()
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], expected[name]) for name in state)
    assert torch.equal(decoder.layer_norm.weight, backbone.layer_norm.weight)
    assert torch.equal(decoder.layer_norm.bias, backbone.layer_norm.bias)
    parameters = {p.data_ptr() for p in backbone.parameters()}
    assert not parameters & {p.data_ptr() for p in decoder.layers.parameters()}, "copies, not the same tensors"


def test_starts_at_random_where_asked(tmp_path):
    longmem(tmp_path)
    model = build_longmem(tmp_path / "backbone.pt", reload_ptm_layer=False)
    layer, expected = model.decoder.layers[0], model.decoder.backbone.decoder.layers[1]
    assert not torch.equal(layer.fc1.weight, expected.fc1.weight)


@pytest.mark.parametrize("kind", ["transformer_lm", "llama_lm"])
def test_layers_that_do_not_read_start_silent(tmp_path, kind):
    """So with the memory off and its reading layer silenced too, the model is the backbone."""
    longmem(tmp_path, model=kind)  # writes the backbone
    options = {"zero_init_side_layers": True, "retrieval_layer_index": 1}
    decoder = build_longmem(tmp_path / "backbone.pt", **options).decoder.eval()
    usual = build_longmem(tmp_path / "backbone.pt", **{**options, "zero_init_side_layers": False}).decoder
    (first, silent), (usual_first, _) = decoder.layers, usual.layers
    assert all(torch.equal(x, y) for x, y in zip(first.parameters(), usual_first.parameters()))
    x, skip = torch.randn(2, T, 3, decoder.backbone.width).unbind()
    assert torch.equal(silent(x, skip), x + skip)
    first.silence()
    tokens, segments = next(iter(batches(documents([T]), T)))
    expected = decoder.backbone.output(decoder.backbone.final_hidden(decoder.backbone(tokens)))
    torch.testing.assert_close(decoder(tokens, segments=segments)[0], expected)


def test_memory_dropout(tmp_path):
    """A row reads either as without dropout or as without the memories; by chance, and in training alone."""
    model = longmem(tmp_path, token_memory=30)
    first, second = list(batches(documents([2 * T] * 6), T))

    def logits(probability, training=True, seed=0, **options):
        model.decoder.memory_dropout.probability = probability
        model.train(training).decoder.reset_memory()
        torch.manual_seed(seed)
        with torch.no_grad():
            model(first[0], segments=first[1])
            return model(second[0], segments=second[1], **options)

    reading, extra = logits(0.0, without_memory=True)
    alone = extra["logits_without_memory"].log_softmax(-1)
    seen = set()
    for seed in range(4):
        actual, extra = logits(0.5, seed=seed)
        assert torch.equal(actual, logits(0.5, seed=seed)[0]), "the same numbers drop the same rows"
        rows = tuple((extra["token_memory_weight"] == 0).all(dim=1).tolist())
        for row, dropped in enumerate(rows):
            torch.testing.assert_close(actual[row], (alone if dropped else reading)[row])
        seen.add(rows)
    assert len(seen) > 1 and 0 < sum(map(sum, seen)) < 6 * len(seen)
    assert torch.equal(logits(0.9, training=False)[0], logits(0.0, training=False)[0])


def test_dropout_is_the_side_networks_alone(tmp_path):
    model = longmem(tmp_path, dropout=0.5)
    tokens, segments = next(batches(documents([T]), T))
    evaluated = [model.eval()(tokens, segments=segments)[0] for _ in range(2)]
    assert torch.equal(*evaluated)
    model.train()
    trained = [model(tokens, segments=segments)[0] for _ in range(2)]
    assert not torch.equal(*trained)
    keys = [model.decoder.backbone(tokens).keys for _ in range(2)]
    assert torch.equal(*keys), "what is remembered does not depend on dropout"


@pytest.mark.parametrize("kind", ["transformer_lm", "alibi_lm", "llama_lm"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_coarsely(tmp_path, kind, dtype):
    """The whole model in half precision, forward and backward; its memory is too."""
    model = longmem(tmp_path, model=kind)
    half = copy.deepcopy(model).to(dtype)
    docs = documents([4 * T, 2 * T])
    for a, b in zip(read(model, docs, T), read(half, docs, T)):
        assert b.dtype == dtype and b.isfinite().all()
        # Rounding may change which chunks are read, so a few rows may differ by more.
        assert float((a - b.float()).abs().mean() / a.std()) < 0.1
    assert next(iter(half.decoder.lane_state.memories)).bank.keys.dtype == dtype
    assert all(grad.isfinite().all() for step in losses(half, docs) for grad in step.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_memory_in_half_precision_beside_a_full_model(tmp_path, dtype):
    full, half = longmem(tmp_path), longmem(tmp_path, memory_dtype=dtype)
    docs = documents([4 * T])
    (a,), (b,) = read(full, docs, T), read(half, docs, T)
    assert b.dtype == torch.float32 and torch.equal(a[:T], b[:T])
    assert float((a - b).abs().mean() / a.std()) < 0.05
    bank = next(iter(half.decoder.lane_state.memories)).bank
    assert str(bank.keys.dtype) == f"torch.{dtype}" and bank.means.dtype == torch.float32


@pytest.mark.parametrize("kind", ["transformer_lm", "llama_lm"])
def test_autocast_computes_products_in_half_and_learns_in_full_precision(tmp_path, kind):
    """--train-dtype bfloat16: parameters and gradients are float32, and a memory is rebuilt bit by bit."""
    full, half, rebuilt = (longmem(tmp_path, model=kind) for _ in range(3))
    half.autocast_dtype = rebuilt.autocast_dtype = torch.bfloat16
    docs = documents([4 * T, 2 * T])
    assert {p.dtype for p in half.parameters()} == {torch.float32}
    for a, b in zip(losses(full, docs), losses(half, docs)):
        assert a.keys() == b.keys() and all(grad.dtype == torch.float32 for grad in b.values())
        whole = [torch.cat([grad.flatten() for grad in gradients.values()]) for gradients in (a, b)]
        assert not torch.equal(*whole) and torch.cosine_similarity(*whole, dim=0) > 0.98
    assert half.memory_contents()[0].dtype == torch.bfloat16
    for tokens, segments in batches(docs, T):
        rebuilt.train().memorize(tokens, segments)
    assert all(torch.equal(a, b) for a, b in zip(half.memory_contents(), rebuilt.memory_contents()))
    with torch.autocast("cpu", torch.bfloat16):  # fairseq's --amp, which a model without a precision keeps
        full.reset_memory()
        losses(full, docs)
    assert all(torch.equal(a, b) for a, b in zip(half.memory_contents(), full.memory_contents()))


def test_a_memory_that_is_read_from_a_snapshot_has_the_precision_of_autocast(tmp_path):
    """It is allocated before the first batch."""
    model = longmem(tmp_path).train()
    model.autocast_dtype = torch.bfloat16
    tokens = documents([T])[0][None]
    with model.autocast(tokens):
        memory, _ = model.decoder.lane_state.allocate(tokens, 1)
    assert memory.bank.keys.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["transformer_lm", "alibi_lm", "llama_lm"])
def test_a_backbone_in_half_precision_beside_a_full_side_network(tmp_path, kind):
    """--backbone-dtype bfloat16: half of the bytes, the same fingerprint, and no weight in the side network rounded."""
    full = longmem(tmp_path, model=kind)
    half = build_longmem(tmp_path / "backbone.pt", backbone_dtype="bfloat16")
    assert half.decoder.backbone.fingerprint == full.decoder.backbone.fingerprint
    half.decoder.layers.load_state_dict(full.decoder.layers.state_dict())
    half.decoder.layer_norm.load_state_dict(full.decoder.layer_norm.state_dict())
    for name, parameter in half.named_parameters():
        product = "backbone" in name and name.endswith("proj.weight")
        assert parameter.dtype == (torch.bfloat16 if product else parameter.dtype), name
        assert parameter.device.type == "cpu" and ("backbone" in name or parameter.dtype == torch.float32), name
    docs = documents([4 * T])
    (a,), (b,) = read(full, docs, T), read(half.eval(), docs, T)
    assert b.dtype == torch.float32 and not torch.equal(a, b)
    assert float((a - b).abs().mean() / a.std()) < 0.1

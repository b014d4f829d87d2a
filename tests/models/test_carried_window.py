"""A carried window: every layer also attends to the tokens before the segment."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.training_snapshot import load_training_memory, save_training_memory
from longmem_fairseq.models.carried_window import window_behind
from longmem_fairseq.models.reading import DocumentReader
from longmem_fairseq.modules.cached_attention import SLIDING_WINDOW
from longmem_fairseq.modules.rotary import RotaryPositions
from longmem_fairseq.modules.rotary_attention import AttentionShape, RotaryAttention
from longmem_fairseq.modules.sliding_window import SINKS, Sinks, SlidingWindow, sliding_window_attention
from tests.models.tiny import LONGMEM, batches, build_longmem, documents, longmem, read

T = LONGMEM["tokens_per_sample"]
KINDS = {"alibi_lm": 5, "llama_lm": 9, "transformer_lm": 11}


def options_of(kind):
    return {"carry_window": KINDS[kind], "retrieval_layer_index": 1 if kind == "alibi_lm" else "1,3"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {kind: longmem(tmp_path_factory.mktemp(kind), model=kind, **options_of(kind)) for kind in KINDS}


@pytest.fixture(scope="module")
def without_memory(models):
    kinds = ("alibi_lm", "llama_lm")
    paths = {kind: models[kind].cfg.pretrained_model_path for kind in kinds}
    return {kind: build_longmem(paths[kind], carry_window=KINDS[kind], memory_size=0).eval() for kind in kinds}


def from_start(model):
    """The model with nothing in its memories and carried windows."""
    model.decoder.reset_memory()
    return model


@settings(max_examples=25)
@given(
    T=st.integers(1, 9),
    before=st.integers(0, 11),
    window=st.integers(1, 12),
    groups=st.sampled_from([1, 3]),
    places=st.tuples(st.integers(0, 20), st.integers(0, 20)),
    alibi=st.booleans(),
)
def test_sliding_window_attention(T, before, window, groups, places, alibi):
    """Against one query at a time, forward and backward, with blocks of all sizes."""
    generator = torch.Generator().manual_seed(T + 100 * before)
    B, kv_heads, d, S = 2, 2, 4, before + T
    H = groups * kv_heads

    def numbers(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    q, k, v = numbers(B, H, T, d), numbers(B, kv_heads, S, d), numbers(B, kv_heads, S, d)
    sink_scores, sink_values = numbers(B, H, T, SINKS), numbers(B, kv_heads, SINKS, d)
    # A row has all columns that its window needs.
    positions = [place if before >= min(place, window) else before for place in places]
    slopes = torch.linspace(0.1, 0.9, H).double() if alibi else None
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                place, g = positions[b] + t, h // groups
                scores = [sink_scores[b, h, t, i] for i in range(SINKS) if i <= place]
                values = [sink_values[b, g, i] for i in range(SINKS) if i <= place]
                for other in range(max(SINKS, place - window), place + 1):
                    column = before + other - positions[b]
                    bias = slopes[h] * (place - other) if alibi else 0.0
                    scores.append(k[b, g, column] @ q[b, h, t] / d**0.5 - bias)
                    values.append(v[b, g, column])
                rows.append(torch.softmax(torch.stack(scores), 0) @ torch.stack(values))
    expected = torch.stack(rows).view(q.shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("longmem_fairseq.modules.sliding_window._QUERIES_AT_ONCE", 4)
        sliding = SlidingWindow(window, torch.tensor(positions))
        actual = sliding_window_attention(q, k, v, sliding, Sinks(sink_scores, sink_values), slopes)
    torch.testing.assert_close(actual, expected)
    weights = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    leaves = (q, k, v, sink_scores, sink_values)
    gradients = [
        torch.autograd.grad((x * weights).sum(), leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for x in (actual, expected)
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("pieces", [[23], [1] * 23, [2, 1, 9, 11], [12, 3, 8]])
def test_rotary_attention_to_a_sliding_window(pieces):
    """The first tokens are as far back as they are, or as the window and they reach; against loops over tokens."""
    size, length, d = 6, 23, 8
    rotary = RotaryPositions(d, 100.0)
    attention = RotaryAttention(AttentionShape(12, 2, 1, d), rotary).double().eval()
    x = torch.randn(length, 1, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    q, (k, v) = attention.queries(x)[0], (y[0, 0] for y in attention.keys_and_values(x))

    def turn(y, position):
        return rotary.turn_by(y[None, None, None], position)[0, 0, 0]

    rows = []
    for t in range(length):
        for h in range(2):
            seen = [i for i in range(t + 1) if i < SINKS or i >= t - size]
            distances = [min(t, size + SINKS) - i if i < SINKS else t - i for i in seen]
            scores = [turn(q[h, t], n) @ k[i] / d**0.5 for i, n in zip(seen, distances)]
            rows.append(torch.softmax(torch.stack(scores), 0) @ v[seen])
    expected = attention.out_proj(torch.stack(rows).view(length, 1, 2 * d))
    state, outputs, begin = {}, [], 0
    for piece in pieces:
        state[SLIDING_WINDOW] = {"window": window_behind(size, np.array([begin]), torch.device("cpu"))}
        outputs.append(attention(x[begin : begin + piece], state))
        begin += piece
    torch.testing.assert_close(torch.cat(outputs), expected)


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=3),
    segment=st.integers(1, 12),
    kind=st.sampled_from(["alibi_lm", "llama_lm"]),
)
def test_where_a_text_is_cut_does_not_matter(without_memory, lengths, segment, kind):
    """With keys carried and the memory off, segments of any length and any neighbors give the same logits."""
    model = without_memory[kind]
    docs = documents(lengths)
    expected = [read(from_start(model), [doc], len(doc))[0] for doc in docs]
    torch.testing.assert_close(read(from_start(model), docs, segment), expected, atol=1e-5, rtol=1e-5)


def test_each_layer_passes_the_past_on(models):
    """A token changes the logits of the next segment, and only of tokens after it."""
    for model in models.values():
        (doc,) = documents([3 * T])
        changed = doc.clone()
        changed[T - 2] = 4 + (doc[T - 2] - 3) % 20
        before, after = (read(from_start(model), [x], T)[0] for x in (doc, changed))
        assert torch.equal(before[: T - 2], after[: T - 2])
        assert ((before[T - 2 : 2 * T] - after[T - 2 : 2 * T]).abs().amax(1) > 0).all()


@settings(max_examples=15)
@given(
    lengths=st.lists(st.integers(1, 4 * T), min_size=2, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    data=st.data(),
)
def test_lanes_are_isolated(models, lengths, kind, data):
    """Changing a document leaves the logits of the others as they are, bit by bit."""
    model = from_start(models[kind])
    changed = data.draw(st.integers(0, len(lengths) - 1))
    docs = documents(lengths)
    before = read(model, docs, T)
    docs[changed] = documents(lengths, seed=1)[changed]
    after = read(model, docs, T)
    assert all(i == changed or torch.equal(before[i], after[i]) for i in range(len(lengths)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_that_comes_again_is_the_same(models, kind, tmp_path):
    """Each batch is read three times, and evaluation reads another document in between, with activations recomputed."""
    model = from_start(models[kind]).train()
    for layer in model.decoder.layers:
        layer.recompute = True
    docs, others = documents([4 * T, 2 * T]), documents([2 * T], seed=9)
    plain = build_longmem(model.cfg.pretrained_model_path, **options_of(kind))
    plain.decoder.load_state_dict(model.decoder.state_dict())
    names = [name for name, x in plain.named_parameters() if x.requires_grad]
    for tokens, segments in batches(docs, T):
        expected = plain.train()(tokens, segments=segments)[0]
        expected.square().sum().backward()
        for _ in range(3):
            model.zero_grad()
            logits = model(tokens, segments=segments)[0]
            logits.square().sum().backward()
            assert torch.equal(logits, expected)
        for name in names:
            gradients = [dict(x.named_parameters())[name].grad for x in (model, plain)]
            torch.testing.assert_close(*gradients, msg=lambda text, name=name: f"{name}: {text}")
        plain.zero_grad()
        read(model.eval(), others, T)
        model.train()
    for layer in model.decoder.layers:
        layer.recompute = False
    model.eval()


@settings(max_examples=15)
@given(pieces=st.integers(2, 6), last=st.integers(1, T), kind=st.sampled_from(sorted(KINDS)))
def test_replay_and_snapshots_equal_never_having_stopped(models, tmp_path_factory, pieces, last, kind):
    model = models[kind].eval()
    parts = list(batches(documents([(pieces - 1) * T + last, 2 * T]), T))
    from_start(model)
    for tokens, segments in parts[:-1]:
        model(tokens, segments=segments)
    path = str(tmp_path_factory.mktemp("snapshot") / "memory")
    save_training_memory(
        path, model.decoder.lane_state.memories.get(False), {}, model.decoder.lane_state.windows.get(False)
    )
    tokens, segments = parts[-1]
    expected = model(tokens, segments=segments)[0]
    from_start(model)
    assert model.needs_replay(segments).all()
    for i, (earlier, places) in enumerate(parts[:-1]):
        model.memorize(earlier, places, restart=i == 0)
    assert torch.equal(model(tokens, segments=segments)[0], expected)
    read(model, documents([T, T]), T)
    load_training_memory(
        path, model.decoder.lane_state.memories.get(False), {}, model.decoder.lane_state.windows.get(False)
    )
    assert torch.equal(model(tokens, segments=segments)[0], expected)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_read_in_the_same_way(models, kind):
    """Scoring in Python, with only a part of the text scored too; and what is memorized of a document."""
    model = from_start(models[kind])
    reader = DocumentReader(model.decoder, T)
    (text,) = documents([4 * T + 3])
    logits = read(model, [reader.inputs_of(text)], T)[0].log_softmax(-1)
    expected = logits.gather(1, text[:, None])[:, 0]
    torch.testing.assert_close(reader.score(text), expected, atol=1e-5, rtol=1e-5)
    branches = reader.branches(1)
    inputs = reader.inputs_of(text)
    last = next(reader.read(inputs, branches, begin=4 * T))
    scored = reader.target_log_probs(last, branches, text[4 * T :])
    torch.testing.assert_close(scored, expected[4 * T :], atol=1e-5, rtol=1e-5)
    memory = reader.new_memory()
    reader.memorize(memory, "text", text[:-1])
    written = model.memory_contents()
    for actual, keys in zip(memory.bank.contents(0), written):
        torch.testing.assert_close(actual, keys, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "kind, changes, sentence",
    [
        ("alibi_lm", {"carry_window": -1}, "--carry-window -1 is negative"),
        ("transformer_lm", {"carry_window": 18}, "--carry-window 18 and --tokens-per-sample 7 .* 24 positions.*lower"),
    ],
)
def test_impossible_windows(models, kind, changes, sentence):
    with pytest.raises(ValueError, match=sentence):
        build_longmem(models[kind].cfg.pretrained_model_path, **changes)


def test_a_snapshot_of_another_window_is_refused(models, tmp_path):
    model, path = from_start(models["alibi_lm"]), str(tmp_path / "memory")
    read(model, documents([3 * T]), T)
    save_training_memory(path, None, {}, model.decoder.lane_state.windows.get(False))
    other = build_longmem(model.cfg.pretrained_model_path, carry_window=6).eval()
    read(other, documents([3 * T]), T)
    with pytest.raises(ValueError, match="of 1 lanes of 5 tokens, and the carried window has 1 of 6"):
        load_training_memory(path, None, {}, other.decoder.lane_state.windows.get(False))
    assert not other.needs_replay(Segments([0], [0], [3 * T], [T], 1)).any(), "it is as it was"

"""What the memory does to documents side by side: each has its own, wherever and however often it is read."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.lane_streams import MemoryOutOfStep
from tests.models.tiny import LONGMEM, batches, documents, longmem, read

T = LONGMEM["tokens_per_sample"]
KINDS = ("transformer_lm", "alibi_lm", "llama_lm")


def from_start(model):
    """The model with nothing in its memories."""
    model.decoder.reset_memory()
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    layers = dict(zip(KINDS, ("1,3", 1, "1,3")))
    return {k: longmem(tmp_path_factory.mktemp(k), model=k, retrieval_layer_index=layers[k]) for k in KINDS}


@settings(max_examples=20)
@given(
    lengths=st.lists(st.integers(1, 4 * T), min_size=2, max_size=4),
    kind=st.sampled_from(KINDS),
    data=st.data(),
)
def test_lanes_are_isolated(models, lengths, kind, data):
    """One document is another one: the logits of all others are the same, bit by bit."""
    model = models[kind]
    changed = data.draw(st.integers(0, len(lengths) - 1))
    docs = documents(lengths)
    before = read(model, docs, T)
    docs[changed] = documents(lengths, seed=1)[changed]
    after = read(model, docs, T)
    for i in range(len(lengths)):
        assert i == changed or torch.equal(before[i], after[i])


@settings(max_examples=20)
@given(lengths=st.lists(st.integers(1, 4 * T), min_size=1, max_size=3), data=st.data())
def test_which_lane_does_not_matter(models, lengths, data):
    """Lanes in another order, or with gaps between them: the same logits, bit by bit."""
    model = models["transformer_lm"]
    docs = documents(lengths)
    lanes = data.draw(st.permutations(range(5)))[: len(lengths)]
    plain = read(from_start(model), docs, T)
    elsewhere = read(model, docs, T, lanes)
    assert all(torch.equal(a, b) for a, b in zip(plain, elsewhere))


def test_a_batch_that_comes_again_gives_the_same_bits(tmp_path):
    model, once = longmem(tmp_path), longmem(tmp_path)
    docs = documents([4 * T, 2 * T])
    expected = read(once, docs, T)
    at = [0, 0]
    for tokens, segments in batches(docs, T):
        for _ in range(3):
            with torch.no_grad():
                logits = model(tokens, segments=segments)[0]
            for row, doc in enumerate(segments.streams.tolist()):
                assert torch.equal(logits[row], expected[doc][at[doc] : at[doc] + T])
        for doc in segments.streams.tolist():
            at[doc] += T


def test_reading_only_remembers_nothing(tmp_path):
    """Whatever is read in between, the memory stays where it was, and says so."""
    model, plain = longmem(tmp_path), longmem(tmp_path)
    parts = list(batches(documents([3 * T]), T))
    others = list(batches(documents([3 * T], seed=5), T))
    for i, ((tokens, segments), (other, _)) in enumerate(zip(parts, others)):
        if i > 0:
            expected = plain(other, segments=segments)[0]
            assert torch.equal(model(other, segments=segments, read_only=True)[0], expected)
            assert all(model.needs_replay(later).all() for _, later in parts[i + 1 :])
        assert torch.equal(model(tokens, segments=segments)[0], plain(tokens, segments=segments)[0])


def test_segments_out_of_step_are_refused(tmp_path):
    model = longmem(tmp_path)
    (tokens, first), (_, second), (_, third) = batches(documents([3 * T]), T)
    assert model.needs_replay(second).tolist() == [True] and model.needs_replay(first).tolist() == [False]
    with pytest.raises(MemoryOutOfStep, match="lane 0 received token 7 of stream 0.*must come in order"):
        model(tokens, segments=second)
    model(tokens, segments=first)
    assert model.needs_replay(second).tolist() == [False] and model.needs_replay(third).tolist() == [True]
    with pytest.raises(MemoryOutOfStep, match="lane 0 received token 14"):
        model(tokens, segments=third)
    model(tokens, segments=second)


def test_a_call_without_segments_is_refused(tmp_path):
    with pytest.raises(ValueError, match="without segments.*--task longmem_language_modeling"):
        longmem(tmp_path)(documents([T])[0][None])


def test_training_and_evaluation_have_a_memory_each(tmp_path):
    model, undisturbed = longmem(tmp_path), longmem(tmp_path)
    docs, others = documents([4 * T]), documents([9 * T, T], seed=1)
    for (tokens, segments), disturbance in zip(batches(docs, T), batches(others, T)):
        with torch.no_grad():
            expected = undisturbed.train()(tokens, segments=segments)[0]
            model.eval()(disturbance[0], segments=disturbance[1])
            assert torch.equal(model.train()(tokens, segments=segments)[0], expected)


def test_more_lanes_than_before(tmp_path):
    """The memory grows, and those who would read it know that it is empty."""
    model = longmem(tmp_path)
    read(model, documents([2 * T]), T)
    two = list(batches(documents([3 * T, 3 * T]), T))
    assert model.needs_replay(two[2][1]).all()
    fresh = longmem(tmp_path)
    for tokens, segments in two:
        assert torch.equal(model(tokens, segments=segments)[0], fresh(tokens, segments=segments)[0])


@settings(max_examples=15)
@given(
    pieces=st.integers(2, 9),
    last=st.integers(1, T),
    memory=st.integers(T, 3 * T),
    layers=st.sampled_from([1, "1,3"]),
    data=st.data(),
)
def test_replay_equals_never_having_stopped(tmp_path_factory, pieces, last, memory, layers, data):
    """From ``memory_tokens`` before on, and whatever the memory held: the same logits, bit by bit."""
    directory = tmp_path_factory.mktemp("replay")
    whole, resumed = (longmem(directory, memory_size=memory, retrieval_layer_index=layers) for _ in range(2))
    parts = list(batches(documents([(pieces - 1) * T + last, 2 * T]), T))
    for tokens, segments in parts[:-1]:
        whole(tokens, segments=segments)
    needed = -(-whole.memory_tokens // T)
    begin = max(0, data.draw(st.integers(0, max(0, pieces - 1 - needed))))
    if data.draw(st.booleans()):  # the memory is in use for another document
        read(resumed, documents([2 * T], seed=3), T)
    for i, (tokens, segments) in enumerate(parts[begin:-1]):
        resumed.memorize(tokens, segments, restart=i == 0)
    tokens, segments = parts[-1]
    assert not resumed.needs_replay(segments).any()
    assert torch.equal(resumed(tokens, segments=segments)[0], whole(tokens, segments=segments)[0])


def test_padding_is_neither_remembered_nor_counted(tmp_path):
    """A row padded to its neighbor's length continues as if it had been alone, whatever stands in the padding."""
    model, alone = longmem(tmp_path), longmem(tmp_path)
    docs = documents([3, 2 * T])
    tokens, segments = next(batches(docs, T))
    assert tokens.shape == (2, T) and segments.lengths.tolist() == [3, T]
    model(tokens, segments=segments)
    alone(tokens[:1, :3], segments=Segments([0], [0], [0], [3], 1))
    more = documents([T], seed=8)[0][None]
    torch.testing.assert_close(
        model(more, segments=Segments([0], [0], [3], [T], 2))[0],
        alone(more, segments=Segments([0], [0], [3], [T], 1))[0],
    )

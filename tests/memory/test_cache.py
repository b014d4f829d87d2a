"""The neural cache equals its definition, written down as loops."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.memory import cache as module
from longmem_fairseq.memory.cache import NeuralCache, causal_log_sums, distribution, log_sums, mix

V, D = 7, 3


def naive(query, hidden, tokens, theta):
    """p_cache of all symbols, as a list, in double precision."""
    weights = [math.exp(theta * sum(float(a) * float(b) for a, b in zip(query, h))) for h in hidden]
    return [sum(w for w, x in zip(weights, tokens.tolist()) if x == symbol) / sum(weights) for symbol in range(V)]


def random(Q, M, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(Q, D, generator=generator) * scale,
        torch.randint(0, V, (Q,), generator=generator),
        torch.randn(M, D, generator=generator) * scale,
        torch.randint(0, V, (M,), generator=generator),
    )


@given(Q=st.integers(1, 5), M=st.integers(1, 40), seed=st.integers(0, 99), block=st.sampled_from([1, 7, 1 << 24]))
def test_log_sums_are_the_definition(Q, M, seed, block):
    queries, targets, hidden, tokens = random(Q, M, seed)
    kept, module.SCORES_AT_ONCE = module.SCORES_AT_ONCE, block
    try:
        sums = log_sums(queries, targets, hidden, tokens, [0.5, 2.0])
    finally:
        module.SCORES_AT_ONCE = kept
    for t, theta in enumerate((0.5, 2.0)):
        for q in range(Q):
            expected = naive(queries[q], hidden, tokens, theta)[int(targets[q])]
            assert math.exp(sums[1, t, q] - sums[0, t, q]) == pytest.approx(expected, abs=1e-5)
        half = M // 2  # in two parts, one of them per query
        per_query = (hidden[half:].expand(Q, -1, -1), tokens[half:].expand(Q, -1))
        dense = distribution(queries, [(hidden[:half], tokens[:half]), per_query], theta, V)
        expected = torch.tensor([naive(query, hidden, tokens, theta) for query in queries])
        torch.testing.assert_close(dense, expected, atol=1e-5, rtol=1e-4)


def test_scores_far_from_zero_do_not_overflow():
    queries, targets, hidden, tokens = random(4, 50, scale=30.0)
    targets = tokens[(queries @ hidden.T).argmax(1)]  # the nearest neighbor has all the weight
    sums = log_sums(queries, targets, hidden, tokens, [5.0])
    torch.testing.assert_close(sums[1] - sums[0], torch.zeros(1, 4))
    assert sums.isfinite().all()


def test_a_token_of_a_text_sees_those_before_it():
    hidden, targets, _, _ = random(9, 1)
    sums = causal_log_sums(hidden, targets, [1.5])[:, 0]
    assert sums[0, 0] == float("-inf"), "the first one sees nothing"
    for q in range(1, 9):
        expected = naive(hidden[q], hidden[:q], targets[:q], 1.5)[int(targets[q])]
        assert math.exp(sums[1, q] - sums[0, q]) == pytest.approx(expected, abs=1e-5)


def test_tokens_that_are_not_there_weigh_nothing():
    queries, _, hidden, tokens = random(2, 10)
    per_query = tokens.repeat(2, 1)
    per_query[0, :4] = -1
    probabilities = distribution(queries, [(hidden.expand(2, -1, -1), per_query)], 1.0, V)
    torch.testing.assert_close(probabilities[:1], distribution(queries[:1], [(hidden[4:], tokens[4:])], 1.0, V))
    torch.testing.assert_close(probabilities[1:], distribution(queries[1:], [(hidden, tokens)], 1.0, V))
    per_query[:] = -1
    assert not distribution(queries, [(hidden.expand(2, -1, -1), per_query)], 1.0, V).any()
    assert not distribution(queries, [], 1.0, V).any()


@given(pieces=st.lists(st.integers(0, 12), max_size=8))
def test_the_last_tokens_are_held(pieces):
    cache = NeuralCache(5, D)
    given_hidden, given_tokens = torch.arange(200.0).view(-1, 1).expand(-1, D), torch.arange(200)
    at = 0
    for piece in pieces:
        cache.append(given_hidden[at : at + piece], given_tokens[at : at + piece])
        at += piece
    expected = list(range(max(0, at - 5), at))
    assert sorted(cache.tokens.tolist()) == expected and len(cache) == len(expected)
    assert cache.hidden[:, 0].long().tolist() == cache.tokens.tolist()


def test_mixing():
    model, cached = torch.tensor([0.2, 0.5, 0.4]).log(), torch.tensor([0.6, 0.0, 1.0]).log()
    torch.testing.assert_close(mix(model, cached, 0.25).exp(), torch.tensor([0.3, 0.375, 0.55]))
    assert torch.equal(mix(model, cached, 0.0), model)
    empty = torch.full((3,), float("nan"))
    assert torch.equal(mix(model, empty, 0.9), model), "an empty cache says nothing"

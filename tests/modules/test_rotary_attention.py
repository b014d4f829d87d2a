"""Attention with rotary positions and grouped queries against its definition, forward and backward."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.modules.cached_attention import LEFT_PADDING
from longmem_fairseq.modules.rotary import RotaryPositions
from longmem_fairseq.modules.rotary_attention import AttentionShape, RotaryAttention, RotaryJointAttention

YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8}
SHAPES = {
    "a head": AttentionShape(10, 1, 1, 4),
    "as many": AttentionShape(12, 3, 3, 6, qkv_bias=True),
    "grouped": AttentionShape(9, 6, 2, 4, out_bias=True),
    "one for all": AttentionShape(10, 5, 1, 2, qkv_bias=True, out_bias=True, qk_norm_eps=1e-5),
}


def attention(shape, kind=RotaryAttention, seed=0, **options):
    torch.manual_seed(seed)
    module = kind(shape, RotaryPositions(shape.head_dim, 100.0, YARN), **options).double()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def naive(module, x):
    """One row (T, D), one head and query at a time."""
    H, G, d = module.heads, module.heads // module.kv_heads, module.head_dim
    q, k, v = module.q_proj(x), module.k_proj(x), module.v_proj(x)
    outputs = []
    for h in range(H):
        queries, keys, values = (y[:, i * d : (i + 1) * d] for y, i in ((q, h), (k, h // G), (v, h // G)))
        if module.q_norm is not None:
            queries, keys = module.q_norm(queries), module.k_norm(keys)
        queries, keys = (module.rotary.rotate(y[None, None])[0, 0] for y in (queries, keys))
        rows = []
        for t in range(len(x)):
            scores = torch.stack([queries[t] @ keys[s] for s in range(t + 1)]) / math.sqrt(d)
            rows.append(torch.softmax(scores, dim=0) @ values[: t + 1])
        outputs.append(torch.stack(rows))
    return module.out_proj(torch.cat(outputs, dim=1))


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_its_definition_forward_and_backward(shape):
    module = attention(SHAPES[shape])
    x = torch.randn(7, 3, SHAPES[shape].width, dtype=torch.float64, requires_grad=True)  # (T, B, D)
    weights = torch.randn(7, 3, SHAPES[shape].width, dtype=torch.float64)
    parameters = [x, *module.parameters()]
    expected = torch.stack([naive(module, x[:, b]) for b in range(3)], dim=1)
    actual = module(x)
    torch.testing.assert_close(actual, expected)
    gradients = (torch.autograd.grad((y * weights).sum(), parameters) for y in (actual, expected))
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@settings(max_examples=20)
@given(
    blocks=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    left=st.lists(st.integers(0, 3), min_size=2, max_size=2),
    shape=st.sampled_from(sorted(SHAPES)),
)
def test_blocks_behind_padding_equal_the_whole(blocks, left, shape):
    """Rows that start with padding, decoded in blocks of any length; the padding's own output does not matter."""
    module, length = attention(SHAPES[shape]), sum(blocks)
    x = torch.randn(length + max(left), 2, SHAPES[shape].width, dtype=torch.float64)
    expected = [module(x[n:, b : b + 1]) for b, n in enumerate(left)]
    state = {LEFT_PADDING: {"left": torch.tensor(left)}}
    outputs, start = [], 0
    with torch.no_grad():
        for block in [max(left), *blocks]:
            outputs.append(module(x[start : start + block], state) if block else x[:0])
            start += block
    actual = torch.cat(outputs)
    assert actual.isfinite().all()
    for b, n in enumerate(left):
        torch.testing.assert_close(actual[n:, b], expected[b][:, 0])
    torch.testing.assert_close(module(x, left=torch.tensor(left))[max(left) :], actual[max(left) :])


def test_the_cache_of_a_memory_layer_has_keys_without_position():
    module = attention(SHAPES["grouped"])
    module.caches_unrotated = True
    x, state = torch.randn(5, 2, 9, dtype=torch.float64), {}
    with torch.no_grad():
        for step in x.split([2, 1, 2]):
            module(step, state)
        keys, values = module.keys_and_values(x)
    for actual, expected in zip(module.cached_without_position(state), (keys, values)):
        torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(module.cache(state)["prev_key"], module.rotary.rotate(keys))


@pytest.mark.parametrize("distance", [0, 9])
def test_a_memory_is_read_with_queries_turned_by_the_distance(distance):
    module = attention(SHAPES["grouped"], RotaryJointAttention, query_distance=distance)
    x, seen = torch.randn(5, 2, 9, dtype=torch.float64), {}

    def reader(q, scaling):
        seen.update(q=q, scaling=scaling)
        return torch.zeros_like(q), None

    with torch.no_grad(), module.reading(reader):
        module(x)
    torch.testing.assert_close(seen["q"], module.rotary.turn_by(module.queries(x), distance))
    assert seen["scaling"] == pytest.approx(module.rotary.magnitude**2 / 2)

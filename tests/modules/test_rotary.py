"""Rotary positions: the rotation itself, and the scalings as transformers defines them."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from longmem_fairseq.modules.rotary import RotaryPositions, rope_type

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}
SCALINGS = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", **LLAMA3},
    "yarn": {"rope_type": "yarn", **YARN},
    "yarn without rounding": {"rope_type": "yarn", "truncate": False, "beta_fast": 20, "beta_slow": 2, **YARN},
    "yarn with magnitudes": {"rope_type": "yarn", "mscale": 0.7, "mscale_all_dim": 0.5, **YARN},
    "yarn with a factor": {"rope_type": "yarn", "attention_factor": 1.25, **YARN},
}


def naive(x, positions, frequencies):
    """Turn pair (i, i + d / 2) of each vector of x (n, d) by its position times the pair's frequency."""
    turned = torch.empty_like(x)
    half = x.size(1) // 2
    for row, position in enumerate(positions):
        for i in range(half):
            turn = complex(torch.polar(torch.tensor(1.0), position * frequencies[i]))
            z = complex(x[row, i], x[row, i + half]) * turn
            turned[row, i], turned[row, i + half] = z.real, z.imag
    return turned


@pytest.mark.parametrize("start", [0, 3, 2047])
def test_equals_its_definition(start):
    rotary = RotaryPositions(6, 100.0)
    x = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    left = torch.tensor([0, min(start, 2)])
    actual = rotary.rotate(x, start, left)
    for b in range(2):
        for h in range(3):
            positions = [start + t - int(left[b]) for t in range(4)]
            expected = naive(x[b, h], positions, rotary.frequencies)
            torch.testing.assert_close(actual[b, h], expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(rotary.rotate(x[:1], start), actual[:1])


@given(distance=st.integers(0, 3000), position=st.integers(0, 900))
def test_scores_depend_on_the_distance_alone(distance, position):
    rotary = RotaryPositions(8, 1e4)
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(1)).double()
    score = (rotary.rotate(q, position + distance) * rotary.rotate(k, position)).sum()
    torch.testing.assert_close(score, (rotary.turn_by(q, distance) * k).sum(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCALINGS)
def test_scalings_equal_transformers(name):
    scaling = SCALINGS[name]
    config = LlamaConfig(
        hidden_size=64, num_attention_heads=4, rope_parameters={"rope_theta": 500.0, **scaling}
    )  # heads of 16
    frequencies, magnitude = ROPE_INIT_FUNCTIONS[rope_type(scaling)](config, torch.device("cpu"))
    rotary = RotaryPositions(16, 500.0, scaling)
    torch.testing.assert_close(rotary.frequencies, frequencies)
    assert rotary.magnitude == pytest.approx(magnitude)
    assert not torch.allclose(rotary.frequencies, RotaryPositions(16, 500.0).frequencies)
    x = torch.randn(1, 1, 1, 16)
    torch.testing.assert_close(rotary.rotate(x, 0), x * magnitude)


def test_tables_made_in_inference_serve_training():
    rotary = RotaryPositions(4, 100.0)
    with torch.inference_mode():
        rotary.rotate(torch.ones(1, 1, 3, 4))
    x = torch.ones(1, 1, 3, 4, requires_grad=True)
    rotary.rotate(x).sum().backward()
    assert x.grad.isfinite().all()

"""The fused causal attention against plain attention with a mask; without a GPU in Triton's interpreter."""

import numpy as np
import pytest
import torch

from longmem_fairseq.models.carried_window import window_behind
from longmem_fairseq.modules import causal_attention, rotary_attention, self_attention, sliding_window
from longmem_fairseq.modules.cached_attention import SLIDING_WINDOW
from longmem_fairseq.modules.rotary import RotaryPositions
from longmem_fairseq.modules.rotary_attention import AttentionShape, RotaryAttention
from longmem_fairseq.modules.self_attention import SelfAttention
from tests.memory.interpreter import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest number


def plain(q, k, v, slopes, window, left):
    """Attention by its definition, in the dtype of the arguments."""
    (T, d), S, group = q.shape[2:], k.size(2), q.size(1) // k.size(1)
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    distance = torch.arange(S - T, S)[:, None] - torch.arange(S)  # (T, S)
    scores = q @ k.mT / d**0.5
    if slopes is not None:
        scores = scores - slopes[:, None, None] * distance
    visible = (distance >= 0) & (distance <= (S if window is None else window))
    if left is not None:
        visible = visible & (torch.arange(S) >= left.view(-1, 1, 1, 1))
    scores = scores.masked_fill(~visible, float("-inf"))
    weights = torch.softmax(scores, dim=-1).masked_fill(~visible.any(dim=-1, keepdim=True), 0.0)
    return weights @ v, scores.logsumexp(dim=-1).clamp(min=-1e38)


HALF = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter cannot multiply bfloat16


@pytest.mark.parametrize(
    "B, H, kv_heads, T, S, d, alibi, window, hidden, dtype",
    [
        (1, 3, 3, 17, 17, 5, True, None, False, torch.float32),  # a segment, no size is round
        (1, 2, 1, 130, 140, 8, True, 40, False, torch.float32),  # a carried window, grouped queries, several tiles
        (2, 2, 1, 3, 20, 12, False, 9, True, torch.float32),  # rows of unequal length
        (1, 1, 1, 35, 40, 80, True, None, True, HALF),
    ],
)
def test_equals_plain_attention_forward_and_backward(B, H, kv_heads, T, S, d, alibi, window, hidden, dtype):
    generator = torch.Generator().manual_seed(T)
    q = torch.randn(B, T, H, d, generator=generator).to(dtype).transpose(1, 2)  # not contiguous, as a layer's
    k, v = torch.randn(2, B, kv_heads, S, d, generator=generator).to(dtype)
    upstream = torch.randn(B, H, T, d, generator=generator).to(dtype)
    slopes = torch.rand(H, generator=generator) if alibi else None
    left = torch.tensor([0, S - T + 1][-B:]) if hidden else None  # the first query of a row sees nothing
    results = []
    for function, device, precision in (
        (causal_attention.causal_attention, DEVICE, dtype),
        (plain, torch.device("cpu"), torch.float64),
    ):
        leaves = [x.detach().to(device, precision).requires_grad_() for x in (q, k, v)]
        places = (None if x is None else x.to(device) for x in (slopes, left))
        out, sums = function(*leaves, next(places), window, next(places))
        assert out.dtype == precision
        seen = sums > -1e30
        gradients = torch.autograd.grad(
            (out * upstream.to(device, precision)).sum() + sums[seen].sin().sum(), leaves, retain_graph=True
        )
        results.append([out, sums * seen, *gradients])
    for actual, expected in zip(*results):
        tolerance = TOLERANCE[dtype] * max(1.0, expected.abs().max().item())
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=0, atol=tolerance)


torch.manual_seed(0)
STATE = {SelfAttention: "incremental_state", RotaryAttention: "state"}  # names of the argument
LAYERS = {
    "alibi": (SelfAttention(8, 2, alibi=True), False),
    "alibi, carried window": (SelfAttention(8, 2, alibi=True), True),
    "rotary, carried window": (RotaryAttention(AttentionShape(8, 2, 1, 4), RotaryPositions(4, 100.0)), True),
    "grouped queries in float32": (RotaryAttention(AttentionShape(8, 2, 1, 4), RotaryPositions(4, 100.0)), False),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_attend_by_the_kernel(monkeypatch, name):
    """Where the kernel runs no mask is made, and outputs and gradients are the same, for the tokens of two segments."""
    module, carried = LAYERS[name]
    module = module.to(DEVICE).eval()
    generator, rows = torch.Generator().manual_seed(1), 2 if carried else 1
    segments = torch.randn(2, 6, rows, 8, generator=generator).to(DEVICE).requires_grad_()
    used = []

    def attend(*arguments, **named):
        used.append(arguments)
        return causal_attention.causal_attention(*arguments, **named)

    def run(kernels):
        monkeypatch.setattr(causal_attention, "runs_kernels", lambda device: kernels)
        state, outputs = {}, []
        for number, x in enumerate(segments[: 2 if carried else 1]):
            if carried:
                positions = np.full(rows, 6 * number)
                state[SLIDING_WINDOW] = {"window": window_behind(3, positions, DEVICE)}
            y = module(x, **({STATE[type(module)]: state} if carried else {}))
            outputs.append(y[0] if isinstance(y, tuple) else y)
        loss = torch.cat(outputs).square().sum()
        return [*outputs, *torch.autograd.grad(loss, [segments, *module.parameters()])]

    for place in (self_attention, sliding_window, rotary_attention):
        monkeypatch.setattr(place, "causal_attention", attend)
    expected = run(kernels=False)
    assert not used
    for actual, other in zip(run(kernels=True), expected):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-5)
    assert len(used) == (2 if carried else 1)


def test_one_query_wide_heads_and_dropped_weights_take_a_mask(monkeypatch):
    monkeypatch.setattr(causal_attention, "runs_kernels", lambda device: True)
    q = torch.zeros(1, 1, 2, 4)
    assert causal_attention.has_causal_kernel(q, 0.0) and not causal_attention.has_causal_kernel(q, 0.1)
    assert not causal_attention.has_causal_kernel(q[:, :, :1], 0.0)
    wide = torch.zeros(1, 1, 2, 256)
    assert causal_attention.has_causal_kernel(wide.half(), 0.0) and not causal_attention.has_causal_kernel(wide, 0.0)

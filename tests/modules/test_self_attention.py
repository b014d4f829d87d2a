"""Self-attention: the same function as fairseq's own, in one piece or in blocks, and ALiBi by its definition."""

import math

import pytest
import torch
from fairseq.modules import MultiheadAttention
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.modules.self_attention import SelfAttention, alibi_slopes, causal_mask
from tests.models.tiny import randomize


def attention(heads, head_dim=4, seed=0, **options):
    built = SelfAttention(heads * head_dim, heads, **options)
    randomize(built, seed)
    return built.eval()


def segment(T, B, D, seed=0):
    """Random input (T, B, D)."""
    return torch.randn(T, B, D, generator=torch.Generator().manual_seed(seed))


def naive(module, x, bias):
    """Attention one query at a time, with ``bias(head, distance)`` added to the scores; x (T, B, D)."""
    T, B, D = x.shape
    H, d = module.num_heads, module.head_dim
    q, k, v = (projection(x).view(T, B, H, d) for projection in (module.q_proj, module.k_proj, module.v_proj))
    rows = []
    for t in range(T):
        heads = []
        for h in range(H):
            scores = [(q[t, :, h] * k[s, :, h]).sum(-1) / math.sqrt(d) + bias(h, t - s) for s in range(t + 1)]
            weights = torch.stack(scores).softmax(dim=0)  # (t + 1, B)
            heads.append((weights[..., None] * v[: t + 1, :, h]).sum(dim=0))
        rows.append(torch.cat(heads, dim=-1))
    return module.out_proj(torch.stack(rows))


@pytest.mark.parametrize("T, B, heads", [(1, 2, 1), (63, 3, 5), (17, 1, 4)])
def test_equals_fairseqs_attention_forward_and_backward(T, B, heads):
    layer = attention(heads)
    stock = MultiheadAttention(heads * 4, heads, self_attention=True).eval()
    stock.load_state_dict(layer.state_dict())  # strict: the parameters have the same names
    masks = torch.full((T, T), float("-inf")).triu(1)
    results = []
    for module in (layer, stock):
        x = segment(T, B, heads * 4).requires_grad_()
        y, _ = module(query=x, key=x, value=x, attn_mask=masks, need_weights=False)
        y.backward(segment(T, B, heads * 4, seed=1))
        results.append([y, x.grad, *(p.grad for _, p in sorted(module.named_parameters()))])
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_padding_behind_the_tokens_changes_nothing():
    module = attention(3)
    x = segment(9, 2, 12)
    whole = module(x)[0]
    x[6:, 1] = 1e4
    mask = torch.zeros(2, 9, dtype=torch.bool)
    mask[1, 6:] = True
    padded = module(x, key_padding_mask=mask)[0]
    assert torch.equal(padded[:, 0], whole[:, 0])
    assert torch.equal(padded[:6, 1], whole[:6, 1])


@pytest.mark.parametrize(
    "heads, slopes",
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (4, [2**-2, 2**-4, 2**-6, 2**-8]),
        (8, [0.5, 0.25, 0.125, 2**-4, 2**-5, 2**-6, 2**-7, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (6, [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]),
        (12, [2.0**-i for i in range(1, 9)] + [2**-0.5, 2**-1.5, 2**-2.5, 2**-3.5]),
    ],
)
def test_alibi_slopes(heads, slopes):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(slopes, dtype=torch.float32))


@pytest.mark.parametrize("heads, alibi, bias", [(1, True, True), (3, True, True), (4, True, False), (2, False, False)])
def test_equals_its_definition_forward_and_backward(heads, alibi, bias):
    """With ALiBi and without biases, which fairseq's own module cannot compute."""
    module = attention(heads, alibi=alibi, bias=bias)
    slopes = alibi_slopes(heads).tolist() if alibi else [0.0] * heads
    results = []
    for compute in (lambda x: module(x)[0], lambda x: naive(module, x, lambda h, distance: -slopes[h] * distance)):
        module.zero_grad()
        x = segment(11, 2, heads * 4).requires_grad_()
        y = compute(x)
        y.backward(segment(11, 2, heads * 4, seed=1))
        results.append([y, x.grad, *(p.grad.clone() for p in module.parameters())])
    for fused, plain in zip(*results):
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-5)


def test_alibi_of_far_positions_survives_half_precision():
    """Distance 700 times slope 2^-8 is not lost to rounding: the bias is made in float32."""
    mask = causal_mask(8, 1, 701, torch.bfloat16, torch.device("cpu"))[0, :, 0].float()  # (H, 701): of the last query
    expected = -alibi_slopes(8)[:, None] * torch.arange(700, -1, -1)
    torch.testing.assert_close(mask, expected, rtol=2**-8, atol=0)


def test_alibi_serves_segments_of_any_order_of_lengths():
    module = attention(3, alibi=True)
    x = segment(40, 2, 12)
    whole = module(x)[0]
    for T in (7, 40, 1, 23):
        torch.testing.assert_close(module(x[:T])[0], whole[:T], rtol=1e-5, atol=1e-5)


def test_an_evaluation_in_inference_mode_leaves_nothing_that_training_cannot_use():
    module = attention(3, alibi=True)
    with torch.inference_mode():
        module(segment(13, 1, 12))
    module(segment(13, 1, 12).requires_grad_())[0].sum().backward()


def test_a_step_of_decoding_makes_no_square_mask():
    def mask(T, S):
        return causal_mask(2, T, S, torch.float32, torch.device("cpu"))

    assert mask(1, 4000).untyped_storage().nbytes() == 2 * 4000 * 4
    assert torch.equal(mask(3, 40), mask(40, 40)[:, :, 37:])
    assert mask(40, 40) is mask(40, 40), "layers share it"


blocks = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=40)
@given(blocks=blocks, heads=st.integers(1, 4), alibi=st.booleans())
def test_blocks_of_any_length_equal_the_whole(blocks, heads, alibi):
    module = attention(heads, alibi=alibi)
    x = segment(sum(blocks), 2, heads * 4)
    state = {}
    with torch.no_grad():
        actual = torch.cat([module(block, incremental_state=state)[0] for block in x.split(blocks)])
        torch.testing.assert_close(actual, module(x)[0], rtol=1e-5, atol=1e-5)


@settings(max_examples=40)
@given(
    before=st.integers(1, 7),
    after=st.integers(1, 5),
    alibi=st.booleans(),
    order=st.lists(st.integers(0, 2), min_size=1, max_size=5),
)
def test_reordered_rows_go_on_with_their_own_past(before, after, alibi, order):
    """As beam search does: rows change places, are doubled, or vanish."""
    module = attention(2, alibi=alibi)
    x, rest = segment(before, 3, 8), segment(after, len(order), 8, seed=1)
    state, order = {}, torch.tensor(order)
    with torch.no_grad():
        module(x, incremental_state=state)
        module.reorder_incremental_state(state, order)
        actual = module(rest, incremental_state=state)[0]
        whole = module(torch.cat([x[:, order], rest]))[0]
    torch.testing.assert_close(actual, whole[before:], rtol=1e-5, atol=1e-5)


def test_dropout_acts_in_training_only_and_keeps_the_mean():
    torch.manual_seed(0)
    module = attention(2, dropout=0.4)
    x = segment(6, 1, 8)
    with torch.no_grad():
        plain = module(x)[0]
        assert torch.equal(module(x)[0], plain)
        module.train()
        dropped = [module(x)[0] for _ in range(2000)]
    assert not torch.equal(dropped[0], plain)
    torch.testing.assert_close(torch.stack(dropped).mean(dim=0), plain, rtol=0, atol=0.06)

"""Joint attention: the fast memory attention against the plain one, and the gate that mixes it with the window."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.modules.joint_attention import GATE_PACE, JointAttention
from longmem_fairseq.modules.memory_attention import memory_attention, naive_memory_attention
from longmem_fairseq.modules.self_attention import SelfAttention
from tests.models.tiny import randomize

DEVICES = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def bank(L, H, N, C, d, seed=0, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(L, H, N, C, d, generator=generator).to(device, dtype) for _ in range(2)]


def queries(B, H, T, d, seed=1):
    return torch.randn(B, H, T, d, generator=torch.Generator().manual_seed(seed))


def both(q, keys, values, lanes, slots, scaling=0.5):
    """[output, gradient of the queries] of the fast and of the plain attention."""
    results = []
    for attend in (memory_attention, naive_memory_attention):
        leaf = q.clone().requires_grad_()
        z = attend(leaf, keys, values, lanes, slots, scaling)
        assert z.shape == q.shape and z.dtype == q.dtype
        z.backward(torch.randn(z.shape, generator=torch.Generator().manual_seed(2)).to(z))
        results.append([z.detach(), leaf.grad])
    return results


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "L, B, H, T, N, C, d, n", [(3, 2, 5, 63, 11, 3, 7, 5), (1, 1, 1, 1, 1, 1, 1, 1), (4, 4, 2, 33, 17, 4, 16, 17)]
)
def test_fast_equals_plain_on_odd_sizes(L, B, H, T, N, C, d, n, device):
    generator = torch.Generator().manual_seed(3)
    slots = torch.randint(-1, N, (B, H, T, n), generator=generator)  # some absent, some twice
    slots[:, :, T // 2] = -1  # nothing at all for one query
    lanes = torch.randperm(L, generator=generator)[:B]
    keys, values = bank(L, H, N, C, d, device=device)
    fast, plain = both(queries(B, H, T, d).to(device), keys, values, lanes.to(device), slots.to(device))
    for actual, reference in zip(fast, plain):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    assert not fast[0][:, :, T // 2].any() and not fast[1][:, :, T // 2].any()


@settings(max_examples=30)
@given(
    sizes=st.tuples(*[st.integers(1, 5)] * 6),
    n=st.integers(1, 6),
    seed=st.integers(0, 10**6),
    absent=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_fast_equals_plain(sizes, n, seed, absent):
    B, H, T, N, C, d = sizes
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randint(0, N, (B, H, T, n), generator=generator)
    slots[torch.rand(slots.shape, generator=generator) < absent] = -1
    keys, values = bank(B, H, N, C, d, seed)
    fast, plain = both(queries(B, H, T, d, seed), keys, values, torch.randperm(B, generator=generator), slots)
    for actual, reference in zip(fast, plain):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("of_queries", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("of_bank", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_with_full(of_queries, of_bank, device):
    slots = torch.randint(-1, 9, (2, 2, 21, 3), generator=torch.Generator().manual_seed(3)).to(device)
    keys, values = bank(2, 2, 9, 3, 8, dtype=of_bank, device=device)
    q = queries(2, 2, 21, 8).to(device, of_queries)
    lanes = torch.tensor([1, 0], device=device)
    half, _ = both(q, keys, values, lanes, slots)
    full, _ = both(q.float(), keys.float(), values.float(), lanes, slots)
    for actual, reference in zip(half, full):
        torch.testing.assert_close(actual.float(), reference, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("device", DEVICES)
def test_diverged_queries_stay_visible(device):
    """A query that is not a number, or whose scores overflow, is not answered by zeros, and spreads to no other."""
    keys, values = (x.to(device) for x in bank(1, 2, 3, 2, 4))
    keys[:, :, :2] = 1e20
    q = queries(1, 2, 3, 4).to(device)
    q[0, :, 0], q[0, :, 1] = float("nan"), 1e20
    slots = torch.tensor([[0, -1], [1, 0], [2, -1]], device=device).expand(1, 2, 3, 2)
    for z, _ in both(q, keys, values, torch.tensor([0], device=device), slots):
        assert z[:, :, :2].isnan().all() and z[:, :, 2].isfinite().all()


@pytest.mark.parametrize("device", DEVICES)
def test_the_lowest_scores_are_scores(device):
    keys, values = (x.to(device) for x in bank(1, 1, 2, 2, 4))
    keys[:] = -1e19
    q, zeros = torch.full((1, 1, 1, 4), 5e18, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    slots = torch.tensor([0, 1], device=device).view(1, 1, 1, 2)
    for z, _ in both(q, keys, values, zeros, slots, scaling=1.0):
        torch.testing.assert_close(z.flatten(), values.mean(dim=(0, 1, 2, 3)))


def test_slots_that_are_not_asked_for_do_not_matter():
    """Whatever lies elsewhere in the bank, other lanes and heads included, even NaN, is not touched."""
    keys, values = bank(3, 2, 5, 2, 4)
    slots = torch.tensor([[[[2, -1]], [[4, -1]]]])
    before = both(queries(1, 2, 1, 4), keys, values, torch.tensor([1]), slots)
    kept = [x[1, 0, 2].clone() for x in (keys, values)], [x[1, 1, 4].clone() for x in (keys, values)]
    for i, x in enumerate((keys, values)):
        x.fill_(float("nan"))
        x[1, 0, 2], x[1, 1, 4] = kept[0][i], kept[1][i]
        x[1, :, 0] = 1e6  # what a masked slot points to: finite, but it would be seen
    after = both(queries(1, 2, 1, 4), keys, values, torch.tensor([1]), slots)
    assert torch.equal(before[0][0], after[0][0]) and torch.equal(before[0][1], after[0][1])


# --- the gate


B, T, H, D = 3, 6, 2, 8


class Reader:
    """Finds Z = constant in the memory, for the rows that have one."""

    def __init__(self, present=None, seed=7):
        self.z = torch.randn(B, H, T, D // H, generator=torch.Generator().manual_seed(seed))
        self.present = present
        self.queries = None

    def __call__(self, q, scaling):
        self.queries = q, scaling
        z = self.z if self.present is None else self.z * self.present.view(-1, 1, 1, 1)
        return z.to(q), self.present


@pytest.fixture
def joint():
    module = JointAttention(D, H)
    randomize(module, 0)
    return module.eval()


@pytest.fixture
def x():
    return torch.randn(T, B, D, generator=torch.Generator().manual_seed(4))


def plain(module):
    """The same attention without a memory."""
    built = SelfAttention(D, H).eval()
    built.load_state_dict({k: v for k, v in module.state_dict().items() if k != "gate_bias"})
    return built


def mixed(module, x, reader, weight):
    """(1 - weight) * local + weight * Z, before the output projection is undone; weight (B, H)."""
    q, k, v = (module.split_heads(p(x)) for p in (module.q_proj, module.k_proj, module.v_proj))
    local = module.local_attention(q, k, v)
    out = local + weight[:, :, None, None] * (reader.z - local)  # (B, H, T, d)
    return module.out_proj(out.permute(2, 0, 1, 3).reshape(T, B, D))


def test_starts_at_one_half(x):
    module = JointAttention(D, H).eval()
    assert torch.equal(module.gate_bias, torch.zeros(H)) and module.gate_weight is None
    with module.reading(reader := Reader()):
        actual = module(x)[0]
    torch.testing.assert_close(actual, mixed(module, x, reader, torch.full((B, H), 0.5)), rtol=1e-5, atol=1e-6)


def test_each_head_has_its_own_gate(joint, x):
    gates = torch.tensor([-1.3, 2.0])
    joint.gate_bias.data = gates / GATE_PACE
    with joint.reading(reader := Reader()):
        actual = joint(x)[0]
    weight = gates.sigmoid().expand(B, H)
    torch.testing.assert_close(actual, mixed(joint, x, reader, weight), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joint.mean_gates, gates.sigmoid())


def test_gates_that_depend_on_the_query(joint, x):
    """By a loop over rows, heads and tokens; the mean that is logged, and the gradients of both parameters."""
    joint.add_gate_weight(D // H)
    randomize(joint, 5)
    bias, weight = (p.detach() * GATE_PACE for p in (joint.gate_bias, joint.gate_weight))
    q, k, v = (joint.split_heads(p(x)) for p in (joint.q_proj, joint.k_proj, joint.v_proj))
    gates = torch.empty(B, H, T)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                gates[b, h, t] = torch.sigmoid(bias[h] + q[b, h, t] @ weight[h] / (D // H) ** 0.5)
    with joint.reading(reader := Reader()):
        actual = joint(x)[0]
    local = joint.local_attention(q, k, v)
    out = local + gates[..., None] * (reader.z - local)
    expected = joint.out_proj(out.permute(2, 0, 1, 3).reshape(T, B, D))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(joint.mean_gates, gates.mean(dim=(0, 2)))
    assert gates.std(dim=2).min() > 0
    actual.sum().backward()
    assert all(p.grad.abs().min() > 0 for p in (joint.gate_bias, joint.gate_weight))


def test_the_reader_gets_the_layers_own_queries_unscaled(joint, x):
    with joint.reading(reader := Reader()):
        joint(x)
    q, scaling = reader.queries
    assert scaling == (D // H) ** -0.5
    assert torch.equal(q, joint.split_heads(joint.q_proj(x)))


def test_gates_far_from_zero_choose_one_side(joint, x):
    with torch.no_grad(), joint.reading(reader := Reader()):
        joint.gate_bias.fill_(-40.0)
        torch.testing.assert_close(joint(x)[0], plain(joint)(x)[0])
        joint.gate_bias.fill_(40.0)
        torch.testing.assert_close(joint(x)[0], mixed(joint, x, reader, torch.ones(B, H)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
def test_without_a_memory_it_is_local_attention_exactly(joint, x, training):
    joint.train(training)
    local = plain(joint)(x)[0]
    assert torch.equal(joint(x)[0], local)
    with joint.reading(None):
        assert torch.equal(joint(x)[0], local)
    with joint.reading(Reader(torch.zeros(B, dtype=torch.bool))):
        assert torch.equal(joint(x)[0], local)


def test_rows_with_nothing_to_read_are_local_exactly_beside_others(joint, x):
    with joint.reading(Reader(torch.tensor([True, False, True]))):
        actual = joint(x)[0]
    local = plain(joint)(x)[0]
    assert torch.equal(actual[:, 1], local[:, 1])
    assert not torch.allclose(actual[:, 0], local[:, 0]) and not torch.allclose(actual[:, 2], local[:, 2])


def test_reading_ends_with_its_context_even_on_an_error(joint, x):
    local = plain(joint)(x)[0]
    with pytest.raises(RuntimeError, match="stop"):
        with joint.reading(Reader()):
            raise RuntimeError("stop")
    assert torch.equal(joint(x)[0], local)


@pytest.mark.parametrize("present", [None, torch.tensor([True, False, True])])
def test_gradients_of_gate_and_input(joint, x, present):
    reader = Reader(present)
    upstream = torch.randn(T, B, D, generator=torch.Generator().manual_seed(9))
    rows = torch.ones(B) if present is None else present.float()
    results = []
    for compute in (
        lambda x: joint(x)[0],
        lambda x: mixed(joint, x, reader, rows[:, None] * (GATE_PACE * joint.gate_bias).sigmoid()),
    ):
        joint.zero_grad()
        leaf = x.clone().requires_grad_()
        with joint.reading(reader):
            compute(leaf).backward(upstream)
        results.append([leaf.grad, *(p.grad.clone() for p in joint.parameters())])
    for actual, reference in zip(*results):
        torch.testing.assert_close(actual, reference, rtol=1e-5, atol=1e-5)
    assert joint.gate_bias.grad.abs().min() > 0


@pytest.mark.parametrize("reader", [None, Reader(torch.zeros(B, dtype=torch.bool))])
def test_the_gate_is_always_in_the_graph(joint, x, reader):
    """Distributed training waits for a gradient of every parameter, at the start of documents too."""
    joint.train().add_gate_weight(D // H)
    with joint.reading(reader):
        joint(x)[0].sum().backward()
    for gradient in (joint.gate_bias.grad, joint.gate_weight.grad):
        assert gradient is not None and not gradient.any()

"""The Triton search on numbers of every kind against float64; without a GPU in Triton's interpreter.

In the interpreter, products read float32 as the matrix units do: without its last 13 bits.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import triton as triton_search
from longmem_fairseq.memory.search.triton import TritonSearch, search_ring
from tests.memory.interpreter import DEVICE, INTERPRETED, needs_triton

pytestmark = needs_triton
EXAMPLES = 8 if INTERPRETED else 200
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def bank_of(fills, H, d, N, C=1, dtype=torch.float32, make=torch.randn, seed=0):
    """A bank whose lane i joined its stream at token fills[i][0] and then got fills[i][1] tokens."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(len(fills), H, d, N * C, C, dtype, DEVICE)
    bank.means.fill_(float("nan"))  # slots that were never written
    for lane, (position, tokens) in enumerate(fills):
        bank.reset(lane, position)
        keys = make(H, tokens, d, generator=generator).to(DEVICE)
        bank.append(lane, keys, keys)
    return bank


def check(bank, lanes, queries, n):
    """The slots have the n largest products of what a lane holds, best first, within the rounding of float32."""
    slots = TritonSearch()(bank, lanes, queries.to(DEVICE), n).cpu()
    d = queries.size(-1)
    assert slots.shape == (*queries.shape[:3], n) and slots.dtype == torch.int64
    for row, lane in enumerate(lanes):
        held = torch.tensor([slot for span in bank.spans(lane) for slot in range(*span)], dtype=torch.int64)
        if not len(held):
            assert (slots[row] == -1).all()
            continue
        keys, q = bank.means[lane].cpu()[:, held].double(), queries[row].double()
        finite = keys.isfinite().all(dim=-1, keepdim=True).mT  # (H, 1, held)
        keys = keys.nan_to_num(0.0, 0.0, 0.0)
        scores, sums = (q @ keys.mT).masked_fill(~finite, -np.inf), q.abs() @ keys.abs().mT
        best = scores.sort(dim=-1, descending=True)
        for head in range(bank.heads):
            count = min(n, int(finite[head].sum()))
            of_head = slots[row, head]
            assert (of_head[:, count:] == -1).all() and torch.isin(of_head[:, :count], held).all()
            places = torch.searchsorted(held, of_head[:, :count].contiguous())
            assert (places.sort(dim=-1).values.diff(dim=-1) > 0).all()
            rounding = (d + 8) * 2.0**-24 * sums[head].amax(dim=-1, keepdim=True)
            scores_of_slots, expected = scores[head].gather(-1, places), best.values[head, :, :count]
            assert ((scores_of_slots - expected).abs() <= 2 * rounding).all()
            equal = (scores_of_slots.diff(dim=-1) == 0) & (rounding == 0)  # nothing was rounded: zeros
            assert (of_head[:, :count].diff(dim=-1)[equal] > 0).all()


fills = st.lists(st.tuples(st.sampled_from([0, 0, 3, 70]), st.integers(0, 150)), min_size=1, max_size=3)


@settings(max_examples=EXAMPLES)
@given(
    fills=fills,
    N=st.sampled_from([1, 7, 8, 50, 100]),
    d=st.sampled_from([1, 5, 16, 33, 130]),
    T=st.sampled_from([1, 3, 17]),
    n=st.integers(1, 9),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([1e-4, 1.0, 1e15]),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    kind=st.sampled_from(["plain", "signs", "growing"]),
    q_dtype=st.sampled_from(DTYPES),
    bank_dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_finds_the_largest_products(fills, N, d, T, n, seed, spread, offset, kind, q_dtype, bank_dtype, data):
    """Keys around one center, closer to each other than the first products are exact; equal keys; long and short."""

    def make(H, tokens, d, generator):
        keys = torch.randn(H, tokens, d, generator=generator) * spread + offset * torch.randn(
            H, 1, d, generator=generator
        )
        keys = keys.sign() if kind == "signs" else keys
        keys = keys * torch.logspace(-4, 4, tokens)[:, None] if kind == "growing" else keys
        return keys.clamp(-60000, 60000) if bank_dtype == torch.float16 else keys

    bank = bank_of(fills, 2, d, N, 2, bank_dtype, make, seed)
    lanes = data.draw(st.permutations(range(len(fills))))[: data.draw(st.integers(1, len(fills)))]
    queries = torch.randn(len(lanes), 2, T, d, generator=torch.Generator().manual_seed(seed + 1))
    queries = queries.sign() if kind == "signs" else queries
    check(bank, np.array(lanes), queries.to(q_dtype), n)


@pytest.mark.parametrize("N, large_lane, spread, center", [(1100, 0, 1.0, 0.0), (600, 1 << 16, 1e-3, 10.0)])
def test_finds_the_best_of_many(monkeypatch, N, large_lane, spread, center):
    """Several spans; one lane is full, one has wrapped, one is part-full, one was joined midway, one is empty.

    The first products cannot tell keys around a far center apart: a query then reads most of the blocks.
    """
    monkeypatch.setattr(triton_search, "_LARGE_LANE", large_lane)
    fills = [(0, N), (0, 3000), (0, 40), (N - 30, 90), (0, 0)]
    bank = bank_of(
        fills, 1, 20, N, make=lambda *shape, generator: center + spread * torch.randn(shape, generator=generator)
    )
    assert [len(bank.spans(lane)) for lane in range(5)] == [1, 1, 1, 2, 0]
    queries = torch.randn(5, 1, 3, 20, generator=torch.Generator().manual_seed(1))
    check(bank, np.array([3, 1, 4, 0, 2]), queries, 6)


def test_any_floats():
    """Both zeros, the smallest and the largest numbers, in keys and queries; some chunks are not numbers."""
    values = torch.tensor([0.0, -0.0, 1e-30, 1e-15, 1.0, -1.0, 1e20, 3.4e38, -3.4e38])
    generator = torch.Generator().manual_seed(0)

    def make(H, tokens, d, generator):
        keys = values[torch.randint(len(values), (H, tokens, 1), generator=generator)]
        keys = keys * torch.rand(H, tokens, d, generator=generator)
        keys[:, 5], keys[:, 17, 2], keys[0, 30, 1] = float("nan"), float("inf"), -float("inf")
        return keys

    bank = bank_of([(0, 60), (0, 35)], 2, 9, 40, make=make)
    queries = torch.randn(2, 2, len(values), 9, generator=generator).clamp(-1, 1) * values[:, None]
    check(bank, np.array([1, 0]), queries, 6)
    check(bank, np.array([1, 0]), queries, 40)


def test_equal_scores_are_listed_by_their_slots():
    """All scores of one query are 0, and many of the other are equal; both zeros are one score."""
    bank = bank_of([(0, 20)], 1, 4, 20, make=lambda H, tokens, d, generator: torch.zeros(H, tokens, d))
    bank.means[0, 0, ::2] = -0.0
    bank.means[0, 0, [3, 10, 19]] = 1.0
    queries = torch.tensor([[0.0] * 4, [1.0] * 4]).view(1, 1, 2, 4).to(DEVICE)
    slots = TritonSearch()(bank, np.array([0]), queries, 20)[0, 0].tolist()
    assert slots[0] == list(range(20))
    assert slots[1] == [3, 10, 19, *(slot for slot in range(20) if slot not in (3, 10, 19))]


def test_queries_that_are_not_numbers_find_what_is_held():
    """Attention to held chunks shows that the query is not a number; see ``modules/test_joint_attention.py``."""
    bank = bank_of([(12, 9)], 1, 5, 11, 3)
    queries = torch.randn(1, 1, 3, 5, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    expected = TritonSearch()(bank, np.array([0]), queries, 3)
    queries[0, 0, 0, 2], queries[0, 0, 2] = float("nan"), float("inf")
    slots = TritonSearch()(bank, np.array([0]), queries, 3)
    assert torch.equal(slots[0, 0, 1], expected[0, 0, 1])
    assert (slots.sort(dim=-1).values == torch.tensor([4, 5, 6], device=DEVICE)).all()


def test_parts_change_nothing(monkeypatch):
    """A few heads or queries at a time, of queries in any memory layout, find the same chunks."""
    bank = bank_of([(0, 70)], 3, 5, 40)
    queries = torch.randn(1, 3, 3, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE).transpose(1, 2)
    whole = TritonSearch()(bank, np.array([0]), queries.contiguous(), 2)
    for queries_at_once in (2, 6):
        monkeypatch.setattr(triton_search, "_BYTES", 4 * 5 * queries_at_once)  # a lane has 5 blocks
        assert torch.equal(TritonSearch()(bank, np.array([0]), queries, 2), whole)


def test_counters_are_read_on_the_device():
    """What a lane holds is in tensors, so that one captured graph serves all fills; no query, nothing found."""
    bank = bank_of([(0, 90)], 1, 5, 50)
    queries = torch.randn(1, 1, 2, 5, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    lanes, begins, held = (torch.tensor([x], device=DEVICE) for x in (0, 47, 3))  # it holds the 50 from slot 40 on
    slots = search_ring(bank.means, lanes, begins, held, queries, 4)
    assert (slots[..., :3].sort(dim=-1).values == torch.tensor([47, 48, 49], device=DEVICE)).all()
    assert (slots[..., 3] == -1).all()
    assert search_ring(bank.means, lanes, begins, held, queries[:, :, :0], 4).shape == (1, 1, 0, 4)

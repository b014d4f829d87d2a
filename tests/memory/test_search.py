"""Exact search against scoring every chunk: faiss, torch and native, on lanes filled in every way."""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import base as search
from longmem_fairseq.memory.search import native
from longmem_fairseq.memory.search.base import choose_search, faiss_search, torch_search
from tests.memory.kernel import needs_kernel

H, D = 3, 5


def kernel_search(*arguments):
    """The native search, by its kernel however few the queries are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FEWEST_QUERIES", 1)
        return native.native_search(*arguments)


SEARCHES = {"torch": torch_search, "faiss": faiss_search, "native": kernel_search}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and search.has_faiss_gpu() else [])
names = ["torch", "faiss", pytest.param("native", marks=needs_kernel)]
each_search = pytest.mark.parametrize("name", names)
each_search_and_device = pytest.mark.parametrize(
    "name, device",
    [*itertools.product(names[:2], DEVICES), pytest.param("native", "cpu", marks=needs_kernel)],
)


def filled_bank(fills, N, C, seed=0, duplicates=False, dtype=torch.float32, device="cpu"):
    """A bank whose lane i joined a stream at token fills[i][0] and was given fills[i][1] tokens."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(len(fills), H, D, N * C, C, dtype, torch.device(device))
    # Slots that nothing was written to would win every search.
    bank.means.fill_(1e6)
    for lane, (position, T) in enumerate(fills):
        bank.reset(lane, position)
        keys = torch.randn(H, T, D, generator=generator)
        if duplicates:
            keys = keys.sign()
        bank.append(lane, keys.to(device), keys.to(device))
    return bank


def check(bank, lanes, queries, n, slots):
    """The slots found are those of the best chunks held, best first, each once, then -1."""
    B, _, T, _ = queries.shape
    assert slots.shape == (B, H, T, n) and slots.dtype == torch.int64
    for row, lane in enumerate(lanes):
        held = torch.tensor([slot for begin, end in bank.spans(lane) for slot in range(begin, end)], dtype=torch.int64)
        wanted = min(n, len(held))
        for head in range(H):
            scores = queries[row, head].float().cpu() @ bank.means[lane, head].cpu().T  # (T, N)
            best = scores[:, held].sort(dim=-1, descending=True).values[:, :wanted]
            found = slots[row, head].cpu()
            assert (found[:, wanted:] == -1).all()
            found = found[:, :wanted]
            assert torch.isin(found, held).all()
            for t in range(T):
                assert len(found[t].unique()) == wanted
            # Equal scores may stand in any order, so scores are compared and not slots.
            torch.testing.assert_close(scores.gather(1, found), best, rtol=1e-5, atol=1e-5)


fills = st.lists(
    st.tuples(st.sampled_from([0, 0, 3, 8, 17]), st.integers(0, 60)), min_size=1, max_size=4
)  # (where a lane joined its stream, tokens it was given)


@each_search
@settings(max_examples=40)
@given(
    fills=fills, N=st.integers(1, 13), C=st.integers(1, 4), T=st.integers(1, 9), n=st.integers(1, 15),
    seed=st.integers(0, 10**6), duplicates=st.booleans(), data=st.data(),
)  # fmt: skip
def test_finds_the_best_chunks(name, fills, N, C, T, n, seed, duplicates, data):
    bank = filled_bank(fills, N, C, seed, duplicates)
    lanes = data.draw(st.lists(st.integers(0, len(fills) - 1), min_size=1, unique=True))
    queries = torch.randn(len(lanes), H, T, D, generator=torch.Generator().manual_seed(seed + 1))
    check(bank, lanes, queries, n, SEARCHES[name](bank, np.array(lanes), queries, n))


@each_search_and_device
def test_finds_the_best_of_many(name, device):
    """No size is a round number; one lane is full, one has wrapped, one is part-full, one joined midway, one empty."""
    fills = [(0, 997 * 3), (0, 5000), (0, 100), (997 * 3 - 30, 90), (0, 0)]
    bank = filled_bank(fills, 997, 3, device=device)
    assert [len(bank.spans(lane)) for lane in range(5)] == [1, 1, 1, 2, 0]
    queries = torch.randn(5, H, 63, D, generator=torch.Generator().manual_seed(1)).to(device)
    lanes = np.array([3, 1, 4, 0, 2])
    check(bank, lanes, queries, 17, SEARCHES[name](bank, lanes, queries, 17))


@each_search_and_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_searched_in_float32(name, dtype, device):
    bank = filled_bank([(0, 30), (0, 11)], 8, 3, dtype=dtype, device=device)
    queries = torch.randn(2, H, 7, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    check(bank, [1, 0], queries, 4, SEARCHES[name](bank, np.array([1, 0]), queries, 4))


def test_blocks_of_queries_change_nothing(monkeypatch):
    bank = filled_bank([(0, 30), (5, 20)], 13, 2)
    queries = torch.randn(2, H, 63, D, generator=torch.Generator().manual_seed(1))
    whole = torch_search(bank, np.array([0, 1]), queries, 5)
    monkeypatch.setattr(search, "_BLOCK", H * 13 * 10)
    check(bank, [0, 1], queries, 5, torch_search(bank, np.array([0, 1]), queries, 5))
    assert torch.equal(torch_search(bank, np.array([0, 1]), queries, 5), whole)


@each_search
def test_lanes_do_not_depend_on_each_other(name):
    """Each lane alone finds, bit by bit, what it finds beside others."""
    bank = filled_bank([(0, 30), (4, 9), (0, 0), (0, 5)], 8, 3)
    queries = torch.randn(4, H, 7, D, generator=torch.Generator().manual_seed(1))
    together = SEARCHES[name](bank, np.array([2, 0, 3, 1]), queries, 4)
    for row, lane in enumerate([2, 0, 3, 1]):
        assert torch.equal(SEARCHES[name](bank, np.array([lane]), queries[row : row + 1], 4)[0], together[row])


@each_search
def test_queries_that_are_not_numbers_find_nothing_outside_what_is_held(name):
    """A training that diverges must not read slots that nothing was written to."""
    bank = filled_bank([(12, 9)], 11, 3)
    assert bank.spans(0) == ((4, 7),)
    slots = SEARCHES[name](bank, np.array([0]), torch.full((1, H, 2, D), float("nan")), 3)
    assert torch.isin(slots, torch.tensor([-1, 4, 5, 6])).all()


@each_search
def test_gradients_do_not_flow_through_the_search(name):
    bank = filled_bank([(0, 30)], 8, 3)
    slots = SEARCHES[name](bank, np.array([0]), torch.randn(1, H, 7, D).requires_grad_(), 4)
    assert not slots.requires_grad


# --- the choice


def test_choice_by_name():
    assert choose_search("torch", torch.device("cpu")) is torch_search
    assert choose_search("faiss", torch.device("cpu")) is faiss_search
    with pytest.raises(ValueError, match="--memory-search annoy is unknown: it is auto, native, faiss or torch"):
        choose_search("annoy", torch.device("cpu"))
    with pytest.raises(ValueError, match="native searches in main memory, but the memory lies on cuda:0: choose --mem"):
        choose_search("native", torch.device("cuda:0"))


@needs_kernel
@pytest.mark.parametrize("name", ["auto", "native"])
def test_choice_of_the_kernel(name):
    assert choose_search(name, torch.device("cpu")) is native.native_search


def test_where_there_is_no_kernel_faiss_is_chosen_and_said(monkeypatch, caplog):
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.load_kernel.cache_clear()
    with caplog.at_level("INFO"):
        assert choose_search("auto", torch.device("cpu")) is faiss_search
    assert "search by faiss, as there is no C++ compiler no-such-compiler" in caplog.text
    with pytest.raises(ValueError, match="native: there is no C.. compiler no-such-compiler: choose --memory-search"):
        choose_search("native", torch.device("cpu"))


def test_faiss_that_is_not_installed_is_an_error_not_another_search(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert not search.has_faiss_gpu()
    with pytest.raises(ValueError, match="pip install faiss-cpu or faiss-gpu, or choose --memory-search torch"):
        choose_search("faiss", torch.device("cpu"))
    assert choose_search("torch", torch.device("cpu")) is torch_search


@pytest.mark.skipif(search.has_faiss_gpu(), reason="the installed faiss has GPU support")
def test_a_memory_on_a_gpu_needs_a_faiss_for_it():
    with pytest.raises(ValueError, match="no GPU support.*pip install faiss-gpu, or choose --memory-search torch"):
        choose_search("faiss", torch.device("cuda"))
    assert choose_search("torch", torch.device("cuda")) is torch_search

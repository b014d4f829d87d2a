"""Exact search against scoring every chunk: faiss, torch and native, on lanes filled in every way.

The Triton search, in its interpreter, has the tests that need few searches; ``test_triton_search.py`` has its own.
"""

import itertools
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import base, native
from longmem_fairseq.memory.search import torch as torch_search
from longmem_fairseq.memory.search import triton as triton_search
from longmem_fairseq.memory.search.base import (
    SearchBackend,
    check_search,
    choose_search,
    register_search,
    registered_searches,
)
from longmem_fairseq.memory.search.faiss import FaissSearch, has_faiss_gpu
from longmem_fairseq.memory.search.kernel import KernelUnavailable
from longmem_fairseq.memory.search.native import NativeSearch
from longmem_fairseq.memory.search.torch import TorchSearch
from longmem_fairseq.memory.search.triton import TritonSearch
from longmem_fairseq.modules.query_groups import group_queries, ungroup
from tests.memory.interpreter import needs_interpreter
from tests.memory.kernel import needs_kernel

H, D = 3, 5


def kernel_search(*arguments):
    """Search by the native kernel, also for few queries."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "FEWEST_QUERIES", 1)
        return NativeSearch()(*arguments)


SEARCHES = {"torch": TorchSearch(), "faiss": FaissSearch(), "native": kernel_search, "triton": TritonSearch()}
DEVICES = ["cpu"] + (["cuda"] if torch.cuda.is_available() and has_faiss_gpu() else [])
names = ["torch", "faiss", pytest.param("native", marks=needs_kernel)]
each_search = pytest.mark.parametrize("name", names)
each_search_and_interpreted = pytest.mark.parametrize("name", [*names, pytest.param("triton", marks=needs_interpreter)])
each_search_and_device = pytest.mark.parametrize(
    "name, device",
    [*itertools.product(names[:2], DEVICES), pytest.param("native", "cpu", marks=needs_kernel)],
)


def filled_bank(fills, N, C, seed=0, duplicates=False, dtype=torch.float32, device="cpu"):
    """Make a bank whose lane i joined a stream at token fills[i][0] and then got fills[i][1] tokens."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(len(fills), H, D, N * C, C, dtype, torch.device(device))
    # Slots that were never written would win every search.
    bank.means.fill_(1e6)
    for lane, (position, T) in enumerate(fills):
        bank.reset(lane, position)
        keys = torch.randn(H, T, D, generator=generator)
        if duplicates:
            keys = keys.sign()
        bank.append(lane, keys.to(device), keys.to(device))
    return bank


def check(bank, lanes, queries, n, slots):
    """The slots are those of the best chunks held, best first, each once, then -1."""
    B, _, T, _ = queries.shape
    assert slots.shape == (B, H, T, n) and slots.dtype == torch.int64
    for row, lane in enumerate(lanes):
        held = torch.tensor([slot for begin, end in bank.spans(lane) for slot in range(begin, end)], dtype=torch.int64)
        best_n = min(n, len(held))
        for head in range(H):
            scores = queries[row, head].float().cpu() @ bank.means[lane, head].cpu().T  # (T, N)
            best = scores[:, held].sort(dim=-1, descending=True).values[:, :best_n]
            of_head = slots[row, head].cpu()
            assert (of_head[:, best_n:] == -1).all()
            of_head = of_head[:, :best_n]
            assert torch.isin(of_head, held).all()
            for t in range(T):
                assert len(of_head[t].unique()) == best_n
            # Equal scores may be in any order, so scores are compared and not slots.
            torch.testing.assert_close(scores.gather(1, of_head), best, rtol=1e-5, atol=1e-5)


fills = st.lists(
    st.tuples(st.sampled_from([0, 0, 3, 8, 17]), st.integers(0, 60)), min_size=1, max_size=4
)  # (token at which a lane joined its stream, tokens that it got)


@each_search
@settings(max_examples=40)
@given(
    fills=fills,
    N=st.integers(1, 13),
    C=st.integers(1, 4),
    T=st.integers(1, 9),
    n=st.integers(1, 15),
    seed=st.integers(0, 10**6),
    duplicates=st.booleans(),
    data=st.data(),
)
def test_finds_the_best_chunks(name, fills, N, C, T, n, seed, duplicates, data):
    bank = filled_bank(fills, N, C, seed, duplicates)
    lanes = data.draw(st.lists(st.integers(0, len(fills) - 1), min_size=1, unique=True))
    queries = torch.randn(len(lanes), H, T, D, generator=torch.Generator().manual_seed(seed + 1))
    check(bank, lanes, queries, n, SEARCHES[name](bank, np.array(lanes), queries, n))


@each_search_and_device
def test_finds_the_best_of_many(name, device):
    """No size is round; one lane is full, one has wrapped, one is part-full, one was joined midway, one is empty."""
    fills = [(0, 997 * 3), (0, 5000), (0, 100), (997 * 3 - 30, 90), (0, 0)]
    bank = filled_bank(fills, 997, 3, device=device)
    assert [len(bank.spans(lane)) for lane in range(5)] == [1, 1, 1, 2, 0]
    queries = torch.randn(5, H, 63, D, generator=torch.Generator().manual_seed(1)).to(device)
    lanes = np.array([3, 1, 4, 0, 2])
    check(bank, lanes, queries, 17, SEARCHES[name](bank, lanes, queries, 17))


def test_empty_slots_are_masked_as_on_a_gpu():
    """A GPU scores all slots and learns from ``places`` which are filled; no size depends on what lanes hold."""
    fills = [(0, 97 * 3), (0, 500), (0, 10), (97 * 3 - 30, 90), (0, 0)]
    bank, lanes = filled_bank(fills, 97, 3), np.array([3, 1, 4, 0, 2])
    queries = torch.randn(5, H, 63, D, generator=torch.Generator().manual_seed(1))
    places = bank.places(lanes, queries.device)
    check(bank, lanes, queries, 17, torch_search.search_masked(bank, places, queries, 17))
    assert bank.places(lanes, queries.device) is places  # copied once for a batch
    queries[:] = float("nan")
    slots = torch_search.search_masked(bank, places, queries, 17)
    for row, lane in enumerate(lanes):
        held = [-1, *(slot for begin, end in bank.spans(lane) for slot in range(begin, end))]
        assert torch.isin(slots[row], torch.tensor(held)).all()
    bank.append(4, *torch.randn(2, H, 3, D))
    assert bank.places(lanes, queries.device).held.tolist() == [bank.held[lane] for lane in lanes]


@each_search_and_device
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_searched_in_float32(name, dtype, device):
    bank = filled_bank([(0, 30), (0, 11)], 8, 3, dtype=dtype, device=device)
    queries = torch.randn(2, H, 7, D, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    check(bank, [1, 0], queries, 4, SEARCHES[name](bank, np.array([1, 0]), queries, 4))


def test_blocks_of_queries_change_nothing(monkeypatch):
    bank = filled_bank([(0, 30), (5, 20)], 13, 2)
    queries = torch.randn(2, H, 63, D, generator=torch.Generator().manual_seed(1))
    search = TorchSearch()
    whole = search(bank, np.array([0, 1]), queries, 5)
    monkeypatch.setattr(torch_search, "SCORES_PER_BLOCK", H * 13 * 10)
    check(bank, [0, 1], queries, 5, search(bank, np.array([0, 1]), queries, 5))
    assert torch.equal(search(bank, np.array([0, 1]), queries, 5), whole)


@each_search_and_interpreted
def test_lanes_do_not_depend_on_each_other(name):
    """Each lane alone finds, bit by bit, what it finds in a batch."""
    bank = filled_bank([(0, 30), (4, 9), (0, 0), (0, 5)], 8, 3)
    queries = torch.randn(4, H, 7, D, generator=torch.Generator().manual_seed(1))
    together = SEARCHES[name](bank, np.array([2, 0, 3, 1]), queries, 4)
    for row, lane in enumerate([2, 0, 3, 1]):
        assert torch.equal(SEARCHES[name](bank, np.array([lane]), queries[row : row + 1], 4)[0], together[row])


@each_search_and_interpreted
def test_queries_that_are_not_numbers_find_nothing_outside_what_is_held(name):
    """A training that diverges must not read slots that were never written."""
    bank = filled_bank([(12, 9)], 11, 3)
    assert bank.spans(0) == ((4, 7),)
    slots = SEARCHES[name](bank, np.array([0]), torch.full((1, H, 2, D), float("nan")), 3)
    assert torch.isin(slots, torch.tensor([-1, 4, 5, 6])).all()


@each_search_and_interpreted
@pytest.mark.parametrize("power", [-140, -60, 100, 124])
def test_the_length_of_a_query_does_not_matter(name, power):
    """Scores of the long queries are above the largest float32, those of the short ones below the smallest."""
    bank = filled_bank([(0, 40), (40, 20)], 13, 3)
    bank.means *= 2.0**40
    queries = torch.randn(2, H, 20, D, generator=torch.Generator().manual_seed(1)).round(decimals=2)
    lanes = np.array([0, 1])
    expected = SEARCHES[name](bank, lanes, (queries * 4).round(), 5)
    assert torch.equal(SEARCHES[name](bank, lanes, (queries * 4).round() * 2.0**power, 5), expected)


@each_search_and_interpreted
def test_gradients_do_not_flow_through_the_search(name):
    bank = filled_bank([(0, 30)], 8, 3)
    slots = SEARCHES[name](bank, np.array([0]), torch.randn(1, H, 7, D).requires_grad_(), 4)
    assert not slots.requires_grad


@each_search_and_interpreted
def test_query_heads_share_a_kv_head(name):
    """9 query heads over 3 KV heads find what a loop over the query heads finds, each in its KV head's chunks."""
    bank, lanes = filled_bank([(0, 60), (5, 20), (0, 0)], 11, 3), np.array([1, 0, 2])
    queries = torch.randn(3, 9, 4, D, generator=torch.Generator().manual_seed(1))
    slots = ungroup(SEARCHES[name](bank, lanes, group_queries(queries, H), 5), 9)
    assert slots.shape == (3, 9, 4, 5)
    for row, lane in enumerate(lanes):
        held = [slot for begin, end in bank.spans(lane) for slot in range(begin, end)]
        for head in range(9):
            for t in range(4):
                scores = bank.means[lane, head // 3] @ queries[row, head, t]
                expected = sorted(held, key=lambda slot, scores=scores: -float(scores[slot]))[:5]
                assert slots[row, head, t].tolist() == expected + [-1] * (5 - len(expected))


# --- the choice


CPU, GPU = torch.device("cpu"), torch.device("cuda:0")


def test_choice_by_name():
    assert isinstance(choose_search("torch", CPU), TorchSearch)
    assert isinstance(choose_search("faiss", CPU), FaissSearch)
    assert [choose_search(name, CPU).name for name in ("torch", "faiss")] == ["torch", "faiss"]
    for refuse in (check_search, lambda name: choose_search(name, CPU)):
        with pytest.raises(ValueError, match="--memory-search annoy is unknown: choose auto, .*faiss.* or "):
            refuse("annoy")
    message = "--memory-search native is not available: it searches main memory, but the memory is on cuda:0; .*torch$"
    with pytest.raises(ValueError, match=message):
        choose_search("native", GPU)


@needs_kernel
@pytest.mark.parametrize("name", ["auto", "native"])
def test_choice_of_the_kernel(name):
    assert isinstance(choose_search(name, CPU), NativeSearch)


def test_without_a_kernel_faiss_is_chosen_and_the_log_says_why(monkeypatch, caplog):
    def no_kernel():
        raise KernelUnavailable("it was not compiled on the machine of this test")

    monkeypatch.setattr(native, "Kernel", no_kernel)
    with caplog.at_level("INFO"):
        for _ in range(2):
            assert isinstance(choose_search("auto", CPU), FaissSearch)
    reason = "it was not compiled on the machine of this test"
    assert caplog.text.count(f"search by faiss, as native is not available: {reason}") == 1
    with pytest.raises(ValueError) as error:
        choose_search("native", CPU)
    assert f"--memory-search native is not available: {reason}; choose --memory-search " in str(error.value)


def test_choice_on_a_gpu(monkeypatch, caplog):
    monkeypatch.setattr(FaissSearch, "unavailable", classmethod(lambda cls, device: None))
    monkeypatch.setattr(triton_search, "missing_triton", lambda: None)
    assert [type(choose_search(name, GPU)) for name in ("auto", "triton", "faiss")] == [
        *(TritonSearch, TritonSearch, FaissSearch)
    ]
    monkeypatch.setattr(triton_search, "missing_triton", lambda: "Triton finds no compiler in this test")
    with caplog.at_level("INFO"):
        assert isinstance(choose_search("auto", GPU), FaissSearch)
    assert "search by faiss, as triton is not available: Triton finds no compiler in this test" in caplog.text
    with pytest.raises(ValueError, match="triton is not available: it searches the memory of a GPU, but .* on cpu; "):
        choose_search("triton", CPU)


def test_faiss_that_is_not_installed_is_an_error_not_another_search(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert not has_faiss_gpu()
    for name in ("auto", "faiss", "native"):
        message = f"{name} is not available: it needs faiss .pip install faiss-cpu or faiss-gpu.; choose .* torch"
        with pytest.raises(ValueError, match=message):
            choose_search(name, CPU)
    assert isinstance(choose_search("torch", CPU), TorchSearch)


@pytest.mark.skipif(has_faiss_gpu(), reason="the installed faiss has GPU support")
@pytest.mark.parametrize("name", ["auto", "faiss"])
def test_a_memory_on_a_gpu_needs_a_faiss_for_it(name):
    with pytest.raises(ValueError, match=f"{name} is not available: .*no GPU support.*pip install faiss-gpu.*torch$"):
        choose_search(name, GPU)
    assert isinstance(choose_search("torch", GPU), TorchSearch)


# --- the registry


@pytest.fixture
def newest():
    """A backend of a third party, in place of the registry that the tests share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "BACKENDS", dict(base.BACKENDS))

        @register_search("newest")
        class Newest(SearchBackend):
            """The newest chunks, whatever the queries."""

            @classmethod
            def unavailable(cls, device):
                return None if device.type == "cpu" else "it is a toy"

            def __call__(self, bank, lanes, queries, n):
                slots = torch.from_numpy(bank.written[lanes, None] - 1 - np.arange(n)) % bank.chunks
                return slots[:, None, None].expand(*queries.shape[:3], n)

        yield Newest


def test_a_registered_backend_is_chosen_by_its_name(newest):
    assert newest.name == "newest" and registered_searches()[0] == "auto" and registered_searches()[-1] == "newest"
    search = choose_search("newest", CPU)
    slots = search(filled_bank([(0, 60)], 11, 3), np.array([0]), torch.randn(1, H, 2, D), 3)
    assert slots[0, 0, 0].tolist() == [8, 7, 6] and search.recall is None  # 20 chunks in 11 slots
    with pytest.raises(ValueError, match="--memory-search newest is not available: it is a toy; choose .*torch"):
        choose_search("newest", GPU)
    with pytest.raises(ValueError, match="--memory-search annoy is unknown: choose auto, .* or newest"):
        choose_search("annoy", CPU)


@pytest.mark.parametrize("name", ["auto", "torch", "newest"])
def test_a_name_is_registered_once(newest, name):
    with pytest.raises(ValueError, match=f"a search backend is registered as {name} already"):
        register_search(name)(newest)


def test_only_search_backends_are_registered():
    with pytest.raises(ValueError, match="object is not a subclass of SearchBackend"):
        register_search("object")(object)


def test_a_backend_searches_no_lists_unless_it_says_so():
    assert TorchSearch().list_search(100, D) is None

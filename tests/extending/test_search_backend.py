"""A search backend in one class, registered by a user directory; it is compared with the search by torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import base
from longmem_fairseq.memory.search.base import SearchBackend, choose_search, register_search
from tests.extending.commands import ADAPT, Commands, check_answers, check_perplexities, stock_backbone, stock_reference
from tests.fairseq_runs import finish, weights


class LoopSearch(SearchBackend):
    """Exact search, one lane, head and query at a time."""

    @classmethod
    def unavailable(cls, device):
        return None if device.type == "cpu" else f"it searches in main memory, but the memory is on {device}"

    def __call__(self, bank, lanes, queries, n):
        slots = torch.full((*queries.shape[:3], n), -1, dtype=torch.int64)
        for row, lane in enumerate(lanes.tolist()):
            held = torch.tensor([slot for span in bank.spans(lane) for slot in range(*span)], dtype=torch.int64)
            for head, heads_queries in enumerate(queries[row]):
                for t, query in enumerate(heads_queries):
                    scores = bank.means[lane, head, held] @ query.float()
                    best = scores.argsort(descending=True)[:n]
                    slots[row, head, t, : len(best)] = held[best]
        return slots


REGISTRATION = """
import longmem_fairseq
from longmem_fairseq.memory.search.base import register_search
from tests.extending.test_search_backend import LoopSearch

register_search("loop")(LoopSearch)
"""


@pytest.fixture
def registered(monkeypatch):
    """Register the backend for one test, so that others do not see its name."""
    monkeypatch.setattr(base, "BACKENDS", dict(base.BACKENDS))
    register_search("loop")(LoopSearch)


@settings(max_examples=30)
@given(
    lengths=st.tuples(*[st.integers(0, 100)] * 3),
    groups=st.integers(1, 3),
    n=st.integers(1, 12),
    seed=st.integers(0, 99),
)
def test_finds_what_torch_finds(lengths, groups, n, seed):
    """Lanes may be empty, partly filled, or full and overwritten; ``groups`` query heads share a KV head."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(lanes=3, heads=2, head_dim=5, memory_size=40, chunk_size=4)
    for lane, length in enumerate(lengths):
        bank.append(lane, *torch.randn(2, 2, length, 5, generator=generator))
    lanes = np.array([2, 0, 1])
    n = min(n, int(bank.held.max()))
    if n:
        queries = torch.randn(3, 2, groups * 7, 5, generator=generator)
        expected = choose_search("torch", torch.device("cpu"))(bank, lanes, queries, n)
        assert torch.equal(LoopSearch()(bank, lanes, queries, n), expected)


def test_is_chosen_by_its_name(registered):
    assert isinstance(choose_search("loop", torch.device("cpu")), LoopSearch)
    with pytest.raises(ValueError, match="--memory-search lop is unknown.* loop"):
        choose_search("lop", torch.device("cpu"))
    with pytest.raises(ValueError, match="--memory-search loop is not available: it searches in main memory"):
        choose_search("loop", torch.device("cuda"))


@pytest.fixture(scope="module")
def commands(tiny_data, tmp_path_factory):
    return Commands(tmp_path_factory.mktemp("search"), tiny_data, "loop_search", REGISTRATION)


@pytest.fixture(scope="module")
def checkpoint(commands):
    """A model trained with the new search, which is the same as one trained with torch's."""
    options = [*ADAPT, "--pretrained-model-path", stock_backbone(commands.directory / "backbone.pt"), "--save-backbone"]
    trainings = {name: commands.start_training(name, *options, "--memory-search", name) for name in ("loop", "torch")}
    for name, training in trainings.items():
        assert f"search by {name}" in finish(training)
    loop, expected = (weights(commands.directory / name / "checkpoint_last.pt") for name in ("loop", "torch"))
    assert loop.keys() == expected.keys()
    for name in expected:
        assert torch.equal(loop[name], expected[name]), name
    return commands.directory / "loop" / "checkpoint_last.pt"


def test_evaluates_as_the_reference(commands, checkpoint):
    """The search comes from the checkpoint."""
    output = finish(commands.start_evaluation(checkpoint, "results"))
    assert "search by loop" in output
    check_perplexities(commands.perplexities("results"), lambda: stock_reference(checkpoint))


def test_generates_as_the_reference(commands, checkpoint):
    check_answers(commands.generate(checkpoint), lambda: stock_reference(checkpoint))

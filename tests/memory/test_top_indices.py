"""Two-level selection against topk."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import torch as torch_search
from longmem_fairseq.memory.search.torch import TorchSearch, top_indices


@given(
    N=st.integers(1, 2000),
    n=st.integers(1, 8),
    rows=st.integers(1, 5),
    seed=st.integers(0, 10**6),
    levels=st.sampled_from([0, 3, 50]),
    hidden=st.integers(0, 500),
)
def test_finds_what_topk_finds(N, n, rows, seed, levels, hidden):
    """All scores differ (levels 0), or many are equal; some columns are hidden."""
    n = min(n, N)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, rows, N, generator=generator)
    if levels:
        scores = (scores * levels).round()
    scores[..., : min(hidden, N - n)] = float("-inf")
    columns = top_indices(scores, n)
    assert columns.shape == (2, rows, n) and columns.dtype == torch.int64
    assert columns.min() >= min(hidden, N - n) and columns.max() < N
    assert all(len(row.unique()) == n for row in columns.flatten(0, 1))
    assert torch.equal(scores.gather(-1, columns), scores.topk(n, dim=-1).values)


@pytest.mark.parametrize("N", [64 * 40, 64 * 40 + 1, 64 * 41 - 1])
def test_the_last_columns_are_found(N):
    """The last block may be smaller than the others."""
    scores = -torch.rand(1, N)
    scores[0, N - 5 :] = torch.tensor([1.0, 3.0, 2.0, 5.0, 4.0])
    assert (top_indices(scores, 5) - (N - 5)).tolist() == [[3, 4, 1, 2, 0]]


def test_scores_that_are_not_numbers_come_first_but_never_from_outside():
    scores = torch.full((3, 64 * 20 + 7), float("-inf"))
    scores[:, 700:703] = float("nan")
    assert (top_indices(scores, 3).sort().values == torch.tensor([700, 701, 702])).all()


@pytest.mark.parametrize("budget", [1, 5000, 3 * 2000 * 4])
def test_the_size_of_a_block_changes_nothing(monkeypatch, budget):
    """A few queries, heads or lanes at a time find the same chunks."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(3, 2, 5, 2000, 1)
    for lane in range(3):
        keys = torch.randn(2, 2100, 5, generator=generator)
        bank.append(lane, keys, keys)
    queries = torch.randn(3, 2, 9, 5, generator=generator)
    lanes = torch.tensor([2, 0, 1]).numpy()
    search = TorchSearch()
    whole = search(bank, lanes, queries, 4)
    monkeypatch.setattr(torch_search, "SCORES_PER_BLOCK", budget)
    assert torch.equal(search(bank, lanes, queries, 4), whole)

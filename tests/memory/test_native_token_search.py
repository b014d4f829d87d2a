"""The native search of token memories against plain products and a sort, with each set of instructions."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.search.native_token_search import NativeTokenSearch
from tests.memory.kernel import each_instructions, needs_kernel


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1).half()


def check(instructions, table, queries, n, causal=False):
    """The entries for queries (T, D) of a table in pieces have the n largest products, and no others are found."""
    scores, numbers = (x[0] for x in NativeTokenSearch(instructions)([table], queries[None], n, causal))
    entries, T = torch.cat(table).double(), len(queries)
    exact = queries.double() @ entries.T
    if causal:
        readable = torch.arange(len(entries) - T, len(entries))[:, None]
        exact = exact.masked_fill(torch.arange(len(entries)) >= readable, float("-inf"))
    exact = torch.cat([exact, exact.new_full((T, n), float("-inf"))], dim=1)  # where there are fewer
    absent = scores.isneginf()
    assert torch.equal(numbers < 0, absent)
    products = exact.gather(1, numbers.clamp(min=0)).masked_fill(absent, float("-inf"))
    torch.testing.assert_close(scores.double(), products, atol=2e-6, rtol=0)
    torch.testing.assert_close(scores.double().sort(descending=True).values, exact.topk(n).values, atol=2e-6, rtol=0)
    assert all((row[row >= 0].diff() > 0).all() for row in numbers), "in the order of the table, none twice"
    return numbers


@each_instructions
@settings(max_examples=60)
@given(
    pieces=st.lists(st.integers(0, 400), min_size=1, max_size=3),
    D=st.sampled_from([1, 7, 8, 16, 33, 64, 100, 1030]),
    T=st.integers(1, 70),
    n=st.integers(1, 300),
    seed=st.integers(0, 10**6),
    common=st.sampled_from([0.0, 1.0, 30.0]),
    coarse=st.booleans(),
    causal=st.booleans(),
    threads=st.integers(1, 3),
)
def test_finds_the_largest_products(instructions, pieces, D, T, n, seed, common, coarse, causal, threads):
    """States around one direction, or none; many equal ones; zeros; fewer entries than are to be found."""
    generator = torch.Generator().manual_seed(seed)
    if causal:
        pieces = [*pieces, T]
    states = torch.randn(sum(pieces) + T, D, generator=generator) + common * torch.randn(1, D, generator=generator)
    if coarse:
        states = states.round().clamp(-1, 1)
    states = unit(states)
    table, queries = states[: sum(pieces)].split(pieces), (states[-T:] if not causal else states[sum(pieces) - T :][:T])
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check(instructions, table, queries.float(), n, causal)
    finally:
        torch.set_num_threads(before)


@each_instructions
@pytest.mark.parametrize("T", [3, 40])
def test_a_sample_that_misleads(instructions, T):
    """Every second entry, which the sample takes, is much nearer to the queries than the others, or much farther."""
    generator = torch.Generator().manual_seed(0)
    noise, direction = torch.randn(10_000, 24, generator=generator), torch.randn(24, generator=generator)
    for nearer in (0, 1):
        states = noise.clone()
        states[nearer::2] += 2 * direction
        check(instructions, [unit(states)], unit(direction + noise[:T] / 9).float(), 100)


@each_instructions
@pytest.mark.parametrize("T", [1, 40])
def test_of_equal_entries_the_oldest_are_found(instructions, T):
    """More of them than are kept at a time, in one thread and in several."""
    table = unit(torch.ones(9_000, 16))
    table[::3] = -table[::3]
    queries = torch.ones(T, 16) / 4
    expected = [i for i in range(9_000) if i % 3][:70]
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            numbers = check(instructions, table.split(5_000), queries, 70)
            assert numbers.tolist() == [expected] * T
    finally:
        torch.set_num_threads(threads)


@each_instructions
@pytest.mark.parametrize("T", [2, 40])
def test_what_is_not_finite_is_not_found(instructions, T):
    table, queries = unit(torch.randn(500, 8)), torch.randn(T, 8)
    table[7], table[9, 3], queries[1] = float("nan"), float("inf"), float("nan")
    _, numbers = NativeTokenSearch(instructions)([[table]], queries[None], 500, False)
    assert numbers[0, 0, :498].tolist() == sorted(set(range(500)) - {7, 9}) and (numbers[0, 0, 498:] == -1).all()
    assert (numbers[0, 1] == -1).all()


@needs_kernel
def test_rows_of_a_batch_are_searched_as_if_alone():
    generator = torch.Generator().manual_seed(0)
    tables = [[unit(torch.randn(m, 20, generator=generator))] for m in (50, 3_000, 300)]
    queries = torch.randn(3, 40, 20, generator=generator)
    scores, numbers = NativeTokenSearch()(tables, queries, 100, False)
    for row, table in enumerate(tables):
        alone = NativeTokenSearch()([table], queries[row : row + 1], 100, False)
        assert torch.equal(scores[row], alone[0][0]) and torch.equal(numbers[row], alone[1][0])

"""The token memory's ring against lists, and its search against loops over the definition."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory import token_search
from longmem_fairseq.memory.token_bank import TokenBank, stored
from longmem_fairseq.memory.token_search import TokenStates, read_segments, read_windows

D, N, V = 4, 7, 5


def text(length: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return stored(torch.randn(length, D, generator=generator)), torch.randint(0, V, (length,), generator=generator)


@given(pieces=st.lists(st.integers(0, 20), min_size=1, max_size=6), start=st.integers(0, 30), way=st.integers(0, 3))
def test_a_lane_holds_the_newest_tokens_whatever_the_pieces(pieces, start, way):
    hidden, tokens = text(sum(pieces))
    bank = TokenBank(2, D, N)
    bank.append(0, *text(3, seed=1))
    bank.append(1, *text(5, seed=2))
    bank.reset(0, start)
    for h, x in zip(hidden.split(pieces), tokens.split(pieces)):
        bank.append(0, h, x)
    if way == 1:
        bank = copy.deepcopy(bank)
    elif way == 2:
        other = TokenBank(2, D, N)
        other.append(0, *text(9, seed=3))
        tensors, counters = bank.state()
        other.restore({name: x.clone() for name, x in tensors.items()}, counters)
        bank = other
    elif way == 3:
        single = TokenBank(1, D, N)
        single.reset(0, start)
        single.append(0, hidden, tokens)
        bank.reset(0)
        bank.load(0, single)
    held = min(sum(pieces), N)
    got_hidden, got_tokens = bank.contents(0)
    assert bank.held[0] == held and bank.position[0] == start + sum(pieces)
    assert got_tokens.tolist() == tokens[len(tokens) - held :].tolist()
    assert torch.equal(got_hidden, hidden[len(hidden) - held :])
    for i in range(held):  # token i of a stream is in slot i mod N
        number = start + len(tokens) - held + i
        assert bank.tokens[0, number % N] == got_tokens[i]
    assert bank.contents(1)[1].tolist() == text(5, seed=2)[1].tolist()  # the other lane stays as it was


@settings(max_examples=25)
@given(
    past=st.integers(0, 12),
    T=st.integers(1, 6),
    n=st.integers(1, 20),
    block=st.sampled_from([1, 1 << 24]),
    seed=st.integers(0, 99),
)
def test_every_token_finds_the_nearest_before_it(past, T, n, block, seed):
    hidden, tokens = text(past + T, seed)
    bank = TokenBank(3, D, N)
    bank.append(2, hidden[:past], tokens[:past])
    states = TokenStates(hidden[None, past:], tokens[None, past:])
    kept, token_search.SCORES_AT_ONCE = token_search.SCORES_AT_ONCE, block
    try:
        reads = read_segments([bank.contents(2)], states, n)
    finally:
        token_search.SCORES_AT_ONCE = kept
    unit = hidden.double()
    for t in range(T):
        number = past + t
        readable = range(max(0, past - N), number)  # what the ring holds, and the segment so far
        best = sorted(((float(unit[number] @ unit[i]), int(tokens[i + 1])) for i in readable), reverse=True)[:n]
        assert reads.sizes[0, t] == len(readable)
        scores = [score for score in reads.scores[0, t].tolist() if score > -float("inf")]
        assert scores == pytest.approx([score for score, _ in best], abs=1e-5)
        assert reads.followers[0, t, : len(best)].tolist() == [token for _, token in best]
        assert not reads.followers[0, t, len(best) :].any()


@settings(max_examples=25)
@given(
    pasts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    n=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_last_token_of_a_window_finds_what_it_finds_in_a_segment(pasts, lengths, n, seed):
    groups, rows = [], [i % len(pasts) for i in range(3)]  # rows that share a past
    for number, past in enumerate(pasts):
        hidden, tokens = text(past, seed + number)
        groups.append(([row for row in range(3) if rows[row] == number], (hidden, tokens)))
    windows = [text(length, seed + 10 + row) for row, length in enumerate(lengths)]
    S = max(lengths)
    hidden, tokens = torch.ones(3, S, D).half(), torch.ones(3, S, dtype=torch.int64)  # padding on the left
    for row, (h, x) in enumerate(windows):
        hidden[row, S - len(x) :], tokens[row, S - len(x) :] = h, x
    reads = read_windows(groups, TokenStates(hidden, tokens), torch.tensor(lengths), n)
    for row, (h, x) in enumerate(windows):
        expected_reads = read_segments([groups[rows[row]][1]], TokenStates(h[None], x[None]), n)
        torch.testing.assert_close(reads.scores[row, 0], expected_reads.scores[0, -1])
        assert torch.equal(reads.followers[row, 0], expected_reads.followers[0, -1])
        assert reads.sizes[row, 0] == expected_reads.sizes[0, -1]

"""Reading a token memory against loops over the definition, with each search."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.search import torch_token_search
from longmem_fairseq.memory.search.native_token_search import NativeTokenSearch
from longmem_fairseq.memory.search.torch_token_search import TorchTokenSearch
from longmem_fairseq.memory.token_bank import Past, TokenBank, TokenStates
from longmem_fairseq.memory.token_reader import TokenReader, choose_token_search
from tests.memory.kernel import needs_kernel
from tests.memory.test_token_bank import D, N, text

CPU = torch.device("cpu")
each_search = pytest.mark.parametrize("search", [TorchTokenSearch, pytest.param(NativeTokenSearch, marks=needs_kernel)])


def entries_of(reads, row, t):
    """Scores that one token reads, best first, and their followers."""
    scores, order = reads.scores[row, t].sort(descending=True)
    followers, present = reads.followers[row, t, order], ~scores.isneginf()
    assert not followers[~present].any()
    return scores[present].tolist(), followers[present].tolist()


@each_search
@settings(max_examples=25)
@given(
    past=st.integers(0, 12),
    T=st.integers(1, 6),
    n=st.integers(1, 20),
    block=st.sampled_from([1, 1 << 24]),
    seed=st.integers(0, 99),
)
def test_every_token_finds_the_nearest_before_it(search, past, T, n, block, seed):
    hidden, tokens = text(past + T, seed)
    bank = TokenBank(3, D, N)
    bank.append(2, hidden[:past], tokens[:past])
    states = TokenStates(hidden[None, past:], tokens[None, past:])
    kept, torch_token_search.SCORES_AT_ONCE = torch_token_search.SCORES_AT_ONCE, block
    try:
        reads = TokenReader(search(), n).read_segments([bank.past(2)], states)
    finally:
        torch_token_search.SCORES_AT_ONCE = kept
    unit = hidden.double()
    for t in range(T):
        number = past + t
        readable = range(max(0, past - N), number)  # what the ring holds, and the segment so far
        best = sorted(((float(unit[number] @ unit[i]), int(tokens[i + 1])) for i in readable), reverse=True)[:n]
        assert reads.sizes[0, t] == len(readable)
        scores, followers = entries_of(reads, 0, t)
        assert scores == pytest.approx([score for score, _ in best], abs=1e-5)
        assert followers == [token for _, token in best]


@each_search
@settings(max_examples=25)
@given(
    pasts=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    lengths=st.lists(st.integers(1, 5), min_size=3, max_size=3),
    n=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_the_last_token_of_a_window_finds_what_it_finds_in_a_segment(search, pasts, lengths, n, seed):
    reader, groups, rows = TokenReader(search(), n), [], [i % len(pasts) for i in range(3)]  # rows that share a past
    for number, past in enumerate(pasts):
        hidden, tokens = text(past, seed + number)
        pieces = hidden.split([past // 3, past - past // 3])
        groups.append(([row for row in range(3) if rows[row] == number], Past(pieces, tokens)))
    windows = [text(length, seed + 10 + row) for row, length in enumerate(lengths)]
    S = max(lengths)
    hidden, tokens = torch.ones(3, S, D).half(), torch.ones(3, S, dtype=torch.int64)  # padding on the left
    for row, (h, x) in enumerate(windows):
        hidden[row, S - len(x) :], tokens[row, S - len(x) :] = h, x
    reads = reader.read_windows(groups, TokenStates(hidden, tokens), torch.tensor(lengths))
    for row, (h, x) in enumerate(windows):
        expected = reader.read_segments([groups[rows[row]][1]], TokenStates(h[None], x[None]))
        scores, followers = entries_of(reads, row, 0)
        expected_scores, expected_followers = entries_of(expected, 0, len(x) - 1)
        assert scores == pytest.approx(expected_scores, abs=1e-6) and followers == expected_followers
        assert reads.sizes[row, 0] == expected.sizes[0, -1]


@needs_kernel
@pytest.mark.parametrize(
    "name, device, dtype, width, reason",
    [
        ("auto", "cpu", torch.float16, 8192, None),
        ("native", "cpu", torch.float16, 64, None),
        ("faiss", "cpu", torch.float16, 64, None),
        ("auto", "cpu", torch.float64, 64, "it searches numbers in float16, but the token memory holds float64"),
        ("native", "cuda", torch.float16, 64, "it searches main memory, but the token memory is on cuda"),
        ("auto", "cpu", torch.float16, 8193, "it searches hidden states of width 8,192 or less, and this is 8,193"),
    ],
)
def test_the_search_is_chosen_and_what_cannot_be_is_logged(caplog, name, device, dtype, width, reason):
    caplog.set_level(logging.INFO, "longmem_fairseq")
    search = choose_token_search(name, torch.device(device), dtype, width)
    native = reason is None and name != "faiss"
    assert type(search) is (NativeTokenSearch if native else TorchTokenSearch)
    assert (reason is None) == (not caplog.messages) and all(reason in message for message in caplog.messages)

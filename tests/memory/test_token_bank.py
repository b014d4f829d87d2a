"""The token memory's ring against lists."""

import copy

import torch
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.memory.token_bank import TokenBank, stored

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
    past = bank.past(0)
    assert torch.equal(torch.cat([got_hidden[:0], *past.hidden]), got_hidden) and torch.equal(past.tokens, got_tokens)
    assert all(piece.untyped_storage().data_ptr() == bank.hidden.data_ptr() for piece in past.hidden), "not a copy"
    for i in range(held):  # token i of a stream is in slot i mod N
        number = start + len(tokens) - held + i
        assert bank.tokens[0, number % N] == got_tokens[i]
    assert bank.contents(1)[1].tolist() == text(5, seed=2)[1].tolist()  # the other lane stays as it was

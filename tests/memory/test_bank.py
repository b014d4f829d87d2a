"""The memory bank against lists: whatever is given to it in whatever pieces, it holds the newest whole chunks."""

from typing import Dict, List

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank

H, D = 2, 3


def tokens_of(stream: int, begin: int, end: int):
    """Keys and values (H, end - begin, D) of a stream's tokens: every number occurs once."""
    numbers = torch.arange(begin, end, dtype=torch.float32) + 1000 * stream
    base = numbers[None, :, None] * 8 + torch.arange(H)[:, None, None] * 4 + torch.arange(D)
    return base + 0.25, -base


class ListBank:
    """The same, by lists of token numbers: what a memory of N chunks holds of one lane."""

    def __init__(self, N: int, C: int):
        self.N, self.C = N, C
        self.restart(0, 0)

    def restart(self, stream: int, position: int):
        self.stream, self.position = stream, position
        self.waiting: List[int] = []
        self.chunks: Dict[int, List[int]] = {}  # number of the chunk -> numbers of its tokens, oldest first

    def append(self, T: int):
        for _ in range(T):
            if self.waiting or self.position % self.C == 0:  # else the rest of a chunk whose start was missed
                self.waiting.append(self.position)
            self.position += 1
            if len(self.waiting) == self.C:
                self.chunks[self.waiting[0] // self.C] = self.waiting
                self.waiting = []
                if len(self.chunks) > self.N:
                    del self.chunks[min(self.chunks)]

    def evict(self, n: int):
        for _ in range(min(n, len(self.chunks))):
            del self.chunks[min(self.chunks)]


def held(bank: MemoryBank, lane: int) -> Dict[int, int]:
    """Number of each chunk that a lane holds -> its slot, by the bank's own spans."""
    slots = [slot for begin, end in bank.spans(lane) for slot in range(begin, end)]
    numbers = bank.chunk_numbers(np.array([lane]), torch.tensor([slots], dtype=torch.int64))[0].tolist()
    assert len(slots) == len(set(numbers)) == bank.held[lane]
    return dict(zip(numbers, slots))


def check(bank: MemoryBank, lane: int, expected: ListBank):
    """A lane of the bank holds exactly what the lists hold, slot by slot."""
    slot_of = held(bank, lane)
    assert sorted(slot_of) == sorted(expected.chunks)
    assert bank.position[lane] == expected.position
    for number, slot in slot_of.items():
        assert slot == number % bank.chunks
        chunk = expected.chunks[number]
        keys, values = tokens_of(expected.stream, chunk[0], chunk[-1] + 1)
        assert torch.equal(bank.keys[lane, :, slot], keys)
        assert torch.equal(bank.values[lane, :, slot], values)
        torch.testing.assert_close(bank.means[lane, :, slot], keys.mean(dim=1))
    # the same again in the order of the stream, for those who save or continue it
    slots = [slot_of[number] for number in sorted(slot_of)]
    for copied, of_slots in zip(bank.contents(lane), (bank.keys, bank.values, bank.means)):
        assert torch.equal(copied, of_slots[lane][:, slots])
    tokens = [token for number in sorted(expected.chunks) for token in expected.chunks[number]] + expected.waiting
    for copied, of_stream in zip(bank.tokens(lane), tokens_of(expected.stream, 0, expected.position)):
        assert torch.equal(copied, of_stream[:, tokens])


events = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 2), st.integers(0, 50)),
        st.tuples(st.just("append"), st.integers(0, 2), st.integers(0, 50)),
        st.tuples(st.just("evict"), st.integers(0, 2), st.integers(0, 9)),
        st.tuples(st.just("reset"), st.integers(0, 2), st.sampled_from([0, 0, 0, 1, 2, 5, 7, 30, 31])),
    ),
    max_size=12,
)


@settings(max_examples=100)
@given(C=st.integers(1, 5), size=st.integers(0, 40), events=events)
def test_holds_what_lists_hold(C, size, events):
    bank = MemoryBank(3, H, D, C + size, C)
    lists = [ListBank((C + size) // C, C) for _ in range(3)]
    for stream, (event, lane, n) in enumerate(events, start=1):
        if event == "append":
            begin = lists[lane].position
            bank.append(lane, *tokens_of(lists[lane].stream, begin, begin + n))
            lists[lane].append(n)
        elif event == "evict":
            bank.evict(lane, n)
            lists[lane].evict(n)
        else:
            bank.reset(lane, n)
            lists[lane].restart(stream, n)
        for i, expected in enumerate(lists):  # the other lanes are as they were
            check(bank, i, expected)


@given(C=st.integers(1, 4), N=st.integers(1, 6), pieces=st.lists(st.integers(0, 20), max_size=8))
def test_segmentation_does_not_matter(C, N, pieces):
    """The same tokens in other pieces: the same bytes in the same slots."""
    T = sum(pieces)
    banks = [MemoryBank(1, H, D, N * C, C) for _ in range(3)]
    for bank, cuts in zip(banks, (pieces, [T], [1] * T)):
        begin = 0
        for n in cuts:
            bank.append(0, *tokens_of(0, begin, begin + n))
            begin += n
    for bank in banks[1:]:
        assert bank.spans(0) == banks[0].spans(0)
        for begin, end in bank.spans(0):
            for name in ("keys", "values", "means"):
                assert torch.equal(getattr(bank, name)[:, :, begin:end], getattr(banks[0], name)[:, :, begin:end])


def test_keys_and_values_in_half_precision_have_float32_means():
    bank = MemoryBank(1, 1, 1, 4, 2, torch.float16)
    keys = torch.tensor([[[2049.0], [1.0]]])  # 2049 is no float16: 2048 is what is kept, and what is averaged
    bank.append(0, keys, keys)
    assert bank.keys.dtype == bank.values.dtype == torch.float16 and bank.means.dtype == torch.float32
    assert bank.keys[0, 0, 0, :, 0].tolist() == [2048.0, 1.0]
    assert bank.means[0, 0, 0].tolist() == [1024.5]


def test_means_before_rounding_where_asked():
    """As the released LongMem takes them: also of a chunk that two segments share."""
    bank = MemoryBank(1, 1, 1, 8, 2, torch.float16, exact_means=True)
    keys = torch.tensor([[[2049.0], [1.0], [2049.0]]])
    bank.append(0, keys, keys)
    bank.append(0, keys[:, 1:2], keys[:, 1:2])
    assert bank.keys[0, 0, :2, :, 0].tolist() == [[2048.0, 1.0], [2048.0, 1.0]]
    assert bank.means[0, 0, :2, 0].tolist() == [1025.0, 1025.0]


@given(
    L=st.integers(1, 3),
    heads=st.integers(1, 3),
    d=st.integers(1, 8),
    size=st.integers(5, 60),
    C=st.integers(1, 5),
    dtype=st.sampled_from([(torch.float32, 4), (torch.float16, 2), (torch.bfloat16, 2)]),
)
def test_bytes(L, heads, d, size, C, dtype):
    """The documented formula, and nothing else of any size is held."""
    bank = MemoryBank(L, heads, d, size, C, dtype[0])
    N = size // C
    of_a_token = 2 * d * dtype[1]
    assert bank.nbytes == L * heads * N * (C * of_a_token + 4 * d) + L * heads * C * of_a_token
    tensors = [x for x in vars(bank).values() if isinstance(x, torch.Tensor)]
    assert sum(x.untyped_storage().nbytes() for x in tensors) == bank.nbytes


def test_memory_is_bounded_and_allocated_once():
    bank = MemoryBank(1, H, D, 8, 2)
    addresses = [x.data_ptr() for x in (bank.keys, bank.values, bank.means)]
    for begin in range(0, 200, 20):
        bank.append(0, *tokens_of(0, begin, begin + 20))
    assert addresses == [x.data_ptr() for x in (bank.keys, bank.values, bank.means)]
    assert sorted(held(bank, 0)) == [96, 97, 98, 99]


@pytest.mark.parametrize("size, C", [(3, 4), (0, 1), (-5, 2)])
def test_a_memory_without_a_chunk_is_refused(size, C):
    message = f"memory of {size} tokens has no room for a chunk of {C}.*--memory-size.*--chunk-size"
    with pytest.raises(ValueError, match=message):
        MemoryBank(1, H, D, size, C)


def test_a_chunk_without_a_token_is_refused():
    with pytest.raises(ValueError, match="--chunk-size 0: a chunk has at least one token"):
        MemoryBank(1, H, D, 4, 0)


def test_numbers_of_chunks_have_the_shape_of_the_slots():
    bank = MemoryBank(2, H, D, 6, 2)  # 3 slots
    for lane, T in ((0, 4), (1, 10)):
        bank.append(lane, *tokens_of(lane, 0, T))
    slots = torch.tensor([[[0, 1], [1, 0]], [[0, 1], [2, 2]]])
    numbers = bank.chunk_numbers(np.array([0, 1]), slots)
    assert numbers.tolist() == [[[0, 1], [1, 0]], [[3, 4], [2, 2]]]

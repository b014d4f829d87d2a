"""The memory that all rows share: what a batch adds, what leaves, and when it is reset."""

import numpy as np
import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.lane_streams import MemoryOutOfStep
from longmem_fairseq.memory.reader import ChunkReader
from longmem_fairseq.memory.search.torch import TorchSearch
from longmem_fairseq.modules.memory_attention import naive_memory_attention, row_memory_attention
from longmem_fairseq.released.shared_memory import SharedMemory

HEADS, WIDTH, CHUNK, CAPACITY = 2, 4, 3, 8  # of chunks


def new_memory(dtype=torch.float32, attention=naive_memory_attention, **options):
    bank = MemoryBank(1, HEADS, WIDTH, CAPACITY * CHUNK + 2, CHUNK, dtype, exact_means=True)
    return SharedMemory(bank, ChunkReader(TorchSearch(), attention, 2), **options)


def at(starts, lengths, streams=None):
    rows = len(starts)
    return Segments(np.arange(rows), np.zeros(rows) if streams is None else streams, starts, lengths, rows)


def keys_of(numbers):
    """Keys (B, H, T, d) that tell which token each is."""
    x = torch.as_tensor(np.asarray(numbers, dtype=np.float32))
    return x[:, None, :, None].expand(-1, HEADS, -1, WIDTH).contiguous()


def held(memory):
    memory.flush()
    keys, _, means = memory.bank.contents(0)
    torch.testing.assert_close(means, keys.float().mean(dim=2))
    return keys[0, :, :, 0].tolist()


def step(memory, starts, numbers, lengths=None):
    segments = at(starts, lengths or [len(row) for row in numbers])
    reader = memory.open(segments)
    memory.write(segments, keys_of(numbers), keys_of(numbers))
    return reader


def test_rows_are_laid_end_to_end_and_the_rest_is_dropped():
    memory = new_memory()
    step(memory, [0, 0], [[0, 1, 2, 3], [4, 5, 6, 7]])
    assert held(memory) == [[0, 1, 2], [3, 4, 5]]
    step(memory, [4, 4], [[8, 9, 99], [10, 11, 12]], lengths=[2, 3])  # 99 is padding
    assert held(memory) == [[0, 1, 2], [3, 4, 5], [8, 9, 10]]


def test_twice_a_batch_leaves_before_it_would_be_full():
    memory, sizes = new_memory(), []
    for i in range(9):
        step(memory, [7 * i], [list(range(7 * i, 7 * i + 7))])  # 2 chunks, and 14 // 3 = 4 leave
        sizes.append(len(held(memory)))
    assert sizes == [2, 4, 6, 4, 6, 4, 6, 4, 6]
    assert held(memory)[-1] == [59, 60, 61]
    step(memory, [63], [list(range(63, 63 + 40))])  # more than it holds: the end of it stays
    assert held(memory) == [[63 + 15 + 3 * i + j for j in range(3)] for i in range(CAPACITY)]


def test_reads_are_numbered_by_age():
    memory = new_memory()
    for i in range(4):
        reader = step(memory, [6 * i], [list(range(6 * i, 6 * i + 6))])
        reader(keys_of([[1.0] * 6]), 0.5)  # keys grow with their number: the newest score best
        if i:
            newest = len(held(memory)) - 2 - 1 if i < 3 else 5
            assert reader.retrieved.shape == (1, HEADS, 6, 2)
            assert (reader.retrieved == torch.tensor([newest, newest - 1])).all()


def test_a_batch_that_comes_twice_is_remembered_once():
    memory = new_memory()
    step(memory, [0, 0], [[0, 1, 2], [3, 4, 5]])
    step(memory, [3, 3], [[6, 7, 8], [9, 10, 11]])
    reader = step(memory, [3, 3], [[6, 7, 8], [9, 10, 11]])
    assert reader.fill == pytest.approx(2 / memory.bank.chunks)
    step(memory, [6, 6], [[12, 13, 14], [15, 16, 17]])
    assert held(memory) == [[3 * i, 3 * i + 1, 3 * i + 2] for i in range(6)]


def test_it_starts_anew_with_all_rows():
    memory = new_memory()
    step(memory, [0], [[0, 1, 2]])
    step(memory, [3, 0], [[3, 4, 5], [6, 7, 8]])  # a lane comes in
    assert len(held(memory)) == 3
    with pytest.raises(MemoryOutOfStep, match="lane 1 received token 9 of stream 0, but its memory is at token 3"):
        step(memory, [6, 9], [[0, 0, 0]] * 2)
    assert memory.ends(np.arange(3)).tolist() == [6, 3, 0]
    step(memory, [0, 0], [[20, 21, 22], [23, 24, 25]])
    assert held(memory) == [[20, 21, 22], [23, 24, 25]]
    memory.reset()
    assert held(memory) == [] and memory.ends(np.arange(2)).tolist() == [0, 0]


def test_joined_amid_streams():
    memory = new_memory()
    step(memory, [0, 0], [[0, 1, 2], [3, 4, 5]])
    segments = at([30, 30], [3, 3])
    assert memory.needs_replay(segments).all()
    memory.restart(segments)
    memory.write(segments, *[keys_of([[0, 1, 2], [3, 4, 5]])] * 2)
    assert not memory.needs_replay(at([33, 33], [3, 3])).any()
    assert held(memory) == [[0, 1, 2], [3, 4, 5]]


def test_means_before_rounding():
    keys = torch.randn(1, HEADS, 6, WIDTH)
    memory = new_memory(torch.float16)
    memory.open(at([0], [6]))
    memory.write(at([0], [6]), keys, keys)
    memory.flush()
    half, _, means = memory.bank.contents(0)
    assert half.dtype == torch.float16
    assert torch.equal(means, keys[0].view(HEADS, 2, 3, WIDTH).mean(dim=2))
    assert not torch.equal(means, half.float().mean(dim=2))


def test_more_than_one_lane_refused():
    with pytest.raises(ValueError, match="a shared memory needs a bank of one lane, not of 2"):
        SharedMemory(MemoryBank(2, HEADS, WIDTH, 12, CHUNK), ChunkReader(TorchSearch(), naive_memory_attention, 2))


@pytest.mark.parametrize("keep", [False, True])
def test_backward_after_a_later_batch(keep):
    """What a batch read is kept for it where an option says so, else the bank is read in place, without a copy."""
    read = []

    def attention(q, keys, values, *rest):
        read.append(keys)
        return row_memory_attention(q, keys, values, *rest)

    memory = new_memory(keep_reads=keep, attention=attention)
    step(memory, [0], [list(range(12))])
    reader = step(memory, [12], [list(range(12, 24))])
    q = keys_of([[1.0] * 12]).requires_grad_()
    z, _ = reader(q, 0.5)
    assert (read[0] is memory.bank.keys) != keep
    expected = torch.autograd.grad(z.sum(), q, retain_graph=True)
    step(memory, [24], [list(range(24, 36))])
    if keep:
        assert torch.equal(torch.autograd.grad(z.sum(), q)[0], expected[0])
    else:
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            torch.autograd.grad(z.sum(), q)

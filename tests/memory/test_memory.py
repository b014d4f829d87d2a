"""The memory of a split: what is written when, whose it is, and how it follows segments that repeat, jump or end."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.lane_streams import MemoryOutOfStep
from longmem_fairseq.memory.reader import ChunkReader
from longmem_fairseq.memory.search.torch import TorchSearch
from longmem_fairseq.memory.stream_memory import StreamMemory
from longmem_fairseq.modules.memory_attention import memory_attention

H, D, C = 2, 4, 3
SCALING = 0.5

torch_search = TorchSearch()


def make_memory(lanes=3, N=4, chunks_per_query=2, search=torch_search) -> StreamMemory:
    return StreamMemory(MemoryBank(lanes, H, D, N * C, C), ChunkReader(search, memory_attention, chunks_per_query))


def states(segments: Segments, seed=0):
    """Queries, keys and values (B, H, T, D) of segments: each a function of its stream and place alone."""
    T = int(segments.lengths.max())
    rows = []
    for stream, start in zip(segments.streams.tolist(), segments.starts.tolist()):
        tokens = [
            torch.randn(3, H, 1, D, generator=torch.Generator().manual_seed(10**6 * seed + 10**4 * stream + start + t))
            for t in range(T)
        ]
        rows.append(torch.cat(tokens, dim=2))
    return torch.stack(rows, dim=1)  # (3, B, H, T, D)


def at(lanes, streams, starts, lengths, n_lanes=3) -> Segments:
    return Segments(lanes, streams, starts, lengths, n_lanes)


def step(memory: StreamMemory, segments: Segments):
    """One batch, as the model runs it; returns what was read, (B, H, T, D)."""
    q, k, v = states(segments)
    z, _ = memory.open(segments)(q, SCALING)
    memory.write(segments, k, v)
    return z


def held(memory: StreamMemory, lane: int):
    """What a lane's memory holds: chunk number -> its keys, values and mean."""
    bank = memory.bank
    slots = [slot for begin, end in bank.spans(lane) for slot in range(begin, end)]
    numbers = bank.chunk_numbers(np.array([lane]), torch.tensor([slots], dtype=torch.int64))[0].tolist()
    return {
        number: [x[lane, :, slot].clone() for x in (bank.keys, bank.values, bank.means)]
        for number, slot in zip(numbers, slots)
    }


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, y) for key in a for x, y in zip(a[key], b[key]))


def numbers(memory: StreamMemory, lane: int):
    return sorted(held(memory, lane))


# --- when it is written


def test_nothing_retrieves_itself_or_its_future():
    memory = make_memory()
    first = at([0], [5], [0], [6])
    assert not step(memory, first).any()
    assert numbers(memory, 0) == []  # held back until the lane continues
    memory.open(at([0], [5], [6], [6]))
    assert numbers(memory, 0) == [0, 1]


def test_flush_writes_what_is_held_back():
    memory = make_memory()
    step(memory, at([0, 2], [5, 6], [0, 0], [6, 7]))
    memory.flush()
    assert numbers(memory, 0) == [0, 1] and numbers(memory, 1) == [] and numbers(memory, 2) == [0, 1]
    memory.flush()
    assert numbers(memory, 2) == [0, 1]
    step(memory, at([0, 2], [5, 6], [6, 7], [6, 7]))  # and streams continue from there


def test_padding_is_not_remembered():
    memory = make_memory(N=8)
    step(memory, at([0, 1], [5, 6], [0, 0], [4, 12]))  # lane 0 is padded by 8
    memory.flush()
    assert numbers(memory, 0) == [0] and numbers(memory, 1) == [0, 1, 2, 3]
    assert memory.bank.position.tolist() == [4, 12, 0]


def test_no_graph_is_kept():
    memory = make_memory()
    segments = at([0], [5], [0], [6])
    q, k, v = states(segments).requires_grad_()
    memory.open(segments)
    memory.write(segments, k, v)
    memory.open(at([0], [5], [6], [6]))
    assert not memory.bank.keys.requires_grad and not memory.bank.means.requires_grad


pieces = st.lists(st.integers(1, 10), min_size=1, max_size=5)


@settings(max_examples=40)
@given(lanes=st.lists(pieces, min_size=1, max_size=3), repeats=st.lists(st.integers(1, 3), min_size=5, max_size=5))
def test_batches_that_come_again_read_the_same_and_are_written_once(lanes, repeats):
    """Dummy batches, and retries after an overflow: bit by bit as if each batch had come once."""
    once, often = make_memory(), make_memory()
    for i in range(max(len(lane) for lane in lanes)):
        rows = [row for row, lane in enumerate(lanes) if i < len(lane)]
        segments = at(rows, rows, [sum(lanes[row][:i]) for row in rows], [lanes[row][i] for row in rows])
        expected = step(once, segments)
        for _ in range(repeats[i]):
            assert torch.equal(step(often, segments), expected)
    once.flush()
    often.flush()
    assert all(same(held(once, lane), held(often, lane)) for lane in range(3))


def test_a_batch_that_comes_again_with_fewer_lanes():
    """The lanes that are missing continue; those that come again do not."""
    memory = make_memory()
    step(memory, at([0, 1], [5, 6], [0, 0], [6, 6]))
    step(memory, at([0], [5], [0], [6]))
    assert numbers(memory, 0) == [] and numbers(memory, 1) == [0, 1]
    step(memory, at([1, 0], [6, 5], [6, 6], [6, 6]))
    assert numbers(memory, 0) == [0, 1] and numbers(memory, 1) == [0, 1]


def test_a_failed_batch_leaves_the_memory_as_it_was():
    """Out of memory between open and write: the same batch afterwards reads and writes as if nothing had been."""
    memory, calm = make_memory(), make_memory()
    for m in (memory, calm):
        step(m, at([0], [5], [0], [7]))
    memory.open(at([0], [5], [7], [7]))  # and then it fails
    assert torch.equal(step(memory, at([0], [5], [7], [7])), step(calm, at([0], [5], [7], [7])))
    for m in (memory, calm):
        m.flush()
    assert same(held(memory, 0), held(calm, 0))


# --- whose it is


def test_a_new_stream_starts_with_nothing_and_leaves_other_lanes_alone():
    memory = make_memory()
    step(memory, at([0, 1], [5, 6], [0, 0], [6, 6]))
    z = step(memory, at([0, 1], [7, 6], [0, 6], [6, 6]))
    assert not z[0].any() and z[1].any()
    assert numbers(memory, 0) == [] and numbers(memory, 1) == [0, 1]


def test_a_stream_that_starts_anew_forgets_itself():
    """A document of one batch per epoch."""
    memory = make_memory()
    step(memory, at([0], [5], [0], [6]))
    step(memory, at([0], [5], [6], [6]))
    assert not step(memory, at([0], [5], [0], [6])).any()
    memory.flush()
    assert numbers(memory, 0) == [0, 1]


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(1, 30), min_size=2, max_size=3), changed=st.integers(0, 1), T=st.integers(1, 8))
def test_lanes_are_isolated(lengths, changed, T):
    """Other keys, values and queries in one lane: what the others read and hold is the same, bit by bit."""
    reads = []
    for seed_of_changed in (0, 1):
        memory, attended = make_memory(), {}
        for start in range(0, max(lengths), T):
            rows = [row for row in range(len(lengths)) if lengths[row] > start]
            segments = at(rows, rows, [start] * len(rows), [min(T, lengths[row] - start) for row in rows])
            q, k, v = states(segments)
            if changed in rows:
                i = rows.index(changed)
                q[i], k[i], v[i] = (x[i] for x in states(segments, seed_of_changed))
            z, _ = memory.open(segments)(q, SCALING)
            memory.write(segments, k, v)
            for i, row in enumerate(rows):
                attended[row, start] = z[i]
        memory.flush()
        reads.append((attended, [held(memory, lane) for lane in range(3)]))
    (before, held_before), (after, held_after) = reads
    for lane, start in before:
        if lane != changed:
            assert torch.equal(before[lane, start], after[lane, start])
    for lane in range(3):
        assert same(held_before[lane], held_after[lane]) == (lane != changed or not held_before[lane])


# --- where it is


def test_segments_out_of_order_are_refused_and_change_nothing():
    memory = make_memory()
    step(memory, at([0, 1], [5, 6], [0, 0], [6, 6]))
    for lane, stream, start in ((0, 5, 7), (0, 5, 12), (0, 9, 6), (0, 6, 6), (2, 5, 6)):
        with pytest.raises(
            MemoryOutOfStep, match=rf"lane {lane} received token {start} of stream {stream}, but its memory is at token"
        ):
            memory.open(at([lane], [stream], [start], [6]))
    assert numbers(memory, 0) == []
    step(memory, at([0, 1], [5, 6], [6, 6], [6, 6]))
    with pytest.raises(MemoryOutOfStep, match="lane 1 received token 6 of stream 7, .* at token 6 of stream 6"):
        memory.open(at([0, 1], [5, 7], [12, 6], [6, 6]))


def test_lagging_names_the_rows():
    memory = make_memory()
    assert memory.needs_replay(at([0, 1, 2], [1, 2, 3], [0, 6, 0], [1, 1, 1])).tolist() == [False, True, False]
    step(memory, at([0, 1], [1, 2], [0, 0], [6, 5]))
    assert memory.needs_replay(at([0, 1, 2], [1, 2, 3], [6, 5, 0], [1, 1, 1])).tolist() == [False, False, False]
    assert memory.needs_replay(at([0, 1, 2], [1, 2, 3], [0, 0, 0], [1, 1, 1])).tolist() == [False, False, False]
    assert memory.needs_replay(at([1, 0], [2, 1], [6, 5], [1, 1])).tolist() == [True, True]
    assert memory.needs_replay(at([0, 1], [2, 1], [6, 5], [1, 1])).tolist() == [True, True]
    memory.flush()
    assert memory.needs_replay(at([0, 1], [1, 2], [6, 5], [1, 1])).tolist() == [False, False]


def test_reset_forgets_everything():
    memory = make_memory()
    step(memory, at([0, 1], [5, 6], [0, 0], [6, 6]))
    step(memory, at([0, 1], [5, 6], [6, 6], [6, 6]))
    memory.reset()
    assert [numbers(memory, lane) for lane in range(3)] == [[], [], []]
    assert memory.needs_replay(at([0], [5], [12], [1])).all()
    memory.flush()
    assert numbers(memory, 0) == []
    assert not step(memory, at([0], [5], [0], [6])).any()


@settings(max_examples=60)
@given(pieces=st.lists(st.integers(1, 9), min_size=1, max_size=12), data=st.data())
def test_a_stream_joined_midway_becomes_what_it_would_have_been(pieces, data):
    """Replay of the last memory size + chunk size tokens or more: reads and bank equal bit by bit."""
    N = data.draw(st.integers(1, 4))
    ends = np.cumsum([0, *pieces])
    whole, joined = make_memory(1, N), make_memory(1, N)

    def segment(i):
        return at([0], [5], [ends[i]], [pieces[i]], 1)

    for i in range(len(pieces) - 1):
        step(whole, segment(i))
    last = len(pieces) - 1
    enough = [i for i in range(last + 1) if i == 0 or ends[last] - ends[i] >= (N + 1) * C]
    begin = data.draw(st.sampled_from(enough))
    if begin < last:
        joined.restart(segment(begin))
        joined.write(segment(begin), *states(segment(begin))[1:])
        for i in range(begin + 1, last):
            joined.open(segment(i))
            joined.write(segment(i), *states(segment(i))[1:])
    if begin < last or last == 0:
        assert not joined.needs_replay(segment(last)).any()
        assert torch.equal(step(whole, segment(last)), step(joined, segment(last)))
        whole.flush()
        joined.flush()
        assert same(held(whole, 0), held(joined, 0))


def test_joining_forgets_the_lane_and_keeps_what_others_had_to_write():
    memory = make_memory()
    step(memory, at([0, 1], [5, 6], [0, 0], [6, 6]))
    memory.restart(at([0], [9], [40], [6]))
    assert numbers(memory, 0) == [] and numbers(memory, 1) == [0, 1]
    assert not memory.needs_replay(at([0, 1], [9, 6], [40, 6], [1, 1])).any()
    memory.write(at([0], [9], [40], [6]), *states(at([0], [9], [40], [6]))[1:])
    memory.flush()
    assert numbers(memory, 0) == [14]  # tokens 42 to 44: 40 and 41 are the end of a chunk, 45 is a beginning


# --- what is read


@pytest.mark.parametrize("N, steps", [(4, 1), (4, 3), (2, 5)])
def test_reads_the_softmax_over_all_that_is_held(N, steps):
    """Where k covers the memory, what is read is plain attention to the newest N * C remembered tokens."""
    memory = make_memory(2, N, chunks_per_query=9)
    T = 5
    for i in range(steps):
        step(memory, at([1], [5], [i * T], [T], 2))
    segments = at([1], [5], [steps * T], [T], 2)
    z = step(memory, segments)
    chunks = steps * T // C
    first, last = max(0, chunks - N) * C, chunks * C
    past = states(at([1], [5], [0], [steps * T], 2))[1:, 0, :, first:last]  # (2, H, S, D)
    q = states(segments)[0, 0]
    weights = (q @ past[0].transpose(-1, -2) * SCALING).softmax(dim=-1)
    torch.testing.assert_close(z[0], weights @ past[1], rtol=1e-5, atol=1e-5)


def test_says_which_rows_have_a_memory():
    memory = make_memory()
    step(memory, at([0, 1], [5, 6], [0, 0], [7, 2]))  # two tokens fill no chunk
    segments = at([2, 1, 0], [7, 6, 5], [0, 2, 7], [4, 4, 4])
    z, present = memory.open(segments)(states(segments)[0], SCALING)
    assert present.tolist() == [False, False, True]
    assert not z[:2].any() and z[2].any()


def test_recomputation_reads_the_same_without_searching_again():
    searches = []

    class Counting(TorchSearch):
        def __call__(self, *args):
            searches.append(args[-1])
            return super().__call__(*args)

    memory = make_memory(N=8, chunks_per_query=2, search=Counting())
    step(memory, at([0], [5], [0], [3]))
    step(memory, at([0], [5], [3], [6]))
    segments = at([0], [5], [9], [5])
    reader = memory.open(segments)
    q, k, v = states(segments)
    first = reader(q, SCALING)[0]
    memory.write(segments, k, v)
    assert torch.equal(reader(q, SCALING)[0], first)
    assert searches == [2, 2]  # chunks asked for: k / C, also where fewer are held


def distances(memory, reader, segments):
    """Every distance from a token to the middle of a chunk that it reads, one by one."""
    result = []
    for row, lane in enumerate(segments.lanes.tolist()):
        of_slot = {number % memory.bank.chunks: number for number in held(memory, lane)}
        for head in range(H):
            for t in range(segments.lengths[row]):
                for slot in reader.slots[row, head, t].tolist():
                    if slot >= 0:
                        middle = np.mean(np.arange(C) + of_slot[slot] * C)
                        result.append(segments.starts[row] + t - middle)
    return result


def test_figures_of_fill_and_distance():
    memory = make_memory(N=4, chunks_per_query=3)
    assert memory.open(segments := at([0, 1], [5, 6], [0, 0], [8, 7])).distance() == (0, 0)
    memory.write(segments, *states(segments)[1:])
    for start in (8, 16):
        segments = at([0], [5], [start], [8])
        step(memory, segments)
    # lane 0 holds its last four of eight chunks, lane 1 two chunks, lane 2 nothing
    segments = at([1, 2, 0], [6, 7, 5], [7, 0, 24], [2, 6, 5])
    reader = memory.open(segments)
    reader(states(segments)[0], SCALING)
    expected = distances(memory, reader, segments)
    assert len(expected) == H * (2 * 2 + 5 * 3)
    assert reader.fill == pytest.approx((4 + 2 + 0) / 4 / 3)
    total, reads = reader.distance()
    assert reads == len(expected) and float(total) == pytest.approx(sum(expected))
    assert min(expected) > 0

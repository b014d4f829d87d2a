"""Readers with fewer key/value heads than query heads, and what all readers tell of a batch.

A bank of 3 key/value heads that 9 query heads read must give the same as a bank of 9 heads in which every key/value
head is repeated for its three query heads.
"""

import pickle

import numpy as np
import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.branches import MemoryBranches
from longmem_fairseq.memory.reader import ChunkReader
from longmem_fairseq.memory.search.torch import TorchSearch
from longmem_fairseq.memory.stream_memory import StreamMemory
from longmem_fairseq.models.trace import ReadRecorder
from longmem_fairseq.modules.joint_attention import GATE_PACE, MemoryGate
from longmem_fairseq.modules.memory_attention import memory_attention, naive_memory_attention
from longmem_fairseq.released.shared_memory import SharedMemory

H, KV, d, C, N, T, B = 9, 3, 5, 2, 7, 6, 2
SCALING = 0.4


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def bank_of(heads, lanes=1):
    return MemoryBank(lanes, heads, d, N * C, C)


def chunk_reader(attention=memory_attention):
    return ChunkReader(TorchSearch(), attention, 3)


def repeat(x):
    """Repeat each key/value head for its query heads: (B, KV, T, d) -> (B, H, T, d)."""
    return x.repeat_interleave(H // KV, dim=1)


def segments(start):
    return Segments(np.arange(B), np.arange(B), np.full(B, start), np.full(B, T), B)


def read_streams(memory_class, lanes, heads, attention=memory_attention):
    """Return Z and the retrieved chunks of three segments, and the readers."""
    memory = memory_class(bank_of(heads, lanes), chunk_reader(attention))
    results = []
    for i in range(3):
        keys, values = random(B, KV, T, d, seed=2 * i), random(B, KV, T, d, seed=2 * i + 1)
        reader = memory.open(segments(i * T))
        z, present = reader(random(B, H, T, d, seed=100 + i), SCALING)
        results.append((z, reader.retrieved, reader, present))
        memory.write(segments(i * T), *((keys, values) if heads == KV else (repeat(keys), repeat(values))))
    return results


@pytest.mark.parametrize("attention", [memory_attention, naive_memory_attention])
@pytest.mark.parametrize("memory_class, lanes", [(StreamMemory, B), (SharedMemory, 1)])
def test_grouped_heads_equal_repeated_heads(memory_class, lanes, attention):
    grouped, repeated = (read_streams(memory_class, lanes, heads, attention) for heads in (KV, H))
    assert grouped[0][1] is None and not grouped[0][0].any(), "there is nothing to read in the first segment"
    for (z, retrieved, *_), (expected, expected_retrieved, *_) in zip(grouped[1:], repeated[1:]):
        torch.testing.assert_close(z, expected)
        assert torch.equal(retrieved, expected_retrieved) and retrieved.shape == (B, H, T, 3)


def test_autocast_does_not_round_the_search():
    """--train-dtype bfloat16 and --amp: near ties are decided by float32 products."""
    keys, _ = torch.randn(2, 1, KV, 90, d, generator=torch.Generator().manual_seed(0))
    bank = MemoryBank(1, KV, d, 90, 3)
    bank.append(0, keys[0], keys[0])
    reader, q = ChunkReader(TorchSearch(), memory_attention, 9), 1 + torch.randn(1, KV, 40, d) / 99
    expected = reader.find(bank, np.zeros(1, dtype=np.int64), q)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(reader.find(bank, np.zeros(1, dtype=np.int64), q), expected)


def test_grouped_heads_have_the_gradient_of_repeated_heads():
    gradients = []
    for heads in (KV, H):
        bank = bank_of(heads)
        keys = random(1, KV, N * C, d, seed=0)
        bank.append(0, *((keys[0], keys[0]) if heads == KV else (repeat(keys)[0], repeat(keys)[0])))
        q = random(B, H, T, d, seed=1).requires_grad_()
        z, _ = MemoryBranches(B, lambda: None, chunk_reader(), base=bank).reader()(q, SCALING)
        z.backward(random(B, H, T, d, seed=2))
        gradients.append(q.grad)
    torch.testing.assert_close(*gradients)


def test_grouped_heads_of_branches_equal_repeated_heads():
    """Three rows, of which two share a bank; one has written other tokens."""
    results = []
    for heads in (KV, H):
        keys = random(1, KV, N * C, d, seed=0)
        base = bank_of(heads)
        base.append(0, *((keys[0], -keys[0]) if heads == KV else (repeat(keys)[0], -repeat(keys)[0])))
        branches = MemoryBranches(3, lambda: None, chunk_reader(), base=base)
        new = random(1, KV, T, d, seed=3)
        branches.write([1], torch.arange(T)[None], *((new, new) if heads == KV else (repeat(new), repeat(new))))
        reader = branches.reader()
        z, present = reader(random(3, H, T, d, seed=4), SCALING)
        assert present is None
        results.append((z, reader.retrieved, reader.fill))
    torch.testing.assert_close(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and results[0][2] == results[1][2] == 1.0


class Gates(MemoryGate, torch.nn.Module):
    """The gates of a reading layer, and nothing else of it."""

    def __init__(self, gates):
        super().__init__()
        self.add_gate(len(gates))
        self.gate_bias.data = gates.logit() / GATE_PACE


def gates_of(layers):
    """Gates of some reading layers, other ones for each of all their heads."""
    return [Gates(gates) for gates in torch.linspace(0.1, 0.9, H).chunk(layers)]


def test_a_trace_of_grouped_heads_equals_that_of_repeated_heads():
    columns = []
    for heads in (KV, H):
        keys = random(1, KV, N * C, d, seed=0)
        bank = bank_of(heads)
        bank.append(0, *((keys[0], keys[0]) if heads == KV else (repeat(keys)[0], repeat(keys)[0])))
        branches = MemoryBranches(1, lambda: None, chunk_reader(), base=bank)
        branches.on_read = recorder = ReadRecorder(gates_of(1), T, kept=4)
        branches.reader()(random(1, H, T, d, seed=4), SCALING)
        columns.append(recorder.columns)
    assert set(columns[0]) == {"heads", "chunks", "scores", "masses", "strongest", "by_head", "gates"}
    for name, x in columns[0].items():
        torch.testing.assert_close(x, columns[1][name])


def read_in_layers(reader, q, layers):
    """Let each memory layer answer its share of the query heads."""
    return torch.cat([reader.of_layer(i)(x, SCALING)[0] for i, x in enumerate(q.chunk(layers, dim=1))], dim=1)


def streams_of_layers(bank, keys, values):
    """What two streams read of the two segments before, in other lanes than their rows."""
    memory = StreamMemory(bank, chunk_reader())
    place = Segments([2, 1], [0, 1], np.zeros(B), np.full(B, 2 * T), 3)
    memory.open(place)
    memory.write(place, keys, values)
    return memory.open(Segments([2, 1], [0, 1], np.full(B, 2 * T), np.full(B, T), 3))


def branches_of_layers(bank, keys, values):
    """What two rows read, of which one has written other tokens, into a copy of the bank."""
    base = pickle.loads(pickle.dumps(bank))
    base.append(0, keys[0], values[0])
    branches = MemoryBranches(B, lambda: None, chunk_reader(), base, bank.layers)
    branches.write([1], torch.arange(2 * T)[None], keys[1:], values[1:])
    branches.reorder([1, 0])
    return branches.reader()


@pytest.mark.parametrize("lanes, read", [(3, streams_of_layers), (1, branches_of_layers)])
def test_three_layers_of_three_heads_read_what_nine_heads_of_one_layer_read(lanes, read):
    results = []
    for layers in (1, 3):
        keys, values, q = random(B, H, 2 * T, d, seed=0), random(B, H, 2 * T, d, seed=1), random(B, H, T, d, seed=2)
        reader = read(MemoryBank(lanes, H, d, N * C, C, layers=layers), keys, values)
        recorder = ReadRecorder(gates_of(layers), T, kept=4)  # of the first row
        q = q.requires_grad_()
        parts = []
        for i, queries in enumerate(q.chunk(layers, dim=1)):
            reader.of_layer(i).on_read = recorder
            parts.append(reader.of_layer(i)(queries, SCALING)[0])
        z = torch.cat(parts, dim=1)
        z.backward(random(B, H, T, d, seed=3))
        columns = {name: x for name, x in recorder.columns.items() if name != "strongest"}  # of one layer's output
        results.append([z.detach(), q.grad, reader.retrieved, reader.fill, *reader.distance(), columns])
    torch.testing.assert_close(*results)
    assert results[0][2].shape == (B, H, T, 3) and (results[0][2] >= 0).all()


def test_retrieved_numbers_chunks_by_age():
    """The bank holds 7 of 9 chunks; each query reads the chunk whose key it is."""
    memory = StreamMemory(MemoryBank(1, 1, 9, N * C, C), ChunkReader(TorchSearch(), memory_attention, 1))
    keys = torch.eye(9).repeat_interleave(C, dim=0)[None, None]  # chunk i has unit vector i
    place = Segments([0], [5], [0], [9 * C], 1)
    memory.open(place)
    memory.write(place, keys, keys)
    reader = memory.open(Segments([0], [5], [9 * C], [7], 1))
    reader(torch.eye(9)[None, None, 2:], 1.0)
    assert reader.retrieved.flatten().tolist() == list(range(7))
    assert reader.fill == 1.0


def test_what_was_retrieved_stays_when_the_bank_is_written_again():
    memory = StreamMemory(bank_of(KV, B), chunk_reader())
    for i in range(2):
        reader = memory.open(segments(i * T))
        reader(random(B, H, T, d, seed=i), SCALING)
        memory.write(segments(i * T), random(B, KV, T, d, seed=5), random(B, KV, T, d, seed=6))
    before = reader.retrieved
    memory.flush()
    assert torch.equal(reader.retrieved, before)

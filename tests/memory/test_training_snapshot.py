"""A training memory on disk comes back bit by bit, or is refused."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.memory_file import SnapshotError
from longmem_fairseq.memory.reader import ChunkReader
from longmem_fairseq.memory.search.torch import TorchSearch
from longmem_fairseq.memory.stream_memory import StreamMemory
from longmem_fairseq.memory.training_snapshot import load_training_memory, save_training_memory
from longmem_fairseq.modules.memory_attention import memory_attention
from longmem_fairseq.released.shared_memory import SharedMemory
from tests.memory.test_memory import SCALING, C, D, H, at, make_memory, states

ABOUT = {"epoch": 1, "batch": 12, "backbone": "0123"}


def make(shared=False, dtype=torch.float32, N=4, layers=1):
    lanes = 1 if shared else 3
    bank = MemoryBank(lanes, H, D, N * C, C, dtype, exact_means=shared, layers=layers)
    return (SharedMemory if shared else StreamMemory)(bank, ChunkReader(TorchSearch(), memory_attention, 2))


def step(memory, segments):
    """One batch; returns what was read, (B, H, T, D)."""
    q, k, v = states(segments)
    reader = memory.open(segments)
    z = [reader.of_layer(i)(x, SCALING)[0] for i, x in enumerate(q.chunk(memory.bank.layers, dim=1))]
    memory.write(segments, k, v)
    return torch.cat(z, dim=1)


@settings(max_examples=40)
@given(
    lanes=st.lists(st.lists(st.integers(1, 10), min_size=1, max_size=6), min_size=1, max_size=3),
    stop=st.integers(0, 5),
    shared=st.booleans(),
    layers=st.integers(1, 2),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    repeat=st.booleans(),
)
def test_a_memory_that_was_loaded_goes_on_as_the_one_that_was_saved(
    tmp_path_factory, lanes, stop, shared, layers, dtype, repeat
):
    """Whatever is held, held back, evicted or waiting for a chunk to be full; also where the last batch comes again."""
    path = str(tmp_path_factory.mktemp("memory") / "m.safetensors")
    batches = []
    for i in range(max(len(lane) for lane in lanes)):
        rows = [row for row, lane in enumerate(lanes) if i < len(lane)]
        batches.append(at(rows, rows, [sum(lanes[row][:i]) for row in rows], [lanes[row][i] for row in rows]))
    saved, loaded = (make(shared, dtype, layers=1 if shared else layers) for _ in range(2))
    if shared:
        step(loaded, at([0], [9], [0], [20]))  # what was there before is gone afterwards
    else:
        step(loaded, at([2], [9], [0], [20]))
        loaded.flush()
    for segments in batches[:stop]:
        step(saved, segments)
    save_training_memory(path, saved, ABOUT)
    load_training_memory(path, loaded, ABOUT)
    os.remove(path)
    for segments in [*batches[stop - 1 : stop], *batches[stop:]] if repeat and stop else batches[stop:]:
        assert not loaded.needs_replay(segments).any()
        assert torch.equal(step(saved, segments), step(loaded, segments))
    for memory in (saved, loaded):
        memory.flush()
    for lane in range(saved.bank.lanes):
        for a, b in zip(saved.bank.contents(lane), loaded.bank.contents(lane)):
            assert torch.equal(a, b)


@pytest.fixture
def path(tmp_path):
    memory = make_memory()
    for start in (0, 7):
        step(memory, at([0, 2], [5, 6], [start, start], [7, 7]))
    save_training_memory(str(tmp_path / "memory"), memory, ABOUT)
    return str(tmp_path / "memory")


def test_only_what_is_held_is_written(path, tmp_path):
    """Not the room that is left: 7 tokens in chunks are on disk of two lanes, the others wait or are held back."""
    with safe_open(path, framework="pt") as file:
        shapes = {name: tuple(file.get_tensor(name).shape) for name in file.keys()}
    assert shapes == {
        "tail": (2, 3, H, C, D),
        "keys.0": (H, 2, C, D),
        "values.0": (H, 2, C, D),
        "means.0": (H, 2, D),
        "keys.2": (H, 2, C, D),
        "values.2": (H, 2, C, D),
        "means.2": (H, 2, D),
        "pending.keys": (2, H, 7, D),
        "pending.values": (2, H, 7, D),
    }
    assert os.listdir(tmp_path) == ["memory"]


@pytest.mark.parametrize(
    "about, memory, message",
    [
        ({"batch": 13}, {}, "batch was 12 and is 13"),
        ({"backbone": "4567"}, {}, "backbone was 0123 and is 4567"),
        ({}, {"N": 5}, r"--memory-size \(in whole chunks\) was 12 and is 15"),
        ({}, {"dtype": torch.float16}, r"precision \(--memory-dtype, or the model's\) was float32 and is float16"),
        ({}, {"shared": True}, "lanes of the memory was 3 and is 1"),
    ],
)
def test_memories_of_another_place_or_setting_are_refused(path, about, memory, message):
    there = make(**memory)
    with pytest.raises(SnapshotError, match=f"memory does not fit: {message}$"):
        load_training_memory(path, there, {**ABOUT, **about})
    assert not there.bank.held.any()


def rewrite(path, header=None, **tensors):
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **(header or {})}
        tensors = {**{name: file.get_tensor(name).clone() for name in file.keys()}, **tensors}
    save_file(tensors, path, metadata=metadata)


BAD = {
    "does not exist": os.remove,
    "is damaged, or not a safetensors file": lambda path: os.truncate(path, os.path.getsize(path) - 10),
    r"its checksum \(crc32\) differs": lambda path: rewrite(path, **{"keys.0": torch.zeros(H, 2, C, D)}),
    "as it was written": lambda path: rewrite(path, {"state": json.dumps(None)}),
    "has the format longmem memory 1, but this version reads longmem training memory 1": lambda path: rewrite(
        path, {"format": "longmem memory 1"}
    ),
    "has the format None": lambda path: save_file({"x": torch.zeros(3)}, path),
    "is not as it was written": lambda path: rewrite(path, {"about": "{"}),
}


@pytest.mark.parametrize("message", BAD)
def test_bad_files_are_refused(path, message):
    BAD[message](path)
    memory = make_memory()
    with pytest.raises(SnapshotError, match=message):
        load_training_memory(path, memory, ABOUT)
    assert not memory.bank.held.any()


def test_a_rank_without_a_memory(tmp_path):
    path = str(tmp_path / "memory")
    assert save_training_memory(path, None, ABOUT) == 0
    memory = make_memory()
    load_training_memory(path, memory, ABOUT)
    assert not memory.bank.held.any() and (memory.ends(np.arange(3)) == 0).all()


def test_a_failed_save_leaves_the_old_file(path, tmp_path, monkeypatch):
    before = open(path, "rb").read()

    def fail(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr("longmem_fairseq.tensor_files.save_file", fail)
    with pytest.raises(OSError, match="memory cannot be written: No space left on device"):
        save_training_memory(path, make_memory(), ABOUT)
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["memory"]

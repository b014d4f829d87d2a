"""Where a memory lies: on the CPU, in a file, on a GPU; what it holds and what is read of it is the same everywhere."""

import copy
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from longmem_fairseq.memory import placement as module
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.placement import Placement, choose_placement, mapped_zeros
from longmem_fairseq.memory.search.torch import TorchSearch
from tests.repository import ROOT

H, D, C = 2, 4, 3
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def bank_in(directory, dtype=torch.float32, map_means=False, lanes=2, chunks=20):
    where = Placement(directory=None if directory is None else str(directory), map_means=map_means)
    return MemoryBank(lanes, H, D, chunks * C, C, dtype, placement=where)


def fill(bank, T=100):
    generator = torch.Generator().manual_seed(0)
    for lane in range(bank.lanes):
        bank.append(lane, *torch.randn(2, H, T + lane, D, generator=generator))


@pytest.mark.parametrize("map_means", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_bank_in_a_file_holds_what_one_in_memory_holds(tmp_path, dtype, map_means):
    banks = bank_in(None, dtype), bank_in(tmp_path, dtype, map_means)
    for bank in banks:
        fill(bank)
    copies = [copy.deepcopy(bank) for bank in banks]
    fill(banks[1], 5)  # the copy stays as it is
    for bank in (*copies, banks[0]):
        for name in ("keys", "values", "means"):
            assert torch.equal(getattr(bank, name), getattr(banks[0], name))
        assert bank.nbytes == banks[0].nbytes
    assert copies[1].placement == banks[1].placement and copies[1].keys.data_ptr() != banks[1].keys.data_ptr()
    queries = torch.randn(2, H, 5, D)
    slots = [TorchSearch()(bank, np.array([0, 1]), queries, 4) for bank in (banks[0], copies[1])]
    assert torch.equal(*slots)


def test_the_file_has_no_name_and_goes_with_its_tensors(tmp_path):
    """Nothing is left, also not by a process that is killed; the room on the disk is taken, and given back."""
    bank = bank_in(tmp_path)
    assert os.listdir(tmp_path) == []
    mapped = [line for line in open("/proc/self/maps") if str(tmp_path) in line]
    assert len(mapped) == 2 and all("(deleted)" in line for line in mapped)  # keys and values; the means are searched
    bank.values[:] = 1.0
    keys = bank.keys
    del bank
    assert keys.sum() == 0
    del keys
    assert not [line for line in open("/proc/self/maps") if str(tmp_path) in line]


def test_a_disk_that_is_full_is_told_before_anything_is_written(tmp_path, monkeypatch):
    def full(handle, begin, size):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "posix_fallocate", full)
    with pytest.raises(OSError, match=r"--memory-map .* has no room for 4.00 GiB .*No space left.*--memory-size"):
        mapped_zeros(str(tmp_path), (1 << 30,), torch.float32)
    assert os.listdir(tmp_path) == [] and not [x for x in os.listdir("/proc/self/fd") if _points_to(x, tmp_path)]


def _points_to(handle, directory) -> bool:
    try:
        return str(directory) in os.readlink(f"/proc/self/fd/{handle}")
    except OSError:  # the listing's own
        return False


def test_the_choice():
    assert choose_placement("auto", None, CPU, False) == Placement(CPU, CPU)
    assert choose_placement("auto", None, CUDA, False) == Placement(CUDA, CUDA)
    assert choose_placement("cuda", None, CUDA, True) == Placement(CUDA, CPU, map_means=True)
    assert choose_placement("cpu", None, CUDA, False) == Placement(CPU, CUDA)  # exact search runs on the GPU
    assert choose_placement("cpu", None, CUDA, True) == Placement(CPU, CPU, map_means=True)
    assert choose_placement("auto", "/tmp", CUDA, False) == Placement(CPU, CUDA, "/tmp")
    assert str(choose_placement("auto", None, CPU, False)) == "cpu"
    assert str(choose_placement("cpu", None, CUDA, False)) == "cpu, chunk means on cuda"
    assert str(choose_placement("auto", "/tmp", CPU, True)) == "a file in /tmp"


@pytest.mark.parametrize(
    "device, directory, message",
    [
        ("gpu", None, "--memory-device gpu is unknown: it is auto, cuda or cpu"),
        ("cuda", None, "--memory-device cuda: the model is on cpu, choose auto or cpu"),
        ("cuda", "/tmp", "--memory-map /tmp puts the memory into a file and --memory-device cuda on the GPU"),
        ("auto", "/nowhere/at/all", "--memory-map /nowhere/at/all is not a directory that can be written"),
        ("cpu", "/proc/version", "--memory-map /proc/version is not a directory"),
    ],
)
def test_refusals(device, directory, message):
    with pytest.raises(ValueError, match=message) as error:
        choose_placement(device, directory, CPU, False)
    assert "\n" not in str(error.value)


STREAM = """
import gc, sys, torch
torch.set_num_threads(1)
import numpy as np
from longmem_fairseq.data.segments import Segments
from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search.index import IndexSearch
from longmem_fairseq.memory.search.index_spec import index_spec
from longmem_fairseq.memory.reader import ChunkReader
from longmem_fairseq.memory.stream_memory import StreamMemory
from longmem_fairseq.memory.placement import Placement
from longmem_fairseq.memory.search.faiss import FaissSearch
from longmem_fairseq.modules.memory_attention import memory_attention

H, d, C, T, N = 4, 16, 4, 128, 2048
search = FaissSearch() if sys.argv[1] == "flat" else IndexSearch(index_spec(sys.argv[1], "", d, N), FaissSearch())
where = Placement(directory=sys.argv[2] if len(sys.argv) > 2 else None)
memory = StreamMemory(MemoryBank(1, H, d, N * C, C, placement=where), ChunkReader(search, memory_attention, 4))
address = memory.bank.keys.data_ptr()


def resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096


for step in range(1200):
    lane = np.zeros(1, dtype=np.int64)
    segments = Segments(lane, lane, lane + step * T, lane + T, 1)
    q, k, v = torch.randn(3, 1, H, T, d, generator=torch.Generator().manual_seed(step))
    with torch.no_grad():
        memory.open(segments)(q, 0.25)
    memory.write(segments, k, v)
    if step == 200:
        before = resident()
print(memory.bank.nbytes, resident() - before, memory.bank.keys.data_ptr() == address, int(memory.bank.held[0]))
"""


@pytest.mark.parametrize("index", ["flat", "IVF16,Flat"])
def test_resident_memory_is_constant_over_a_thousand_segments(index):
    """Behind the first 200, which fill the memory three times over: no more than a few pages."""
    done = subprocess.run([sys.executable, "-c", STREAM, index], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    size, grown, same, held = done.stdout.split()
    assert int(size) == 4 * 2048 * (2 * 4 * 16 * 4 + 4 * 16) + 4 * 2 * 4 * 16 * 4  # the formula of MemoryBank
    assert same == "True" and held == "2048"
    assert int(grown) < 2**21  # what 1,000 segments wrote is 130 MiB

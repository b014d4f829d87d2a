"""The native search on numbers of every kind against plain top-k, with each set of instructions, and its kernel."""

import platform
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import kernel, native
from longmem_fairseq.memory.search.kernel import Kernel, KernelUnavailable, available_instructions
from longmem_fairseq.memory.search.native import NativeSearch
from tests.memory.kernel import each_instructions, needs_kernel

ONE = np.zeros(1, dtype=np.int64)


def bank_of(means):
    """A bank of one lane that holds chunks of one token with these keys, (H, N, d)."""
    H, N, d = means.shape
    bank = MemoryBank(1, H, d, N, 1)
    bank.append(0, means, means)
    return bank


def check(instructions, means, queries, n):
    """The slots for queries (H, T, d) have the n largest products, best first, within the rounding of float64."""
    slots = NativeSearch(instructions)(bank_of(means), ONE, queries[None], n)[0]  # (H, T, n)
    scores = queries.double() @ means.double().transpose(-1, -2)
    best = scores.topk(n, dim=-1).values
    rounding = 1e-12 * (queries.double().abs() @ means.double().abs().transpose(-1, -2)).amax(dim=-1, keepdim=True)
    assert ((scores.gather(-1, slots) - best).abs() <= rounding).all()
    assert (slots.sort(dim=-1).values.diff(dim=-1) > 0).all()


@each_instructions
@settings(max_examples=60)
@given(
    N=st.integers(1, 700),
    d=st.sampled_from([1, 5, 15, 16, 17, 64, 65, 100]),
    T=st.integers(16, 23),
    n=st.integers(1, 40),
    seed=st.integers(0, 10**6),
    spread=st.sampled_from([0.0, 1e-3, 1.0, 1e15]),
    offset=st.sampled_from([0.0, 1.0, 30.0]),
    duplicates=st.booleans(),
    growing=st.booleans(),
)
def test_finds_the_largest_products(instructions, N, d, T, n, seed, spread, offset, duplicates, growing):
    """Keys around one center, or none; equal keys; zeros; some rows or queries many times as long as others."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, N, d, generator=generator) * spread + offset * torch.randn(2, 1, d, generator=generator)
    queries = torch.randn(2, T, d, generator=generator)
    if duplicates:
        means, queries = means.sign(), queries.sign()
    if growing:
        means = means * torch.logspace(-4, 4, N)[:, None]
        queries = queries * torch.logspace(-4, 4, T)[:, None]
    check(instructions, means, queries, min(n, N))


MAGNITUDES = [0.0, 1e-45, 1e-40, 1e-38, 1e-30, 1e-15, 1.0, 1e20, 1e30, 3.4e38]
magnitudes = st.lists(st.sampled_from(MAGNITUDES), min_size=1, max_size=4)


@each_instructions
@settings(max_examples=60)
@given(
    N=st.integers(1, 300),
    d=st.sampled_from([1, 7, 16, 33, 64]),
    T=st.integers(16, 19),
    n=st.integers(1, 20),
    seed=st.integers(0, 10**6),
    of_rows=magnitudes,
    of_columns=magnitudes,
    of_queries=magnitudes,
    common=st.sampled_from([0.0, 1.0, 2e38]),
)
def test_finds_the_largest_products_of_any_floats(
    instructions, N, d, T, n, seed, of_rows, of_columns, of_queries, common
):
    """Floats from the smallest to the largest, both zeros, mixed in a row or between rows; flushing is switched on."""
    rng = np.random.default_rng(seed)

    def numbers(rows, magnitudes):
        x = rng.uniform(-1, 1, (rows, d)) * rng.choice(magnitudes, (rows, 1))
        return x * np.minimum(rng.choice(of_columns, d), 1.0)

    keys = np.clip(numbers(N, of_rows) + common * rng.uniform(-1, 1, d), -3.4e38, 3.4e38)
    means, queries = (torch.from_numpy(x.astype(np.float32)[None]) for x in (keys, numbers(T, of_queries)))
    bank, n = bank_of(means), min(n, N)
    torch.set_flush_denormal(True)
    try:
        slots = NativeSearch(instructions)(bank, ONE, queries[None], n)[0]
    finally:
        torch.set_flush_denormal(False)
    scores = queries.double() @ means.double().mT
    sums = queries.double().abs() @ means.double().abs().mT
    best = scores.topk(n, dim=-1)
    rounding = 1e-12 * torch.maximum(sums.gather(-1, slots), sums.gather(-1, best.indices))
    assert ((scores.gather(-1, slots) - best.values).abs() <= rounding).all()
    assert (slots.sort(dim=-1).values.diff(dim=-1) > 0).all()


@needs_kernel
def test_zero_keys_are_found_by_queries_of_any_size():
    slots = NativeSearch()(bank_of(torch.zeros(1, 20, 8)), ONE, torch.full((1, 1, 16, 8), 1e20), 20)
    assert (slots.sort(dim=-1).values == torch.arange(20)).all()


@each_instructions
def test_zero_queries_and_outliers(instructions):
    means = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0))
    means[0, 17, 3] = 1e4  # uses all bits of its row
    queries = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    queries[0, 5] = 0.0
    queries[0, 6] = 1e-38
    check(instructions, means, queries, 16)


@each_instructions
def test_chunks_that_are_not_numbers_are_not_found(instructions):
    means = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    means[0, 10] = float("nan")
    means[0, 20, 4] = float("inf")
    slots = NativeSearch(instructions)(bank_of(means), ONE, torch.randn(1, 1, 16, 8), 100)
    assert (slots[..., 98:] == -1).all()
    assert set(slots[..., :98].flatten().tolist()) == set(range(100)) - {10, 20}


@needs_kernel
@pytest.mark.parametrize("H, T", [(1, 100), (2, 33), (5, 16)])
def test_threads_change_nothing(H, T):
    search = NativeSearch()
    generator = torch.Generator().manual_seed(0)
    bank = bank_of(torch.randn(H, 500, 16, generator=generator).round())
    queries = torch.randn(1, H, T, 16, generator=generator).round()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = search(bank, ONE, queries, 20)
        torch.set_num_threads(3)
        assert torch.equal(search(bank, ONE, queries, 20), alone)
    finally:
        torch.set_num_threads(threads)


@each_instructions
@pytest.mark.parametrize("nprobe", [1, 5, 32])
@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32_HNSW4,Flat"])
def test_finds_in_inverted_lists_what_faiss_finds(instructions, factory, nprobe):
    """Lists of every length, also empty; few rows in the lists of some queries, and rows that were removed."""
    rng, indices = np.random.default_rng(0), []
    centers = rng.normal(size=(32, 12)).astype("float32")
    for _ in range(3):
        x = np.repeat(centers, rng.integers(0, 40, 32), axis=0)
        x += rng.normal(size=x.shape).astype("float32") / 3
        index = faiss.index_factory(12, factory, faiss.METRIC_INNER_PRODUCT)
        index.train(np.concatenate([x, centers + 0.1]))
        index.add_with_ids(x, 7 * np.arange(len(x)))
        index.remove_ids(7 * np.arange(50))
        index.nprobe = nprobe
        indices.append(index)
    queries = rng.normal(size=(3, 20, 12)).astype("float32")
    ids = NativeSearch(instructions).list_search(20, 12)(indices, queries, 40)
    for index, of_head, ids_of_head in zip(indices, queries, ids):
        expected = index.search(of_head, 40)[1]
        assert nprobe > 1 or (expected < 0).any()
        assert np.array_equal(ids_of_head, expected)


@needs_kernel
def test_few_queries_are_left_to_faiss(monkeypatch):
    search, bank, queries = NativeSearch(), bank_of(torch.randn(2, 50, 8)), torch.randn(1, 2, 40, 8)
    expected = search(bank, ONE, queries, 7)[:, :, :15]
    monkeypatch.setattr(native, "Kernel", lambda instructions: pytest.fail("the kernel was used"))
    assert torch.equal(search(bank, ONE, queries[:, :, :15], 7), expected)


# --- the kernel


def test_the_kernel_is_built_where_it_can_run():
    """A kernel that was not built must not look like a machine that cannot run it: other tests are skipped then."""
    processor = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not processor.exists():
        pytest.skip("not Linux on x86-64")
    flags = set(processor.read_text().split())
    expected = [name for name, flag in (("avx512", "avx512_vnni"), ("avx2", "avx2")) if flag in flags]
    assert list(available_instructions()) == expected, "build it: python setup.py build_ext --inplace"


@needs_kernel
def test_instructions_that_the_processor_lacks(monkeypatch):
    monkeypatch.setattr(kernel, "available_instructions", lambda: ("avx2",))
    Kernel()
    with pytest.raises(KernelUnavailable, match="this processor has no avx512, but it has avx2$"):
        Kernel("avx512")
    monkeypatch.setattr(kernel, "available_instructions", lambda: ())
    with pytest.raises(KernelUnavailable, match="this processor has neither AVX-512 VNNI nor AVX2"):
        Kernel()

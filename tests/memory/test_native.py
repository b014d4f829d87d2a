"""The native search on numbers of every kind against plain top-k, and how its kernel is made."""

import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.search import native
from longmem_fairseq.memory.search.native import KernelUnavailable, NativeSearch, load_kernel
from tests.memory.kernel import needs_kernel

ONE = np.zeros(1, dtype=np.int64)
search = NativeSearch()


def bank_of(means):
    """A bank of one lane that holds chunks of one token with these keys, (H, N, d)."""
    H, N, d = means.shape
    bank = MemoryBank(1, H, d, N, 1)
    bank.append(0, means, means)
    return bank


def check(means, queries, n):
    """The slots for queries (H, T, d) have the n largest products, best first, within the rounding of float32."""
    slots = search(bank_of(means), ONE, queries[None], n)[0]  # (H, T, n)
    scores = queries.double() @ means.double().transpose(-1, -2)
    best = scores.topk(n, dim=-1).values
    rounding = 1e-6 * (queries.double().abs() @ means.double().abs().transpose(-1, -2)).amax(dim=-1, keepdim=True)
    assert ((scores.gather(-1, slots) - best).abs() <= rounding).all()
    assert (slots.sort(dim=-1).values.diff(dim=-1) > 0).all()


@needs_kernel
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
def test_finds_the_largest_products(N, d, T, n, seed, spread, offset, duplicates, growing):
    """Keys around one center, or none; equal keys; zeros; some rows or queries many times as long as others."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(2, N, d, generator=generator) * spread + offset * torch.randn(2, 1, d, generator=generator)
    queries = torch.randn(2, T, d, generator=generator)
    if duplicates:
        means, queries = means.sign(), queries.sign()
    if growing:
        means = means * torch.logspace(-4, 4, N)[:, None]
        queries = queries * torch.logspace(-4, 4, T)[:, None]
    check(means, queries, min(n, N))


@needs_kernel
def test_zero_queries_and_outliers():
    means = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0))
    means[0, 17, 3] = 1e4  # uses all bits of its row
    queries = torch.randn(1, 20, 64, generator=torch.Generator().manual_seed(1))
    queries[0, 5] = 0.0
    queries[0, 6] = 1e-38
    check(means, queries, 16)


@needs_kernel
def test_chunks_that_are_not_numbers_are_not_found():
    means = torch.randn(1, 100, 8, generator=torch.Generator().manual_seed(0))
    means[0, 10] = float("nan")
    means[0, 20, 4] = float("inf")
    slots = search(bank_of(means), ONE, torch.randn(1, 1, 16, 8), 100)
    assert (slots[..., 98:] == -1).all()
    assert set(slots[..., :98].flatten().tolist()) == set(range(100)) - {10, 20}


@needs_kernel
@pytest.mark.parametrize("H, T", [(1, 100), (2, 33), (5, 16)])
def test_threads_change_nothing(H, T):
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


@needs_kernel
@pytest.mark.parametrize("nprobe", [1, 5, 32])
@pytest.mark.parametrize("factory", ["IVF32,Flat", "IVF32_HNSW4,Flat"])
def test_finds_in_inverted_lists_what_faiss_finds(factory, nprobe):
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
    ids = search.list_search(20, 12)(indices, queries, 40)
    for index, of_head, ids_of_head in zip(indices, queries, ids):
        expected = index.search(of_head, 40)[1]
        assert nprobe > 1 or (expected < 0).any()
        assert np.array_equal(ids_of_head, expected)


@needs_kernel
def test_few_queries_are_left_to_faiss(monkeypatch):
    bank, queries = bank_of(torch.randn(2, 50, 8)), torch.randn(1, 2, 40, 8)
    expected = search(bank, ONE, queries, 7)[:, :, :15]
    monkeypatch.setattr(native, "load_kernel", lambda: pytest.fail("the kernel was loaded"))
    assert torch.equal(search(bank, ONE, queries[:, :, :15], 7), expected)


# --- the kernel


def test_the_kernel_compiles_where_it_can():
    """A kernel that does not compile must not look like a machine that cannot run it: other tests are skipped then."""
    processor = Path("/proc/cpuinfo")
    if not processor.exists() or "avx512_vnni" not in processor.read_text() or shutil.which("c++") is None:
        pytest.skip("no processor with AVX-512 VNNI, or no C++ compiler")
    load_kernel()


@pytest.fixture
def new_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    load_kernel.cache_clear()
    yield tmp_path / "longmem_fairseq"
    load_kernel.cache_clear()


@needs_kernel
def test_the_kernel_is_compiled_once(new_cache, caplog):
    with caplog.at_level("INFO"):
        load_kernel()
        (library,) = new_cache.iterdir()
        load_kernel.cache_clear()
        load_kernel()
    assert [record.getMessage() for record in caplog.records] == [f"compiled {library}"]
    assert list(new_cache.iterdir()) == [library]


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler --fast", "there is no C.. compiler no-such-compiler"),
        ("false", "false fails .no reason given."),
        ("true", "cannot be made or loaded .*No such file"),
    ],
)
def test_a_compiler_that_cannot(new_cache, monkeypatch, compiler, reason):
    monkeypatch.setenv("CXX", compiler)
    with pytest.raises(KernelUnavailable, match=reason):
        load_kernel()
    assert not list(new_cache.glob("*"))


def test_a_cache_that_cannot_be_written(new_cache, monkeypatch):
    new_cache.write_text("a file in the place of a directory")
    with pytest.raises(KernelUnavailable, match="native_search-.*so cannot be made or loaded .*exists"):
        load_kernel()

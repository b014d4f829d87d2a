"""Approximate search: indices that probe all find what exact search finds, whatever was written, left or reset."""

import copy
import logging

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.branches import MemoryBranches
from longmem_fairseq.memory.document_memory import DocumentMemory
from longmem_fairseq.memory.memory_file import load_memory, save_memory
from longmem_fairseq.memory.reader import ChunkReader
from longmem_fairseq.memory.search import native
from longmem_fairseq.memory.search.faiss import FaissSearch
from longmem_fairseq.memory.search.index import IndexSearch, count_hits
from longmem_fairseq.memory.search.index_spec import FLAT, index_spec, split_index
from longmem_fairseq.memory.search.native import NativeSearch
from longmem_fairseq.memory.search.torch import TorchSearch
from longmem_fairseq.modules.memory_attention import memory_attention
from longmem_fairseq.modules.query_groups import group_queries, ungroup
from tests.memory.kernel import needs_kernel

H, D, C = 2, 8, 3
# Each of these searches all chunks, so its result is exact; chunks needed to train: 4 lists * 39, or one.
WHOLE = {"IVF4,Flat": "nprobe=4", "HNSW8": "efSearch=2000", "RR8,HNSW8": "efSearch=2000"}
LANES = 2
torch_search = TorchSearch()


def search_of(factory, parameters, N, exact=torch_search) -> IndexSearch:
    return IndexSearch(index_spec(factory, parameters, D, N), exact)


def write(bank, lane, T, generator, copies=False):
    """Write random keys; or a few keys repeated, so that scores are equal."""
    keys = torch.randn(H, T, D, generator=generator)
    if copies:
        keys = keys[:, :C].repeat(1, -(-T // C), 1)[:, :T]
    bank.append(lane, keys, keys)


def scores(bank, lanes, queries, slots):
    """Return the scores of slots (B, H, T, n), -inf for none; check that each slot is held, and once per query."""
    products = queries @ bank.means[lanes].transpose(-1, -2)
    for lane, of_lane in zip(lanes, slots):
        held = {slot for begin, end in bank.spans(lane) for slot in range(begin, end)}
        for of_query in of_lane.flatten(0, 1).tolist():
            of_query = [slot for slot in of_query if slot >= 0]
            assert len(set(of_query)) == len(of_query) and set(of_query) <= held
    return products.gather(-1, slots.clamp(min=0)).masked_fill(slots < 0, float("-inf"))


def check(search, bank, generator, n=5, T=4, complete=True):
    lanes = np.array([1, 0])
    queries = torch.randn(2, H, T, D, generator=generator)
    slots, exact = search(bank, lanes, queries, n), torch_search(bank, lanes, queries, n)
    assert slots.shape == exact.shape and slots.dtype == torch.int64
    actual, expected = scores(bank, lanes, queries, slots), scores(bank, lanes, queries, exact)
    if complete:
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


events = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, LANES - 1), st.sampled_from([1, 5, 40, 60, 200, 1000])),
        st.tuples(st.just("append"), st.integers(0, LANES - 1), st.sampled_from([3, 300, 333])),
        st.tuples(st.just("evict"), st.integers(0, LANES - 1), st.sampled_from([1, 20, 500])),
        st.tuples(st.just("reset"), st.integers(0, LANES - 1), st.sampled_from([0, 0, 7, 100])),
        st.tuples(st.just("copy"), st.just(0), st.just(0)),
    ),
    min_size=1,
    max_size=8,
)


@pytest.fixture
def every_query(monkeypatch):
    """Let the native search leave no query to faiss."""
    monkeypatch.setattr(native, "FEWEST_QUERIES", 1)


@pytest.mark.parametrize(
    "factory, exact",
    [(factory, torch_search) for factory in WHOLE]
    + [pytest.param("IVF4,Flat", NativeSearch(), marks=needs_kernel, id="IVF4,Flat-native")],
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=events, seed=st.integers(0, 10**6), copies=st.booleans())
def test_follows_the_bank(every_query, factory, exact, events, seed, copies):
    """After each write, eviction, reset and copy the index finds what exact search finds."""
    generator = torch.Generator().manual_seed(seed)
    bank = MemoryBank(LANES, H, D, 300 * C + 1, C)
    search = search_of(factory, WHOLE[factory], 300, exact)
    for event, lane, n in events:
        if event == "append":
            write(bank, lane, n, generator, copies)
        elif event == "copy":
            bank = copy.deepcopy(bank)
        else:
            getattr(bank, event)(lane, n)
        # Among many copies of one key a graph may miss other keys; its results are still held, and found once.
        check(search, bank, generator, complete=not copies or "HNSW" not in factory)


@pytest.mark.parametrize("factory", ["IVF4,SQ8", "IVF4,PQ4x4", "HNSW8_SQ8", "OPQ4,IVF2,PQ4x4", "PCA4,IVF4,Flat"])
def test_keys_in_codes_are_compared_exactly(factory):
    """Candidates are ranked by their exact scores, while one lane is written and the other is not."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(LANES, H, D, 700 * C, C)
    ivf = "IVF" in factory
    search = search_of(factory, "nprobe=2" if factory.startswith("OPQ") else "nprobe=4" if ivf else "efSearch=500", 700)
    write(bank, 0, 650 * C, generator)
    write(bank, 1, 650 * C, generator)
    for _ in range(5):
        queries = torch.randn(2, H, 30, D, generator=generator)
        lanes = np.array([0, 1])
        slots, exact = (s(bank, lanes, queries, 4) for s in (search, torch_search))
        actual, expected = scores(bank, lanes, queries, slots), scores(bank, lanes, queries, exact)
        assert torch.equal(actual, actual.sort(dim=-1, descending=True).values)
        assert (actual >= expected[..., -1:] - 1e-5).float().mean() > (0.5 if "PCA" in factory else 0.85)
        write(bank, 0, 200 * C, generator)


def test_exact_until_there_is_enough_to_train(caplog):
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 1000 * C, C)
    searched = []  # queries of each exact search

    class Counting(TorchSearch):
        def __call__(self, bank, lanes, queries, n):
            searched.append(queries.size(2))
            return super().__call__(bank, lanes, queries, n)

    search = search_of("IVF4,Flat", "nprobe=1", 1000, Counting())
    queries = torch.randn(1, H, 100, D, generator=generator)
    with caplog.at_level(logging.INFO, "longmem_fairseq.memory.search.index"):
        search(bank, np.array([0]), queries, 4)  # empty
        for _ in range(3):
            write(bank, 0, 51 * C, generator)  # 153 in the end
            assert torch.equal(search(bank, np.array([0]), queries, 4), torch_search(bank, np.array([0]), queries, 4))
        assert searched == [100] * 4 and search.recall is None
        write(bank, 0, 3 * C, generator)  # 4 * 39
        slots = search(bank, np.array([0]), queries, 4)
    assert not torch.equal(slots, torch_search(bank, np.array([0]), queries, 4))  # one list of four
    assert searched == [100] * 4 + [32]  # compared
    messages = [record.getMessage() for record in caplog.records]
    assert messages[0] == (
        "search is exact until a lane of the memory holds 156 chunks, on which IVF4,Flat:nprobe=1 is then trained"
    )
    assert len(messages) == 2 and messages[1].startswith("IVF4,Flat:nprobe=1 finds ")


def test_recall_is_measured_on_every_fiftieth_search():
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 1000 * C, C)
    write(bank, 0, 1000 * C, generator)
    whole, part = search_of("IVF16,Flat", "nprobe=16", 1000), search_of("IVF16,Flat", "nprobe=2", 1000)
    queries = torch.randn(1, H, 32, D, generator=generator)
    measured = []
    for i in range(101):
        part(bank, np.array([0]), queries[:, :, : 1 if i % 50 else 32], 4)
        if part.recall is not None:
            measured.append((i, *part.recall))
    assert [i for i, _, _ in measured] == [0, 50, 100] and all(total == H * 32 * 4 for _, _, total in measured)
    slots, exact = (s(bank, np.array([0]), queries, 4)[0] for s in (part, torch_search))
    hits = sum(len(set(a) & set(b)) for a, b in zip(slots.flatten(0, 1).tolist(), exact.flatten(0, 1).tolist()))
    assert abs(measured[0][1] - hits) <= 1 and 0 < hits < H * 32 * 4
    whole(bank, np.array([0]), queries, 4)
    assert whole.recall == (H * 32 * 4, H * 32 * 4)


@pytest.mark.parametrize(
    "scores, exact, hits",
    [
        ([5.0, 3.0, 2.0], [5.0, 3.0, 2.0], 3),
        ([3.0, 2.0, 2.0], [5.0, 3.0, 2.0], 2),  # two that equal the lowest exact score count as one
        ([2.0, 2.0, 2.0], [2.0, 2.0, 2.0], 3),
        ([5.0, 1.0, float("-inf")], [5.0, 3.0, 2.0], 1),
        ([5.0, float("-inf"), float("-inf")], [5.0, float("-inf"), float("-inf")], 1),
        ([float("-inf")] * 3, [float("-inf")] * 3, 0),
        ([float("nan")] * 3, [5.0, 3.0, 2.0], 0),
    ],
)
def test_hits(scores, exact, hits):
    assert count_hits(torch.tensor([scores, scores]), torch.tensor([exact, exact])) == 2 * hits


def test_any_of_equal_scores_is_a_hit():
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 400 * C, C)
    write(bank, 0, 400 * C, generator, copies=True)  # all chunks are the same
    search = search_of("IVF4,Flat", "nprobe=4", 400, FaissSearch())
    search(bank, np.array([0]), torch.randn(1, H, 32, D, generator=generator), 4)
    assert search.recall[0] == search.recall[1] > 0


def test_what_is_added_and_removed_is_what_changed(monkeypatch):
    """The cost of a segment does not depend on the memory's size; only a whole turn of the ring trains again."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 400 * C, C)
    search, touched, trained = search_of("IVF4,Flat", "nprobe=4", 400), [], []
    write(bank, 0, 400 * C, generator)
    queries = torch.randn(1, H, 2, D, generator=generator)
    search(bank, np.array([0]), queries, 4)
    index = bank.indices[0]
    for name in ("add", "remove"):
        original = getattr(index, name)

        def counted(*args, original=original):
            before = [x.ntotal for x in index.heads]
            original(*args)
            touched.append([abs(x.ntotal - b) for x, b in zip(index.heads, before)])

        monkeypatch.setattr(index, name, counted)
    build = index.build
    monkeypatch.setattr(index, "build", lambda *args: (trained.append(int(bank.written[0])), build(*args)))
    for _ in range(39):
        write(bank, 0, 10 * C, generator)
        search(bank, np.array([0]), queries, 4)
    assert touched == [[10, 10]] * 78 and not trained
    write(bank, 0, 10 * C, generator)
    search(bank, np.array([0]), queries, 4)
    assert trained == [800]


def test_a_graph_is_rebuilt_when_half_of_it_was_evicted():
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 50 * C, C)
    search = search_of("HNSW8", "efSearch=500", 50)
    sizes = []
    for _ in range(40):
        write(bank, 0, 10 * C, generator)
        search(bank, np.array([0]), torch.randn(1, H, 2, D, generator=generator), 4)
        sizes.append(bank.indices[0].heads[0].ntotal)
    assert max(sizes) < 100 and sizes[-10:] == [60, 70, 80, 90, 50, 60, 70, 80, 90, 50]


@pytest.mark.parametrize("layers", [1, H])
def test_copies_of_a_bank_are_independent(layers):
    """Each hypothesis of a beam has an index of what all share, and then of what it wrote; in each memory layer."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 300 * C, C, layers=layers)
    search = search_of("IVF4,Flat", "nprobe=4", 300)
    write(bank, 0, 290 * C, generator)
    chunk_reader = ChunkReader(search, memory_attention, 4)
    branches = MemoryBranches(2, lambda: None, chunk_reader, bank, layers)
    queries = torch.randn(2, H, 3, D, generator=generator)
    for layer, q in enumerate(queries.chunk(layers, dim=1)):
        branches.reader().of_layer(layer)(q, 1.0)
    keys = torch.randn(2, H, 60 * C, D, generator=generator)
    branches.write([0, 1], torch.arange(2 * 60 * C).view(2, -1), keys, keys)
    branches.reorder([1, 0, 0])
    assert len({id(b) for b in branches.banks} | {id(bank)}) == 3
    for branch in (*branches.banks, bank):
        branch = branch.by_layer()
        for layer, q in enumerate(queries[:1].chunk(layers, dim=1)):
            lane = np.array([layer])
            slots, exact = (s(branch, lane, q, 4) for s in (search, torch_search))
            torch.testing.assert_close(scores(branch, lane, q, slots), scores(branch, lane, q, exact))


def test_a_loaded_memory_is_indexed_again(tmp_path):
    generator = torch.Generator().manual_seed(0)
    search, lane = search_of("IVF4,Flat", "nprobe=4", 300), np.array([0])
    document_memory = DocumentMemory(MemoryBank(1, H, D, 300 * C, C))
    write(document_memory.bank, 0, 290 * C, generator)
    document_memory.replace(*document_memory.bank.tokens(0), [])
    save_memory(str(tmp_path / "memory"), document_memory, "ab", 1, "float32")
    queries = torch.randn(1, H, 3, D, generator=generator)
    expected = search(document_memory.bank, lane, queries, 4)
    write(document_memory.bank, 0, 290 * C, generator)
    search(document_memory.bank, lane, queries, 4)
    load_memory(str(tmp_path / "memory"), document_memory, "ab", 1)
    assert torch.equal(search(document_memory.bank, lane, queries, 4), expected)


def test_a_restored_bank_is_indexed_again():
    """A training snapshot does not hold indices."""
    generator = torch.Generator().manual_seed(0)
    search, lanes = search_of("IVF4,Flat", "nprobe=4", 300), np.array([0])
    first, second = (MemoryBank(1, H, D, 300 * C, C) for _ in range(2))
    for bank in (first, second):
        write(bank, 0, 290 * C, generator)
        search(bank, lanes, torch.randn(1, H, 3, D, generator=generator), 4)
    second.restore(*first.state())
    queries = torch.randn(1, H, 3, D, generator=generator)
    assert torch.equal(search(second, lanes, queries, 4), torch_search(first, lanes, queries, 4))


def test_queries_that_are_not_numbers_read_nothing():
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, H, D, 300 * C, C)
    write(bank, 0, 300 * C, generator)
    queries = torch.randn(1, H, 3, D, generator=generator)
    clean = search_of("IVF4,Flat", "nprobe=4", 300)(bank, np.array([0]), queries, 4)
    queries[0, :, 1] = float("nan")
    slots = search_of("IVF4,Flat", "nprobe=4", 300)(bank, np.array([0]), queries, 4)
    assert torch.equal(slots[:, :, [0, 2]], clean[:, :, [0, 2]]) and slots.max() < 300


@pytest.mark.parametrize(
    "factory, exact",
    [
        ("IVF4,Flat", TorchSearch()),
        ("HNSW8", TorchSearch()),
        pytest.param("IVF4,Flat", NativeSearch(), marks=needs_kernel, id="IVF4,Flat-native"),
    ],
)
def test_query_heads_share_a_kv_head(every_query, factory, exact):
    """9 query heads over 3 KV heads find what a loop over the query heads finds, each in its KV head's chunks."""
    generator = torch.Generator().manual_seed(0)
    bank = MemoryBank(1, 3, D, 300 * C, C)
    keys = torch.randn(3, 320 * C, D, generator=generator)
    bank.append(0, keys, keys)
    search = search_of(factory, WHOLE[factory], 300, exact)
    queries = torch.randn(1, 9, 4, D, generator=generator)
    slots = ungroup(search(bank, np.array([0]), group_queries(queries, 3), 5), 9)
    assert slots.shape == (1, 9, 4, 5) and bank.indices[0].heads
    for head in range(9):
        for t in range(4):
            best = (bank.means[0, head // 3] @ queries[0, head, t]).topk(5).indices
            assert torch.equal(slots[0, head, t], best)


REFUSED = {
    ("IVF4,Nonsense", "", 500): "--memory-index IVF4,Nonsense is not an index that faiss makes for keys of width 8",
    ("ivf", "", 500): r"could not parse index string ivf\).*such as IVF1024,Flat",
    ("", "", 500): "--memory-index  is not an index that faiss makes",
    ("IVF4,PQ3", "", 500): "multiple of the number of subquantizers",
    ("NSG8", "", 500): "makes an IndexNSGFlat, from which a memory cannot remove evicted chunks",
    ("IVF4,PQ4x4fs", "", 500): "makes an IndexIVFPQFastScan, from which",
    ("IVF4,Flat,RFlat", "", 500): "makes an IndexRefineFlat",
    ("Flat", "", 500): "makes an IndexFlat, .*choose flat",
    ("IVF64,Flat", "", 63): "is trained on 64 chunks or more, and a memory .* holds 63: raise --memory-size",
    ("IVF4,PQ4", "", 200): "is trained on 256 chunks or more",
    (
        "IVF4,Flat",
        "nprobes=3",
        500,
    ): "--memory-index IVF4,Flat:nprobes=3 has .* that cannot be set .*IVF4,Flat:nprobe=32",
    (
        "HNSW8",
        "nprobe=3",
        500,
    ): "--memory-index HNSW8:nprobe=3 has .* that cannot be set for HNSW8: .*HNSW8:efSearch=64",
    ("IVF4,Flat", "nprobe", 500): "IVF4,Flat:nprobe has search parameters that cannot be set",
    ("IVF4,Flat", "nprobe=0", 500): "nprobe=0 must be between 1 and the 4 lists of IVF4,Flat",
    ("IVF4,Flat", "nprobe=5", 500): "nprobe=5 must be between 1 and the 4 lists",
    ("HNSW8", "efSearch=-1", 500): "efSearch=-1 must be 1 or more",
}


@pytest.mark.parametrize("factory, parameters, chunks", REFUSED)
def test_refusals(factory, parameters, chunks):
    with pytest.raises(ValueError, match=REFUSED[factory, parameters, chunks]) as error:
        index_spec(factory, parameters, D, chunks)
    assert "\n" not in str(error.value)


def test_without_faiss(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    with pytest.raises(ValueError, match="--memory-index IVF4,Flat needs faiss: pip install faiss-cpu"):
        index_spec("IVF4,Flat", "", D, 500)


@pytest.mark.parametrize(
    "option, parameters, expected",
    [
        ("flat", "", (FLAT, "")),
        ("IVF4,Flat", "", ("IVF4,Flat", "")),
        ("IVF4,Flat:nprobe=2", "", ("IVF4,Flat", "nprobe=2")),
        ("IVF4,Flat", "nprobe=2", ("IVF4,Flat", "nprobe=2")),
        ("IVF4,Flat:nprobe=2", "nprobe=2", ("IVF4,Flat", "nprobe=2")),
        ("IVF4_HNSW8,Flat:nprobe=2,quantizer_efSearch=9", "", ("IVF4_HNSW8,Flat", "nprobe=2,quantizer_efSearch=9")),
    ],
)
def test_an_index_and_its_parameters_are_one_string(option, parameters, expected):
    assert split_index(option, parameters) == expected
    if expected[0] != FLAT:
        spec = index_spec(*expected, D, 500)
        assert split_index(str(spec)) == (spec.factory, spec.parameters)


@pytest.mark.parametrize(
    "option, parameters, message",
    [
        ("IVF4,Flat:nprobe=2", "nprobe=3", "IVF4,Flat:nprobe=2 and --memory-index-parameters nprobe=3 name different"),
        ("flat:nprobe=2", "", "flat is exact search, which has no search parameters such as nprobe=2: leave them out"),
        ("flat", "nprobe=2", "flat is exact search, which has no search parameters such as nprobe=2"),
    ],
)
def test_parameters_that_contradict_the_index(option, parameters, message):
    with pytest.raises(ValueError, match=f"--memory-index {message}"):
        split_index(option, parameters)

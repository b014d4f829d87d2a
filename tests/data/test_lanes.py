import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.data.lanes import Lane, lay_documents

sizes_lists = st.lists(st.integers(1, 60), min_size=1, max_size=30).map(np.array)


@given(costs=sizes_lists, n_lanes=st.integers(1, 6), seed=st.none() | st.integers(0, 99))
def test_every_document_is_on_one_lane(costs, n_lanes, seed):
    lanes = lay_documents(costs, n_lanes, seed)
    assert len(lanes) == n_lanes
    assert sorted(np.concatenate(lanes).tolist()) == list(range(len(costs)))
    # no lane ends more than one document after the others
    loads = [int(costs[lane].sum()) for lane in lanes]
    assert max(loads) <= min(loads) + costs.max()


@given(costs=sizes_lists, n_lanes=st.integers(1, 6))
def test_without_a_seed_documents_keep_their_order(costs, n_lanes):
    for lane in lay_documents(costs, n_lanes, None):
        assert lane.tolist() == sorted(lane.tolist())


def test_seeds_shuffle_and_repeat():
    costs = np.random.default_rng(0).integers(1, 100, 50)
    first, again, other = (lay_documents(costs, 4, seed) for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert any(not np.array_equal(a, b) for a, b in zip(first, other))
    assert {frozenset(lane.tolist()) for lane in first} != {frozenset(lane.tolist()) for lane in other}


def test_long_documents_do_not_come_last():
    costs = np.concatenate([np.ones(300, dtype=int), [100]])
    in_order, shuffled = (max(costs[lane].sum() for lane in lay_documents(costs, 4, seed)) for seed in (None, 1))
    assert in_order == 175 and shuffled == 100


@pytest.mark.parametrize("joined", [False, True])
@given(sizes=sizes_lists, T=st.integers(1, 20))
def test_segments_cut_streams(sizes, T, joined):
    documents = np.arange(len(sizes)) + 10
    lane = Lane(documents, sizes, T, joined, stream=7)
    read = {int(d): 0 for d in documents}
    ends = {}  # of each stream
    order = []
    for step in range(len(lane)):
        stream, start, length = lane.segment(step)
        pieces = lane.pieces(step)
        assert 1 <= length <= T
        assert start == ends.get(stream, 0)
        ends[stream] = start + length
        assert sum(piece.stop - piece.start for piece in pieces) == length
        for piece in pieces:
            assert piece.start == read[piece.document] < piece.stop
            read[piece.document] = piece.stop
            order.append(piece.document)
    assert list(read.values()) == sizes.tolist()
    assert order == sorted(order)
    if joined:
        assert ends == {7: sizes.sum()} and len(lane) == -(-sizes.sum() // T)
    else:
        assert ends == dict(zip(documents.tolist(), sizes.tolist()))


def test_a_lane_without_documents():
    for joined in (False, True):
        none = np.array([], dtype=np.int64)
        assert len(Lane(none, none, 4, joined, 0)) == 0

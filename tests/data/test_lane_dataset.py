"""Every token is a target once, in order, whatever the lengths, lanes, ranks, scope and order."""

import pickle

import numpy as np
import pytest
import torch
from fairseq import utils
from hypothesis import given, settings
from hypothesis import strategies as st

from longmem_fairseq.data.lane_dataset import LaneDataset
from tests.fairseq_runs import random_documents

EOS, PAD = 2, 1


# Settings of a LaneDataset by the name of the memory's scope.
SCOPES = {
    "document": {"scope": "document"},
    "stream": {"scope": "stream", "joins_documents": True},
    "shared": {"scope": "shared", "joins_documents": True, "shares_memory": True},
}


class Documents:
    """A DocumentDataset in memory, as far as LaneDataset needs it."""

    split, pad = "train", PAD

    def __init__(self, documents):
        self.documents = documents
        self.sizes = np.array([len(document) for document in documents])
        self.tokens = int(self.sizes.sum())

    def __len__(self):
        return len(self.documents)

    def names(self):
        return [str(document) for document in range(len(self))]

    def read(self, document, start, stop):
        return self.documents[document][start:stop]


@st.composite
def datasets(draw, scopes=tuple(SCOPES)):
    T = draw(st.integers(1, 9))
    lengths = draw(st.lists(st.integers(1, 5 * T), min_size=1, max_size=12))
    return LaneDataset(
        Documents(random_documents(lengths)),
        n_lanes=draw(st.integers(1, 4)),
        n_ranks=draw(st.integers(1, 3)),
        tokens_per_sample=T,
        bos=EOS,
        seed=draw(st.none() | st.integers(0, 5)),
        **SCOPES[draw(st.sampled_from(scopes))],
    )


def batches_of(dataset, rank):
    """Return the collated batches that a rank reads in an epoch."""
    return [
        dataset.collater([dataset[i] for i in indices])
        for n, indices in enumerate(dataset.batches())
        if n % dataset.n_ranks == rank
    ]


@given(dataset=datasets(), epoch=st.integers(1, 3))
def test_every_token_is_a_target_once_in_order(dataset, epoch):
    dataset.set_epoch(epoch)
    documents = dataset.documents.documents
    read = {i: [] for i in range(len(documents))}
    source = {i: [] for i in range(len(documents))}
    for rank in range(dataset.n_ranks):
        tokens = 0
        for sample in batches_of(dataset, rank):
            tokens += sample.get("ntokens", 0)
            for row, pieces in enumerate(sample.get("pieces", [])):
                at = 0
                for piece in pieces:
                    n = piece.stop - piece.start
                    assert piece.start == len(read[piece.document])
                    read[piece.document] += sample["target"][row, at : at + n].tolist()
                    source[piece.document] += sample["net_input"]["src_tokens"][row, at : at + n].tolist()
                    at += n
        assert tokens == dataset.rank_tokens(rank)
    for i, document in enumerate(documents):
        assert read[i] == document.tolist()
        assert source[i] == [EOS] + document[:-1].tolist()


@pytest.mark.parametrize("scope", ["document", "stream"])
def test_a_document_of_many_segments(scope):
    """Its length does not fit 16 bits; its neighbors are around one segment long."""
    T = 1024
    documents = random_documents([1, T - 1, T, T + 1, 70_001])
    dataset = LaneDataset(Documents(documents), 2, 1, T, EOS, **SCOPES[scope])
    read = [[] for _ in documents]
    for sample in batches_of(dataset, 0):
        for row, pieces in enumerate(sample["pieces"]):
            target = sample["target"][row].tolist()
            for piece in pieces:
                read[piece.document] += target[: piece.stop - piece.start]
                target = target[piece.stop - piece.start :]
    assert read == [document.tolist() for document in documents]


@given(dataset=datasets())
def test_lanes_continue_their_streams(dataset):
    """On each lane of each rank: a segment starts a stream, or continues the one that was there."""
    for rank in range(dataset.n_ranks):
        place = {}
        for sample in batches_of(dataset, rank):
            if not sample:
                continue
            segments = sample["net_input"]["segments"]
            assert segments.n_lanes == dataset.n_lanes
            assert len(segments) == sample["nsentences"] == len(sample["target"])
            for lane, stream, start, end in zip(segments.lanes, segments.streams, segments.starts, segments.ends):
                if start > 0:
                    assert place[lane] == (stream, start)
                place[lane] = (stream, end)
        if dataset.joins_documents:
            assert len({stream for stream, _ in place.values()}) == len(place)


@given(dataset=datasets(scopes=["document"]))
def test_scope_document_starts_a_stream_at_each_document(dataset):
    for index in range(len(dataset)):
        step, lane = divmod(index, dataset.total_lanes)
        if step < len(dataset.lanes[lane]):
            segment = dataset[index]
            (piece,) = segment["pieces"]
            assert (segment["stream"], segment["start"]) == (piece.document, piece.start)


def test_scope_stream_fills_segments_across_documents():
    dataset = LaneDataset(Documents(random_documents([3, 4, 2, 6])), 1, 1, 5, EOS, joins_documents=True)
    assert dataset.steps == 3
    assert [len(dataset[i]["target"]) for i in range(3)] == [5, 5, 5]
    assert [(p.document, p.start, p.stop) for p in dataset[1]["pieces"]] == [(1, 2, 4), (2, 0, 2), (3, 0, 1)]
    assert dataset[1]["source"][[2, 4]].tolist() == [EOS, EOS]


def test_streams_of_epochs_differ():
    dataset = LaneDataset(Documents(random_documents([30, 30])), 2, 1, 5, EOS, joins_documents=True)
    streams = set()
    for epoch in (1, 2):
        dataset.set_epoch(epoch)
        streams |= {dataset[lane]["stream"] for lane in range(2)}
    assert len(streams) == 4


@given(dataset=datasets())
def test_padding_is_trailing_and_only_where_there_is_no_token(dataset):
    for rank in range(dataset.n_ranks):
        for sample in batches_of(dataset, rank):
            if sample:
                lengths = sample["net_input"]["src_lengths"]
                real = torch.arange(sample["target"].size(1))[None] < lengths[:, None]
                assert torch.equal(sample["target"].ne(PAD), real)
                assert torch.equal(sample["net_input"]["src_tokens"].ne(PAD), real)
                assert sample["ntokens"] == int(lengths.sum()) and sample["target"].size(1) == int(lengths.max())


@given(dataset=datasets(), tokens=st.integers(0, 30), data=st.data())
def test_history_covers_what_a_memory_holds(dataset, tokens, data):
    """Replayed, it leads every lane through its last tokens up to the batch, with no gap."""
    rank = data.draw(st.integers(0, dataset.n_ranks - 1))
    steps = [step for step in range(dataset.steps) if len(dataset.batch(step, rank))]
    if not steps:
        return
    step = data.draw(st.sampled_from(steps))
    sample = dataset.collater([dataset[i] for i in dataset.batch(step, rank)])
    history = dataset.history(sample, tokens)
    assert history == [dataset.batch(t, rank) for t in range(step - len(history), step)]
    past = [dataset.collater([dataset[i] for i in batch]) for batch in history]
    segments = sample["net_input"]["segments"]
    covered = dict.fromkeys(segments.lanes.tolist(), 0)
    for batch in past:
        for lane, start, length in zip(
            *(getattr(batch["net_input"]["segments"], x) for x in ("lanes", "starts", "lengths"))
        ):
            if lane in covered:
                covered[lane] = covered[lane] + length if start > 0 else length
    if dataset.shares_memory:
        everything = sum(batch["ntokens"] for batch in past)
        assert everything >= tokens or len(history) == step
    else:
        for lane, start in zip(segments.lanes.tolist(), segments.starts.tolist()):
            assert covered[lane] >= min(start, tokens) or start == 0
    if not dataset.joins_documents:
        assert len(history) <= -(-tokens // dataset.T)


def test_few_documents_spread_over_all_ranks():
    dataset = LaneDataset(Documents(random_documents([50, 50])), 4, 2, 5, EOS)
    assert [dataset.rank_tokens(rank) for rank in range(2)] == [50, 50]


def test_segments_survive_workers_and_devices():
    dataset = LaneDataset(Documents(random_documents([30, 7])), 2, 1, 5, EOS)
    sample = dataset.collater([dataset[i] for i in dataset.batch(0, 0)])
    segments = sample["net_input"]["segments"]
    moved = utils.apply_to_sample(lambda tensor: tensor + 1, sample)["net_input"]["segments"]
    assert moved is segments
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(segments)).starts, segments.starts)
    without = LaneDataset(Documents(random_documents([30, 7])), 2, 1, 5, EOS, with_segments=False)
    assert set(without.collater([without[0]])["net_input"]) == {"src_tokens", "src_lengths"}


def test_nothing_to_collate():
    assert LaneDataset(Documents(random_documents([3])), 1, 1, 5, EOS).collater([]) == {}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"n_lanes": 0}, "--batch-size and --tokens-per-sample must be at least 1"),
        ({"tokens_per_sample": 0}, "segments of 0 tokens"),
    ],
)
def test_bad_arguments(arguments, message):
    settings_ = {"n_lanes": 1, "n_ranks": 1, "tokens_per_sample": 5, "bos": EOS, **arguments}
    with pytest.raises(ValueError, match=message):
        LaneDataset(Documents(random_documents([3])), **settings_)


@settings(max_examples=20)
@given(dataset=datasets())
def test_no_rank_waits_long_for_another(dataset):
    """Where lanes have ended, full steps are given as ranges: they must list the same lanes."""
    for step in range(dataset.steps):
        for rank in range(dataset.n_ranks):
            expected = [
                step * dataset.total_lanes + g
                for g in range(rank, dataset.total_lanes, dataset.n_ranks)
                if step < len(dataset.lanes[g])
            ]
            assert list(dataset.batch(step, rank)) == expected

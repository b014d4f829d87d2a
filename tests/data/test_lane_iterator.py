"""The iterator that fairseq gets: workers, epochs, ranks, and resuming at any place."""

import gc
import multiprocessing

import numpy as np
import pytest
from fairseq.data.iterators import GroupedIterator

from longmem_fairseq.data.directories import find_split
from longmem_fairseq.data.document_dataset import DocumentDataset
from longmem_fairseq.data.lane_dataset import LaneDataset
from longmem_fairseq.data.lane_iterator import LaneIterator
from tests.data.test_lane_dataset import SCOPES
from tests.fairseq_runs import make_dictionary, random_documents, write_data

T = 8
LENGTHS = [1, T - 1, T, T + 1, 50, 3 * T, 2, 33]


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    data = write_data(tmp_path_factory.mktemp("lanes"), train=random_documents(LENGTHS))
    return DocumentDataset(find_split(str(data), "train", False), make_dictionary(), "train")


def iterator(documents, rank=0, ranks=1, lanes=2, workers=0, epoch=1, scope="document", seed=1, buffer_size=0):
    dataset = LaneDataset(documents, lanes, ranks, T, 2, seed=seed, **SCOPES[scope])
    return LaneIterator(dataset, rank, epoch, workers, buffer_size)


def ids(batches):
    return [batch["id"].tolist() if batch else [] for batch in batches]


def tokens_of(batches):
    """The target tokens of each document, as read by these batches in turn."""
    read = {}
    for batch in filter(None, batches):
        for row, pieces in enumerate(batch["pieces"]):
            at = 0
            for piece in pieces:
                n = piece.stop - piece.start
                read.setdefault(piece.document, []).extend(batch["target"][row, at : at + n].tolist())
                at += n
    return read


@pytest.mark.parametrize("workers, buffer_size", [(0, 0), (1, 10), (2, 0), (3, 2)])
def test_workers_change_nothing(documents, workers, buffer_size):
    reference = iterator(documents)
    other = iterator(documents, workers=workers, buffer_size=buffer_size)
    for epoch in (1, 2):
        batches = list(other.next_epoch_itr())
        expected = list(reference.next_epoch_itr())
        assert ids(batches) == ids(expected)
        assert all(np.array_equal(a["target"], b["target"]) for a, b in zip(batches, expected))
        assert reference.epoch == other.epoch == epoch


@pytest.mark.parametrize("exhausted", [False, True])
def test_workers_end_with_their_iterator(documents, exhausted):
    """Freed with its last reference: in fairseq's own, a cycle, workers are waited for until they time out."""
    abandoned = iterator(documents, workers=1)
    gc.disable()
    try:
        batches = abandoned.next_epoch_itr()
        next(batches)
        (worker,) = multiprocessing.active_children()
        if exhausted:
            list(batches)
        else:
            assert worker.is_alive()
        del abandoned, batches
        assert not worker.is_alive()
    finally:
        gc.enable()


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("update_freq", [1, 3])
def test_all_ranks_together_read_the_corpus(documents, ranks, update_freq):
    read, steps = {}, set()
    for rank in range(ranks):
        epoch = iterator(documents, rank, ranks).next_epoch_itr()
        batches = [batch for group in GroupedIterator(epoch, update_freq) for batch in group]
        steps.add(len(batches))
        tokens = tokens_of(batches)
        assert not set(tokens) & set(read)
        read.update(tokens)
    assert len(steps) == 1, "every rank must take part in every update"
    assert read == {i: documents.read(i, 0, n).tolist() for i, n in enumerate(LENGTHS)}


def test_epochs_differ_and_repeat(documents):
    first = iterator(documents)
    orders = [tokens_of(first.next_epoch_itr()) for _ in range(3)]
    assert orders[0] == orders[1] == orders[2]  # the same tokens...
    assert len({tuple(order) for order in orders}) > 1  # ...in another order
    again = iterator(documents, epoch=3)
    assert tuple(tokens_of(again.next_epoch_itr())) == tuple(orders[2])


def test_without_shuffling_epochs_are_alike(documents):
    itr = iterator(documents, lanes=1, seed=None)
    for _ in range(2):
        assert list(tokens_of(itr.next_epoch_itr())) == list(range(len(LENGTHS)))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("epoch", [1, 2])
def test_resumes_at_any_place(documents, workers, rank, epoch):
    whole = ids(iterator(documents, rank, 2, epoch=epoch).next_epoch_itr())
    for stop in range(len(whole) + 1):
        stopped = iterator(documents, rank, 2, epoch=epoch)
        itr = stopped.next_epoch_itr()
        done = ids(next(itr) for _ in range(stop))
        state = stopped.state_dict()
        resumed = iterator(documents, rank, 2, workers=workers, epoch=state["epoch"])
        assert resumed.first_batch  # as fairseq's trainer does, before it restores the state
        resumed.load_state_dict(state)
        if stop == len(whole):
            assert resumed.next_epoch_idx == epoch + 1
        else:
            assert done + ids(resumed.next_epoch_itr()) == whole
        if workers and stop > 2:
            break  # starting processes takes its time


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lanes": 1}, r"lanes per rank \(--batch-size, --max-tokens\) was 2 and is 1"),
        ({"ranks": 2}, r"ranks \(--distributed-world-size\) was 1 and is 2"),
        ({"scope": "stream"}, "--memory-scope was document and is stream"),
        ({"seed": 2}, r"--seed \(or --data-no-shuffle\) was 1 and is 2"),
    ],
)
def test_other_lanes_cannot_be_continued(documents, change, message):
    stopped = iterator(documents)
    next(stopped.next_epoch_itr())
    with pytest.raises(ValueError, match=message + ".*--reset-dataloader"):
        iterator(documents, **change).load_state_dict(stopped.state_dict())


def test_at_an_epoch_boundary_lanes_may_change(documents):
    stopped = iterator(documents)
    list(stopped.next_epoch_itr())
    state = stopped.state_dict()
    resumed = iterator(documents, lanes=1, epoch=state["epoch"])
    resumed.load_state_dict(state)
    assert tokens_of(resumed.next_epoch_itr()).keys() == set(range(len(LENGTHS)))


def test_a_place_in_another_tasks_epoch_means_nothing(documents):
    state = {"version": 2, "epoch": 1, "iterations_in_epoch": 3, "shuffle": True}
    with pytest.raises(ValueError, match="another task.*--reset-dataloader"):
        iterator(documents).load_state_dict(state)

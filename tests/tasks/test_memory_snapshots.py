"""Snapshots beside checkpoints: when they are written, that they are read bit by bit, and when they are removed."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longmem_fairseq.data.lane_dataset import LaneDataset
from longmem_fairseq.data.lane_iterator import LaneIterator
from longmem_fairseq.memory.container import SnapshotError
from longmem_fairseq.tasks.checkpoints import Restored
from longmem_fairseq.tasks.memory_snapshots import MemorySnapshots, before_each_checkpoint
from longmem_fairseq.tasks.replay import replay_past
from tests.data.test_lane_dataset import SCOPES, Documents
from tests.models.tiny import VOCABULARY, longmem

T = 7
LENGTHS = [60, 33, 5, 40]


def optimizer_of_fairseq(**methods):
    inner = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    for name, method in methods.items():
        setattr(inner, name, method)
    return SimpleNamespace(optimizer=inner)


class Calls:
    def __init__(self):
        self.times = 0

    def act(self):
        self.times += 1


@pytest.mark.parametrize("sharded", [False, True])
def test_every_rank_acts_before_a_checkpoint(sharded):
    """Once, however often the hook was set; an optimizer that gathers its own state still does."""
    calls, gathered = Calls(), []
    optimizer = optimizer_of_fairseq(**({"consolidate_state_dict": gathered.append} if sharded else {}))
    for _ in range(3):
        before_each_checkpoint(optimizer, calls.act)
    optimizer.optimizer.consolidate_state_dict(*([0] if sharded else []))
    assert calls.times == 1 and gathered == ([0] if sharded else [])


def test_the_rest_of_a_run_that_failed_has_no_snapshot():
    """fairseq saves it on the rank that failed alone: waiting for the others would never end."""
    calls, optimizer = Calls(), optimizer_of_fairseq()
    before_each_checkpoint(optimizer, calls.act)
    try:
        raise FloatingPointError("gradients are Nan/Inf")
    except FloatingPointError:
        optimizer.optimizer.consolidate_state_dict()
    assert calls.times == 0


def new_iterator(scope="document", epoch=1):
    rng = np.random.default_rng(0)
    documents = Documents([rng.integers(4, len(VOCABULARY), length) for length in LENGTHS])
    return LaneIterator(LaneDataset(documents, 2, 1, T, VOCABULARY.eos(), seed=1, **SCOPES[scope]), 0, epoch)


def new_model(tmp_path, **changes):
    return longmem(tmp_path, **{"memory_size": 30, **changes}).train()


def read(model, batches):
    """Logits of batches."""
    with torch.no_grad():
        return [model(**batch["net_input"])[0] for batch in batches]


@pytest.mark.parametrize(
    "scope, changes",
    [
        ("document", {}),
        ("stream", {"token_memory": 13}),
        ("shared", {}),
        ("document", {"carry_window": 5, "retrieval_layer_index": "1,3", "token_memory": 13}),
        ("stream", {"carry_window": 9, "model": "alibi_lm", "memory_size": 0}),
    ],
)
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_continues_bit_by_bit(tmp_path, scope, changes, stop, caplog):
    """Also one memory for all lanes, and a carried window, which replay does not restore to the bit."""
    model, iterator = new_model(tmp_path, memory_scope=scope, **changes), new_iterator(scope)
    resumed = copy.deepcopy(model)
    batches = iterator.next_epoch_itr()
    read(model, [next(batches) for _ in range(stop)])
    MemorySnapshots(str(tmp_path)).save(model, iterator)
    rest = list(batches)
    expected = read(model, rest)
    snapshots = MemorySnapshots(str(tmp_path / "elsewhere"), Restored(str(tmp_path / "checkpoint.pt"), 1, stop))
    snapshots.expect(resumed)
    with caplog.at_level("INFO"):
        snapshots.load(rest[0], resumed, iterator)
    assert all(torch.equal(a, b) for a, b in zip(read(resumed, rest), expected))
    assert "memory of 2 lanes read from" in caplog.text
    resumed.reset_memory()
    snapshots.load(rest[0], resumed, iterator)  # only before the first batch
    assert resumed.needs_replay(rest[0]["net_input"]["segments"]).any()


@pytest.mark.parametrize("changes", [{"carry_window": 5}, {"carry_window": 9, "model": "alibi_lm", "memory_size": 0}])
@pytest.mark.parametrize("stop", [3, 8, 10])
def test_a_carried_window_is_rebuilt_by_replay(tmp_path, changes, stop):
    """In a new process, also where another lane was within a document: its padding rounds in another way."""
    model, iterator = new_model(tmp_path, **changes), new_iterator()
    resumed = copy.deepcopy(model)
    batches = iterator.next_epoch_itr()
    read(model, [next(batches) for _ in range(stop)])
    rest = list(batches)
    expected = read(model, rest)
    replay_past(rest[0], resumed, iterator.dataset)
    torch.testing.assert_close(read(resumed, rest), expected, atol=1e-5, rtol=1e-5)


@pytest.fixture
def stopped(tmp_path):
    """A model that has read three batches, its iterator, and the path of its snapshot."""
    model, iterator = new_model(tmp_path), new_iterator()
    batches = iterator.next_epoch_itr()
    read(model, [next(batches) for _ in range(3)])
    MemorySnapshots(str(tmp_path / "run")).save(model, iterator)
    (path,) = (tmp_path / "run").iterdir()
    assert path.name == "memory_epoch1_batch3.rank0of1.safetensors"
    return SimpleNamespace(model=model, iterator=iterator, batches=batches, path=path)


def continued(stopped, place=(1, 3)):
    return MemorySnapshots("unused", Restored(str(stopped.path.parent / "checkpoint.pt"), *place))


def test_a_snapshot_that_is_gone_is_refused_at_the_start(stopped):
    continued(stopped).expect(stopped.model)
    stopped.path.unlink()
    with pytest.raises(SnapshotError, match="checkpoint.pt stopped at batch 3 of epoch 1, and there is no snapshot"):
        continued(stopped).expect(stopped.model)


def test_snapshots_that_do_not_fit_are_refused(stopped, tmp_path):
    batch = next(stopped.batches)
    other = new_model(tmp_path, retrieval_layer_index=2)
    with pytest.raises(SnapshotError, match="--retrieval-layer-index was 1 and is 2: .*--resume-memory replay"):
        continued(stopped).load(batch, other, stopped.iterator)
    other = new_model(tmp_path, retrieval_layer_index="1,3")
    with pytest.raises(SnapshotError, match="--retrieval-layer-index was 1 and is 1,3; heads was .*--resume-memory"):
        continued(stopped).load(batch, other, stopped.iterator)
    other = new_model(tmp_path, backbone={"seed": 5})
    with pytest.raises(SnapshotError, match="backbone .* was .* and is .*: .*--resume-memory replay"):
        continued(stopped).load(batch, other, stopped.iterator)
    other = new_model(tmp_path)
    shutil.copy(stopped.path, stopped.path.parent / stopped.path.name.replace("batch3", "batch4"))
    with pytest.raises(SnapshotError, match="batch was 3 and is 4: .*--resume-memory replay"):
        continued(stopped, (1, 4)).load(next(stopped.batches), other, stopped.iterator)
    with pytest.raises(SnapshotError, match="does not reach the batch that comes next: .*--resume-memory replay"):
        continued(stopped).load(next(stopped.batches), other, stopped.iterator)


def test_a_model_without_a_memory(tmp_path, caplog):
    with pytest.raises(ValueError, match="--memory-snapshot is for models that have a memory"):
        MemorySnapshots(str(tmp_path)).expect(torch.nn.Identity())
    off, iterator = new_model(tmp_path, use_external_memory=False), new_iterator()
    next(iterator.next_epoch_itr())
    with caplog.at_level("INFO"):
        MemorySnapshots(str(tmp_path / "run"), Restored("checkpoint.pt", 1, 3)).expect(off)
    assert "--memory-snapshot has no effect while the memory is off" in caplog.text
    MemorySnapshots(str(tmp_path / "run")).save(off, iterator)
    assert not (tmp_path / "run").exists()


def test_at_the_end_of_an_epoch_there_is_nothing_to_save(stopped):
    list(stopped.batches)
    MemorySnapshots(str(stopped.path.parent)).save(stopped.model, stopped.iterator)
    assert [path.name for path in stopped.path.parent.iterdir()] == [stopped.path.name]


def test_a_full_disk_is_one_sentence_and_leaves_what_was_there(stopped, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=500))
    next(stopped.batches)
    with pytest.raises(OSError, match="has 0.0 MB left, but a snapshot .* needs up to .*: make room and start"):
        MemorySnapshots(str(stopped.path.parent)).save(stopped.model, stopped.iterator)
    assert [path.name for path in stopped.path.parent.iterdir()] == [stopped.path.name]


def write_checkpoint(path, epoch, batches):
    place = {"epoch": epoch, "iterations_in_epoch": batches}
    torch.save({"model": {}, "extra_state": {"train_iterator": place}}, path)


def test_a_snapshot_stays_as_long_as_a_checkpoint_of_its_place(tmp_path):
    snapshots = MemorySnapshots(str(tmp_path))
    for batches in (5, 10, 15):
        for rank in (0, 1):
            (tmp_path / f"memory_epoch1_batch{batches}.rank{rank}of2.safetensors").write_bytes(b"")
    write_checkpoint(tmp_path / "checkpoint_1_10.pt", 1, 10)
    write_checkpoint(tmp_path / "checkpoint_last.pt", 1, 15)
    (tmp_path / "checkpoint_best.pt").write_bytes(b"cut short")
    (tmp_path / "memory_of_mine.safetensors").write_bytes(b"")

    def left():
        snapshots.remove_unused()
        return sorted(path.name for path in tmp_path.glob("memory*"))

    assert left() == sorted(
        [f"memory_epoch1_batch{b}.rank{r}of2.safetensors" for b in (10, 15) for r in (0, 1)]
        + ["memory_of_mine.safetensors"]
    )
    write_checkpoint(tmp_path / "checkpoint_last.pt", 2, 0)
    assert left() == [*(f"memory_epoch1_batch10.rank{r}of2.safetensors" for r in (0, 1)), "memory_of_mine.safetensors"]
    (tmp_path / "checkpoint_1_10.pt").unlink()
    assert left() == ["memory_of_mine.safetensors"]

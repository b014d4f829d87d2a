"""The task inside one process: what it loads, how it lays lanes, what it refuses."""

import logging
import subprocess
import sys

import pytest
import torch

from longmem_fairseq.data.manifest import dictionary_fingerprint
from longmem_fairseq.tasks.longmem_language_modeling import LongMemLanguageModelingTask
from longmem_fairseq.tasks.memory_session import memory_of_evaluation
from tests.fairseq_runs import make_dictionary, random_documents, write_data
from tests.tasks.test_options import config

LENGTHS = [40, 3, 17]


def make_task(data, **changes):
    return LongMemLanguageModelingTask.setup_task(config(data=str(data), tokens_per_sample=8, **changes))


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data", train=random_documents(LENGTHS))


def iterator(task, split="train", **options):
    task.load_dataset(split)
    return task.get_batch_iterator(task.dataset(split), **options)


@pytest.mark.parametrize(
    "limits, ranks, lanes",
    [
        ({"max_sentences": 2}, 1, 2),
        ({"max_tokens": 16}, 1, 2),
        ({"max_tokens": 23, "max_sentences": 3}, 1, 2),
        ({"max_tokens": 7}, 1, 1),  # a batch holds a segment at least
        ({"max_sentences": 100}, 1, 3),  # no more lanes than documents
        ({"max_sentences": 100}, 2, 2),
    ],
)
def test_lanes_of_a_batch(data, limits, ranks, lanes):
    itr = iterator(make_task(data), num_shards=ranks, **limits)
    assert itr.dataset.n_lanes == lanes
    assert itr.dataset.rank_tokens(0) + (ranks > 1 and itr.dataset.rank_tokens(1)) == sum(LENGTHS)


def test_no_shuffle(data):
    assert iterator(make_task(data), max_sentences=2, seed=5).dataset.seed == 5
    assert iterator(make_task(data, data_no_shuffle=True), max_sentences=2, seed=5).dataset.seed is None


def test_dropping_the_last_batch_is_refused(data):
    with pytest.raises(ValueError, match="--skip-remainder-batch would drop tokens"):
        iterator(make_task(data), max_sentences=2, skip_remainder_batch=True)


def test_no_data(tmp_path):
    with pytest.raises(ValueError, match="no data: name the directory"):
        LongMemLanguageModelingTask.setup_task(config(data=None))
    with pytest.raises(FileNotFoundError, match="no dictionary: .*nowhere/dict.txt does not exist"):
        make_task(tmp_path / "nowhere")


def test_directories_read_in_turn_share_a_dictionary(data, tmp_path):
    second = write_data(tmp_path / "second", train=random_documents([9]))
    task = make_task(f"{data}:{second}")
    assert [len(task.load_dataset("train", epoch=epoch)) for epoch in (1, 2, 3)] == [3, 1, 3]
    assert task.has_sharded_data("train")
    make_dictionary(59).save(str(second / "dict.txt"))
    message = "second/dict.txt differs from the dictionary of the first data directory"
    with pytest.raises(ValueError, match=message):
        task.load_dataset("train", epoch=2)
    with pytest.raises(ValueError, match=message):  # training does not begin, though it would read the first for long
        make_task(f"{data}:{second}")


def test_directories_that_later_epochs_read_are_looked_at_first(data, tmp_path):
    second = write_data(tmp_path / "second", valid=random_documents([9]))
    with pytest.raises(FileNotFoundError, match=r"no data for the split 'train'.*second: valid\)"):
        make_task(f"{data}:{second}")
    make_task(f"{data}:{second}", path="checkpoint.pt")


def test_evaluation_reads_all_directories(data, tmp_path, caplog):
    """Training validates on the first, as fairseq does, and says so where others have the split too."""
    second = write_data(tmp_path / "second", train=random_documents([9]), valid=random_documents([5]))
    third = write_data(tmp_path / "third", train=random_documents([2]), valid=random_documents([6, 7], seed=1))
    task = make_task(f"{data}:{second}:{third}", path="checkpoint.pt")
    dataset = task.load_dataset("valid")
    assert dataset.sizes.tolist() == [5, 6, 7]
    assert dataset.names() == ["second/valid:0", "third/valid:0", "third/valid:1"]
    assert task.load_dataset("train").tokens == sum(LENGTHS) + 11
    training = make_task(f"{second}:{third}:{data}")
    with caplog.at_level(logging.WARNING):
        assert training.load_dataset("valid").sizes.tolist() == [5]
        training.load_dataset("train")
    (warning,) = [record.getMessage() for record in caplog.records if "as fairseq does" in record.getMessage()]
    assert warning == f"valid is read from {second} alone, as fairseq does it; there is also one in {third}"


def test_numbered_files_are_read_together(data):
    write_data(data, train1=random_documents([9, 9]))
    task = make_task(data)
    assert len(task.load_dataset("train", combine=True)) == 5
    assert len(task.load_dataset("train", combine=False)) == 3


def test_state_names_the_dictionary(data):
    task = make_task(data)
    state = task.state_dict()
    assert state["dictionary_sha256"] == dictionary_fingerprint(make_dictionary().symbols)
    task.load_state_dict(state)
    with pytest.raises(ValueError, match="made with another dictionary"):
        task.load_state_dict({**state, "dictionary_sha256": "0" * 64})


def test_a_checkpoint_that_is_evaluated_does_not_concern_the_save_dir(data, tmp_path):
    """fairseq-eval-lm has no --save-dir, but a default for it, in which another training may have been."""
    (tmp_path / "checkpoint_last.pt").write_text("no checkpoint")
    make_task(data, save_dir=str(tmp_path), path=str(tmp_path / "x.pt"))
    with pytest.raises(ValueError, match="cannot be read"):
        make_task(data, save_dir=str(tmp_path))


def test_memory_of_a_training_that_continues(data, tmp_path, caplog):
    """From a snapshot by --memory-snapshot or --resume-memory; without one at an epoch's start, or by replay."""
    place = {"epoch": 2, "iterations_in_epoch": 3}

    def expected(**options):
        torch.save({"extra_state": {"train_iterator": place}}, tmp_path / "checkpoint_last.pt")
        task = make_task(data, save_dir=str(tmp_path), **options)
        return task.memory.snapshots and (task.memory.snapshots.restored is not None)

    assert expected() is None
    assert expected(memory_snapshot=True) is True
    assert expected(resume_memory="snapshot") is True
    assert expected(memory_snapshot=True, resume_memory="replay") is False
    assert expected(memory_snapshot=True, reset_dataloader=True) is False
    with caplog.at_level(logging.WARNING):
        assert expected(memory_snapshot=True, memory_scope="shared") is True
        assert "is exact" not in caplog.text
        assert expected(memory_scope="shared") is None
    assert "a snapshot (--memory-snapshot) is exact" in caplog.text
    place["iterations_in_epoch"] = 0
    assert expected(memory_snapshot=True) is False
    with pytest.raises(ValueError, match="--memory-snapshot and --no-save-optimizer-state exclude each other"):
        expected(memory_snapshot=True, no_save_optimizer_state=True)
    with pytest.raises(ValueError, match="--memory-snapshot does not work with --ddp-backend fully_sharded"):
        expected(memory_snapshot=True, ddp_backend="fully_sharded")


def test_a_given_memory_needs_a_model_with_a_memory(data, tmp_path):
    task = make_task(data, path="checkpoint.pt", memory_save=str(tmp_path / "memory"))
    stock = torch.nn.Linear(1, 1)
    message = "--memory-save needs a model with a memory, but that of --path has none: leave it out"
    with pytest.raises(ValueError, match=message):
        task.build_generator([stock], None)
    with pytest.raises(ValueError, match=message):
        memory_of_evaluation(stock, task.args, task.dictionary, None, 1)


def test_lines_of_stock_preprocessing(tmp_path, caplog):
    """Data of fairseq-preprocess has no documents: its lines are read as such, or joined."""
    lines = ["the cat sat", "", "on the mat and on the other mat", "the end"]
    (tmp_path / "text").write_text("\n".join(lines) + "\n")
    subprocess.run(
        [sys.executable, "-m", "fairseq_cli.preprocess", *"--only-source --trainpref text --destdir data".split()],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    tokens = [len(line.split()) + 1 for line in lines]
    for scope, streams in (("document", 4), ("stream", 1)):
        task = LongMemLanguageModelingTask.setup_task(
            config(data=str(tmp_path / "data"), tokens_per_sample=64, memory_scope=scope)
        )
        with caplog.at_level(logging.WARNING):
            batches = list(iterator(task, max_sentences=1).next_epoch_itr())
        assert task.dataset("train").sizes.tolist() == tokens
        assert sum(batch["ntokens"] for batch in batches) == sum(tokens)
        assert len(batches) == streams
    (warning,) = [record.getMessage() for record in caplog.records if "--memory-scope stream" in record.getMessage()]
    assert "items of 4 tokens on average" in warning

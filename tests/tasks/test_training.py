"""fairseq-train as users run it: what it reads, killing and resuming it, two ranks, what it refuses."""

import resource
import shutil
import signal

import pytest
import torch

from tests.conftest import TRAIN_LENGTHS, VALID_LENGTHS, T
from tests.fairseq_runs import (
    figures,
    finish,
    make_dictionary,
    random_documents,
    run,
    run_ranks,
    start,
    weights,
    write_data,
)

UPDATES = 21  # of an epoch on four lanes: the longest document has 21 segments


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def updates(log):
    """What was logged for each update: number of the update -> its loss and gradient norm."""
    names = ("num_updates", "loss", "gnorm", "wpb")
    return {row[0]: row[1:] for row in zip(*(figures(log, "train_inner", name) for name in names))}


def test_all_tokens_are_read(tiny_longmem):
    read = updates(tiny_longmem.log)
    assert sum(row[-1] for row in read.values()) == 2 * sum(TRAIN_LENGTHS)
    assert figures(tiny_longmem.log, "valid", "num_updates") == [UPDATES, 2 * UPDATES]
    for words_per_batch in figures(tiny_longmem.log, "valid", "wpb"):
        assert words_per_batch == pytest.approx(sum(VALID_LENGTHS) / -(-max(VALID_LENGTHS) // T), abs=0.06)


def test_max_tokens_workers_and_update_freq_read_all_tokens_too(tiny_data, tiny_options, tmp_path):
    log = run(
        "train", *tiny_options, "--max-tokens", 3 * T + 2, "--update-freq", 2, "--num-workers", 2,
        "--disable-validation", "--save-dir", tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert "train: 3 lanes on each of 1 ranks" in log
    assert sum(row[-1] for row in updates(log).values()) == 2 * sum(TRAIN_LENGTHS)


def test_shards_of_the_data_are_read_in_turn(tiny_data, tiny_options, tmp_path):
    second = write_data(tmp_path / "second", train=random_documents([60, 7]))
    log = run(
        "train", f"{tiny_data}:{second}", *tiny_options[1:], "--batch-size", 4, "--num-workers", 0, "--no-save",
        "--save-dir", tmp_path, cwd=tmp_path,
    )  # fmt: skip
    assert "train: 2 documents, 67 tokens" in log
    assert sum(row[-1] for row in updates(log).values()) == sum(TRAIN_LENGTHS) + 67


@pytest.fixture(scope="module")
def killed(tiny_options, tmp_path_factory):
    """A training that was killed amid its first epoch, after it had saved at least the checkpoint of update 10."""
    directory = tmp_path_factory.mktemp("killed")
    options = [*tiny_options, "--batch-size", 4, "--num-workers", 1, "--save-interval-updates", 5]
    options += ["--validate-interval", 1, "--save-dir", directory]
    process = start("train", *options, cwd=directory)
    log = ""
    for line in process.stdout:
        log += line
        if '"num_updates": "13"' in line:
            process.send_signal(signal.SIGKILL)
            break
    else:
        pytest.fail(log[-5000:])
    process.wait()
    assert (directory / "checkpoint_1_10.pt").exists()
    return directory, options


def test_a_killed_training_continues_bit_by_bit(killed, tiny_longmem, tmp_path):
    """Weights and losses are those of the training that was not interrupted, dropout and memory included."""
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    last = tmp_path / "run" / "checkpoint_last.pt"
    last.write_bytes(last.read_bytes()[:1000])  # as if it was killed while fairseq copied its newest checkpoint there
    log = run("train", *options[:-1], tmp_path / "run", cwd=tmp_path)
    assert "checkpoint_last.pt is made again" in log.replace("it is made again", "checkpoint_last.pt is made again")
    assert "rebuilt the memory" in log
    whole, resumed = updates(tiny_longmem.log), updates(log)
    assert 10 < min(resumed) < 2 * UPDATES
    assert resumed == {update: whole[update] for update in resumed}
    assert same_weights(last, tiny_longmem.checkpoint)


def test_a_full_disk_leaves_the_last_checkpoint(killed, tmp_path):
    """Files may not grow beyond 20 kB, as if the disk was full: the next checkpoint fails, the others stay."""
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    process = start(
        "train", *options[:-1], tmp_path / "run", "--num-workers", 0, cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )  # fmt: skip
    log = finish(process, succeeds=False)
    assert "File too large" in log
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")} == before


def test_other_lanes_cannot_continue_amid_an_epoch(killed, tmp_path):
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    options = [*options[:-1], tmp_path / "run"]
    options[options.index("--batch-size") + 1] = 2
    log = run("train", *options, cwd=tmp_path, succeeds=False)
    assert "lanes per rank (--batch-size, --max-tokens) was 4 and is 2" in log


def test_two_ranks(tiny_options, tiny_longmem, tmp_path):
    """Two ranks of two lanes do what one rank of four does, and continue where they stopped."""
    options = [*tiny_options, "--batch-size", 2, "--num-workers", 0, "--dropout", 0]
    options += ["--valid-subset", "valid,single"]
    whole, _ = run_ranks("train", *options, "--save-dir", tmp_path / "whole", cwd=tmp_path)
    one = run(
        "train", *options, "--batch-size", 4, "--no-save", "--save-dir", tmp_path / "one", cwd=tmp_path
    )  # the same lanes: lane g is row g // 2 of rank g % 2
    for figure in ("loss", "gnorm", "wpb"):
        two_ranks, one_rank = figures(whole, "train_inner", figure), figures(one, "train_inner", figure)
        assert len(two_ranks) == 2 * UPDATES
        assert two_ranks == pytest.approx(one_rank, rel=2e-3, abs=2e-3)
    for split in ("valid", "single"):
        assert figures(whole, split, "loss") == pytest.approx(figures(one, split, "loss"), abs=2e-3)

    stopped = ["train", *options, "--save-dir", tmp_path / "stopped"]
    run_ranks(*stopped, "--max-update", 12, cwd=tmp_path)
    resumed = run_ranks(*stopped, cwd=tmp_path)
    assert "rebuilt the memory" in resumed[0]
    assert same_weights(tmp_path / "stopped" / "checkpoint_last.pt", tmp_path / "whole" / "checkpoint_last.pt")


def test_a_missing_restore_file_is_an_error(tiny_options, tmp_path):
    log = run(
        "train", *tiny_options, "--batch-size", 2, "--save-dir", tmp_path, "--restore-file", tmp_path / "gone.pt",
        cwd=tmp_path, succeeds=False,
    )  # fmt: skip
    assert f"--restore-file {tmp_path / 'gone.pt'} does not exist" in log
    assert not list(tmp_path.iterdir())


def test_a_token_outside_the_dictionary_is_an_error_and_keeps_the_checkpoint(tiny_data, tiny_options, tmp_path):
    documents = random_documents(TRAIN_LENGTHS)
    documents[5][300] = len(make_dictionary())
    data = write_data(tmp_path / "data", train=documents, valid=random_documents(VALID_LENGTHS, seed=1))
    log = run(
        "train", data, *tiny_options[1:], "--batch-size", 4, "--num-workers", 1, "--save-interval-updates", 5,
        "--save-dir", tmp_path / "run", cwd=tmp_path, succeeds=False,
    )  # fmt: skip
    assert "token 64 at position 300 of document 5" in log and "outside the dictionary of 64 symbols" in log
    torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=False)

"""fairseq-train as users run it: what it reads, killing and resuming it, two ranks, what it refuses."""

import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from longmem_fairseq.hub import LongMem
from longmem_fairseq.tasks.checkpoints import place_in
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
from tests.repository import ROOT

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


def test_max_tokens_workers_update_freq_and_shards_read_all_tokens_too(tiny_data, tiny_options, tmp_path):
    """Shards of the data are read in turn, one an epoch."""
    second = write_data(tmp_path / "second", train=random_documents([60, 7]))
    log = run(
        "train",
        f"{tiny_data}:{second}",
        *tiny_options[1:],
        "--max-tokens",
        3 * T + 2,
        *"--update-freq 2 --num-workers 2 --disable-validation --no-save --memory-scope stream".split(),
        "--save-dir",
        tmp_path,
        cwd=tmp_path,
    )
    assert "train: 3 lanes on each of 1 ranks" in log and "train: 2 documents, 67 tokens" in log
    assert sum(row[-1] for row in updates(log).values()) == sum(TRAIN_LENGTHS) + 67


def interrupt(update, act, *options, cwd, **more):
    """Do something to fairseq-train when it logs an update; returns how it ended, and what it printed."""
    process = start("train", *options, cwd=cwd, **more)
    log = ""
    for line in process.stdout:
        log += line
        if f'"num_updates": "{update}"' in line:
            act(process)
    return process.wait(), log


@pytest.fixture(scope="module")
def killed(tiny_options, tmp_path_factory):
    """A training that was killed within its first epoch, after it had saved at least the checkpoint of update 10."""
    directory = tmp_path_factory.mktemp("killed")
    options = [*tiny_options, "--batch-size", 4, "--num-workers", 1, "--save-interval-updates", 5]
    options += ["--keep-interval-updates", 2, "--memory-snapshot", "--save-dir", directory]
    ended, log = interrupt(13, lambda process: process.kill(), *options, cwd=directory)
    assert ended == -signal.SIGKILL, log[-5000:]
    assert (directory / "checkpoint_1_10.pt").exists()
    return directory, options


def between(directory):
    """A limit on the size of files that lets a snapshot be written, but no checkpoint."""
    snapshot = max(path.stat().st_size for path in directory.glob("memory*"))
    checkpoint = (directory / "checkpoint_1_10.pt").stat().st_size
    assert snapshot < checkpoint
    return ((snapshot + checkpoint) // 2,) * 2


def test_a_killed_training_continues_bit_by_bit(killed, tiny_longmem, tmp_path):
    """Killed twice, weights and losses are those of the training that was not, dropout and memory included."""
    directory, options = killed
    run_directory, last = tmp_path / "run", tmp_path / "run" / "checkpoint_last.pt"
    shutil.copytree(directory, run_directory)
    options = [*options[:-1], run_directory, "--num-workers", 0]
    last.write_bytes(last.read_bytes()[:1000])  # as if it was killed while fairseq copied its newest checkpoint there

    # Continues from the snapshot, and is killed by the kernel within the bytes of the checkpoint of update 30.
    (tmp_path / "sitecustomize.py").write_text("import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)")
    limit = between(run_directory)
    ended, first = interrupt(
        28,
        lambda process: resource.prlimit(process.pid, resource.RLIMIT_FSIZE, limit),
        *options,
        cwd=tmp_path,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert ended == -signal.SIGXFSZ, first[-5000:]
    assert "it is made again from" in first
    assert re.search(r"memory of 4 lanes read from .*memory_epoch1_batch10.* in [\d.]+ s", first)
    assert (run_directory / "checkpoint_2_30.pt.tmp").stat().st_size == limit[0]
    assert not (run_directory / "checkpoint_2_30.pt").exists()

    second = run("train", *options, "--resume-memory", "replay", cwd=tmp_path)
    assert "checkpoint_2_30.pt.tmp was never finished, and is removed" in second
    assert re.search(r"memory of \d lanes rebuilt by replay of the \d batches before in [\d.]+ s", second)
    whole, resumed = updates(tiny_longmem.log), {**updates(first), **updates(second)}
    assert (min(updates(first)), min(updates(second))) == (11, 26)
    assert resumed == {update: row for update, row in whole.items() if update > 10}
    assert same_weights(last, tiny_longmem.checkpoint)
    assert "memory of" not in second.split("rebuilt by replay")[1] + first.split("read from")[1], "once will do"

    # A snapshot stays as long as there is a checkpoint of its place.
    snapshots = [re.findall(r"\d+", path.name) for path in run_directory.glob("memory*")]
    places = {place_in(str(path)) for path in run_directory.glob("checkpoint*.pt")}
    assert sorted((int(epoch), int(batch)) for epoch, batch, *_ in snapshots) == sorted(p for p in places if p[1])
    assert (2, 40 - UPDATES) in places and (1, 20) not in places


def test_a_snapshot_that_is_gone_is_not_replaced_by_replay(killed, tmp_path):
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    for path in (tmp_path / "run").glob("memory*"):
        path.unlink()
    before = sorted(path.name for path in (tmp_path / "run").iterdir())
    log = run("train", *options[:-1], tmp_path / "run", cwd=tmp_path, succeeds=False)
    assert re.search(r"stopped at batch \d+ of epoch 1, and there is no snapshot .*--resume-memory replay", log)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == before


def test_a_full_disk_leaves_the_last_checkpoint(killed, tmp_path):
    """Files may not grow beyond what a snapshot needs, as if the disk was full: the next checkpoint fails."""
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")}
    limit = between(directory)
    process = start(
        "train",
        *options[:-1],
        tmp_path / "run",
        "--num-workers",
        0,
        cwd=tmp_path,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
    )
    log = finish(process, succeeds=False)
    assert "File too large" in log
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").glob("*.pt")} == before


def test_damaged_data_is_an_error_and_leaves_the_last_checkpoint(killed, tiny_data, tmp_path):
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    shutil.copytree(tiny_data, tmp_path / "data")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    tokens = tmp_path / "data" / "train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    log = run("train", tmp_path / "data", *options[1:-1], tmp_path / "run", cwd=tmp_path, succeeds=False)
    assert re.search(r"ValueError: .*train.bin has \d+ bytes, but .*train.idx describes \d+", log)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_other_lanes_cannot_continue_within_an_epoch(killed, tmp_path):
    directory, options = killed
    shutil.copytree(directory, tmp_path / "run")
    options = [*options[:-1], tmp_path / "run"]
    options[options.index("--batch-size") + 1] = 2
    log = run("train", *options, cwd=tmp_path, succeeds=False)
    assert "lanes per rank (--batch-size, --max-tokens) was 4 and is 2" in log


@pytest.fixture(scope="module")
def ranks(tiny_options, tmp_path_factory):
    """A training on two ranks of two lanes that reads two layers: its options, directory and log."""
    directory = tmp_path_factory.mktemp("ranks")
    options = [*tiny_options, "--batch-size", 2, "--num-workers", 0, "--dropout", 0]
    options += ["--valid-subset", "valid,single", "--layer-reduction-factor", 1, "--retrieval-layer-index", "0,1"]
    log, _ = run_ranks("train", *options, "--save-dir", directory / "whole", cwd=directory)
    return SimpleNamespace(options=options, checkpoint=directory / "whole" / "checkpoint_last.pt", log=log)


def test_two_ranks_do_what_one_does(ranks, tmp_path):
    """The same lanes: lane g is row g // 2 of rank g % 2."""
    one = run("train", *ranks.options, "--batch-size", 4, "--save-dir", tmp_path, cwd=tmp_path)
    for figure in ("loss", "gnorm", "wpb"):
        two_ranks, one_rank = figures(ranks.log, "train_inner", figure), figures(one, "train_inner", figure)
        assert len(two_ranks) == 2 * UPDATES
        assert two_ranks == pytest.approx(one_rank, rel=2e-3, abs=2e-3)
    for split in ("valid", "single"):
        assert figures(ranks.log, split, "loss") == pytest.approx(figures(one, split, "loss"), abs=2e-3)
    # The gradient of a bias of the keys is 0 up to rounding, so its direction is arbitrary.
    two_ranks, one_rank = (
        {name: x for name, x in weights(path).items() if not name.endswith("k_proj.bias")}
        for path in (ranks.checkpoint, tmp_path / "checkpoint_last.pt")
    )
    torch.testing.assert_close(two_ranks, one_rank, rtol=1e-3, atol=1e-3)


def test_two_ranks_train_a_token_memory(ranks, tmp_path):
    """The losses of one rank with the same lanes, and the weight that the token memory has."""
    options = [*ranks.options, "--token-memory", 40, "--token-memory-k", 8, "--max-update", 6, "--disable-validation"]
    two, _ = run_ranks("train", *options, "--save-dir", tmp_path / "two", cwd=tmp_path)
    one = run("train", *options, "--batch-size", 4, "--save-dir", tmp_path / "one", cwd=tmp_path)
    for figure in ("loss", "gnorm", "token_memory_weight"):
        expected = figures(one, "train_inner", figure)
        assert len(expected) == 6 and figures(two, "train_inner", figure) == pytest.approx(expected, rel=2e-3, abs=2e-3)


def test_two_ranks_continue_bit_by_bit(ranks, tmp_path):
    stopped = ["train", *ranks.options, "--save-dir", tmp_path / "stopped", "--memory-snapshot"]
    run_ranks(*stopped, "--max-update", 10, cwd=tmp_path)
    assert len(list((tmp_path / "stopped").glob("memory_epoch1_batch10.rank*of2.safetensors"))) == 2
    log, _ = run_ranks(*stopped, "--max-update", 16, cwd=tmp_path)  # fairseq lets only the first rank log
    assert "memory of 2 lanes read from" in log
    log, _ = run_ranks(*stopped, "--resume-memory", "replay", cwd=tmp_path)  # the second rank's lanes have ended
    assert "memory of 1 lanes rebuilt by replay" in log
    assert same_weights(tmp_path / "stopped" / "checkpoint_last.pt", ranks.checkpoint)


def test_recomputed_activations_and_mixed_precision_change_nothing_where_nothing_is_rounded(ranks, tmp_path):
    """On two ranks. fairseq's --amp rounds on GPUs alone; its own path through the optimizer is taken here too."""
    options = [*ranks.options, "--checkpoint-activations", "--amp", "--save-dir", tmp_path]
    log, _ = run_ranks("train", *options, cwd=tmp_path)
    assert updates(log) == updates(ranks.log)
    assert same_weights(tmp_path / "checkpoint_last.pt", ranks.checkpoint)


def test_half_precision_keeps_all_gradients(ranks, tmp_path):
    """Two ranks, weights and activations in 16 bits, activations recomputed."""
    options = [*ranks.options, "--memory-efficient-fp16", "--checkpoint-activations", "--save-dir", tmp_path]
    log, _ = run_ranks("train", *options, cwd=tmp_path)
    assert figures(log, "train_inner", "loss") == pytest.approx(figures(ranks.log, "train_inner", "loss"), rel=0.03)
    half, full = (torch.load(path, weights_only=False) for path in (tmp_path / "checkpoint_last.pt", ranks.checkpoint))
    state = half["last_optimizer_state"]["state"]
    assert len(state) == len(full["last_optimizer_state"]["state"]) > 10
    assert all(entry["exp_avg_sq"].any() for entry in state.values())


def test_half_precision_by_autocast_continues_bit_by_bit(ranks, tmp_path):
    """--train-dtype and --backbone-dtype: float32 parameters, and a memory that is rebuilt as it was.

    On one rank with the lanes of two.
    """
    options = ["train", *ranks.options, "--batch-size", 4, "--train-dtype", "bfloat16", "--backbone-dtype", "bfloat16"]
    log = run(*options, "--save-dir", tmp_path / "whole", cwd=tmp_path)
    losses = figures(log, "train_inner", "loss")
    assert losses != figures(ranks.log, "train_inner", "loss")
    assert losses == pytest.approx(figures(ranks.log, "train_inner", "loss"), rel=0.03)
    run(*options, "--save-dir", tmp_path / "stopped", "--max-update", 10, cwd=tmp_path)
    run(*options, "--save-dir", tmp_path / "stopped", cwd=tmp_path)
    checkpoints = [tmp_path / name / "checkpoint_last.pt" for name in ("stopped", "whole")]
    assert same_weights(*checkpoints)
    state = torch.load(checkpoints[1], weights_only=False)
    assert {x.dtype for x in state["model"].values()} == {torch.float32}


def test_a_moving_average_and_another_backbone(tiny_data, tiny_options, tiny_backbone, tmp_path):
    """--store-ema averages what is trained; a training that continues knows the backbone by its fingerprint."""
    options = [*tiny_options, *"--batch-size 4 --num-workers 0 --disable-validation --lr-scheduler fixed".split()]
    options += ["--save-dir", tmp_path, *"--store-ema --ema-fp32 --ema-decay 0.9".split()]
    run("train", *options, "--max-update", 1, cwd=tmp_path)
    first = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    run("train", *options, "--max-update", 2, "--save-backbone", cwd=tmp_path)
    second = torch.load(tmp_path / "checkpoint_last.pt", weights_only=False)
    averages = second["extra_state"]["ema_fp32_params"]
    assert averages.keys() == second["model"].keys() and all(x.is_floating_point() for x in averages.values())
    for name, average in averages.items():
        expected = second["model"][name]  # of the backbone, which is as it was
        if "backbone" not in name:
            expected = 0.9 * first["extra_state"]["ema_fp32_params"][name] + 0.1 * expected
        torch.testing.assert_close(average, expected)
    state = torch.load(tiny_backbone, weights_only=False)
    state["model"]["decoder.layers.0.fc1.bias"] += 1
    torch.save(state, tmp_path / "other.pt")
    output = run("train", *options, "--pretrained-model-path", tmp_path / "other.pt", cwd=tmp_path, succeeds=False)
    assert re.search(r"trained on a backbone with fingerprint \w{12}, but \S+other.pt has", output.splitlines()[-1])


def documented(heading, language):
    """The first block of a language below a heading of docs/training.md."""
    section = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split(f"## {heading}\n")[1]
    return re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)[1]


def test_fine_tuning_starts_with_the_weights_alone(tiny_data, tiny_options, tiny_longmem, tmp_path):
    command = documented("Fine-tuning a trained side network", "bash")
    resets = re.findall(r"--reset-\S+", command)
    assert len(resets) == 4 and "--finetune-from-model" not in command
    options = [write_data(tmp_path / "data", train=random_documents([40], seed=5)), *tiny_options[1:]]
    options += "--batch-size 2 --num-workers 0 --max-update 1 --lr 1e-30 --disable-validation --save-dir".split()
    checkpoint = tiny_longmem.checkpoint
    runs = {
        "reset": ["--restore-file", checkpoint, *resets],
        "model": ["--finetune-from-model", checkpoint],
    }
    processes = [start("train", *options, tmp_path / name, *more, cwd=tmp_path) for name, more in runs.items()]
    for name, process in zip(runs, processes):
        assert figures(finish(process), "train_inner", "num_updates") == [1]
        assert place_in(tmp_path / name / "checkpoint_last.pt") == (1, 1)
        assert same_weights(tmp_path / name / "checkpoint_last.pt", checkpoint)


def test_an_average_of_checkpoints_is_a_checkpoint(tiny_data, tiny_longmem, tmp_path):
    code = documented("Averaging checkpoints", "python")
    (tmp_path / "CHECKPOINTS").mkdir()
    names = re.findall(r"CHECKPOINTS/checkpoint_\d\S+?\.pt", code)
    for number, name in enumerate(names):
        state = torch.load(tiny_longmem.checkpoint, weights_only=False)
        state["model"] = {key: x + number if x.is_floating_point() else x for key, x in state["model"].items()}
        torch.save(state, tmp_path / name)
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    average = weights(tmp_path / "CHECKPOINTS" / "checkpoint_average.pt")
    for key, x in weights(tiny_longmem.checkpoint).items():
        torch.testing.assert_close(average[key], x + 1 if x.is_floating_point() else x)  # the mean of 0, 1 and 2 more
    model = LongMem.from_pretrained(str(tmp_path / "CHECKPOINTS/checkpoint_average.pt"), str(tiny_data), device="cpu")
    assert torch.equal(model.model.decoder.layer_norm.weight, average["decoder.layer_norm.weight"])


def test_hydra_trains_as_documented(tiny_data, tiny_backbone, tmp_path):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "longmem.yaml").write_text(documented("With hydra", "yaml"))
    words = shlex.split(documented("With hydra", "bash").replace("\\\n", " "))
    assert words[:5] == "fairseq-hydra-train --config-dir config --config-name longmem".split()
    values = {
        "common.user_dir": ROOT / "longmem_fairseq",
        "task.data": tiny_data,
        "model.pretrained_model_path": tiny_backbone,
        "checkpoint.save_dir": tmp_path / "CHECKPOINTS",
    }
    assert [word.split("=")[0] for word in words[5:]] == list(values)
    tiny = ["task.tokens_per_sample=16", "model.memory_size=64", "model.k=8", "+model.retrieval_layer_index=1"]
    tiny += ["optimization.max_update=2", "optimization.update_freq=[1]", "dataset.batch_size=4", "common.cpu=true"]
    given = [f"{name}={value}" for name, value in values.items()]
    output = run("hydra_train", *words[1:5], *given, *tiny, cwd=tmp_path)
    assert "memory for training: 4 lanes x 64 tokens" in output and "num_updates: 2 >= max_update: 2" in output
    state = torch.load(tmp_path / "CHECKPOINTS" / "checkpoint_last.pt", weights_only=False)
    assert state["cfg"]["model"]["_name"] == "longmem_lm" and state["optimizer_history"][-1]["num_updates"] == 2


def test_a_missing_restore_file_is_an_error(tiny_options, tmp_path):
    log = run(
        "train",
        *tiny_options,
        "--batch-size",
        2,
        "--save-dir",
        tmp_path,
        "--restore-file",
        tmp_path / "gone.pt",
        cwd=tmp_path,
        succeeds=False,
    )
    assert f"--restore-file {tmp_path / 'gone.pt'} does not exist" in log
    assert not list(tmp_path.iterdir())


def test_a_token_outside_the_dictionary_is_an_error_and_keeps_the_checkpoint(tiny_data, tiny_options, tmp_path):
    documents = random_documents(TRAIN_LENGTHS)
    documents[5][300] = len(make_dictionary())
    data = write_data(tmp_path / "data", train=documents, valid=random_documents(VALID_LENGTHS, seed=1))
    log = run(
        "train",
        data,
        *tiny_options[1:],
        *"--batch-size 4 --num-workers 1 --save-interval-updates 5".split(),
        "--save-dir",
        tmp_path / "run",
        cwd=tmp_path,
        succeeds=False,
    )
    assert "token 64 at position 300 of document 5" in log and "outside the dictionary of 64 symbols" in log
    torch.load(tmp_path / "run" / "checkpoint_last.pt", weights_only=False)

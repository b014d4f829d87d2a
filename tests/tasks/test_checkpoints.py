import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from longmem_fairseq.data.manifest import dictionary_fingerprint
from longmem_fairseq.tasks.checkpoints import (
    DamagedCheckpoint,
    check_dictionary,
    check_space,
    prepare_restore,
    read_checkpoint,
)
from tests.fairseq_runs import make_dictionary

LAST = "checkpoint_last.pt"


def save(path, updates=5, dictionary=None):
    state = {"dictionary_sha256": dictionary_fingerprint((dictionary or make_dictionary()).symbols)}
    torch.save(
        {
            "model": {"weight": torch.randn(64, 64)},
            "task_state": state,
            "optimizer_history": [{"num_updates": updates}],
        },
        path,
    )


def prepare(directory, restore_file=LAST, finetune_from_model=None):
    restored = prepare_restore(restore_file, str(directory), finetune_from_model, make_dictionary())
    return restored and restored.path


def cut(path, share=0.5):
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_starts_from_scratch_without_a_checkpoint(tmp_path):
    assert prepare(tmp_path) is None


def test_continues_from_the_last(tmp_path):
    save(tmp_path / LAST)
    assert prepare(tmp_path) == str(tmp_path / LAST)


def test_a_named_checkpoint_must_exist(tmp_path):
    save(tmp_path / LAST)
    missing = tmp_path / "other.pt"
    with pytest.raises(FileNotFoundError, match=f"--restore-file {missing} does not exist"):
        prepare(tmp_path, str(missing))
    with pytest.raises(FileNotFoundError, match=f"--finetune-from-model {missing} does not exist"):
        prepare(tmp_path / "new", finetune_from_model=str(missing))
    save(missing)
    assert prepare(tmp_path, str(missing)) == str(missing)
    assert prepare(tmp_path / "new", finetune_from_model=str(missing)) == str(missing)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_a_damaged_last_checkpoint_is_made_again_from_the_newest_whole_one(tmp_path, share):
    for updates in (5, 20, 10):
        save(tmp_path / f"checkpoint_1_{updates}.pt", updates)
    save(tmp_path / "checkpoint_1_30.pt", 30)
    cut(tmp_path / "checkpoint_1_30.pt")
    shutil.copy(tmp_path / "checkpoint_1_20.pt", tmp_path / LAST)
    cut(tmp_path / LAST, share)
    assert prepare(tmp_path) == str(tmp_path / LAST)
    assert read_checkpoint(str(tmp_path / LAST))["optimizer_history"][-1]["num_updates"] == 20
    assert not [*tmp_path.glob("*.tmp"), *tmp_path.glob("*.part*")]


def test_a_damaged_checkpoint_without_another_is_refused_and_kept(tmp_path):
    save(tmp_path / LAST)
    cut(tmp_path / LAST)
    size = (tmp_path / LAST).stat().st_size
    with pytest.raises(DamagedCheckpoint, match=r"checkpoint_last.pt cannot be read \(.+\): continue from another"):
        prepare(tmp_path)
    assert (tmp_path / LAST).stat().st_size == size


def test_one_changed_byte_is_found(tmp_path):
    path = tmp_path / "named.pt"
    save(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1  # within the weights
    path.write_bytes(bytes(data))
    with pytest.raises(DamagedCheckpoint, match="named.pt cannot be read .*--restore-file"):
        prepare(tmp_path, str(path))


class Code:
    """What no checkpoint needs: a call, when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("made",)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_checkpoint_with_code_is_refused(tmp_path, monkeypatch, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Code()}, tmp_path / "named.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DamagedCheckpoint, match=r"\(it asks for posix.mkdir, which may run code\)") as refused:
        prepare(tmp_path, str(tmp_path / "named.pt"))
    assert "weights_only" not in str(refused.value)
    assert not (tmp_path / "made").exists()


def test_another_dictionary_of_the_same_size_is_refused(tmp_path):
    other = make_dictionary()
    other.symbols[10], other.symbols[11] = other.symbols[11], other.symbols[10]
    save(tmp_path / LAST, dictionary=other)
    with pytest.raises(ValueError, match="checkpoint_last.pt was made with another dictionary"):
        prepare(tmp_path)


def test_counts_of_a_dictionary_do_not_matter():
    other = make_dictionary()
    other.count[10] = 99
    check_dictionary({"dictionary_sha256": dictionary_fingerprint(other.symbols)}, make_dictionary(), "x")


def test_checkpoints_of_other_tasks_name_no_dictionary():
    check_dictionary({}, make_dictionary(), "x")


def test_unfinished_checkpoints_are_removed(tmp_path):
    save(tmp_path / LAST)
    (tmp_path / "checkpoint_1_5.pt.tmp").write_bytes(b"PK")
    (tmp_path / "checkpoint_last.pt.part").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("mine")
    (tmp_path / "memory_epoch1_batch2.rank0of1.safetensors.part").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "notes.tmp").write_text("mine")
    prepare(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LAST, "elsewhere", "notes.tmp"]
    assert (tmp_path / "elsewhere" / "kept").read_text() == "mine"


def test_a_checkpoint_needs_room(tmp_path, monkeypatch):
    check_space(str(tmp_path / "new"))
    save(tmp_path / LAST)
    check_space(str(tmp_path))
    free = (tmp_path / LAST).stat().st_size - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    with pytest.raises(OSError, match="the disk of --save-dir .* MB left, but a checkpoint needs"):
        check_space(str(tmp_path))

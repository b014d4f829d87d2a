"""Files are written whole, to regular files only, and names that are not UTF-8 can be written and printed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from longmem_fairseq.files import (
    parse_json,
    printable,
    remove_tree,
    require_writable,
    write_json,
    write_text,
    write_whole,
)
from tests.repository import ROOT


def mode(path):
    return os.stat(path).st_mode & 0o777


def test_a_file_is_replaced_with_its_mode(tmp_path):
    path = tmp_path / "memory.safetensors"
    path.write_text("old")
    path.chmod(0o600)
    seen = []

    def write(temporary):
        seen.append((os.path.basename(temporary), mode(os.path.dirname(temporary))))
        with open(temporary, "w") as file:
            file.write("new")
        with open(f"{temporary}.left", "w"):
            pass  # libraries have temporary files of their own

    write_whole(path, write)
    assert path.read_text() == "new" and mode(path) == 0o600
    assert seen == [("memory.safetensors", 0o700)], "nobody else reads it while it is written"
    assert os.listdir(tmp_path) == ["memory.safetensors"]
    umask = os.umask(0o027)
    try:
        write_text(tmp_path / "new.txt", "x")
    finally:
        os.umask(umask)
    assert mode(tmp_path / "new.txt") == 0o640


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    for error in (OSError(28, "No space left on device"), KeyboardInterrupt()):

        def fail(temporary, error=error):
            with open(temporary, "w") as file:
                file.write("half")
            raise error

        with pytest.raises((OSError, KeyboardInterrupt)) as caught:
            write_whole(path, fail)
        assert str(caught.value) in (f"{path} cannot be written: No space left on device", "")
        assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_through_a_link_its_file_is_written(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "target", tmp_path / "link"
    link.symlink_to(target)
    for text in ("first", "second"):  # where it points to nothing, and to a file
        write_text(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert os.listdir(tmp_path / "elsewhere") == ["target"]


def test_only_regular_files_are_written(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/full")
    for path, kind in (
        (tmp_path / "pipe", "a named pipe"),
        (tmp_path / "folder", "a directory"),
        ("/dev/full", "a device"),
        (tmp_path / "link", "a device"),
    ):
        for write in (lambda path: write_text(path, "x"), require_writable):
            with pytest.raises(OSError, match=f"{path} is {kind}, not a regular file: name another path"):
                write(path)
    assert sorted(os.listdir(tmp_path)) == ["folder", "link", "pipe"] and os.path.exists("/dev/full")
    with pytest.raises(OSError, match="the directory .*none does not exist"):
        require_writable(tmp_path / "none" / "file")


def test_what_a_killed_process_left_is_removed_and_no_link_is_followed(tmp_path):
    path = tmp_path / "a.txt"
    program = (
        "import sys, time; from longmem_fairseq.files import write_whole\n"
        "def write(path):\n    open(path, 'w').write('half'); print('writing', flush=True); time.sleep(60)\n"
        "write_whole(sys.argv[1], write)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        process.stdout.readline()
        process.send_signal(signal.SIGKILL)
    assert os.listdir(tmp_path) == ["a.txt.part"]
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").write_text("mine")
    (tmp_path / "a.txt.part" / "link").symlink_to(tmp_path / "kept")
    write_text(path, "whole")
    assert path.read_text() == "whole" and sorted(os.listdir(tmp_path)) == ["a.txt", "kept"]
    (tmp_path / "a.txt.part").symlink_to(tmp_path / "kept")
    with pytest.raises(OSError, match="a.txt.part is in the way: remove it"):
        write_text(path, "again")
    remove_tree(tmp_path / "a.txt.part")
    assert os.listdir(tmp_path / "kept") == ["file"] and path.read_text() == "whole"


def test_writers_of_one_file_wait_for_each_other(tmp_path):
    path, together, most = tmp_path / "a.txt", [], []

    def write(temporary):
        together.append(1)
        most.append(len(together))
        with open(temporary, "w") as file:
            file.write("x" * 100)
        time.sleep(0.01)
        together.pop()

    threads = [threading.Thread(target=write_whole, args=(path, write)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8 and path.read_text() == "x" * 100 and os.listdir(tmp_path) == ["a.txt"]


def test_names_that_are_not_utf_8(tmp_path):
    names = [os.fsdecode(b"caf\xe9.txt"), "\ud800", "déjà vu 🎉"]
    assert [printable(name) for name in names] == ["caf\\udce9.txt", "\\ud800", "déjà vu 🎉"]
    write_json(tmp_path / "names.json", names)
    assert json.loads((tmp_path / "names.json").read_text(encoding="utf-8")) == names
    write_text(tmp_path / "names.txt", "\n".join(names))
    assert (tmp_path / "names.txt").read_text(encoding="utf-8").split("\n") == list(map(printable, names))


def test_json_is_parsed_or_refused():
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
    for text in (b"\xff", "{", "[" * 100_000):
        with pytest.raises(ValueError):
            parse_json(text)

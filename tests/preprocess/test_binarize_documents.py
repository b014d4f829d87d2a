"""The command as users run it: from text to data that stock fairseq reads, and its errors."""

import filecmp
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import zstandard
from fairseq.data import Dictionary, data_utils

from longmem_fairseq.data.manifest import read_manifest, verify
from preprocess.binarize_documents import main
from preprocess.split_writer import smallest_dtype, write_index
from preprocess.tokenization import load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-m", "preprocess.binarize_documents"]  # run from ROOT


def write_json_lines(path, texts, **more):
    with open(path, "w", encoding="utf-8") as stream:
        for number, text in enumerate(texts):
            stream.write(json.dumps({"text": text, "name": f"document {number}", **more}) + "\n")
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, source_files, sources):
    """Training text in a directory, validation in compressed JSON lines, test in one file."""
    directory = tmp_path_factory.mktemp("inputs")
    (directory / "train" / "deep").mkdir(parents=True)
    for number, path in enumerate(source_files[:40]):
        (directory / "train" / ("deep" if number % 2 else ".") / path.name).write_bytes(path.read_bytes())
    lines = write_json_lines(directory / "valid.jsonl", sources[40:50])
    (directory / "valid.jsonl.zst").write_bytes(zstandard.compress(lines.read_bytes()))
    (directory / "test.txt").write_text("a\r\n\tb \u2581 \n\n", encoding="utf-8", newline="")
    return directory


def arguments(inputs, destination, *more):
    return [
        *("--train", str(inputs / "train"), "--valid", str(inputs / "valid.jsonl.zst")),
        *("--test", str(inputs / "test.txt"), "--destdir", str(destination), *map(str, more)),
    ]


@pytest.fixture(scope="module")
def data(inputs, tmp_path_factory):
    """The data directory that the command makes of the inputs, run in a process."""
    made = tmp_path_factory.mktemp("data") / "made"
    command = [*COMMAND, *arguments(inputs, made, "--vocab-size", 600, "--workers", 2)]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "train: 40 documents" in process.stderr
    return made


def same_files(one, two):
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(two))
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])


def test_every_document_comes_back(data, inputs, sources):
    dictionary = Dictionary.load(str(data / "dict.txt"))
    tokenizer = load_tokenizer(data)
    assert tokenizer.dictionary.symbols == dictionary.symbols and len(dictionary) == 600
    expected = {
        "train": [path.read_bytes().decode() for path in sorted((inputs / "train").rglob("*.py"))],
        "valid": sources[40:50],
        "test": [(inputs / "test.txt").read_bytes().decode()],
    }
    for split, texts in expected.items():
        items = data_utils.load_indexed_dataset(str(data / split), dictionary, "mmap")
        assert len(items) == len(texts)
        for item, text in zip(items, texts, strict=True):
            assert item[-1] == dictionary.eos() and (item != dictionary.unk()).all()
            assert (item[:-1] >= dictionary.nspecial).all()
            assert tokenizer.decode(item.tolist()) == text


def test_names_and_counts_stand_beside_the_data(data, inputs):
    manifest = read_manifest(data)
    for split, names in {
        "train": [path.relative_to(inputs / "train").as_posix() for path in sorted((inputs / "train").rglob("*.py"))],
        "valid": [f"document {number}" for number in range(10)],
        "test": ["test.txt"],
    }.items():
        records = [json.loads(line) for line in (data / f"{split}.documents.jsonl").read_text().splitlines()]
        items = data_utils.load_indexed_dataset(str(data / split), None, "mmap")
        assert [record["name"] for record in records] == names
        assert [record["tokens"] for record in records] == items.sizes.tolist()
        assert manifest["splits"][split]["documents"] == len(names)
        assert manifest["splits"][split]["tokens"] == items.sizes.sum()
        verify(data, split, full=True)
    assert manifest["tokenizer"]["lossless"] and manifest["tokenizer"]["kind"] == "sentencepiece"


def test_stock_language_modeling_reads_it(data):
    from fairseq.tasks.language_modeling import LanguageModelingConfig, LanguageModelingTask

    config = LanguageModelingConfig(data=str(data), sample_break_mode="none", tokens_per_sample=128)
    config.seed, config.dataset_impl, config.train_subset, config.use_plasma_view = 1, None, "train", False
    task = LanguageModelingTask.setup_task(config)
    task.load_dataset("train")
    seen = sum(len(task.dataset("train")[i]["target"]) for i in range(len(task.dataset("train"))))
    assert seen == read_manifest(data)["splits"]["train"]["tokens"]


def test_the_index_is_fairseqs_own(data, tmp_path):
    from fairseq.data.indexed_dataset import MMapIndexedDatasetBuilder

    items = data_utils.load_indexed_dataset(str(data / "train"), None, "mmap")
    builder = MMapIndexedDatasetBuilder(str(tmp_path / "train.bin"), dtype=np.uint16)
    for item in items:
        builder.add_item(item)
    builder.finalize(str(tmp_path / "train.idx"))
    for name in ("train.bin", "train.idx"):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes()


def test_the_index_of_more_than_two_gigabytes(tmp_path):
    from fairseq.data.indexed_dataset import MMapIndexedDataset

    sizes = [1_500_000_000, 7, 1_900_000_000, 1]
    np.array(sizes, dtype=np.int32).tofile(tmp_path / "sizes")
    write_index(tmp_path / "written.idx", tmp_path / "sizes", np.uint32)
    with MMapIndexedDataset.Index.writer(str(tmp_path / "stock.idx"), np.uint32) as index:
        index.write(sizes)
    assert (tmp_path / "written.idx").read_bytes() == (tmp_path / "stock.idx").read_bytes()


@pytest.mark.parametrize("symbols", [4, 65499, 65500, 200_000])
def test_the_dtype_is_fairseqs_own(symbols):
    from fairseq.data.indexed_dataset import best_fitting_int_dtype

    assert smallest_dtype(symbols) is best_fitting_int_dtype(symbols)


def test_workers_do_not_change_a_byte(data, inputs, tmp_path):
    main(arguments(inputs, tmp_path / "made", "--vocab-size", 600))
    same_files(data, tmp_path / "made")


def test_processes_do_not_change_a_byte(large, tmp_path):
    given, expected = large
    main([*given, "--workers", "3", "--destdir", str(tmp_path / "made")])
    same_data(expected, tmp_path / "made")


def test_a_finished_run_is_not_repeated(data, inputs, caplog):
    before = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    main(arguments(inputs, data, "--vocab-size", 600))
    assert "nothing to do" in caplog.text
    assert before == {path: path.stat().st_mtime_ns for path in data.iterdir()}


def test_gpt2_with_a_wide_dictionary_and_one_split(inputs, gpt2_files, tmp_path):
    vocabulary = json.loads(gpt2_files[0].read_text())
    numbers = [*sorted(vocabulary.values(), reverse=True), *(f"filler{i}" for i in range(70_000))]
    (tmp_path / "dict.txt").write_text("".join(f"{number} 1\n" for number in numbers))
    gpt2 = ["--tokenizer", "gpt2", "--gpt2-encoder-json", gpt2_files[0], "--gpt2-vocab-bpe", gpt2_files[1]]
    more = ["--dict", tmp_path / "dict.txt", "--test", inputs / "train", "--destdir", tmp_path / "made"]
    main(list(map(str, [*gpt2, *more])))
    assert (tmp_path / "made" / "dict.txt").read_bytes() == (tmp_path / "dict.txt").read_bytes()
    assert read_manifest(tmp_path / "made")["dtype"] == "uint32"  # more symbols than two bytes can tell apart
    assert sorted(os.listdir(tmp_path / "made")) == [
        *("dict.txt", "encoder.json", "manifest.json", "test.bin", "test.documents.jsonl", "test.idx", "vocab.bpe")
    ]
    tokenizer = load_tokenizer(tmp_path / "made")
    items = data_utils.load_indexed_dataset(str(tmp_path / "made" / "test"), None, "mmap")
    for item, path in zip(items, sorted((inputs / "train").rglob("*.py")), strict=True):
        assert tokenizer.decode(item.tolist()) == path.read_bytes().decode()


def test_a_data_directory_is_a_tokenizer(data, inputs, tmp_path):
    main(["--test", str(inputs / "test.txt"), "--tokenizer", str(data), "--destdir", str(tmp_path / "made")])
    for part in ("tokenizer", "dictionary"):
        assert read_manifest(tmp_path / "made")[part]["fingerprint"] == read_manifest(data)[part]["fingerprint"]
    assert (tmp_path / "made" / "test.bin").read_bytes() == (data / "test.bin").read_bytes()


ERRORS = {
    "no input": ([], "no input: give --train, --valid or --test"),
    "missing path": (["--train", "{tmp}/nowhere"], "there is no file or directory {tmp}/nowhere"),
    "empty document": (["--train", "{tmp}/empty"], "{tmp}/empty/b.txt is an empty document: repair it, or"),
    "not UTF-8": (["--train", "{tmp}/latin.txt"], "{tmp}/latin.txt is not UTF-8 text (byte 1)"),
    "nothing left": (
        ["--test", "{tmp}/latin.txt", "--bad-documents", "skip", "--tokenizer", "{model}"],
        "there is not one --test document",
    ),
    "small vocabulary": (["--train", "{tmp}/a.txt", "--vocab-size", "10"], "--vocab-size 10 is smaller than 300"),
    "vocabulary of a model": (
        ["--train", "{tmp}/a.txt", "--tokenizer", "{model}", "--vocab-size", "300"],
        "--vocab-size is for training",
    ),
    "no model": (["--train", "{tmp}/a.txt", "--tokenizer", "{tmp}/m.model"], "cannot be loaded: No such file"),
    "not the dictionary": (
        ["--train", "{tmp}/a.txt", "--tokenizer", "{model}", "--dict", "{tmp}/dict.txt"],
        "are not in the dictionary of 1 symbols",
    ),
    "dictionary in training": (["--train", "{tmp}/a.txt", "--dict", "{tmp}/dict.txt"], "--dict does not go with"),
    "nothing to train on": (["--test", "{tmp}/a.txt"], "--tokenizer sentencepiece needs --train"),
    "gpt2 without files": (["--test", "{tmp}/a.txt", "--tokenizer", "gpt2"], "needs local files"),
    "workers": (["--train", "{tmp}/a.txt", "--workers", "0"], "--workers 0 is smaller than 1"),
    "shard": (["--train", "{tmp}/a.txt", "--shard-id", "2", "--num-shards", "2"], "--shard-id 2 is not from 0"),
    "tokenizer of shards": (["--train", "{tmp}/a.txt", "--num-shards", "2"], "train it once with"),
    "destination": (["--train", "{tmp}/a.txt", "--destdir", "{tmp}/a.txt"], "--destdir {tmp}/a.txt is not a directory"),
    "weights": (
        ["--train", "{tmp}/a.txt", "--tokenizer", "{model}", "--subset-weights", "a=-1"],
        "--subset-weights a=-1 is not NAME=W",
    ),
    "unknown subset": (
        ["--train", "{tmp}/a.txt", "--tokenizer", "{model}", "--subset-weights", "b=1"],
        "--subset-weights names b, the --train documents are of a",
    ),
    "not text": (["--train", "{tmp}/latin.txt", "{tmp}/paper.pdf"], "{tmp}/paper.pdf is a PDF document: give UTF-8"),
    "separator": (["--train", "{tmp}/a.jsonl", "--document-separator", "|"], "--document-separator is for text files"),
    "key": (["--train", "{tmp}/a.txt", "--text-key", "body"], "--text-key body is for JSON lines and Parquet, but"),
    "another key": (["--train", "{tmp}/a.jsonl", "--text-key", "body"], 'line 1, has no string under "body": name its'),
    "not a tokenizer": (["--train", "{tmp}/a.txt", "--tokenizer", "{tmp}/t.json"], "{tmp}/t.json is not a tokenizer"),
    "budget": (
        ["--train", "{tmp}/a.txt", "--tokenizer", "{model}", "--token-budget", "1000"],
        "--token-budget 1000 is more than the",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_an_error_is_one_sentence_and_leaves_nothing(name, tmp_path, model_file):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.txt").write_text("text")
    (tmp_path / "empty" / "b.txt").write_text("")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.7\n")
    (tmp_path / "t.json").write_text("{}")
    (tmp_path / "a.jsonl").write_text('{"text": "some words"}\n')
    (tmp_path / "latin.txt").write_bytes(b"a\xe9a")
    (tmp_path / "a.txt").write_text("some words\n" * 20)
    (tmp_path / "dict.txt").write_text("a 1\n")
    given, message = ERRORS[name]
    places = {"tmp": tmp_path, "model": model_file}
    given = [argument.format(**places) for argument in given]
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit) as error:
        main(["--destdir", str(tmp_path / "made"), *given])
    sentence = str(error.value.code)
    assert (
        sentence.startswith("python -m preprocess.binarize_documents: error: ") and message.format(**places) in sentence
    )
    assert "\n" not in sentence
    assert sorted(tmp_path.rglob("*")) == before


def test_marks_of_documents(model_file, tmp_path):
    """Keys and separators are part of the request, by which a run recognizes finished data."""
    (tmp_path / "a.json").write_text('{"body": "one", "text": "other"}\n{"body": "two", "text": "other"}\n')
    (tmp_path / "b.txt").write_text("three###four\n###")
    given = ["--train", str(tmp_path / "a.json"), str(tmp_path / "b.txt"), "--tokenizer", str(model_file)]
    given += ["--destdir", str(tmp_path / "made")]
    main([*given, "--text-key", "body", "--document-separator", "###"])
    items = data_utils.load_indexed_dataset(str(tmp_path / "made" / "train"), None, "mmap")
    tokenizer = load_tokenizer(tmp_path / "made")
    assert [tokenizer.decode(item.tolist()) for item in items] == ["one", "two", "three", "four\n"]
    with pytest.raises(SystemExit, match="already holds manifest.json, made from other input or with other settings"):
        main([*given, "--text-key", "body"])


def test_names_that_are_not_unicode(model_file, tmp_path):
    """Half of a surrogate pair in a name or a subset, and a file name that is not UTF-8."""
    directory = tmp_path / "d"
    directory.mkdir()
    (directory / "a.jsonl").write_text(r'{"text": "one", "name": "\ud800", "meta": {"pile_set_name": "\udfff"}}')
    with open(os.path.join(os.fsencode(directory), b"caf\xe9.txt"), "w") as file:
        file.write("two")
    given = ["--train", str(directory), "--tokenizer", str(model_file), "--token-budget", "4"]
    main([*given, "--subset-weights", "d=1", "\udfff=1", "--destdir", str(tmp_path / "made")])
    assert set(read_manifest(tmp_path / "made")["splits"]["train"]["subsets"]) <= {"d", r"\udfff"}
    main([*given[:4], "--destdir", str(tmp_path / "all")])
    records = map(json.loads, (tmp_path / "all" / "train.documents.jsonl").read_text("utf-8").splitlines())
    described = [(record["name"], record["subset"]) for record in records]
    assert described == [(r"\ud800", r"\udfff"), (r"caf\udce9.txt", "d")]
    assert set(read_manifest(tmp_path / "all")["splits"]["train"]["subsets"]) == {"d", r"\udfff"}


def test_data_is_only_replaced_with_overwrite(inputs, model_file, tmp_path, caplog):
    made = tmp_path / "made"
    train = ["--train", str(inputs / "train"), "--destdir", str(made)]
    main([*train, "--valid", str(inputs / "train"), "--vocab-size", "400"])
    before = (made / "train.bin").read_bytes()
    with pytest.raises(SystemExit, match="already holds manifest.json, made from other input or with other settings"):
        main([*train, "--tokenizer", str(model_file)])
    assert (made / "train.bin").read_bytes() == before
    main([*train, "--tokenizer", str(model_file), "--overwrite"])
    assert (made / "train.bin").read_bytes() != before
    assert not (made / "valid.bin").exists() and not (made / ".partial").exists()  # nothing of the old set remains
    verify(made, "train", full=True)
    (made / "train.bin").write_bytes(before)
    with pytest.raises(SystemExit, match="its manifest says .* truncated or was replaced; --overwrite"):
        main([*train, "--tokenizer", str(model_file)])


@pytest.fixture(scope="module")
def large(tmp_path_factory, sources, model_file):
    """JSON lines of about 12 MB, their data, and the arguments that make it."""
    directory = tmp_path_factory.mktemp("large")
    write_json_lines(directory / "large.jsonl", sources * 8)
    train = ["--train", str(directory / "large.jsonl"), "--tokenizer", str(model_file), "--save-interval", "0"]
    main([*train, "--destdir", str(directory / "made")])
    return train, directory / "made"


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_killed_run_is_continued_and_its_workers_end(large, tmp_path):
    train, expected = large
    command = [*COMMAND, *train, "--workers", "2", "--destdir", str(tmp_path / "made")]
    journal = tmp_path / "made" / ".partial" / "journal.json"
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None:
        if journal.exists() and json.loads(journal.read_text()).get("splits", {}).get("train", {}).get("position"):
            break
        time.sleep(0.005)
    workers = children(process.pid)
    assert process.poll() is None, "it was too fast to be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert sorted(os.listdir(tmp_path / "made")) == [".partial"]
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "the workers outlived their parent"
        time.sleep(0.05)
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and "train: continuing after" in process.stderr, process.stderr
    same_data(expected, tmp_path / "made")


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_killed_worker_is_one_sentence(large, tmp_path):
    command = [*COMMAND, *large[0], "--workers", "2", "--destdir", str(tmp_path / "made")]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    workers = []
    while process.poll() is None and not workers:
        time.sleep(0.005)
        # the other child is multiprocessing's own resource tracker
        spawned = [pid for pid in children(process.pid) if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        workers = [pid for pid in spawned if (tmp_path / "made" / ".partial" / "train.bin").exists()]
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    errors = process.communicate()[1]
    assert process.returncode == 1 and "Traceback" not in errors
    assert "error: a worker process was killed, probably for want of memory" in errors


def same_data(one, two):
    """The same files but for the manifest, which tells the requests apart."""
    names = sorted(set(os.listdir(one)) - {"manifest.json"})
    assert names == sorted(set(os.listdir(two)) - {"manifest.json"})
    assert filecmp.cmpfiles(one, two, names, shallow=False) == (names, [], [])
    assert read_manifest(one)["splits"] == read_manifest(two)["splits"]


def test_full_disk_keeps_the_work(large, tmp_path):
    train, expected = large
    command = [*COMMAND, *train, "--destdir", str(tmp_path / "made")]
    size = (expected / "train.bin").stat().st_size // 2
    process = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    assert process.returncode == 1
    assert "error: [Errno 27] File too large" in process.stderr and "Traceback" not in process.stderr
    assert sorted(os.listdir(tmp_path / "made")) == [".partial"]
    main(command[len(COMMAND) :])
    same_data(expected, tmp_path / "made")


class Killed(BaseException):
    """Ends a run as abruptly as a test in one process can."""


def test_a_run_can_die_anywhere(inputs, model_file, tmp_path, monkeypatch):
    """At every point where something becomes durable or visible."""
    from preprocess import workspace

    given = ["--train", str(inputs / "test.txt"), "--test", str(inputs / "test.txt"), "--tokenizer", str(model_file)]
    given += ["--save-interval", "0"]
    main([*given, "--destdir", str(tmp_path / "expected")])
    real = {name: getattr(os, name) for name in ("replace", "fsync", "unlink")}
    calls, limit = 0, 0

    def dying(name):
        def call(*arguments, **keywords):
            nonlocal calls
            calls += 1
            if calls > limit:
                raise Killed
            return real[name](*arguments, **keywords)

        return call

    finished = False
    while not finished:
        assert limit < 200
        calls, made = 0, tmp_path / f"made{limit}"
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(workspace.os, name, dying(name))
            try:
                main([*given, "--destdir", str(made)])
                finished = True
            except Killed:
                manifest = read_manifest(made) if made.exists() else None
                if manifest:  # once it is there, all is there
                    verify(made, "train", full=True)
        main([*given, "--destdir", str(made)])
        same_files(tmp_path / "expected", made)
        limit += 1
    assert limit > 15


def test_unfinished_work_is_not_mixed_with_other_settings(inputs, model_file, tmp_path, monkeypatch):
    from preprocess.split_writer import SplitWriter

    given = ["--train", str(inputs / "train"), "--destdir", str(tmp_path / "made"), "--save-interval", "0"]
    with monkeypatch.context() as patch:
        patch.setattr(SplitWriter, "finish", lambda self: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            main([*given, "--tokenizer", str(model_file)])
    with pytest.raises(SystemExit, match="unfinished work with another .*--tokenizer.*: repeat that command, or"):
        main([*given, "--tokenizer", "sentencepiece"])
    partial = tmp_path / "made" / ".partial" / "train.bin"
    content = partial.read_bytes()
    partial.write_bytes(b"\0" + content[1:])
    with pytest.raises(SystemExit, match="train.bin was changed: start again with --overwrite"):
        main([*given, "--tokenizer", str(model_file)])
    partial.write_bytes(content + b"written after the journal")
    main([*given, "--tokenizer", str(model_file), "--bad-documents", "skip"])
    verify(tmp_path / "made", "train", full=True)


def test_links_are_not_followed_and_only_files_are_replaced(inputs, model_file, tmp_path):
    made, kept = tmp_path / "made", tmp_path / "kept"
    kept.mkdir()
    (kept / "journal.json").write_text("mine")
    made.mkdir()
    command = ["--train", str(inputs / "test.txt"), "--tokenizer", str(model_file), "--destdir", str(made)]
    command.append("--overwrite")

    def refused(sentence):
        with pytest.raises(SystemExit, match=sentence):
            main(command)
        assert os.listdir(kept) == ["journal.json"] and (kept / "journal.json").read_text() == "mine"

    (made / ".partial").symlink_to(kept)
    refused(".partial is not a directory of unfinished data: remove it")
    (made / ".partial").unlink()
    (made / ".partial").mkdir()
    for name in ("lock", "journal.json", "train.bin", "x.part"):
        (made / ".partial" / name).symlink_to(kept / "journal.json" if name != "x.part" else kept)
        refused(f".partial/{name} is not a file of unfinished data: remove it")
        (made / ".partial" / name).unlink()
    os.mkfifo(made / "train.bin")
    refused("train.bin is a named pipe, not a regular file")
    (made / "train.bin").unlink()
    (made / "train.bin").symlink_to(kept / "journal.json")
    main(command)
    assert (kept / "journal.json").read_text() == "mine" and not (made / "train.bin").is_symlink()
    verify(made, "train", full=True)


def test_two_runs_do_not_write_the_same_data(inputs, model_file, tmp_path):
    import fcntl

    (tmp_path / "made" / ".partial").mkdir(parents=True)
    with open(tmp_path / "made" / ".partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(SystemExit, match="another process is writing --destdir"):
            main(["--train", str(inputs), "--tokenizer", str(model_file), "--destdir", str(tmp_path / "made")])


def test_a_worker_starts_without_torch(model_file, gpt2_files):
    """A worker imports the command's module, loads a tokenizer and encodes; torch and fairseq would take seconds."""
    program = (
        "import sys; import preprocess.binarize_documents; from preprocess.tokenization import load_tokenizer; "
        "load_tokenizer(sys.argv[1]).encode('text'); load_tokenizer('gpt2', *sys.argv[2:]).encode('text'); "
        "print(sorted({'torch', 'fairseq', 'longmem_fairseq'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program, str(model_file), *map(str, gpt2_files)]
    assert subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout == "[]\n"


def test_the_package_can_be_imported_after_its_light_modules():
    program = (
        "import preprocess.package_modules as light; import longmem_fairseq.tasks.longmem_language_modeling as task; "
        "from longmem_fairseq import files; from longmem_fairseq.data import manifest; "
        "print(light.files is files, light.manifest is manifest, task.__name__)"
    )
    output = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert output == "True True longmem_fairseq.tasks.longmem_language_modeling\n"


def test_memory_does_not_grow_with_the_input(sources, gpt2_files, tmp_path):
    gpt2 = ["--tokenizer", "gpt2", "--gpt2-encoder-json", str(gpt2_files[0]), "--gpt2-vocab-bpe", str(gpt2_files[1])]
    program = (
        "import sys; from preprocess.binarize_documents import main; main(sys.argv[1:]); "
        "from examples.benchmark.machine import peak_resident; print(peak_resident() // 1024)"
    )
    peaks = []
    for times in (2, 14):
        path = write_json_lines(tmp_path / f"{times}.jsonl", sources * times)
        made = str(tmp_path / f"made{times}")
        command = [sys.executable, "-c", program, "--train", str(path), *gpt2, "--destdir", made]
        output = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
        peaks.append(int(output.split()[-1]))  # kilobytes
    assert peaks[1] - peaks[0] < 10_000, peaks  # for 18 MB more text

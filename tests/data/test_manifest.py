"""Data that is not what its manifest says is refused before anything is computed from it."""

import json
import shutil

import pytest

from longmem_fairseq.data.manifest import (
    FORMAT,
    MANIFEST,
    ManifestError,
    dictionary_fingerprint,
    read_manifest,
    read_sizes,
    verify,
    verify_shards,
    write_manifest,
)
from longmem_fairseq.tasks.longmem_language_modeling import LongMemLanguageModelingTask
from preprocess.binarize_documents import main
from preprocess.tokenization import load_tokenizer
from tests.tasks.test_options import config


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    """Two data directories of the same tokenizer, and one of another."""
    root = tmp_path_factory.mktemp("manifest")
    for name, text in (("a", "some words\n"), ("b", "other words here\n")):
        (root / f"{name}.txt").write_text(text * 50)
    main(["--train", str(root / "a.txt"), "--vocab-size", "300", "--destdir", str(root / "one")])
    model = str(root / "one" / "sentencepiece.model")
    main(["--train", str(root / "b.txt"), str(root / "a.txt"), "--tokenizer", model, "--destdir", str(root / "two")])
    main(["--train", str(root / "b.txt"), "--vocab-size", "300", "--destdir", str(root / "three")])
    return root


@pytest.fixture
def data(pristine, tmp_path):
    shutil.copytree(pristine / "two", tmp_path / "two")
    return tmp_path / "two"


def test_intact_data_passes(data, pristine):
    manifest = verify(data, "train", full=True)
    assert manifest == read_manifest(data) and manifest["splits"]["train"]["documents"] == 2
    dtype, sizes = read_sizes(data / "train.idx")
    assert dtype.__name__ == manifest["dtype"] == "uint16"
    assert sizes.shape == (2,) and sizes.sum() == manifest["splits"]["train"]["tokens"]
    assert verify_shards([data, pristine / "one"], "train", full=True)[0] == manifest
    assert manifest["dictionary"]["fingerprint"] == dictionary_fingerprint(load_tokenizer(data).dictionary.symbols)


def test_directory_without_a_manifest_is_not_checked(tmp_path):
    assert read_manifest(tmp_path) is None and verify(tmp_path, "train") is None
    assert verify_shards([tmp_path], "train") == [None]


@pytest.mark.parametrize("name", ["train.bin", "train.idx", "train.documents.jsonl"])
def test_missing_and_truncated_files(data, name):
    content = (data / name).read_bytes()
    (data / name).write_bytes(content[:-2])
    with pytest.raises(
        ManifestError, match=f"{name} has {len(content) - 2:,} bytes, its manifest says {len(content):,}"
    ):
        verify(data, "train")
    (data / name).unlink()
    with pytest.raises(ManifestError, match=f"{name} is missing"):
        verify(data, "train")


@pytest.mark.parametrize("name", ["train.bin", "train.documents.jsonl"])
def test_changed_content_is_found_by_the_full_check(data, name):
    content = bytearray((data / name).read_bytes())
    content[len(content) // 2] ^= 1
    (data / name).write_bytes(content)
    verify(data, "train")
    with pytest.raises(ManifestError, match=f"{name} is damaged"):
        verify(data, "train", full=True)


@pytest.mark.parametrize(
    "at, message",
    [(0, "is not the index of a fairseq"), (17, "has version 1 and token type"), (26, "counts .* tokens")],
)
def test_garbage_in_the_index(data, at, message):
    content = bytearray((data / "train.idx").read_bytes())
    content[at] ^= 127
    (data / "train.idx").write_bytes(content)
    with pytest.raises(ManifestError, match=message):
        verify(data, "train")


def test_index_of_another_number_of_documents(data):
    content = (data / "train.idx").read_bytes()
    (data / "train.idx").write_bytes(content[:18] + b"\x01" + content[19:])
    with pytest.raises(ManifestError, match="1 documents need 38"):
        verify(data, "train")


def test_other_dictionary(data, pristine):
    shutil.copy(pristine / "three" / "dict.txt", data)
    with pytest.raises(ManifestError, match="dict.txt is not the dictionary that the data beside it was made with"):
        verify(data, "train")
    (data / "dict.txt").unlink()
    with pytest.raises(ManifestError, match="dict.txt is missing"):
        verify(data, "train")


def test_shards_must_share_the_tokenizer(data, pristine):
    with pytest.raises(ManifestError, match="three was made with another tokenizer than .*two"):
        verify_shards([data, pristine / "three"], "train")


def test_unknown_split_and_damaged_manifest(data):
    with pytest.raises(ManifestError, match="lists train but no split valid"):
        verify(data, "valid")
    (data / MANIFEST).write_text("{")
    with pytest.raises(ManifestError, match="manifest.json cannot be read"):
        verify(data, "train")
    (data / MANIFEST).write_text('{"format": "another"}')
    with pytest.raises(ManifestError, match="is not of the format"):
        verify(data, "train")
    (data / MANIFEST).write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(ManifestError, match="is malformed: tokenizer is None, not a dict: make the data again"):
        verify(data, "train")


def test_a_manifest_is_written_whole_or_not_at_all(tmp_path):
    fingerprints = {"fingerprint": "0", "sha256": "0"}
    contents = {"tokenizer": fingerprints, "dictionary": fingerprints, "splits": {}}
    write_manifest(tmp_path / MANIFEST, contents)
    with pytest.raises(TypeError):
        write_manifest(tmp_path / MANIFEST, {**contents, "splits": object()})
    assert read_manifest(tmp_path)["splits"] == {}


def test_training_on_shards_looks_at_all_of_them_first(data, pristine):
    """Not when their epoch comes, which may be days later."""
    shards = f"{pristine / 'one'}:{data}"
    task = LongMemLanguageModelingTask.setup_task(config(data=shards))
    assert [len(task.load_dataset("train", epoch=epoch)) for epoch in (1, 2)] == [1, 2]
    content = (data / "train.bin").read_bytes()
    (data / "train.bin").write_bytes(content[:-2])
    with pytest.raises(ManifestError, match="two/train.bin has .* bytes, its manifest says"):
        LongMemLanguageModelingTask.setup_task(config(data=shards))
    (data / "train.bin").write_bytes(content)
    manifest = json.loads((data / MANIFEST).read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    write_manifest(data / MANIFEST, manifest)
    with pytest.raises(ManifestError, match="two was made with another tokenizer than .*one"):
        LongMemLanguageModelingTask.setup_task(config(data=shards))

"""Memories on disk, and documents in a memory by name."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.document_memory import Document, DocumentMemory
from longmem_fairseq.memory.memory_file import SnapshotError, load_memory, save_memory

H, D, C, T = 2, 4, 3, 5
FINGERPRINT = "ab" * 32


def encode(tokens):
    """Keys and values (b, H, T, d) that say which token they are of."""
    x = tokens.float()[:, None, :, None].expand(-1, H, -1, D)
    return SimpleNamespace(keys=x + torch.arange(D) / 8, values=-x)


def make_library(*lengths, memory_size=60, dtype=torch.float32):
    document_memory, first = DocumentMemory(MemoryBank(1, H, D, memory_size, C, dtype)), 0
    for i, length in enumerate(lengths):
        document_memory.memorize(f"document {i}", torch.arange(first, first + length), encode, T)
        first += length
    return document_memory


def held(document_memory):
    """The tokens in a document_memory, and that keys and values are of the same."""
    keys, values = document_memory.bank.tokens(0)
    assert torch.equal(keys[..., 0], -values[..., 0])
    return keys[0, :, 0].long().tolist()


def test_documents_lie_end_to_end():
    document_memory = make_library(7, 11, 3)
    assert held(document_memory) == list(range(21)) and document_memory.tokens == 21
    assert document_memory.documents == [
        Document("document 0", 0, 7), Document("document 1", 7, 18), Document("document 2", 18, 21)
    ]  # fmt: skip


def test_the_oldest_documents_give_way():
    document_memory = make_library(7, 11, 10, memory_size=12)
    assert document_memory.tokens == 13 and held(document_memory) == list(
        range(15, 28)
    )  # 4 chunks, and one token that is no chunk yet
    assert [document.name for document in document_memory.documents] == ["document 1", "document 2"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forgetting_leaves_the_others(which):
    lengths = [7, 11, 3]
    document_memory = make_library(*lengths)
    spans = [range(0, 7), range(7, 18), range(18, 21)]
    document_memory.forget(f"document {which}")
    rest = [i for i in range(3) if i != which]
    assert held(document_memory) == [token for i in rest for token in spans[i]]
    for document, i in zip(document_memory.documents, rest):
        assert held(document_memory)[document.begin : document.end] == list(spans[i])
    document_memory.memorize("another", torch.arange(100, 104), encode, T)
    assert held(document_memory)[-4:] == [100, 101, 102, 103]


def test_forgetting_what_was_half_evicted():
    document_memory = make_library(7, 11, 10, memory_size=12)
    document_memory.forget("document 1")
    assert held(document_memory) == list(range(18, 28)) and document_memory.documents == [Document("document 2", 0, 10)]


def test_names_are_known_and_unique():
    document_memory = make_library(7)
    with pytest.raises(ValueError, match="no document other: it has document 0"):
        document_memory.forget("other")
    with pytest.raises(ValueError, match="has a document document 0 already"):
        document_memory.memorize("document 0", torch.arange(3), encode, T)


def save(path, document_memory=None, **kwargs):
    save_memory(str(path), document_memory or make_library(7, 12), FINGERPRINT, 3, **kwargs)
    return str(path)


def test_saved_and_loaded_is_the_same(tmp_path):
    document_memory = make_library(7, 12)
    path = save(tmp_path / "memory", document_memory, dtype="float32")
    other = make_library(2)
    load_memory(path, other, FINGERPRINT, 3)
    assert held(other) == held(document_memory) and other.documents == document_memory.documents
    assert torch.equal(other.bank.means, document_memory.bank.means)
    assert os.listdir(tmp_path) == ["memory"]


def test_half_precision_rounds(tmp_path):
    document_memory = make_library(12)
    document_memory.bank.keys += 1 / 3
    path, exact = save(tmp_path / "half", document_memory), save(tmp_path / "exact", document_memory, dtype="float32")
    assert os.path.getsize(path) < os.path.getsize(exact)
    other = make_library()
    load_memory(path, other, FINGERPRINT, 3)
    rounded, exact = other.bank.tokens(0)[0], document_memory.bank.tokens(0)[0]
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)
    assert not torch.equal(rounded, exact)


def test_values_beyond_half_precision_are_refused(tmp_path):
    document_memory = make_library(12)
    document_memory.bank.keys += 1e6
    with pytest.raises(SnapshotError, match="do not fit float16: save it in bfloat16 or float32"):
        save(tmp_path / "memory", document_memory)
    assert os.listdir(tmp_path) == []


def test_a_smaller_memory_takes_the_newest(tmp_path):
    path = save(tmp_path / "memory", make_library(7, 13))
    other = make_library(memory_size=9)
    load_memory(path, other, FINGERPRINT, 3)
    assert held(other) == list(range(9, 20))
    assert [document.name for document in other.documents] == ["document 1"]


def test_what_was_evicted_is_not_saved(tmp_path):
    path = save(tmp_path / "memory", make_library(7, 11, 10, memory_size=12))
    other = make_library()
    load_memory(path, other, FINGERPRINT, 3)
    assert held(other) == list(range(15, 28))
    assert other.documents == [Document("document 1", 0, 3), Document("document 2", 3, 13)]


def test_an_empty_memory_is_not_saved(tmp_path):
    with pytest.raises(SnapshotError, match="nothing was memorised"):
        save(tmp_path / "memory", make_library())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "memory")
    before = open(path, "rb").read()

    def fail(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("longmem_fairseq.memory.memory_file.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "memory", make_library(5))
    assert open(path, "rb").read() == before and os.listdir(tmp_path) == ["memory"]


def rewrite(path, header=None, **tensors):
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **(header or {})}
        tensors = {**{name: file.get_tensor(name).clone() for name in file.keys()}, **tensors}
    save_file(tensors, path, metadata=metadata)


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 10)


def flip(path):
    with open(path, "r+b") as file:
        file.seek(-3, os.SEEK_END)
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


DAMAGE = {
    "truncated": (truncate, "is damaged, or no safetensors file"),
    "flipped bit": (flip, "is not as it was written: its SHA-256 differs"),
    "changed name": (lambda path: rewrite(path, {"documents": '[["x", 0, 19]]'}), "is not as it was written"),
    "other tensors": (lambda path: rewrite(path, keys=torch.zeros(H, 19, D)), "is not as it was written"),
    "no tensors": (lambda path: save_file({}, path, {"format": "longmem memory 1"}), "is damaged"),
    "foreign": (lambda path: save_file({"x": torch.zeros(3)}, path), "its format is None"),
    "later version": (lambda path: rewrite(path, {"format": "longmem memory 2"}), "its format is longmem memory 2"),
    "no file": (os.unlink, "does not exist"),
    "text": (lambda path: open(path, "w").write("hello"), "is damaged, or no safetensors file"),
    "empty": (lambda path: open(path, "w").close(), "is damaged, or no safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_files_are_refused(tmp_path, name):
    damage, sentence = DAMAGE[name]
    path = save(tmp_path / "memory")
    damage(path)
    document_memory = make_library(4)
    with pytest.raises(SnapshotError, match=sentence):
        load_memory(path, document_memory, FINGERPRINT, 3)
    assert held(document_memory) == [0, 1, 2, 3], "what was there before stays"


def test_memories_of_other_models_are_refused(tmp_path):
    path = save(tmp_path / "memory")
    with pytest.raises(SnapshotError, match="fingerprint abababababab, but the model's has cdcdcdcdcdcd"):
        load_memory(path, make_library(), "cd" * 32, 3)
    with pytest.raises(SnapshotError, match="is of layer 3, but the model remembers layer 5"):
        load_memory(path, make_library(), FINGERPRINT, 5)
    with pytest.raises(SnapshotError, match="has 2 heads of width 4, not 1 of 4"):
        load_memory(path, DocumentMemory(MemoryBank(1, 1, D, 60, C)), FINGERPRINT, 3)

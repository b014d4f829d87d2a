"""Memories on disk, and documents in a memory by name."""

import os
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longmem_fairseq.memory.bank import MemoryBank
from longmem_fairseq.memory.document_memory import DocumentMemory, MemorizedDocument
from longmem_fairseq.memory.memory_file import SnapshotError, load_memory, save_memory
from longmem_fairseq.memory.token_bank import TokenBank

H, D, C, T = 2, 4, 3, 5
FINGERPRINT = "ab" * 32


def encode(tokens):
    """Keys and values (b, H, T, d) that say which token they are of."""
    x = tokens.float()[:, None, :, None].expand(-1, H, -1, D)
    return SimpleNamespace(keys=x + torch.arange(D) / 8, values=-x)


def write(memory, name, tokens):
    """Write a document in segments of T tokens, as a reader of documents does."""
    with memory.writing(name, len(tokens)) as bank:
        for piece in tokens.split(T):
            encoded = encode(piece[None])
            bank.append(0, encoded.keys[0], encoded.values[0])


def make_memory(*lengths, memory_size=60, dtype=torch.float32):
    memory, first = DocumentMemory(MemoryBank(1, H, D, memory_size, C, dtype)), 0
    for i, length in enumerate(lengths):
        write(memory, f"document {i}", torch.arange(first, first + length))
        first += length
    return memory


def held(memory):
    """The tokens in a memory, and that keys and values are of the same."""
    keys, values = memory.bank.tokens(0)
    assert torch.equal(keys[..., 0], -values[..., 0])
    return keys[0, :, 0].long().tolist()


def test_documents_lie_end_to_end():
    memory = make_memory(7, 11, 3)
    assert held(memory) == list(range(21)) and memory.tokens == 21
    assert memory.documents == [
        MemorizedDocument("document 0", 0, 7),
        MemorizedDocument("document 1", 7, 18),
        MemorizedDocument("document 2", 18, 21),
    ]


def test_the_oldest_documents_give_way():
    memory = make_memory(7, 11, 10, memory_size=12)
    assert memory.tokens == 13 and held(memory) == list(range(15, 28))  # 4 chunks, and one token that is no chunk yet
    assert [document.name for document in memory.documents] == ["document 1", "document 2"]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_forgetting_leaves_the_others(which):
    lengths = [7, 11, 3]
    memory = make_memory(*lengths)
    spans = [range(0, 7), range(7, 18), range(18, 21)]
    memory.forget(f"document {which}")
    rest = [i for i in range(3) if i != which]
    assert held(memory) == [token for i in rest for token in spans[i]]
    for document, i in zip(memory.documents, rest):
        assert held(memory)[document.begin : document.end] == list(spans[i])
    write(memory, "another", torch.arange(100, 104))
    assert held(memory)[-4:] == [100, 101, 102, 103]


def test_forgetting_what_was_half_evicted():
    memory = make_memory(7, 11, 10, memory_size=12)
    memory.forget("document 1")
    assert held(memory) == list(range(18, 28)) and memory.documents == [MemorizedDocument("document 2", 0, 10)]


def test_names_are_known_and_unique():
    memory = make_memory(7)
    with pytest.raises(ValueError, match="does not have a document other: it has document 0"):
        memory.forget("other")
    with pytest.raises(ValueError, match="has a document document 0 already"):
        memory.require_new("document 0")


def save(path, memory=None, **kwargs):
    save_memory(str(path), memory or make_memory(7, 12), FINGERPRINT, 3, **kwargs)
    return str(path)


def test_saved_and_loaded_is_the_same(tmp_path):
    memory = make_memory(7, 12)
    path = save(tmp_path / "memory", memory, dtype="float32")
    other = make_memory(2)
    load_memory(path, other, FINGERPRINT, 3)
    assert held(other) == held(memory) and other.documents == memory.documents
    assert torch.equal(other.bank.means, memory.bank.means)
    assert os.listdir(tmp_path) == ["memory"]


def hidden_of(tokens):
    """Hidden states (length, 2) that say which token they are of."""
    angle = tokens.float() / 100
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def with_states(memory, size, *lengths):
    """A memory with a token memory of a size, in which documents were written too."""
    memory.bank.token_bank = TokenBank(1, 2, size, dtype=torch.float32, symbols=100)
    for i, tokens in enumerate(torch.arange(sum(lengths)).split(lengths)):
        with memory.writing(f"document {i}", len(tokens)) as bank:
            encoded = encode(tokens[None])
            bank.append(0, encoded.keys[0], encoded.values[0])
            bank.token_bank.append(0, hidden_of(tokens), tokens)
    return memory


@pytest.mark.parametrize("keys, states", [(60, 60), (60, 8), (9, 60), (9, 14)])
@pytest.mark.parametrize("which", [None, 0, 1, 2])
def test_a_token_memory_is_forgotten_saved_and_read_with_the_documents(tmp_path, keys, states, which):
    """Where either holds more of the text than the other."""
    lengths = (7, 11, 10)
    memory = with_states(make_memory(memory_size=keys), states, *lengths)
    rest = [i for i in range(3) if i != which]
    tokens = [token for i in rest for token in range(sum(lengths[:i]), sum(lengths[: i + 1]))]
    if which is not None and any(document.name == f"document {which}" for document in memory.documents):
        memory.forget(f"document {which}")
    states = [token for token in range(28 - min(states, 28), 28) if token in tokens]
    path = save(tmp_path / "memory", memory)
    other, plain = with_states(make_memory(memory_size=keys), 60), make_memory(memory_size=keys)
    load_memory(path, other, FINGERPRINT, 3)
    load_memory(path, plain, FINGERPRINT, 3)
    for loaded in (memory, other):
        hidden, numbers = loaded.bank.token_bank.contents(0)
        assert numbers.tolist() == states and torch.equal(hidden, hidden_of(numbers))
        assert int(loaded.bank.token_bank.position[0]) == loaded.end
        assert held(loaded) == held(plain) == tokens[len(tokens) - len(held(plain)) :]
        for document in loaded.documents:  # counted from the stream's start
            i = int(document.name[-1])
            places = range(document.begin, document.end)
            last = [token for token in tokens if token < sum(lengths[: i + 1])][-1]
            assert places[-1] == loaded.end - 1 - (len(tokens) - 1 - tokens.index(last))
    with pytest.raises(SnapshotError, match="was saved without a token memory, which the model has: memorize"):
        load_memory(save(tmp_path / "plain"), other, FINGERPRINT, 3)


def test_half_precision_rounds(tmp_path):
    memory = make_memory(12)
    memory.bank.keys += 1 / 3
    path, exact = save(tmp_path / "half", memory), save(tmp_path / "exact", memory, dtype="float32")
    assert os.path.getsize(path) < os.path.getsize(exact)
    other = make_memory()
    load_memory(path, other, FINGERPRINT, 3)
    rounded, exact = other.bank.tokens(0)[0], memory.bank.tokens(0)[0]
    torch.testing.assert_close(rounded, exact, rtol=1e-3, atol=0)
    assert not torch.equal(rounded, exact)


def test_values_beyond_half_precision_are_refused(tmp_path):
    memory = make_memory(12)
    memory.bank.keys += 1e6
    with pytest.raises(ValueError, match="do not fit float16: save it in bfloat16 or float32"):
        save(tmp_path / "memory", memory)
    assert os.listdir(tmp_path) == []


def test_a_smaller_memory_takes_the_newest(tmp_path):
    path = save(tmp_path / "memory", make_memory(7, 13))
    other = make_memory(memory_size=9)
    load_memory(path, other, FINGERPRINT, 3)
    assert held(other) == list(range(9, 20))
    assert [document.name for document in other.documents] == ["document 1"]


def test_a_file_of_several_layers_names_them(tmp_path):
    """The keys of all heads, the lowest layer's first; a file of one layer is as it always was."""
    path = str(tmp_path / "memory")
    save_memory(path, make_memory(7), FINGERPRINT, "1,3")
    other = make_memory()
    load_memory(path, other, FINGERPRINT, "1,3")
    assert held(other) == list(range(7))
    with pytest.raises(SnapshotError, match="is of layer 1,3, but the model's memory layer is 3 .--retrieval-layer"):
        load_memory(path, other, FINGERPRINT, 3)
    with pytest.raises(SnapshotError, match="is of layer 3, but the model's memory layers are 1,3 .--retrieval-layer"):
        load_memory(save(tmp_path / "memory"), other, FINGERPRINT, "1,3")
    assert held(other) == list(range(7))


def test_what_was_evicted_is_not_saved(tmp_path):
    path = save(tmp_path / "memory", make_memory(7, 11, 10, memory_size=12))
    other = make_memory()
    load_memory(path, other, FINGERPRINT, 3)
    assert held(other) == list(range(15, 28))
    assert other.documents == [MemorizedDocument("document 1", 0, 3), MemorizedDocument("document 2", 3, 13)]


def test_an_empty_memory_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="nothing was memorized"):
        save(tmp_path / "memory", make_memory())


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "memory")
    before = open(path, "rb").read()

    def fail(tensors, name, metadata):
        open(name, "wb").write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("longmem_fairseq.tensor_files.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save(tmp_path / "memory", make_memory(5))
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
    "truncated": (truncate, "is damaged, or not a safetensors file"),
    "flipped bit": (flip, "is not as it was written: its checksum .sha256. differs"),
    "changed name": (lambda path: rewrite(path, {"documents": '[["x", 0, 19]]'}), "is not as it was written"),
    "other tensors": (lambda path: rewrite(path, keys=torch.zeros(H, 19, D)), "is not as it was written"),
    "no tensors": (lambda path: save_file({}, path, {"format": "longmem memory 1"}), "is not as it was written"),
    "foreign": (lambda path: save_file({"x": torch.zeros(3)}, path), "has the format None"),
    "later version": (lambda path: rewrite(path, {"format": "longmem memory 2"}), "has the format longmem memory 2"),
    "no file": (os.unlink, "does not exist"),
    "text": (lambda path: open(path, "w").write("hello"), "is damaged, or not a safetensors file"),
    "empty": (lambda path: open(path, "w").close(), "is damaged, or not a safetensors file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_files_are_refused(tmp_path, name):
    damage, sentence = DAMAGE[name]
    path = save(tmp_path / "memory")
    damage(path)
    memory = make_memory(4)
    with pytest.raises(SnapshotError, match=sentence):
        load_memory(path, memory, FINGERPRINT, 3)
    assert held(memory) == [0, 1, 2, 3], "what was there before stays"


def test_memories_of_other_models_are_refused(tmp_path):
    path = save(tmp_path / "memory")
    with pytest.raises(SnapshotError, match="fingerprint abababababab, but the model's has cdcdcdcdcdcd"):
        load_memory(path, make_memory(), "cd" * 32, 3)
    with pytest.raises(SnapshotError, match="is of layer 3, but the model's memory layer is 5"):
        load_memory(path, make_memory(), FINGERPRINT, 5)
    with pytest.raises(SnapshotError, match="has 2 heads of width 4, not 1 of 4"):
        load_memory(path, DocumentMemory(MemoryBank(1, 1, D, 60, C)), FINGERPRINT, 3)

"""A document is in a memory whole or not at all, wherever an interruption comes; and memories that are lent."""

import copy
import pickle
import sys

import pytest
import torch

from longmem_fairseq.memory.document_memory import DocumentMemory
from longmem_fairseq.memory.memory_file import load_memory, save_memory
from longmem_fairseq.models.reading import DocumentReader
from tests.models.tiny import documents, longmem

T = 7
FINGERPRINT = "ab" * 32
TEXT = documents([20], seed=5)[0]
FILES = tuple(
    f"longmem_fairseq/{name}.py"
    for name in ("memory/bank", "memory/token_bank", "memory/document_memory", "models/reading")
)


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    """Reads into two layers of 16 tokens and a token memory of 13, which are written and restored together."""
    options = dict(retrieval_layer_index="1,3", token_memory=13, token_memory_k=4)
    model = longmem(tmp_path_factory.mktemp("model"), **options)
    return DocumentReader(model.decoder, T)


def filled(reader, *lengths) -> DocumentMemory:
    memory = reader.new_memory()
    for i, tokens in enumerate(documents(lengths, seed=3)):
        reader.memorize(memory, f"document {i}", tokens)
    return memory


def state(memory):
    tensors, counters = memory.bank.state()
    states, places = memory.bank.token_bank.state()
    tensors = {**tensors, **{f"states.{name}": x for name, x in states.items()}}
    counters = {**counters, **{f"states.{name}": x for name, x in places.items()}}
    return {**tensors, **{name: torch.tensor(x) for name, x in counters.items()}}, list(memory.documents)


def same(one, other) -> bool:
    return (
        one[1] == other[1]
        and one[0].keys() == other[0].keys()
        and all(map(torch.equal, *map(dict.values, (one[0], other[0]))))
    )


def replace(memory, bank):
    memory.replace(*bank.tokens(0), [], bank.token_bank.contents(0))


class Interruptions:
    """Ctrl-C at a line of the package's code, counted while a function runs, and again at lines of the restoration."""

    def __init__(self, at: int, again: int = 0):
        self.at, self.again, self.lines = at, again, 0

    def trace(self, frame, event, argument):
        if not frame.f_code.co_filename.endswith((*FILES, "memory/savepoint.py")):
            return None
        if event == "line":
            self.lines += 1
            restoring = frame.f_code.co_name == "restore" and self.lines > self.at and self.again > 0
            self.again -= restoring
            if self.lines == self.at or restoring:
                raise KeyboardInterrupt
        return self.trace

    def during(self, function) -> bool:
        """Call a function; return whether it was interrupted."""
        before = sys.gettrace()
        sys.settrace(self.trace)
        try:
            function()
            return False
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(before)


@pytest.mark.parametrize("action", ["memorize", "memorize more than the memory holds", "forget", "load", "replace"])
@pytest.mark.parametrize("lengths", [(3,), (9, 30)], ids=["room", "full"])
def test_an_interruption_at_any_line_leaves_the_memory_as_it_was(reader, tmp_path, action, lengths):
    save_memory(str(tmp_path / "file"), filled(reader, 11, 2), FINGERPRINT, 3, dtype="float32")
    new = documents([12, 25], seed=4)
    act = {
        "memorize": lambda memory: reader.memorize(memory, "new", new[0]),
        "memorize more than the memory holds": lambda memory: reader.memorize(memory, "new", new[1]),
        "forget": lambda memory: memory.forget(memory.documents[-1].name),
        "load": lambda memory: load_memory(str(tmp_path / "file"), memory, FINGERPRINT, 3),
        "replace": lambda memory: replace(memory, filled(reader, 30).bank),
    }[action]
    untouched = filled(reader, *lengths)
    before, score = state(untouched), reader.score(TEXT, untouched)
    done = copy.deepcopy(untouched)
    counter = Interruptions(at=-1)
    counter.during(lambda: act(done))
    after, undone = state(done), 0
    assert not same(before, after)
    for at in range(1, counter.lines + 1):
        memory = copy.deepcopy(untouched)
        if Interruptions(at, again=at % 3).during(lambda memory=memory: act(memory)):
            undone += same(state(memory), before)
            assert same(state(memory), before) or same(state(memory), after), f"line {at} of {counter.lines}"
            if at % 20 == 0 and same(state(memory), before):
                assert torch.equal(reader.score(TEXT, memory), score)
    assert undone > 0.9 * counter.lines, "the rest comes after the last change"
    act(memory := copy.deepcopy(untouched))
    assert same(state(memory), after)


def test_an_interruption_at_every_segment(reader, monkeypatch):
    """The memory is full, so every segment evicts tokens that the interruption brings back."""
    memory = filled(reader, 9, 30)
    before, score, new = state(memory), reader.score(TEXT, memory), documents([8 * T])[0]
    encode, bank = reader.decoder.backbone.encode, memory.bank
    for last in range(1, 8):
        segments = []

        def interrupted(tokens, last=last, segments=segments):
            if len(segments) == last:
                raise KeyboardInterrupt
            segments.append(tokens)
            return encode(tokens)

        monkeypatch.setattr("longmem_fairseq.models.reading._TOKENS_AT_ONCE", T)
        monkeypatch.setattr(reader.decoder.backbone, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            reader.memorize(memory, "new", new)
        assert len(segments) == last and memory.bank is bank
        monkeypatch.setattr(reader.decoder.backbone, "encode", encode)
        assert same(state(memory), before) and torch.equal(reader.score(TEXT, memory), score)
    reader.memorize(memory, "new", new)
    assert [document.name for document in memory.documents] == ["new"]


def test_nothing_is_copied_while_there_is_room(reader, monkeypatch):
    copied = []
    monkeypatch.setattr("longmem_fairseq.memory.savepoint.Savepoint._copy", lambda self, *run: copied.append(run))
    filled(reader, 3, 5)
    assert not copied
    filled(reader, 3, 5, 11)
    assert copied == [(0, 2)], "the two chunks that are evicted"


def test_a_lent_memory_stays_as_it_is(reader):
    memory = filled(reader, 9, 3)
    loan, before, score = memory.lend(), state(memory), reader.score(TEXT, memory)
    reader.memorize(memory, "new", documents([10])[0])
    borrowed = DocumentMemory(loan.bank)
    assert same((state(borrowed)[0], before[1]), before)
    assert torch.equal(reader.score(TEXT, borrowed), score) and not torch.equal(reader.score(TEXT, memory), score)
    bank = memory.bank
    reader.memorize(memory, "newer", documents([4])[0])
    assert memory.bank is bank, "what is lent is the bank of before"
    loan = memory.lend()
    del loan
    memory.forget("newer")
    assert memory.bank is bank, "a loan ends with its object"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda memory: pickle.loads(pickle.dumps(memory))])
def test_copies_are_equal_and_apart(reader, duplicate):
    memory = filled(reader, 9, 3)
    other, before, score = duplicate(memory), state(memory), reader.score(TEXT, memory)
    assert same(state(other), before) and torch.equal(reader.score(TEXT, other), score)
    reader.memorize(other, "new", documents([10])[0])
    assert same(state(memory), before) and not same(state(other), before)


def test_evicted_documents_are_not_kept(reader):
    memory = reader.new_memory()
    for i in range(50):
        reader.memorize(memory, f"document {i}", documents([3], seed=i)[0])
    assert len(pickle.dumps(memory)) < len(pickle.dumps(filled(reader, 20))) + 500
    names = {text for text in vars(memory)["_documents"] for text in text[:1]}
    assert len(names) <= 6, "4 tokens each, of at most 16 and those of a chunk"

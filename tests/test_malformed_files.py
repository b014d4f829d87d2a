"""Every reader of JSON and safetensors takes files that anyone may have changed: it reads them, or says what is wrong.

Each part of a good file is left out, or replaced by a value of another type or size. Checksums are made to fit, so that
the content is what is refused.
"""

import copy
import json
import random
import shutil
from pathlib import Path
from typing import Any, Callable, Iterator

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from longmem_fairseq.backbones.base import BackboneError
from longmem_fairseq.backbones.loading import load_backbone
from longmem_fairseq.data.document_dataset import DocumentDataset
from longmem_fairseq.data.manifest import MANIFEST, verify
from longmem_fairseq.evaluation.chapterbreak import read_boundaries
from longmem_fairseq.evaluation.compare import read_plan
from longmem_fairseq.evaluation.conversations import read_conversations
from longmem_fairseq.evaluation.in_context import read_sentences
from longmem_fairseq.evaluation.qa import read_articles
from longmem_fairseq.evaluation.reporting.finished_items import FinishedItems
from longmem_fairseq.hub import LongMem
from longmem_fairseq.memory.container import SnapshotError, crc32, sha256
from longmem_fairseq.memory.memory_file import load_memory
from longmem_fairseq.memory.search.torch_token_search import TorchTokenSearch
from longmem_fairseq.memory.token_bank import TokenBank, TokenStates, stored
from longmem_fairseq.memory.token_reader import TokenReader
from longmem_fairseq.memory.token_streams import TokenStreams
from longmem_fairseq.memory.training_snapshot import load_training_memory, save_training_memory
from longmem_fairseq.models.model_directory import write_directory
from longmem_fairseq.tasks.document_scores import DocumentScores
from longmem_fairseq.tasks.shard_scores import ShardScores
from preprocess import convert_huggingface, convert_safetensors
from preprocess.binarize_documents import main as binarize
from preprocess.errors import InputError
from preprocess.huggingface_models import conversion_of
from preprocess.survey import Survey, SurveyPart, read_survey
from preprocess.workspace import Workspace
from tests.fairseq_runs import make_dictionary, write_split
from tests.memory import test_snapshot, test_training_snapshot
from tests.text_models import sentencepiece_model

WRONG = (None, "x", -1, 10**30, 1.5, float("nan"), [], {}, [[[]]], True, "\ud800")
MOST = 120  # of one file, drawn at random


def mutants(value: Any) -> Iterator[Any]:
    """Yield a JSON value with one part missing, or replaced by each of ``WRONG``."""
    yield from WRONG
    if not isinstance(value, (dict, list)):
        return
    for key in value if isinstance(value, dict) else range(min(3, len(value))):
        without = copy.copy(value)
        del without[key]
        yield without
        for mutant in mutants(value[key]):
            changed = copy.copy(value)
            changed[key] = mutant
            yield changed


def drawn(value: Any, most: int = MOST) -> list:
    every = list(mutants(value))
    return random.Random(0).sample(every, min(most, len(every)))


def reads_or_refuses(read: Callable[[], Any], *words: str) -> bool:
    """Whether a file is refused; if so, by one line that contains the words."""
    try:
        read()
    except (ValueError, OSError) as error:
        assert not isinstance(error, UnicodeError) and "\n" not in str(error), repr(error)
        assert all(word in str(error) for word in words), repr(error)
        return True
    return False


def check(path: Path, value: Any, read: Callable[[], Any], most: int = MOST, name: bool = True) -> None:
    """Write each mutant of a value to a file and read it; the value itself is read, and most mutants are refused."""
    path.write_text(json.dumps(value) + "\n")
    read()
    refused = 0
    for mutant in drawn(value, most):
        path.write_text(json.dumps(mutant) + "\n")
        refused += reads_or_refuses(read, *[path.name] * name)
    assert refused > 5
    for text in (b"", b"\xff\xfe", b"[" * 100_000, b"{"):
        path.write_bytes(text)
        assert reads_or_refuses(read, *[path.name] * name) or not text


def rewritten(path, checksum, header=None, tensors=None):
    """Change a container and make its checksum fit."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **(header or {})}
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()} if tensors is None else tensors
    metadata = {name: value for name, value in metadata.items() if value is not None}
    save_file(tensors, path, metadata={**metadata, checksum.__name__: checksum(metadata, tensors)})


def test_memories(tmp_path):
    original = test_snapshot.save(tmp_path / "original")
    path, memory = tmp_path / "memory", test_snapshot.make_memory(4)

    def read(header=None, tensors=None):
        shutil.copy(original, path)
        rewritten(path, sha256, header, tensors)
        load_memory(str(path), memory, test_snapshot.FINGERPRINT, 3)

    documents = [["a", 0, 7], ["b", 7, 19]]
    read({"documents": json.dumps(documents)})
    assert memory.documents == [("a", 0, 7), ("b", 7, 19)]
    before = test_snapshot.held(memory)
    for entry in ("documents", "backbone", "layer"):
        assert reads_or_refuses(lambda entry=entry: read({entry: None}), "memory")
    for mutant in drawn(documents):
        reads_or_refuses(lambda mutant=mutant: read({"documents": json.dumps(mutant)}), "memory was not written by")
    read({"documents": json.dumps(documents)})
    for wrong, sentence in (
        ([["a", 0, 7], ["a", 7, 19]], "two of its documents have the same name"),
        ([["a", 0, 7], ["b", 6, 19]], "the places of its documents do not fit its 19 tokens"),
        ([["a", 0, 7], ["b", 7, 20]], "the places of its documents do not fit its 19 tokens"),
        ([["a", 7, 7]], "the places of its documents do not fit its 19 tokens"),
    ):
        with pytest.raises(SnapshotError, match=sentence):
            read({"documents": json.dumps(wrong)})
    keys = torch.zeros(test_snapshot.H, 19, test_snapshot.D)
    bad = keys.clone()
    bad[0, 3, 1] = float("nan")
    for tensors, sentence in (
        ({"keys": bad, "values": keys.clone()}, "its keys are not all finite numbers"),
        ({"keys": keys.clone(), "values": bad - float("inf")}, "its values are not all finite numbers"),
        ({"keys": keys.long(), "values": keys.clone()}, "its keys are torch.int64, not float16, bfloat16, float32"),
        ({"keys": keys.clone()}, "it holds keys, not keys and values"),
        ({"keys": keys[0].clone(), "values": keys[0].clone()}, "are not .heads, tokens, width."),
        ({"keys": keys.clone(), "values": keys[:, 1:].clone()}, "are not .heads, tokens, width."),
    ):
        with pytest.raises(SnapshotError, match=sentence):
            read(tensors=tensors)
    assert test_snapshot.held(memory) == before, "what was there before stays"
    memory.bank.token_bank = TokenBank(1, 2, 30, symbols=100)
    hidden, numbers = torch.ones(19, 2).half(), torch.arange(19)
    for changes, sentence in (
        ({"hidden": hidden}, "was saved without a token memory, which the model has"),
        ({"hidden": hidden, "tokens": numbers[1:].clone()}, "are not .tokens, width. and .tokens."),
        ({"hidden": hidden.long(), "tokens": numbers}, "its hidden states are torch.int64, not float16"),
        ({"hidden": hidden / 0, "tokens": numbers}, "its hidden states are not all finite numbers"),
        ({"hidden": hidden[:, :1].clone(), "tokens": numbers}, "has hidden states of width 1, not 2"),
        ({"hidden": hidden, "tokens": numbers + 90}, "its token memory has ids outside the dictionary"),
        ({"hidden": hidden, "tokens": numbers.float()}, "the ids in its token memory are torch.float32, not int64"),
    ):
        with pytest.raises(SnapshotError, match=sentence):
            read(tensors={"keys": keys.clone(), "values": keys.clone(), **changes})


def test_values_that_the_memory_cannot_hold(tmp_path):
    memory = test_snapshot.make_memory(12)
    memory.bank.keys += 1e6
    path = test_snapshot.save(tmp_path / "memory", memory, dtype="bfloat16")
    half = test_snapshot.make_memory(dtype=torch.float16)
    with pytest.raises(SnapshotError, match="more than torch.float16 holds: load the model with --memory-dtype"):
        load_memory(path, half, test_snapshot.FINGERPRINT, 3)


@pytest.mark.parametrize("shared", [False, True])
def test_training_snapshots(tmp_path, shared):
    about, original, path = test_training_snapshot.ABOUT, tmp_path / "original", tmp_path / "snapshot"

    def new_memory():
        memory = test_training_snapshot.make(shared)
        if not shared:
            memory.token_streams = TokenStreams(TokenBank(3, 2, 6, symbols=9), TokenReader(TorchTokenSearch(), 4))
        return memory

    memory = new_memory()
    memory.open(test_training_snapshot.at([0, 1], [0, 1], [0, 0], [9, 5]))
    k = torch.randn(2, test_training_snapshot.H, 9, test_training_snapshot.D)
    states = TokenStates(stored(torch.randn(2, 9, 2)), torch.full((2, 9), 8))
    memory.write(test_training_snapshot.at([0, 1], [0, 1], [0, 0], [9, 5]), k, k, states)
    memory.flush()
    later = test_training_snapshot.at([0, 1], [0, 1], [9, 5], [4, 4])
    memory.write(later, k[:, :, :4], k[:, :, :4], TokenStates(*(x[:, :4] for x in states)))
    save_training_memory(str(original), memory, about)
    with safe_open(original, framework="pt") as file:
        header = file.metadata()

    def read(changes=None, tensors=None):
        shutil.copy(original, path)
        rewritten(path, crc32, changes, tensors)
        load_training_memory(str(path), new_memory(), about)

    read()
    for entry in ("about", "state"):
        assert reads_or_refuses(lambda entry=entry: read({entry: None}), "snapshot")
        for mutant in drawn(json.loads(header[entry])):
            reads_or_refuses(lambda entry=entry, mutant=mutant: read({entry: json.dumps(mutant)}), "snapshot")
    assert reads_or_refuses(lambda: read(tensors={}), "snapshot was not written by this package: it cannot be put")
    if not shared:
        with safe_open(original, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        for name in ("token_memory.tokens.0", "token_memory.pending.tokens"):
            wrong = {**tensors, name: tensors[name] + 1}
            assert reads_or_refuses(lambda wrong=wrong: read(tensors=wrong), "has ids outside the dictionary")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data directory of preprocess/."""
    directory = tmp_path_factory.mktemp("malformed")
    (directory / "a.txt").write_text("some words\n" * 50)
    binarize(["--train", str(directory / "a.txt"), "--vocab-size", "300", "--destdir", str(directory / "data")])
    return directory / "data"


def test_manifests(data, tmp_path):
    directory = shutil.copytree(data, tmp_path / "data")
    manifest = json.loads((directory / MANIFEST).read_text())
    check(directory / MANIFEST, manifest, lambda: verify(directory, "train"), 300, name=False)
    for request in (None, "x", 1):
        (directory / MANIFEST).write_text(json.dumps({**manifest, "request_sha256": request}))
        with pytest.raises(InputError, match="already holds manifest.json, made from other input"):
            Workspace(directory, {"--train": "x"})
    del manifest["request_sha256"]
    (directory / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="already holds manifest.json, made from other input"):
        Workspace(directory, {"--train": "x"})


def test_journals(tmp_path):
    request = {"--train": "x", "--seed": 1}
    workspace = Workspace(tmp_path, request)
    workspace.journal["splits"] = {"train": {"documents": 1, "files": {"bin": {"bytes": 3}}, "position": None}}
    workspace.save()
    del workspace  # and its lock
    path = tmp_path / ".partial" / "journal.json"
    check(path, json.loads(path.read_text()), lambda: Workspace(tmp_path, request))
    path.write_text("{")
    with pytest.raises(InputError, match="journal.json is damaged .*: discard the unfinished work with --overwrite"):
        Workspace(tmp_path, request)
    assert Workspace(tmp_path, request, overwrite=True).journal["overwrite"], "it is discarded"


def test_names_of_documents(tmp_path):
    write_split(tmp_path / "train", [np.array([5, 2])])
    documents = DocumentDataset([str(tmp_path / "train")], make_dictionary())
    check(tmp_path / "train.documents.jsonl", {"name": "a", "tokens": 2}, documents.names)


def test_scores_of_shards(tmp_path):
    shards = ShardScores(str(tmp_path), {"a": 1}, 2, 0)
    sums = {"run": {"a": 1}, "documents": [1, 2], "sums": [[3.0, 4.0], [1.0, 2.0], [1.0, 2.0]]}

    def read():
        scores = DocumentScores(3)
        scores.sums[:, 0] = 1.0, 2.0, 3.0
        return shards.merge(scores)

    check(tmp_path / "shard-1-of-2.json", sums, read)


def test_surveys(tmp_path):
    survey = Survey()
    survey.add(SurveyPart({"a": (2, 10)}, {"a": {3: 10}}, {"a": (10, 5)}))
    saved = {"identity": "x", "subsets": survey.to_json()}
    check(tmp_path / "survey.json", saved, lambda: read_survey(tmp_path / "survey.json", "x"))


def test_finished_items(tmp_path):
    run = {"evaluation": "a", "model": {"k": 8}}
    check(tmp_path / "items.jsonl", {"run": run}, lambda: FinishedItems(str(tmp_path), run), name=False)
    line = json.dumps({"run": run}) + "\n"
    for mutant in drawn({"item": "a", "result": {"loss": 1.0}}):
        (tmp_path / "items.jsonl").write_text(line + json.dumps(mutant) + "\n")
        reads_or_refuses(lambda: FinishedItems(str(tmp_path), run), "items.jsonl")


TURNS = [{"speaker": "A", "text": "hello"}, {"speaker": "B", "text": "hi"}]
EVALUATION_DATA = {
    "qa.json": (
        read_articles,
        {
            "data": [
                {
                    "title": "t",
                    "paragraphs": [
                        {"context": "c", "qas": [{"id": "1", "question": "q?", "answers": [{"text": "c"}]}]}
                    ],
                }
            ]
        },
    ),
    "qa.jsonl": (read_articles, {"id": "1", "title": "t", "context": "c", "question": "q?", "answers": ["c"]}),
    "ours.jsonl": (read_conversations, {"id": "a", "sessions": [{"turns": TURNS}]}),
    "msc.jsonl": (
        read_conversations,
        {
            "metadata": {"initial_data_id": "a"},
            "previous_dialogs": [{"dialog": [{"text": "hello"}], "time_num": 3, "time_unit": "days"}],
            "dialog": [{"text": "hi"}],
        },
    ),
    "locomo.json": (read_conversations, [{"sample_id": "a", "conversation": {"session_1": TURNS}}]),
    "boundaries.json": (read_boundaries, {"test": {"w": [{"ctx": "c", "pos": "p", "negs": ["n"]}]}}),
    "sst2.jsonl": (lambda path: read_sentences(path, ("bad", "good")), {"text": "t", "label": "good"}),
    "plan.json": (
        lambda path: read_plan(path, "data", {"books": None}),
        {"a": {"evaluation": "books", "arguments": ["--data", "x"]}},
    ),
}


@pytest.mark.parametrize("name", EVALUATION_DATA)
def test_data_of_evaluations(tmp_path, name):
    read, value = EVALUATION_DATA[name]
    check(tmp_path / name, value, lambda: read(str(tmp_path / name)))


def test_answers_that_are_not_a_list_are_refused(tmp_path):
    """A text would be taken for a list of characters."""
    path = tmp_path / "qa.jsonl"
    path.write_text(json.dumps({"id": "1", "title": "t", "context": "c", "question": "q?", "answers": "Paris"}))
    with pytest.raises(ValueError, match="has neither SQuAD's layout"):
        read_articles(str(path))


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A model directory with a dictionary."""
    longmem = LongMem.from_pretrained(str(sentencepiece_model(tmp_path_factory.mktemp("model"))), device="cpu")
    directory = tmp_path_factory.mktemp("directory")
    write_directory(longmem.model, str(directory), tokens_per_sample=longmem.task.args.tokens_per_sample)
    for name in ("dict.txt", "sentencepiece.model"):
        shutil.copy(Path(longmem.task.args.data, name), directory)
    return directory


def test_model_directories(directory, tmp_path):
    copied = shutil.copytree(directory, tmp_path / "model")
    config = json.loads((copied / "config.json").read_text())
    refused = 0
    for mutant in drawn(config, 150):
        text = json.dumps(mutant)
        if str(10**30) not in text:  # such a model would be built as long as there is memory
            (copied / "config.json").write_text(text)
            refused += reads_or_refuses(lambda: LongMem.from_pretrained(str(copied), device="cpu"))
    assert refused > 50


def test_language_models_in_safetensors(directory, tmp_path):
    backbone = Path(directory.parent) / "backbone.safetensors"
    checkpoint = sentencepiece_model(tmp_path) / "backbone.pt"
    convert_safetensors.to_safetensors(str(checkpoint), str(backbone))
    with safe_open(backbone, framework="pt") as file:
        header, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    del header["crc32"]  # who changes the file can change its checksum

    def read(changes):
        changed = {name: value for name, value in {**header, **changes}.items() if value is not None}
        changed["crc32"] = crc32(changed, tensors)
        save_file(tensors, tmp_path / "model.safetensors", metadata=changed)
        convert_safetensors.to_fairseq(str(tmp_path / "model.safetensors"), str(tmp_path / "again.pt"))

    read({})
    for changes in ({"format": None}, {"model": None}, {"tied": None}, {"tied": '{"a": "b"}'}, {"tied": '{"a": []}'}):
        assert reads_or_refuses(lambda changes=changes: read(changes), "model.safetensors")
    for mutant in WRONG:
        for entry in ("model", "tied"):
            changes = {entry: json.dumps(mutant)}
            reads_or_refuses(lambda changes=changes: read(changes), "model.safetensors is malformed")


HUGGING_FACE = {
    "gpt2": {"vocab_size": 100, "n_embd": 24, "n_layer": 2, "n_head": 2, "n_positions": 32, "resid_pdrop": 0.1},
    "opt": {
        **{"vocab_size": 100, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "ffn_dim": 48},
        **{"max_position_embeddings": 32, "activation_function": "relu"},
    },
    "qwen3": {
        **{"vocab_size": 100, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8},
        **{"num_key_value_heads": 2, "intermediate_size": 48, "max_position_embeddings": 32, "rms_norm_eps": 1e-6},
        **{"sliding_window": 16, "use_sliding_window": True, "tie_word_embeddings": True, "hidden_act": "silu"},
        "rope_parameters": {
            **{"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16},
            **{"beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0, "truncate": True},
        },
    },
    "llama": {
        "rope_theta": 500.0,
        "num_hidden_layers": 2,
        "rope_scaling": {
            **{"type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
            "original_max_position_embeddings": 16,
        },
    },
}


@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_configurations_of_hugging_face(kind):
    config = {"model_type": kind, **HUGGING_FACE[kind]}

    def read(config):
        return conversion_of(config).settings(config)

    assert read(config)["decoder_layers"] == 2
    refused = 0
    for mutant in drawn(config, 1000):
        if isinstance(mutant, dict):
            refused += reads_or_refuses(lambda mutant=mutant: read(mutant), "config.json")
    assert refused > 30


def test_adapters_are_no_models(tmp_path):
    adapter = tmp_path / "lora"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"base_model.model.x.lora_A.weight": torch.zeros(2, 2)}, adapter / "adapter_model.safetensors")
    sentence = "lora.* is an adapter .adapter_config.json., not a model: merge it into its base model first"
    with pytest.raises(SystemExit, match=sentence):
        convert_huggingface.main([str(adapter), str(tmp_path / "out")])
    with pytest.raises(ValueError, match=sentence):
        LongMem.from_pretrained(str(adapter), device="cpu")
    for path in (adapter, adapter / "adapter_model.safetensors"):
        with pytest.raises(BackboneError, match=sentence):
            load_backbone(str(path), make_dictionary())
    with pytest.raises(SystemExit, match=sentence):
        convert_safetensors.main([str(adapter / "adapter_model.safetensors"), str(tmp_path / "out.pt")])
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]

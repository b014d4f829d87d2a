"""A Hugging Face directory as a tokenizer: the ids of transformers, in a dictionary with a line for each of them."""

import json
import os
import sys
from pathlib import Path

import pytest
from fairseq.data import Dictionary, data_utils
from transformers import GPT2TokenizerFast, PreTrainedTokenizerFast

from longmem_fairseq.text import encode_text, find_bpe
from preprocess.binarize_documents import main
from preprocess.dictionary import UNK
from preprocess.errors import InputError
from preprocess.tokenization import load_tokenizer
from preprocess.tokenizer_json import from_vocabulary
from tests.huggingface_tokenizers import KINDS, MARKERS, WORDS, byte_level, llama

REAL = Path(os.environ.get("LONGMEM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
CHAT = f"{MARKERS[0]}user\nWho are you, {WORDS[0]}?{MARKERS[1]}\n{MARKERS[0]}assistant\n"


@pytest.fixture(scope="module", params=KINDS)
def directory(request, sources, tmp_path_factory):
    """A Hugging Face directory whose model has 9 rows more than the tokenizer has ids."""
    directory = tmp_path_factory.mktemp("huggingface")
    (directory / "tokenizer.json").write_bytes(KINDS[request.param](sources[:3]))
    size = len(PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json")))
    (directory / "config.json").write_text(json.dumps({"vocab_size": size + 9}))
    return directory


def ids_of_transformers(directory, text):
    return PreTrainedTokenizerFast.from_pretrained(directory)(text, add_special_tokens=False)["input_ids"]


def test_data_and_python_have_the_ids_of_transformers(directory, sources, tmp_path):
    texts = [CHAT, "  \u2581 Cafe\u0301\r\n", *sources[3:5]]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    made = tmp_path / "made"
    main(["--train", str(tmp_path / "d.jsonl"), "--tokenizer", str(directory), "--destdir", str(made)])
    dictionary = Dictionary.load(str(made / "dict.txt"))
    rows = json.loads((directory / "config.json").read_text())["vocab_size"]
    assert dictionary.symbols[4 : 4 + rows] == list(map(str, range(rows))) and len(dictionary) % 8 == 0
    items = data_utils.load_indexed_dataset(str(made / "train"), dictionary, "mmap")
    for text, item in zip(texts, items, strict=True):
        expected = [4 + number for number in ids_of_transformers(directory, text)]
        assert item.tolist() == [*expected, dictionary.eos()]
        assert encode_text(text, dictionary, find_bpe(str(made))).tolist() == expected
    again = load_tokenizer(made)
    assert again.fingerprint() == load_tokenizer(directory / "tokenizer.json").fingerprint()
    assert again.symbols == dictionary.symbols[4:]


def test_the_files_beside_it_count(sources, tmp_path):
    """Added tokens and special tokens that only tokenizer_config.json names, as after ``add_tokens`` by hand."""
    (tmp_path / "tokenizer.json").write_bytes(byte_level(sources[:2]))
    size = len(PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json")))
    added = {"content": "<speaker2>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": True}
    config = {
        "added_tokens_decoder": {str(size): {**added, "special": False}},
        "eos_token": "</turn>",
        "pad_token": {"__type": "AddedToken", "content": "<pad me>"},
        "additional_special_tokens": ["<tool>"],
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    text = f"{CHAT}one  <speaker2> two</turn> <tool>\n<pad me>"
    tokenizer = load_tokenizer(tmp_path)
    assert [number - 4 for number in tokenizer.encode(text)] == ids_of_transformers(tmp_path, text)
    made = tmp_path / "made"
    made.mkdir()
    tokenizer.write_files(made)
    assert load_tokenizer(made).encode(text) == tokenizer.encode(text)  # the file alone is complete
    config["added_tokens_decoder"] = {str(size + 7): {**added, "special": False}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=f"the added token <speaker2> the id {size + 7}, but with tokenizer.json it"):
        load_tokenizer(tmp_path)


def test_two_files_of_gpt2(gpt2_files, sources, tmp_path):
    vocabulary = json.loads(gpt2_files[0].read_text())
    vocabulary["<|endoftext|>"] = len(vocabulary)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text(gpt2_files[1].read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<speaker1>": len(vocabulary)}))
    text = f"A speaker: <speaker1> says\n<|endoftext|>{sources[0][:1000]}"
    tokenizer = load_tokenizer(tmp_path)
    numbers = [number - 4 for number in tokenizer.encode(text)]
    assert {len(vocabulary), len(vocabulary) - 1} < set(numbers)
    assert numbers == GPT2TokenizerFast.from_pretrained(tmp_path)(text)["input_ids"]
    assert tokenizer.lossless and tokenizer.decode(tokenizer.encode(text)) == text


REFUSED = {
    "vocabulary": ({"vocab_size": 99}, {}, "the tokenizer has ids up to 603, but the model's vocabulary"),
    "prefix": ({}, {"add_prefix_space": True}, "has add_prefix_space=true, but tokenizer.json false: make them equal"),
    "split": ({}, {"split_special_tokens": True}, "has split_special_tokens=true, which tokenizer.json cannot express"),
}


@pytest.mark.parametrize("config, tokenizer_config, message", REFUSED.values(), ids=REFUSED)
def test_what_would_change_ids_is_refused(sources, tmp_path, config, tokenizer_config, message):
    (tmp_path / "tokenizer.json").write_bytes(byte_level(sources[:2]))
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    with pytest.raises(InputError, match=message):
        load_tokenizer(tmp_path)


def test_bad_files_are_named(sources, tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(InputError, match="tokenizer.json cannot be read: No such file"):
        load_tokenizer(path)
    path.write_text("{}")
    with pytest.raises(InputError, match="tokenizer.json is not a tokenizer.json: "):
        load_tokenizer(path)
    content = json.loads(llama(sources[:2]))
    content["model"]["dropout"] = 0.1
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="tokenizer.json cannot be used: it encodes at random .dropout 0.1"):
        load_tokenizer(path)
    path.write_bytes(llama(sources[:2]))
    (tmp_path / "dict.txt").write_text("1 1\n")
    with pytest.raises(InputError, match="symbols of .* are not in the dictionary of 1 symbols"):
        load_tokenizer(path, dictionary=tmp_path / "dict.txt")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(InputError, match="tokenizer.json needs the Python package tokenizers: pip install tokenizers"):
        load_tokenizer(path)


def test_lossless_means_that_text_comes_back(sources, tmp_path):
    lossless = {}
    for kind, make in KINDS.items():
        (tmp_path / "tokenizer.json").write_bytes(make(sources[:2]))
        tokenizer = load_tokenizer(tmp_path)
        lossless[kind] = tokenizer.lossless
        assert tokenizer.decode([UNK, 0, 1, 2]) == "<unk>"
        if tokenizer.lossless:
            assert all(tokenizer.decode(tokenizer.encode(text)) == text for text in sources[2:9])
    assert [kind for kind, value in lossless.items() if value] == ["byte level"]


@pytest.mark.skipif(not REAL.is_dir(), reason="GPT-2's files are not available")
def test_gpt2s_own_vocabulary_on_real_text(tmp_path):
    """The ids of the fast GPT-2 BPE, and of transformers."""
    files = [REAL / "gpt2_bpe" / name for name in ("encoder.json", "vocab.bpe")]
    merges = [tuple(line.split(" ")) for line in files[1].read_text(encoding="utf-8").split("\n")[1:-1]]
    (tmp_path / "tokenizer.json").write_bytes(from_vocabulary(json.loads(files[0].read_text()), merges))
    tokenizer, gpt2 = load_tokenizer(tmp_path), load_tokenizer("gpt2", *files)
    assert tokenizer.symbols == gpt2.symbols
    for path in sorted((REAL / "books_test_short").iterdir())[:3]:
        text = path.read_text("utf-8")
        assert tokenizer.encode(text) == gpt2.encode(text)
        assert [number - 4 for number in gpt2.encode(text)] == ids_of_transformers(tmp_path, text)

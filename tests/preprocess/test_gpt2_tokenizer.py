"""The fast GPT-2 BPE gives the ids of fairseq's GPT2BPE and dictionary, on real texts and on arbitrary ones."""

import json
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from hypothesis import given, settings
from hypothesis import strategies as st

from preprocess import gpt2_tokenizer
from preprocess.dictionary import UNK
from preprocess.errors import InputError
from preprocess.tokenization import load_tokenizer

# A folder with encoder.json, vocab.bpe and dict.txt, beside others with texts; not part of the repository.
REAL = Path(os.environ.get("LONGMEM_TEST_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "gpt2_bpe"

TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\r'aZ19_.\x1c\x85\u00a0\u2028\u00b2\u0301")),
    max_size=60,
)


def stock(encoder_json, vocab_bpe):
    return GPT2BPE(Namespace(gpt2_encoder_json=str(encoder_json), gpt2_vocab_bpe=str(vocab_bpe)))


@pytest.fixture(scope="module")
def pair(gpt2_files, tmp_path_factory):
    """fairseq's BPE and dictionary, and our tokenizer on the same files, with a dictionary in another order."""
    numbers = list(json.loads(gpt2_files[0].read_text()).values())
    path = tmp_path_factory.mktemp("dict") / "dict.txt"
    path.write_text("".join(f"{number} 1\n" for number in sorted(numbers, key=lambda n: (n % 7, n))))
    return stock(*gpt2_files), Dictionary.load(str(path)), load_tokenizer("gpt2", *gpt2_files, path)


def assert_same(pair, text):
    bpe, dictionary, tokenizer = pair
    expected = dictionary.encode_line(bpe.encode(text), add_if_not_exist=False, append_eos=False).tolist()
    ids = tokenizer.encode(text)
    assert ids == expected
    assert UNK not in ids
    assert tokenizer.decode(ids) == text == bpe.decode(dictionary.string(ids))


def test_same_on_the_standard_library(pair, sources):
    for text in sources:
        assert_same(pair, text)


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
def test_same_on_arbitrary_text(pair, text):
    assert_same(pair, text)


def test_same_on_every_kind_of_character(pair):
    # the words are cut by fairseq's own expression, so one character of each kind and a sample of the others will do
    codes = [*range(0x3000), *range(0x3000, 0xD800, 41), *range(0xE000, 0x110000, 331)]
    for start in range(0, len(codes), 4096):
        assert_same(pair, "".join(f"a{chr(code)} {chr(code)}1{chr(code)}\n" for code in codes[start : start + 4096]))


def test_same_when_long_texts_are_cut_and_the_table_overflows(pair, sources, monkeypatch):
    monkeypatch.setattr(gpt2_tokenizer, "PART_CHARACTERS", 50)
    monkeypatch.setattr(gpt2_tokenizer, "WORDS_IN_TABLE", 100)
    pair[2].word_table.clear()
    for text in [*sources[:10], "no line end " * 50, "\n\n  \n" * 60, "a\n" * 100]:
        assert_same(pair, text)
    assert len(pair[2].word_table) <= 100


@pytest.mark.skipif(not REAL.is_dir(), reason="GPT-2's files are not available")
def test_same_with_the_real_files_on_real_texts(sources):
    bpe = stock(REAL / "encoder.json", REAL / "vocab.bpe")
    files = (REAL / "encoder.json", REAL / "vocab.bpe", REAL / "dict.txt")
    pair = bpe, Dictionary.load(str(files[2])), load_tokenizer("gpt2", *files)
    folders = ("books_test_short", "arxiv_math/valid")
    texts = [path.read_text("utf-8") for folder in folders for path in sorted((REAL.parent / folder).iterdir())]
    for text in [*texts, *sources[:50]]:
        assert_same(pair, text)


def test_dictionary_without_a_file(gpt2_files):
    tokenizer = load_tokenizer("gpt2", *gpt2_files)
    assert len(tokenizer.dictionary) == len(tokenizer) and len(tokenizer) % 8 == 0
    vocabulary = json.loads(gpt2_files[0].read_text())
    assert all(tokenizer.dictionary.index(str(number)) == number + 4 for number in vocabulary.values())
    assert tokenizer.decode([len(tokenizer) - 1, UNK]) == "<unk>"  # a filler symbol has no text


def test_bad_files_are_named(gpt2_files, tmp_path):
    encoder, merges = (Path(shutil.copy(path, tmp_path)) for path in gpt2_files)
    with pytest.raises(InputError, match="needs local files: give --gpt2-encoder-json and --gpt2-vocab-bpe"):
        load_tokenizer("gpt2")
    with pytest.raises(InputError, match="encoder-json .*nowhere is not GPT-2's encoder.json"):
        load_tokenizer("gpt2", tmp_path / "nowhere", merges)
    with pytest.raises(InputError, match="vocab-bpe .* is not GPT-2's vocab.bpe"):
        load_tokenizer("gpt2", encoder, encoder)
    merges.write_text("#version: 0.2\nzq zq\n")
    with pytest.raises(InputError, match="do not belong together"):
        load_tokenizer("gpt2", encoder, merges)
    vocabulary = json.loads(encoder.read_text())
    del vocabulary["a"]
    encoder.write_text(json.dumps(vocabulary))
    merges.write_text("#version: 0.2\nr e\n")
    with pytest.raises(InputError, match="lacks 1 of the 256 bytes"):
        load_tokenizer("gpt2", encoder, merges)
    (tmp_path / "dict.txt").write_text("0 1\n")
    with pytest.raises(InputError, match="are not in the dictionary of 1 symbols"):
        load_tokenizer("gpt2", *gpt2_files, tmp_path / "dict.txt")


@pytest.mark.parametrize("package", ["regex", "tokenizers"])
def test_missing_package_is_named(gpt2_files, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=f"--tokenizer gpt2 needs the Python package {package}: pip install {package}"):
        load_tokenizer("gpt2", *gpt2_files)


def test_loads_again_from_a_data_directory(gpt2_files, tmp_path):
    tokenizer = load_tokenizer("gpt2", *gpt2_files)
    for name, path in tokenizer.files.items():
        shutil.copy(path, tmp_path / name)
    tokenizer.dictionary.save(str(tmp_path / "dict.txt"))
    again = load_tokenizer(tmp_path)
    assert again.fingerprint() == tokenizer.fingerprint() and again.symbols == tokenizer.symbols

"""Text to tokens and back, with real tokenizers: whole texts, single tokens, and the lines of fairseq's commands."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary, encoders
from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from hypothesis import example, given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import PreTrainedTokenizerFast

from longmem_fairseq.text import OneLineBPE, decode_text, encode_text, find_bpe, one_line, token_texts
from preprocess.benchmark import train_byte_level_bpe
from tests.huggingface_tokenizers import KINDS, MARKERS, WORDS, byte_level
from tests.text_models import SHIPPED

TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\r\t'aZ19_.é漢🎉\u0301\u2028\u2581")),
    min_size=1,
    max_size=40,
)
# With added tokens inside, and some of their look-alikes.
MARKED_TEXT = st.lists(
    st.one_of(TEXT, st.sampled_from([*MARKERS, *WORDS, "<unk>", "</s>", "<0x0A>", " "])), min_size=1, max_size=6
).map("".join)


@pytest.fixture(scope="module", params=["sentencepiece", "gpt2", "tokenizer.json"])
def tokenizer(request, tmp_path_factory):
    """BPE and dictionary."""
    if request.param == "sentencepiece":
        bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(SHIPPED / "sentencepiece.model")))
        return bpe, Dictionary.load(str(SHIPPED / "dict.txt"))
    source = Path(__file__).read_text(encoding="utf-8")
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "tokenizer.json":
        (directory / "tokenizer.json").write_bytes(byte_level([source]))
        return find_bpe(directory), dictionary_of_numbers(700)
    files = train_byte_level_bpe([source], 400, directory)
    return GPT2BPE(SimpleNamespace(gpt2_encoder_json=str(files[0]), gpt2_vocab_bpe=str(files[1]))), (
        dictionary_of_numbers(400)
    )


def dictionary_of_numbers(size):
    dictionary = Dictionary()
    for number in range(size):
        dictionary.add_symbol(str(number))
    dictionary.add_symbol("madeupword0000")  # as in GPT-2's dictionaries of fairseq
    return dictionary


@given(text=TEXT)
def test_the_texts_of_tokens_make_up_the_text(tokenizer, text):
    bpe, dictionary = tokenizer
    tokens = encode_text(text, dictionary, bpe)
    texts = token_texts(tokens, dictionary, bpe)
    assert len(texts) == len(tokens)
    assert "".join(texts) == text == decode_text(tokens, dictionary, bpe)


def test_a_character_belongs_to_its_last_token(tokenizer):
    bpe, dictionary = tokenizer
    tokens = encode_text("aԱb", dictionary, bpe)  # of two bytes that no token has together
    assert token_texts(tokens, dictionary, bpe) == ["a", "", "Ա", "b"]
    assert token_texts(tokens[:2], dictionary, bpe) == ["a", "\ufffd"]
    assert token_texts(torch.tensor([dictionary.eos()]), dictionary, bpe) == ["</s>"]
    assert token_texts(tokens[:0], dictionary, bpe) == []


def test_words():
    dictionary = Dictionary()
    tokens = torch.tensor([dictionary.add_symbol("one"), dictionary.add_symbol("two")])
    assert token_texts(tokens, dictionary) == ["one ", "two"]
    with pytest.raises(ValueError, match="SimpleNamespace does not define the text of single tokens"):
        token_texts(tokens, dictionary, SimpleNamespace())


@given(text=TEXT)
@example(text="\nimport sys\n    ")
def test_prompts_and_answers_are_lines(tokenizer, text):
    """What fairseq's commands do with a prompt, and with an answer of the same tokens."""
    bpe, dictionary = tokenizer
    lines = one_line(bpe)
    line = text.replace("\n", "<0x0A>").replace("\r", "<0x0D>")
    tokens = dictionary.encode_line(lines.encode(line), add_if_not_exist=False, append_eos=False).long()
    assert tokens.tolist() == encode_text(text, dictionary, bpe).tolist()
    printed = lines.decode(dictionary.string(tokens))
    assert printed == line and len(printed.split("\n")) == 1


def test_symbols_that_are_no_text_keep_their_names(tokenizer):
    bpe, dictionary = tokenizer
    assert OneLineBPE(bpe).decode("madeupword0000 <unk>") == "madeupword0000<unk>"
    words = SimpleNamespace(encode=None)
    assert one_line(words) is words and one_line(None) is None


@pytest.fixture(scope="module", params=KINDS)
def huggingface(request, tmp_path_factory):
    """A tokenizer as transformers loads it, fairseq's BPE of the same file, and the dictionary."""
    directory = tmp_path_factory.mktemp("tokenizer")
    file = directory / "tokenizer.json"
    file.write_bytes(KINDS[request.param]([Path(__file__).read_text(encoding="utf-8")]))
    bpe = find_bpe(directory)
    dictionary = Dictionary()
    for symbol in bpe.tokenizer.symbols(bpe.tokenizer.size + 5):
        dictionary.add_symbol(symbol)
    return PreTrainedTokenizerFast(tokenizer_file=str(file)), bpe, dictionary


@given(text=MARKED_TEXT)
def test_ids_are_those_of_transformers(huggingface, text):
    reference, bpe, dictionary = huggingface
    expected = reference(text, add_special_tokens=False)["input_ids"]
    if not expected:
        return
    tokens = encode_text(text, dictionary, bpe)
    assert (tokens - dictionary.nspecial).tolist() == expected == bpe.tokenizer.encode_batch([text])[0]
    lines = one_line(bpe)
    if "<0x0A>" not in text:  # the spelling of a newline in a line
        line = text if lines is bpe else text.replace("\n", "<0x0A>").replace("\r", "<0x0D>")
        assert lines.encode(line).split() == list(map(str, expected))
    decoded = decode_text(tokens, dictionary, bpe)
    if bpe.tokenizer.has_token_bytes:
        assert "".join(token_texts(tokens, dictionary, bpe)) == decoded
    if not text.startswith(" "):  # of which transformers removes more than were added
        assert decoded == reference.decode(expected, clean_up_tokenization_spaces=False)


def test_texts_of_tokens_that_depend_on_others(tmp_path):
    """WordPiece encodes and decodes as transformers does, but its tokens do not have a text each."""
    (tmp_path / "tokenizer.json").write_bytes(KINDS["word piece"](["some words to learn"]))
    bpe, dictionary = find_bpe(tmp_path), dictionary_of_numbers(99)
    tokens = encode_text("Some words", dictionary, bpe)
    assert decode_text(tokens, dictionary, bpe) == "some words" and one_line(bpe) is bpe
    with pytest.raises(ValueError, match=r"text of single tokens \(decoder: WordPiece\): supported are byte-level BPE"):
        token_texts(tokens, dictionary, bpe)
    with pytest.raises(ValueError, match="symbol .* is not in the dictionary of 6 symbols: give the dict.txt that"):
        encode_text("some words", dictionary_of_numbers(1), bpe)


def test_a_tokenizer_that_cannot_be_read(tmp_path, monkeypatch):
    def build(path):
        return encoders.build_bpe(OmegaConf.create({"_name": "hf_tokenizer", "tokenizer_json": str(path)}))

    with pytest.raises(ValueError, match="--bpe hf_tokenizer needs a file: name it with --tokenizer-json"):
        encoders.build_bpe(OmegaConf.create({"_name": "hf_tokenizer"}))
    with pytest.raises(ValueError, match="--tokenizer-json .*nowhere cannot be read: No such file"):
        build(tmp_path / "nowhere")
    (tmp_path / "damaged").write_bytes(byte_level(["text"])[:-9])
    with pytest.raises(ValueError, match="--tokenizer-json .*damaged cannot be used: it is not a tokenizer.json: "):
        build(tmp_path / "damaged")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizers: pip install 'longmem_fairseq\[preprocess\]'"):
        build(tmp_path / "damaged")

"""Encoding loses nothing, and fairseq's own tools read and write the same tokens."""

from argparse import Namespace

import numpy as np
import pytest
from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE
from hypothesis import example, given, settings
from hypothesis import strategies as st

from preprocess.dictionary import EOS, UNK
from preprocess.errors import InputError
from preprocess.sentencepiece_training import sample_passages, train
from preprocess.tokenization import load_tokenizer

# Any characters, but often the ones that matter to a tokenizer of source code.
TEXT = st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t\r_(:a1'\u2581\u2585\u00a0")), max_size=80)


@pytest.fixture(scope="module")
def tokenizer(model_file):
    return load_tokenizer(model_file)


@settings(deadline=None, max_examples=300)
@given(text=TEXT)
@example(text="\u2581\u2581 \u2581")
@example(text="\n    \u2581\n")
@example(text="<unk></s><0x0A>")
@example(text="")
def test_decoding_gives_the_text_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert UNK not in ids and EOS not in ids
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([0, 1, *ids, EOS]) == text


def test_sources_come_back_and_are_compressed(tokenizer, sources):
    tokens = 0
    for text in sources:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        tokens += len(ids)
    assert sum(map(len, sources)) / tokens > 2.2  # characters per token with 1,000 symbols
    assert len(tokenizer.encode("\n        ")) == 1 and len(tokenizer.encode("\n\n")) == 1


def test_unknown_symbol_is_visible(tokenizer):
    ids = tokenizer.encode("if x")
    assert tokenizer.decode([*ids, UNK, *ids]) == "if x<unk>if x"


@pytest.mark.parametrize("vocab_size", [300, 333, 1000])
def test_vocabulary_is_never_larger_than_requested(sources, tmp_path, vocab_size):
    path = tmp_path / "m.model"
    path.write_bytes(train(sources, vocab_size))
    tokenizer = load_tokenizer(path)
    assert len(tokenizer.dictionary) == len(tokenizer) == vocab_size
    text = sources[0]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    path.write_bytes(train(["few words"], vocab_size))
    assert len(load_tokenizer(path).dictionary) < vocab_size


def test_vocabulary_too_small():
    with pytest.raises(InputError, match="--vocab-size 299 is smaller than 300"):
        train(["text"], 299)
    with pytest.raises(InputError, match="no visible character"):
        train([" \n"], 1000)


def test_training_is_deterministic_and_bounded(sources):
    assert train(sources, 400, 100_000) == train(sources, 400, 100_000)
    assert train(sources, 400, 100_000) != train(sources, 400, 100_000, seed=2)
    passages = sample_passages(iter(sources), 100_000, seed=1)
    size = sum(len(passage.encode()) for passage in passages)
    assert 80_000 < size <= 100_000
    assert "".join(sample_passages(iter(sources), 10**9, seed=1)) == "".join(sources)


def test_dictionary_survives_its_file(tokenizer, tmp_path):
    tokenizer.dictionary.save(str(tmp_path / "dict.txt"))
    loaded = Dictionary.load(str(tmp_path / "dict.txt"))
    assert loaded.symbols == tokenizer.dictionary.symbols
    loaded.finalize(padding_factor=1)
    assert loaded.symbols == tokenizer.dictionary.symbols  # the counts keep the order
    again = load_tokenizer(*tokenizer.files.values(), dictionary=tmp_path / "dict.txt")
    assert again.symbols == tokenizer.symbols and again.fingerprint() == tokenizer.fingerprint()


def test_stock_fairseq_encodes_a_prompt_alike(tokenizer, model_file, sources):
    """``fairseq-interactive --bpe sentencepiece`` encodes one line of input to the same tokens."""
    config = Namespace(
        sentencepiece_model=str(model_file), sentencepiece_enable_sampling=False, sentencepiece_alpha=None
    )
    stock = SentencepieceBPE(config)
    lines = [line.strip() for text in sources[:20] for line in text.split("\n") if line.strip()]
    for line in [*lines, "tab\there", "é日本\u00a0x\u3000y \U0001f600"]:
        ids = tokenizer.dictionary.encode_line(stock.encode(line), add_if_not_exist=False, append_eos=False)
        assert ids.tolist() == tokenizer.encode(line)
        if line.isascii() and "\t" not in line:  # stock decoding shows byte pieces as <0x..>
            assert stock.decode(tokenizer.dictionary.string(ids)) == line


def test_tokenizer_that_does_not_fit_the_dictionary(model_file, tokenizer, tmp_path):
    symbols = tokenizer.symbols
    path = tmp_path / "dict.txt"
    path.write_text("".join(f"{symbol} 1\n" for symbol in symbols[:-3]))
    with pytest.raises(
        InputError, match=r"^3 of the 996 symbols of .* are not in the dictionary of 993 symbols: .*--dict"
    ):
        load_tokenizer(model_file, dictionary=path)
    path.write_text("".join(f"{symbol} 1\n" for symbol in ["extra", *reversed(symbols)]))
    reordered = load_tokenizer(model_file, dictionary=path)
    assert reordered.decode(reordered.encode("def f():\n    pass")) == "def f():\n    pass"
    assert reordered.encode("x") != tokenizer.encode("x")
    for content, message in (("word\n", '"symbol count"'), ("a 1\na 1\n", "a symbol twice"), (None, "cannot be read")):
        path.unlink(missing_ok=True)
        if content:
            path.write_text(content)
        with pytest.raises(InputError, match=message):
            load_tokenizer(model_file, dictionary=path)


def test_not_a_model(tmp_path):
    with pytest.raises(InputError, match="--tokenizer .*nowhere cannot be loaded: No such file"):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "x.model").write_bytes(b"text")
    with pytest.raises(InputError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(InputError, match="holds neither tokenizer.json nor sentencepiece.model nor encoder.json: give"):
        load_tokenizer(tmp_path)


def foreign_model(path, sources, **options):
    import sentencepiece

    lines = (line for text in sources for line in text.split("\n"))
    with open(path, "wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=lines, model_writer=writer, vocab_size=600, minloglevel=2, **options
        )
    return path


def test_lossy_model_is_refused_unless_accepted(tmp_path, sources):
    model = foreign_model(tmp_path / "m.model", sources, model_type="bpe")
    with pytest.raises(InputError, match="does not give text back as it was .*--allow-lossy-tokenizer"):
        load_tokenizer(model)
    tokenizer = load_tokenizer(model, allow_lossy=True)
    assert not tokenizer.lossless
    assert tokenizer.decode(tokenizer.encode("return self")) == "return self"
    assert "<s>" not in tokenizer.symbols and len(tokenizer.dictionary) == len(tokenizer)


@settings(deadline=None, max_examples=100)
@given(text=TEXT)
def test_lossless_model_with_a_dummy_prefix(prefixed, text):
    """Such as Llama's: it puts a space before every text, and takes it away again."""
    assert prefixed.decode(prefixed.encode(text)) == text


@pytest.fixture(scope="module")
def prefixed(tmp_path_factory, sources):
    model = foreign_model(
        tmp_path_factory.mktemp("prefixed") / "m.model",
        sources,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
    )
    tokenizer = load_tokenizer(model)
    assert tokenizer.symbols[tokenizer.encode("a")[0] - 4].startswith("\u2581")
    return tokenizer


def test_arrays_are_int32(tokenizer):
    assert tokenizer.encode_array("text").dtype == np.int32
    assert tokenizer.encode_array("").shape == (0,)

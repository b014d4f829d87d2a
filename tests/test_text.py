"""Text to tokens and back, with real tokenizers: whole texts, single tokens, and the lines of fairseq's commands."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.gpt2_bpe import GPT2BPE
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig
from hypothesis import given
from hypothesis import strategies as st

from longmem_fairseq.text import OneLineBPE, decode_text, encode_text, one_line, token_texts
from preprocess.benchmark import train_byte_level_bpe
from tests.text_models import SHIPPED

TEXT = st.text(
    st.one_of(st.characters(codec="utf-8"), st.sampled_from(" \n\t'aZ19_.é漢🎉\u0301\u2028")), min_size=1, max_size=40
)


@pytest.fixture(scope="module", params=["sentencepiece", "gpt2"])
def tokenizer(request, tmp_path_factory):
    """BPE and dictionary."""
    if request.param == "sentencepiece":
        bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(SHIPPED / "sentencepiece.model")))
        return bpe, Dictionary.load(str(SHIPPED / "dict.txt"))
    source = Path(__file__).read_text(encoding="utf-8")
    files = train_byte_level_bpe([source], 400, tmp_path_factory.mktemp("gpt2"))
    dictionary = Dictionary()
    for number in range(400):
        dictionary.add_symbol(str(number))
    dictionary.add_symbol("madeupword0000")  # as in GPT-2's dictionaries of fairseq
    return GPT2BPE(SimpleNamespace(gpt2_encoder_json=str(files[0]), gpt2_vocab_bpe=str(files[1]))), dictionary


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
def test_prompts_and_answers_are_lines(tokenizer, text):
    """What fairseq's commands do with a prompt, and with an answer of the same tokens."""
    bpe, dictionary = tokenizer
    lines = one_line(bpe)
    line = text.replace("\n", "<0x0A>")
    tokens = dictionary.encode_line(lines.encode(line), add_if_not_exist=False, append_eos=False).long()
    assert tokens.tolist() == encode_text(text, dictionary, bpe).tolist()
    printed = lines.decode(dictionary.string(tokens))
    assert "\n" not in printed and printed == text.strip().replace("\n", "<0x0A>")


def test_symbols_that_are_no_text_keep_their_names(tokenizer):
    bpe, dictionary = tokenizer
    assert OneLineBPE(bpe).decode("madeupword0000 <unk>") == "madeupword0000<unk>"
    words = SimpleNamespace(encode=None)
    assert one_line(words) is words and one_line(None) is None

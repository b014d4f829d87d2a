"""Bytes and words of tokens are those of the text."""

import random

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary

from longmem_fairseq.data.text_meter import TextMeter, TextSize, find_meter
from longmem_fairseq.hub import LongMem
from longmem_fairseq.text import encode_text, find_bpe
from tests.text_models import gpt2_model, huggingface_model, sentencepiece_model

TEXTS = [
    "It was a dark night.\n",
    " two leading words",
    "  \n\tdéjà vu\u00a0漢字\u3000🎉🎉 end ",
    "no-break words",
    "def f(x):\n    return x\n\n\n",
    "x" * 50,
    " ",
]


@pytest.fixture(scope="module", params=["sentencepiece", "gpt2", "huggingface"])
def model(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    make = {"sentencepiece": sentencepiece_model, "gpt2": gpt2_model, "huggingface": huggingface_model}[request.param]
    texts = [] if request.param == "sentencepiece" else [TEXTS * 9]
    return LongMem.from_pretrained(str(make(directory, *texts)), device="cpu")


@pytest.mark.parametrize("text", TEXTS)
def test_sizes_are_those_of_the_text(model, text):
    meter = TextMeter(model.task.dictionary, model.bpe)
    tokens = torch.cat([model.encode(text), torch.tensor([model.task.dictionary.eos()])])
    expected = TextSize(len(text.split()), len(text.encode()))
    assert meter.measure([tokens]) == [expected]
    draw = random.Random(0)
    for _ in range(20):
        cuts = sorted(draw.randrange(len(tokens) + 1) for _ in range(3))
        pieces = [tokens[begin:end] for begin, end in zip([0, *cuts], [*cuts, len(tokens)])]
        assert tuple(map(sum, zip(*meter.measure(pieces)))) == expected


def test_what_is_unknown_is_not_guessed(model, tmp_path):
    meter = TextMeter(model.task.dictionary, model.bpe)
    assert meter.measure([model.encode("a"), [model.task.dictionary.unk()]]) is None
    with pytest.raises(ValueError, match="does not define the text of single tokens"):
        TextMeter(Dictionary(), None)
    with pytest.raises(ValueError, match="the data directory has no tokenizer"):
        find_meter([str(tmp_path)], Dictionary())


def test_a_space_that_the_tokenizer_adds_is_not_counted(tmp_path):
    (tmp_path / "text").write_text("It was a dark night.\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=tmp_path / "text",
        model_prefix=tmp_path / "sentencepiece",
        vocab_size=30,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    bpe, dictionary = find_bpe(str(tmp_path)), Dictionary()
    for number in range(3, bpe.sp.get_piece_size()):
        dictionary.add_symbol(bpe.sp.id_to_piece(number))
    tokens = encode_text("a dark", dictionary, bpe)
    meter = find_meter([str(tmp_path)], dictionary)
    assert meter.measure([[2], tokens]) == [TextSize(0, 0), TextSize(2, 6)]
    assert meter.measure([tokens], continues=True) == [TextSize(2, 7)]

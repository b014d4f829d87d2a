"""LongMem from Python: what it says equals what the commands and the model say."""

import math
import re
import shutil

import pytest
import sentencepiece
import torch
from fairseq.data import Dictionary
from fairseq.data.encoders.sentencepiece_bpe import SentencepieceBPE, SentencepieceConfig

from longmem_fairseq.hub import LongMem
from longmem_fairseq.text import decode_text, encode_text
from tests.fairseq_runs import TASK, run
from tests.repository import ROOT
from tests.text_models import sentencepiece_model

PAGE = ROOT / "docs" / "generation.md"


def words(*numbers):
    return " ".join(f"w{number}" for number in numbers)


BOOK = words(*(n % 24 for n in range(90)))
TEXT = words(*(n % 24 for n in range(40)))


@pytest.fixture(scope="module")
def loaded(tiny_data, tiny_longmem):
    return LongMem.from_pretrained(str(tiny_longmem.checkpoint), data=str(tiny_data), device="cpu")


@pytest.fixture
def model(loaded):
    loaded.forget()
    return loaded


def test_generate_is_the_same_as_the_command(model, tiny_data, tiny_longmem, tmp_path):
    (tmp_path / "book").write_text(BOOK)
    (tmp_path / "prompts").write_text(f"{TEXT}\n{words(1, 2)}\n")
    output = run(
        "interactive",
        tiny_data,
        *TASK,
        "--path",
        tiny_longmem.checkpoint,
        "--cpu",
        "--input",
        tmp_path / "prompts",
        *"--beam 3 --max-len-b 30".split(),
        "--memory-text",
        tmp_path / "book",
        cwd=tmp_path,
    )
    model.memorize(BOOK, name="book")
    answers = model.generate([TEXT, words(1, 2)], beam=3, max_new_tokens=30)
    assert [answer.split() for answer in answers] == [
        text.split() for text in re.findall(r"^H-\d\t\S+\t(.*)$", output, re.MULTILINE)
    ]
    assert model.generate(TEXT, beam=3, max_new_tokens=30) == answers[0]


def test_a_score_is_that_of_evaluation(model, tiny_data, tiny_longmem, tmp_path):
    from tests.conftest import VALID_LENGTHS
    from tests.fairseq_runs import random_documents

    output = run(
        "eval_lm", tiny_data, *TASK, "--path", tiny_longmem.checkpoint, "--gen-subset", "valid", "--cpu", cwd=tmp_path
    )
    total = 0.0
    for document in random_documents(VALID_LENGTHS, seed=1):
        model.encode = lambda text, tokens=document: torch.from_numpy(tokens).long()  # with its end-of-sentence
        total -= float(model.score("").log_probabilities.sum()) / math.log(2)
    del model.encode
    (loss,) = re.findall(r"Loss \(base 2\): ([\d.]+)", output)
    assert total / sum(VALID_LENGTHS) == pytest.approx(float(loss), abs=1e-4)


def test_memory_changes_scores_until_it_is_forgotten(model):
    nothing = model.score(TEXT)
    assert len(nothing.tokens) == 40 and nothing.perplexity == pytest.approx(
        math.exp(-nothing.log_probabilities.mean().item())
    )
    model.memorize(BOOK, name="book")
    model.memorize(words(30, 31, 32))
    assert model.documents == ["book", "text 1"]
    with_book = model.score(TEXT)
    assert (with_book.log_probabilities - nothing.log_probabilities).abs().max() > 1e-4
    assert torch.equal(model.score(TEXT).log_probabilities, with_book.log_probabilities), "scoring remembers nothing"
    model.forget("text 1")
    model.forget("book")
    assert torch.equal(model.score(TEXT).log_probabilities, nothing.log_probabilities)


def test_forgetting_one_leaves_the_memory_of_the_other(model):
    model.memorize(words(5, 6, 7, 8), name="b")
    expected = model.score(TEXT).log_probabilities
    model.forget()
    model.memorize(words(1, 2, 3), name="a")
    model.memorize(words(5, 6, 7, 8), name="b")
    model.forget("a")
    torch.testing.assert_close(model.score(TEXT).log_probabilities, expected)


def test_saved_memories(model, tmp_path):
    model.memorize(BOOK, name="book")
    expected = model.score(TEXT).log_probabilities
    model.save_memory(str(tmp_path / "exact"), dtype="float32")
    model.save_memory(str(tmp_path / "half"))
    for name, tolerance in (("exact", 1e-6), ("half", 1e-2)):
        model.forget()
        model.load_memory(str(tmp_path / name))
        assert model.documents == ["book"]
        torch.testing.assert_close(model.score(TEXT).log_probabilities, expected, atol=tolerance, rtol=0)


def test_samples(model):
    torch.manual_seed(1)
    one = model.generate(TEXT, sampling=True, top_p=0.9, max_new_tokens=20)
    torch.manual_seed(1)
    assert model.generate(TEXT, sampling=True, top_p=0.9, max_new_tokens=20) == one
    assert len(model.generate("", min_new_tokens=5, max_new_tokens=5).split()) == 5


def test_the_example_of_the_documentation_runs(tmp_path, monkeypatch, capsys):
    """Where "checkpoints", "data" and a novel lie in the working directory."""
    (section,) = re.findall(r"## From Python\n\n```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    for name in ("checkpoints", "data"):
        (tmp_path / name).mkdir()
    sentencepiece_model(tmp_path / "checkpoints")
    for name in ("dict.txt", "sentencepiece.model"):
        shutil.move(tmp_path / "checkpoints" / name, tmp_path / "data")
    (tmp_path / "novel.txt").write_text("The captain said that he would say nothing.\n" * 20)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(section, names)
    assert names["model"].documents == ["novel"] and (tmp_path / "novel.memory").exists()
    *answers, perplexity = capsys.readouterr().out.splitlines()
    assert len(answers) >= 2 and float(perplexity) > 1


def test_errors_are_sentences(model, tiny_data, tiny_longmem, tiny_backbone, tmp_path):
    checkpoint, data = str(tiny_longmem.checkpoint), str(tiny_data)
    for error, sentence, call in (
        (FileNotFoundError, "missing.pt does not exist", lambda: LongMem.from_pretrained("missing.pt")),
        (FileNotFoundError, "has none of checkpoint_best.pt", lambda: LongMem.from_pretrained(str(tmp_path))),
        (FileNotFoundError, "dict.txt is not in", lambda: LongMem.from_pretrained(checkpoint, data=str(tmp_path))),
        (ValueError, "setting memry_size", lambda: LongMem.from_pretrained(checkpoint, data=data, memry_size=9)),
        (ValueError, "which does not have a memory", lambda: LongMem.from_pretrained(str(tiny_backbone), data=data)),
        (ValueError, "document other: it has nothing", lambda: model.forget("other")),
        (ValueError, "nothing was memorized", lambda: model.save_memory(str(tmp_path / "empty"))),
        (ValueError, "set sampling=True", lambda: model.generate(TEXT, top_k=3)),
        (ValueError, "beam=0 is less", lambda: model.generate(TEXT, beam=0)),
        (ValueError, "the text is empty", lambda: model.memorize(" ")),
        (ValueError, "the text is empty", lambda: model.score("")),
    ):
        with pytest.raises(error, match=sentence):
            call()


def test_without_a_memory(tiny_data, tiny_longmem):
    model = LongMem.from_pretrained(
        str(tiny_longmem.checkpoint.parent), data=str(tiny_data), device="cpu", use_external_memory=False
    )
    assert model.documents == [] and model.generate(TEXT, max_new_tokens=5)
    assert model.score(TEXT).perplexity > 1
    with pytest.raises(ValueError, match="memory is off"):
        model.memorize(TEXT)


def test_sentencepiece_keeps_newlines_and_spaces(tiny_longmem, tiny_data, tmp_path):
    """Pieces with a newline in them, which fairseq's own joining by spaces would lose."""
    text = "if x:\n    return y\n\nelse:\n    pass\n"
    (tmp_path / "text").write_text(text * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "sentencepiece"),
        vocab_size=32,
        minloglevel=2,
        user_defined_symbols=["\n", "\n    "],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=False,
        hard_vocab_limit=False,
    )
    bpe = SentencepieceBPE(SentencepieceConfig(sentencepiece_model=str(tmp_path / "sentencepiece.model")))
    dictionary = Dictionary()
    for i in range(bpe.sp.get_piece_size()):
        dictionary.add_symbol(bpe.sp.id_to_piece(i).replace("\n", "<0x0A>").replace(" ", "<0x20>"))
    tokens = encode_text(text, dictionary, bpe)
    assert dictionary.unk() not in tokens.tolist()
    assert decode_text(tokens, dictionary, bpe) == text
    shutil.copy(tiny_data / "dict.txt", tmp_path)
    model = LongMem.from_pretrained(str(tiny_longmem.checkpoint), data=str(tmp_path), device="cpu")
    assert isinstance(model.bpe, SentencepieceBPE), "found beside the dictionary"

"""LongMem from Python: what it says equals what the commands and the model say."""

import copy
import math
import pickle
import re
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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

PAGE, SHIPPED = ROOT / "docs" / "generation.md", ROOT / "examples" / "pretrained" / "mini"


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


STOPS = ["--stop", "2 w", "--stop", " w17", "--repetition-penalty", 1.2, "--nbest", 2, "--min-len", 20]


@pytest.mark.parametrize("options", [[], STOPS], ids=["plain", "stops and penalty"])
def test_generate_is_the_same_as_the_command(model, tiny_data, tiny_longmem, tmp_path, options):
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
        *options,
        "--memory-text",
        tmp_path / "book",
        cwd=tmp_path,
    )
    model.memorize(BOOK, name="book")
    printed = re.findall(r"^D-\d\t(\S+)\t(.*)$", output, re.MULTILINE)
    given = dict(beam=3, max_new_tokens=30)
    if options:
        given.update(stop=["2 w", " w17"], repetition_penalty=1.2, min_new_tokens=20)
    best = model.generate([TEXT, words(1, 2)], **given, n_best=2 if options else 1)
    assert [text.strip() for row in best for text, _, _ in row] == [text for _, text in printed]
    for (_, score, _), (reported, _) in zip([result for row in best for result in row], printed):
        assert score / math.log(2) == pytest.approx(float(reported), abs=1e-4)
    assert model.generate(TEXT, **given) == best[0][0].text
    if options:
        stopped = [text for _, text in printed if len(text.split()) < 20]
        assert stopped and any(re.search(r"w\d?$", text) for text in stopped), "within a word"


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


def test_a_list_of_texts_has_a_list_of_scores():
    """By the shipped model; taken for one text of two words, the perplexity would be that of <unk>."""
    model = LongMem.from_pretrained(SHIPPED, device="cpu")
    texts = ["It was a dark night.", "The old man sat by the fire."]
    scores = model.score(texts)
    assert [score.perplexity for score in scores] == pytest.approx([116.598, 59.040], abs=1e-3)
    for score, text in zip(scores, texts):
        assert torch.equal(score.log_probabilities, model.score(text).log_probabilities)
    assert model.score([]) == model.generate([]) == []
    assert model.score(texts[:1])[0].perplexity == scores[0].perplexity
    assert model.generate(tuple(texts), max_new_tokens=3) == [model.generate(text, max_new_tokens=3) for text in texts]


WRONG_TYPES = [b"bytes", None, 3, 2.5, Path("novel.txt"), ["a", 3], [["a"]], {"a": "b"}, torch.tensor([4]), iter("ab")]


@pytest.mark.parametrize("value", WRONG_TYPES, ids=lambda value: type(value).__name__)
def test_what_is_not_text_is_refused_by_name(model, value):
    calls = {
        "memorize": model.memorize,
        "score": model.score,
        "generate": model.generate,
        "stream": model.stream,
        "trace": model.trace,
        "encode": model.encode,
        "stop": lambda value: model.generate("w1", stop=value),
    }
    for name, call in calls.items():
        with pytest.raises(TypeError, match=rf"^{name} takes a .*\(str\), (not|but number \d of it is) \w+"):
            call(value)
    if value is not None:
        with pytest.raises(TypeError, match="forget takes a name"):
            model.forget(value)
        with pytest.raises(TypeError, match="memorize takes a name"):
            model.memorize(TEXT, value)
    if not isinstance(value, Path):
        for call in (model.save_memory, model.load_memory, LongMem.from_pretrained):
            with pytest.raises(TypeError, match=f"{call.__name__} takes the path of a file"):
                call(value)
    if not isinstance(value, torch.Tensor):
        for call in (model.decode, model.token_texts):
            with pytest.raises(TypeError, match=f"{call.__name__} takes token ids as encode returns them"):
                call(value)
    assert model.documents == []


@pytest.mark.parametrize("function", ["memorize", "encode", "trace", "stream"])
def test_one_text_at_a_time(model, function):
    with pytest.raises(TypeError, match=rf"{function} takes a text \(str\), not list .*: call it once for each text"):
        getattr(model, function)([TEXT, TEXT])


BAD_OPTIONS = {
    "top_k=29 is more than the 28 symbols that can be chosen": dict(sampling=True, top_k=29),
    "top_k=-2 is negative": dict(sampling=True, top_k=-2),
    "top_p=1.5 is not above 0 and at most 1": dict(sampling=True, top_p=1.5),
    "top_p=nan is not above 0": dict(sampling=True, top_p=math.nan),
    "top_k=3 and top_p=0.5 are two ways": dict(sampling=True, top_k=3, top_p=0.5),
    "temperature=nan is not above 0 and finite": dict(temperature=math.nan),
    "temperature=inf is not above 0 and finite": dict(temperature=math.inf),
    "repetition_penalty=0 is not above 0": dict(repetition_penalty=0),
    "repetition_penalty=nan is not above 0": dict(repetition_penalty=math.nan),
    "length_penalty=inf is not a finite number": dict(length_penalty=math.inf),
    "no_repeat_ngram_size=-1 is negative": dict(no_repeat_ngram_size=-1),
    "beam=28 is more than the 27 symbols": dict(beam=28),
    "n_best=3 is more than the 2 hypotheses of beam: raise beam": dict(beam=2, n_best=3),
    "n_best=0 is less than one": dict(n_best=0),
    "min_new_tokens=9 is more than max_new_tokens=8 new tokens": dict(min_new_tokens=9, max_new_tokens=8),
    "max_new_tokens is float .2.5.: it must be a whole number": dict(max_new_tokens=2.5),
    "beam is bool": dict(beam=True),
    "sampling is 'yes': it must be True or False": dict(sampling="yes"),
    "stop has an empty text": dict(stop=["w1", ""]),
}


@pytest.mark.parametrize("sentence", BAD_OPTIONS)
def test_bad_options_of_generation_are_refused(model, sentence):
    options, symbols = dict(BAD_OPTIONS[sentence]), len(model.task.dictionary)
    for name in ("top_k", "beam"):  # written for 28 symbols
        if options.get(name, 0) >= 28:
            sentence = (
                sentence.replace("29", str(symbols + 1)).replace("28", str(symbols)).replace("27", str(symbols - 1))
            )
            options[name] += symbols - 28
    with pytest.raises((TypeError, ValueError), match=f"^{sentence}"):
        model.generate(TEXT, **options)
    if not {"beam", "n_best", "length_penalty"} & options.keys():
        with pytest.raises((TypeError, ValueError), match=f"^{sentence}"):
            model.stream(TEXT, **options)


@pytest.mark.parametrize(
    "settings, sentence",
    [
        (dict(memory_dtype="float8"), "memory_dtype='float8' does not fit: .*float32, float16, bfloat16"),
        (dict(memory_size="large"), "memory_size='large' does not fit"),
        (dict(k=3.5), "k=3.5 does not fit"),
        (dict(memory_size=10**15), "no room for --memory-size 1,000,000,000,000,000 "),
        (dict(memory_size=10**30), "no room for --memory-size 1,000,000,000,000,000,000,000,000,000,000 "),
        (dict(device="gpu"), "device='gpu' is not available.*choose 'cpu'"),
        (dict(device="cuda:99"), "device='cuda:99' is not available.*choose 'cpu'"),
    ],
)
def test_bad_settings_are_refused_by_name(tiny_data, tiny_longmem, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        LongMem.from_pretrained(tiny_longmem.checkpoint, tiny_data, **{"device": "cpu", **settings})


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_model_can_be_copied_and_pickled(model, duplicate):
    model.memorize(BOOK, name="book")
    other = duplicate(model)
    assert other.documents == ["book"]
    for one in (other, other.without_memory()):
        expected = (model if one is other else model.without_memory()).score(TEXT)
        assert torch.equal(one.score(TEXT).log_probabilities, expected.log_probabilities)
    assert other.generate(TEXT, max_new_tokens=20) == model.generate(TEXT, max_new_tokens=20)
    if duplicate is not copy.copy:
        other.forget()
        assert model.documents == ["book"] and other.model is not model.model


def test_an_interrupted_text_is_not_in_the_memory(model, monkeypatch):
    model.memorize(BOOK, name="book")
    before, encode, calls = model.score(TEXT).log_probabilities, model.model.decoder.backbone.encode_for_memory, []

    def interrupted(tokens):
        calls.append(tokens)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(tokens)

    monkeypatch.setattr(model.model.decoder.backbone, "encode_for_memory", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.memorize(TEXT, name="text")
    monkeypatch.undo()
    assert model.documents == ["book"] and torch.equal(model.score(TEXT).log_probabilities, before)
    model.memorize(TEXT, name="text")
    assert model.documents[-1] == "text"


def test_threads_take_turns(model):
    """Several memories over one model, each written and read by several threads."""
    others = [model, model.with_new_memory(), model.without_memory()]
    for i, one in enumerate(others[:2]):
        one.memorize(words(*(n * (i + 1) % 24 for n in range(90))), name="book")
    texts = [words(*(n * k % 24 for n in range(40))) for k in range(1, 11)]
    expected = {(i, text): one.score(text).log_probabilities for i, one in enumerate(others) for text in texts}
    answers = {i: one.generate(texts[:2], beam=2, max_new_tokens=10) for i, one in enumerate(others)}

    def use(number):
        i, text = number % 3, texts[number % len(texts)]
        if number % 10 == 9:
            return others[i].generate(texts[:2], beam=2, max_new_tokens=10) == answers[i]
        return torch.equal(others[i].score(text).log_probabilities, expected[i, text])

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(use, range(300)))
    assert model.documents == others[1].documents == ["book"]


def test_other_calls_run_between_the_pieces_of_a_stream(model):
    """A stream reads the memory as it was when it was asked for."""
    model.memorize(BOOK, name="book")
    lengths = dict(min_new_tokens=30, max_new_tokens=30)
    expected, score = model.generate(TEXT, **lengths), model.score(TEXT).log_probabilities
    stream = model.stream(TEXT, **lengths)
    pieces = [next(stream) for _ in range(5)]
    scores = []
    thread = threading.Thread(target=lambda: scores.append(model.score(TEXT).log_probabilities))
    thread.start()
    thread.join(60)
    assert torch.equal(scores[0], score)
    model.memorize(words(*range(20, 0, -1)), name="other")
    pieces += [next(stream) for _ in range(5)]
    model.forget()
    assert "".join([*pieces, *stream]) == expected
    assert not torch.equal(model.score(TEXT).log_probabilities, score), "the memory was another"


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
        (ValueError, "dtype='float8' is unknown", lambda: model.save_memory(str(tmp_path / "empty"), "float8")),
        (ValueError, "its character 1 is a lone surrogate", lambda: model.score("a\ud800")),
        (ValueError, "outside the dictionary's 0 to", lambda: model.decode(torch.tensor([10**6]))),
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

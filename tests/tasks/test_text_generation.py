"""Text from text, compared with plain loops: stop strings, repetition penalty, several continuations, streams."""

import pickle
import random

import pytest
import torch
from omegaconf import OmegaConf
from transformers import RepetitionPenaltyLogitsProcessor

from longmem_fairseq.hub import LongMem
from longmem_fairseq.models.live_window import prefill
from longmem_fairseq.tasks.longmem_language_modeling import LongMemLanguageModelingTask
from longmem_fairseq.tasks.options import LongMemLanguageModelingConfig
from longmem_fairseq.tasks.repetition_penalty import RepetitionPenalty
from tests.models.tiny import VOCABULARY, longmem
from tests.text_models import gpt2_model, huggingface_model, sentencepiece_model

T = 7  # tokens of a window
NEW = 2 * T + 2
LENGTHS = dict(max_new_tokens=NEW, min_new_tokens=NEW)
BOOK = "It was déjà vu: the 漢字 and the sea. "
WORDS = " ".join(f"w{i % 30}" for i in range(0, 90, 7))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model of each kind of tokens with a text in its memory; random weights write broken characters, too."""
    directories = {name: tmp_path_factory.mktemp(name) for name in ("sentencepiece", "gpt2", "huggingface", "words")}
    cfg = OmegaConf.merge(OmegaConf.structured(LongMemLanguageModelingConfig), {"tokens_per_sample": T})
    loaded = {
        "sentencepiece": LongMem.from_pretrained(sentencepiece_model(directories["sentencepiece"]), device="cpu"),
        "gpt2": LongMem.from_pretrained(gpt2_model(directories["gpt2"], [BOOK * 9]), device="cpu"),
        "huggingface": LongMem.from_pretrained(huggingface_model(directories["huggingface"], [BOOK * 9]), device="cpu"),
        "words": LongMem(longmem(directories["words"]), LongMemLanguageModelingTask(cfg, VOCABULARY)),
    }
    for name, model in loaded.items():
        model.memorize(WORDS if name == "words" else BOOK * 2)
    return loaded


@pytest.fixture(params=["sentencepiece", "huggingface", "words"])
def name(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["memory", "no memory"])
def model(models, name, request):
    return models[name] if request.param else models[name].without_memory()


def prompts(name):
    """One that is empty, and one that is longer than the window."""
    return ["", WORDS] if name == "words" else ["", BOOK]


def text_of(model, prompt, tokens):
    before = model.encode(prompt) if prompt else torch.zeros(0, dtype=torch.int64)
    known, whole = model.decode(before), model.decode(torch.cat([before, torch.tensor(tokens, dtype=torch.int64)]))
    return whole[len(known) :] if whole.startswith(known) else model.decode(torch.tensor(tokens))


def cut(text, stops):
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def stopped(model, prompt, tokens, stops):
    """Text of a continuation that ends with the first token by which a stop is complete."""
    for n in range(1, len(tokens) + 1):
        text = text_of(model, prompt, tokens[:n])
        if cut(text, stops) != text:
            return cut(text, stops)
    return text


def inputs_of(model, prompt):
    eos = torch.tensor([model.task.dictionary.eos()])
    return torch.cat([eos, model.encode(prompt)]) if prompt else eos


def greedy(model, prompt, penalty):
    """Tokens of a greedy continuation, by a plain loop and the processor of transformers."""
    dictionary, inputs = model.task.dictionary, inputs_of(model, prompt)
    bank = model.memory and model.memory.bank
    state = prefill(model.model.decoder, [inputs[:-1]], T, bank, use_memory=model.memory is not None)
    process, seen, answer = RepetitionPenaltyLogitsProcessor(penalty), inputs[1:].tolist(), []
    for _ in range(NEW):
        with torch.no_grad():
            logits = model.model.decoder(inputs[-1:].view(1, 1), incremental_state=state)[0][0, -1:]
        if seen:
            logits = process(torch.tensor([seen]), logits)
        logits[:, [dictionary.pad(), dictionary.eos()]] = float("-inf")
        inputs = logits.argmax(-1)
        answer.append(int(inputs))
        seen.append(int(inputs))
    return answer


def test_the_penalty_is_that_of_transformers():
    torch.manual_seed(0)
    logits, prompts, generated = torch.randn(6, 50), torch.randint(50, (3, 9)), torch.randint(50, (6, 4))
    for penalty in (0.5, 1.3, 4.0):
        rule, order = RepetitionPenalty(penalty, 50), torch.tensor([1, 0, 3, 3, 4, 5])
        rule.start(list(prompts), beam=2)
        rule.reorder(order)
        seen = torch.cat([prompts.repeat_interleave(2, 0)[order], generated], dim=1)
        assert torch.equal(rule(logits, generated), RepetitionPenaltyLogitsProcessor(penalty)(seen, logits.clone()))


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_with_a_repetition_penalty(model, name, penalty):
    """Side by side and one by one."""
    expected = [text_of(model, prompt, greedy(model, prompt, penalty)) for prompt in prompts(name)]
    options = dict(LENGTHS, repetition_penalty=penalty)
    assert model.generate(prompts(name), **options) == expected
    assert [model.generate(prompt, **options) for prompt in prompts(name)] == expected


def some_stops(text, seed):
    """Parts of a text, in one token and over several, and one that does not occur."""
    chance = random.Random(seed)
    places = [chance.randrange(len(text)) for _ in range(3)]
    return [*(text[place : place + chance.randint(1, 6)] for place in places), "not in it"]


def test_stops_cut_a_continuation(model, name):
    for seed, prompt in enumerate(prompts(name)):
        (whole,) = model.generate(prompt, **LENGTHS, n_best=1)
        stops = [stop for stop in some_stops(whole.text, seed) if "\ufffd" not in stop]
        for stop in [*stops, stops]:
            expected = stopped(model, prompt, whole.tokens.tolist(), [stop] if isinstance(stop, str) else stop)
            assert model.generate(prompt, **LENGTHS, stop=stop) == expected
            assert "".join(model.stream(prompt, **LENGTHS, stop=stop)) == expected


@pytest.mark.parametrize("options", [dict(beam=3), dict(beam=3, repetition_penalty=1.5), dict(beam=2, n_best=2)])
def test_stops_with_beams_and_batches(model, name, options):
    whole = model.generate(prompts(name)[-1], **LENGTHS)
    stops = [stop for stop in some_stops(whole, 1) if "\ufffd" not in stop]
    together = model.generate(prompts(name), **LENGTHS, **options, stop=stops)
    for prompt, results in zip(prompts(name), together):
        alone = model.generate(prompt, **LENGTHS, **options, stop=stops)
        results, alone = ([x] if isinstance(x, str) else [best.text for best in x] for x in (results, alone))
        assert results == alone
        assert all(cut(text, stops) == text for text in results)


def test_several_continuations_have_their_scores(models):
    """The end of each is an end-of-sentence, or a stop string that an end of probability 1 follows."""
    model, options = models["words"], dict(beam=6, max_new_tokens=12, length_penalty=0.5)
    plain = model.generate(WORDS, **options, n_best=6)
    stop = next(f" w{token - 4}" for token in plain[0].tokens.tolist() if token >= 14)  # is the start of no other word
    short = model.generate(WORDS, **options, n_best=5, stop=stop)
    assert len(plain) == 6 and len(short) == 5
    assert plain[0].text == model.generate(WORDS, **options)
    assert short[0].text == model.generate(WORDS, **options, stop=stop)
    ends = {"eos": torch.tensor([VOCABULARY.eos()]), "stop": model.encode(stop)}
    reached = []
    for results in (plain, short):
        assert [result.score for result in results] == sorted((result.score for result in results), reverse=True)
        for text, score, tokens in results:
            assert text.split() == [VOCABULARY[token] for token in tokens]
            scores = {
                end: log_probability(model, WORDS, torch.cat([tokens, tail])) / (len(tokens) + extra) ** 0.5
                for (end, tail), extra in zip(ends.items(), (1, 2))
            }
            (end,) = [end for end in ends if scores[end] == pytest.approx(score, abs=1e-4)]
            reached.append(end)
    assert reached[:6] == ["eos"] * 6 and "stop" in reached[6:]


def log_probability(model, prompt, answer):
    inputs = torch.cat([inputs_of(model, prompt), answer[:-1]])
    begin = len(inputs) - len(answer)
    state = prefill(model.model.decoder, [inputs[:begin]], T, model.memory.bank)
    with torch.no_grad():
        logits = [model.model.decoder(token.view(1, 1), incremental_state=state)[0][0] for token in inputs[begin:]]
    return float(torch.cat(logits).log_softmax(-1).gather(1, answer[:, None]).sum())


STREAMS = {
    "greedy": dict(),
    "penalty and n-grams": dict(repetition_penalty=1.3, no_repeat_ngram_size=2),
    "sampling": dict(sampling=True, temperature=1.3),
    "nucleus": dict(sampling=True, top_p=0.9),
    "top k": dict(sampling=True, top_k=5, repetition_penalty=2.0),
}


@pytest.mark.parametrize("way", STREAMS)
def test_pieces_are_the_text(model, name, way, monkeypatch):
    monkeypatch.setattr("longmem_fairseq.tasks.continuation_text._WINDOW", 5)
    for prompt in prompts(name):
        torch.manual_seed(3)
        expected = model.generate(prompt, **LENGTHS, **STREAMS[way])
        torch.manual_seed(3)
        pieces = list(model.stream(prompt, **LENGTHS, **STREAMS[way]))
        assert "".join(pieces) == expected and all(pieces)
        assert len(pieces) > 3


def test_a_character_of_several_tokens_is_one_piece(models, monkeypatch):
    model = models["gpt2"]
    text = "a 漢字é🎉 z"
    tokens = [token for char in text for token in model.encode(char).tolist()]
    assert len(tokens) > len(text)
    monkeypatch.setattr("longmem_fairseq.tasks.generator.LongMemGenerator.stream", lambda self, prompt: iter(tokens))
    assert list(model.stream("x")) == list(text)
    assert list(model.stream("x", stop="é🎉")) == list("a 漢字")


def test_copies_know_their_tokens(models):
    for name, model in models.items():
        other = pickle.loads(pickle.dumps(model))
        assert other.generate(prompts(name), **LENGTHS) == model.generate(prompts(name), **LENGTHS)


def test_a_stream_may_be_left(models):
    model = models["words"]
    stream = model.stream("w1", **LENGTHS)
    next(stream)
    bank = model.memory.bank
    del stream
    model.memorize("w3 w4", name="other")
    model.forget("other")
    assert model.memory.bank is bank, "nobody reads the memory any more"

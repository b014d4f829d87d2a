"""Scores are those of evaluation by fairseq and of direct calls of the models, and scoring writes nothing."""

import hashlib
import math
import re

import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.evaluation.scoring.document_stream import DocumentStream
from longmem_fairseq.evaluation.scoring.scorer import Scorer
from longmem_fairseq.evaluation.scoring.systems import BACKBONE, OFF, ON
from longmem_fairseq.evaluation.scoring.window import Continuation
from longmem_fairseq.hub import LongMem
from longmem_fairseq.memory.cache import CacheSettings, distribution
from tests.evaluation.conftest import SHIPPED, T
from tests.fairseq_runs import TASK, make_dictionary, run, write_split
from tests.repository import ROOT

CACHE = {BACKBONE: CacheSettings(0.3, 0.2), ON: CacheSettings(0.2, 0.1)}
MEMORY = 128


def tokens_of(length, seed=0):
    return torch.randint(4, 4096, (length,), generator=torch.Generator().manual_seed(seed))


def bank_bytes(state):
    tensors, counters = state.bank.state()
    held = b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))
    return hashlib.sha256(held + str((counters, state.last, state.tokens)).encode()).hexdigest()


def close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def plainly(files, document):
    """Score a document's last segment by direct calls: backbone, memory off, memory on, shape (T,) each."""
    stock, longmem = files.models
    inputs = torch.cat([torch.tensor([2]), document[:-1]])
    longmem.reset_memory()
    for s in range(0, len(document), T):
        place = Segments([0], [0], [s], [T], 1)
        on, extra = longmem(inputs[None, s : s + T], segments=place, without_memory=True)
    alone = stock(inputs[None, -T:])[0]
    return [
        x[0].log_softmax(-1).gather(1, document[-T:, None])[:, 0] for x in (alone, extra["logits_without_memory"], on)
    ]


@pytest.mark.parametrize("segments", [2, 7])
def test_equals_the_models_called_segment_by_segment(scorer, files, segments):
    """With a memory that is partly filled, and one that evicts."""
    document = tokens_of(segments * T)
    state = scorer.new_state()
    scorer.memorize(state, document[:-T])
    (scores,) = scorer.window(state, document[-T:-10], room=10).score([document[-10:]])
    for name, expected in zip((BACKBONE, OFF, ON), plainly(files, document)):
        close(scores[name], expected[-10:])
    assert (scores[ON] - scores[OFF]).abs().max() > 1e-3, "the memory matters"


def test_equals_fairseq_eval_lm(scorer, files, tmp_path):
    """Suffixes of documents that end where segments do, against --output-word-probs."""
    documents = [torch.cat([tokens_of(length - 1, length), torch.tensor([2])]) for length in (5 * T, 3 * T, T)]
    (tmp_path / "dict.txt").write_text((files.directory / "dict.txt").read_text())
    write_split(tmp_path / "test", [document.numpy() for document in documents])
    output = run(
        "eval_lm",
        tmp_path,
        *TASK,
        "--path",
        files.longmem,
        *"--gen-subset test --cpu --batch-size 1 --output-word-probs".split(),
        cwd=tmp_path,
    )
    lines = re.findall(r"^\D*\d+ (\S+ \[-?[\d.]+\].*)$", output, re.MULTILINE)  # one for each segment
    segments = [[float(x) for x in re.findall(r" \[(-?[\d.]+)\]", line)] for line in lines]
    assert [len(segment) for segment in segments] == [T] * 9
    for document in documents:
        state = scorer.new_state()
        scorer.memorize(state, document[:-T])
        (scores,) = scorer.window(state, document[-T:-12], room=12).score([document[-12:]])
        scores_on = scores[ON].tolist()
        assert any(segment[-12:] == pytest.approx(scores_on, abs=2e-3) for segment in segments)


def test_batches_prompts_and_room_do_not_matter(scorer):
    scorer.cache = CACHE
    context, prefix = tokens_of(100), tokens_of(9, 1)
    rows = [Continuation(tokens_of(n, n), tokens_of(p, 50 + p) if p else None) for n, p in ((3, 0), (7, 5), (1, 11))]
    state = scorer.new_state()
    scorer.memorize(state, context)
    together = scorer.window(state, prefix, room=20).score(rows)
    assert list(together[0]) == scorer.systems and len(scorer.systems) == 5
    for row, scores in zip(rows, together):
        prompt = prefix if row.prompt is None else torch.cat([prefix, row.prompt])
        (alone,) = scorer.window(state, prompt, room=len(row.tokens)).score([row.tokens])
        for name in scorer.systems:
            close(scores[name], alone[name])


def test_a_full_window_moves_into_the_memory(scorer):
    """Of a prefix longer than the window the start is memorized, for this window only; others do not see it."""
    context, prefix, suffix = tokens_of(50), tokens_of(T + 13, 1), tokens_of(6, 2)
    state = scorer.new_state()
    scorer.memorize(state, context)
    before = bank_bytes(state)
    (scores,) = scorer.window(state, prefix, room=6).score([suffix])
    assert bank_bytes(state) == before
    scorer.memorize(state, prefix[:19])
    (expected,) = scorer.window(state, prefix[19:], room=6).score([suffix])
    for name in scorer.systems:
        close(scores[name], expected[name])


def test_scoring_writes_nothing(scorer):
    scorer.cache = CACHE
    state = scorer.new_state()
    scorer.memorize(state, tokens_of(200))
    before, cached = bank_bytes(state), state.cache.hidden.clone()
    window = scorer.window(state, tokens_of(10, 1), room=15)
    first = window.score([tokens_of(15, 2)])[0]
    again = window.score([tokens_of(5, 3), tokens_of(15, 2)])[1]
    for name in scorer.systems:
        close(first[name], again[name])
    assert bank_bytes(state) == before and torch.equal(state.cache.hidden, cached)


def test_the_cache_is_mixed_in(scorer):
    """Against the whole distribution, over the hidden states of a direct reading of the text."""
    scorer.cache = {ON: CacheSettings(0.4, 0.3)}
    context, prefix, suffix = tokens_of(2 * T), tokens_of(8, 1), tokens_of(5, 2)
    suffix[2] = context[7]
    state = scorer.new_state()
    scorer.memorize(state, context)
    (scores,) = scorer.window(state, prefix, room=5).score([suffix])
    stream = torch.cat([torch.tensor([2]), context, prefix, suffix])
    with torch.no_grad():
        segments = [scorer.backbone.encode(x[None]) for x in stream[:-1].split(T)]
        hidden = torch.cat([scorer.backbone.final_hidden(segment)[0] for segment in segments])
    for t in range(5):
        at = len(stream) - 1 - 5 + t
        cached = distribution(hidden[at : at + 1], [(hidden[:at], stream[1 : at + 1])], 0.3, 4096)[0, suffix[t]]
        expected = 0.6 * math.exp(scores[ON][t]) + 0.4 * cached
        assert math.exp(scores["memory on + cache"][t]) == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("pieces", [(500,), (1, 6, 70, 423), (T, 468)])
def test_a_past_depends_on_its_tokens_only(scorer, pieces):
    """Tokens that would be evicted at once are not encoded; the memory is as if they had been."""
    document = tokens_of(500)
    scorer.cache = CACHE
    expected = scorer.new_state()
    stream = torch.cat([torch.tensor([2]), document])
    at = 0
    for piece in pieces:  # every segment of a piece, one by one
        for begin in range(at, at + piece, T):
            end = min(begin + T, at + piece)
            with torch.no_grad():
                scorer.write(
                    expected,
                    scorer.backbone.encode(stream[None, begin:end]),
                    stream[None, begin:end],
                    stream[begin + 1 : end + 1],
                )
        at += piece
    state, at = scorer.new_state(), 0
    for piece in pieces:
        scorer.memorize(state, document[at : at + piece])
        at += piece
    assert state.tokens == 500 and state.last == int(document[-1])
    for actual, reference in zip(state.bank.contents(0), expected.bank.contents(0)):
        close(actual, reference)
    order, reference = state.cache.hidden.sum(1).argsort(), expected.cache.hidden.sum(1).argsort()
    close(state.cache.hidden[order], expected.cache.hidden[reference])


def test_less_room_for_a_known_length_changes_nothing(scorer):
    scores = []
    for state in (scorer.new_state(), scorer.new_state(at_most=40)):
        scorer.memorize(state, tokens_of(40))
        scores.append(scorer.window(state, tokens_of(50, 1), room=9).score([tokens_of(9, 2)])[0][ON])
    assert state.bank.nbytes < scorer.new_state().bank.nbytes
    close(*scores)


def test_a_stream_is_a_document_read_by_all(scorer, files):
    """Against windows over the same segments; a stream that continues behind a replay gives the same."""
    scorer.cache = CACHE
    document = tokens_of(6 * T + 5)
    stream = DocumentStream(scorer, [48, MEMORY], [2 * T])
    scores = stream.read(document)
    assert list(scores)[0] != "" and set(scores) == set(stream.systems) and len(stream.systems) == 9
    for size in (48, MEMORY):
        state = scorer.new_state(size)
        for begin in range(0, len(document), T):
            (expected,) = scorer.window(state, None, room=T).score([document[begin : begin + T]])
            names = {
                BACKBONE: BACKBONE,
                OFF: OFF,
                ON: f"memory {size}",
                "backbone + cache": f"backbone + cache {size}",
                "memory on + cache": f"memory {size} + cache {size}",
            }
            for window_name, name in names.items():
                close(scores[name][begin : begin + T], expected[window_name])
            scorer.memorize(state, document[begin : begin + T])
    wide = Scorer.load(str(files.backbone), str(files.directory), "cpu", tokens_per_sample=2 * T)
    close(scores[f"backbone, window {2 * T}"], DocumentStream(wide, []).read(document)[BACKBONE])
    again = DocumentStream(scorer, [48, MEMORY], [2 * T])
    again.replay(document[: 4 * T])
    for name, log_probs in again.read(document[4 * T :]).items():
        close(log_probs, scores[name][4 * T :])


def test_a_backbone_alone(files):
    scorer = Scorer.load(str(files.backbone), str(files.directory), "cpu", tokens_per_sample=T, memory_size=64)
    assert scorer.systems == [BACKBONE] and scorer.size == T and not scorer.has_memory
    scorer.cache = CACHE
    assert scorer.systems == [BACKBONE, "backbone + cache"]
    state = scorer.new_state()
    scorer.memorize(state, tokens_of(100))
    (scores,) = scorer.window(state, tokens_of(5, 1), room=4).score([tokens_of(4, 2)])
    assert list(scores) == scorer.systems and len(state.cache) == 64
    assert scorer.describe()["backbone"] == "transformer_lm" and "k" not in scorer.describe()


def test_a_model_directory(text):
    """The shipped model, against the Python API."""
    scorer = Scorer.load(str(SHIPPED), device="cpu", memory_size=512)
    model = LongMem.from_pretrained(str(SHIPPED), device="cpu", memory_size=512)
    scores = DocumentStream(scorer, [512]).read(model.encode(text))
    for system, loaded in (("memory 512", model), (OFF, model.without_memory())):
        close(scores[system], loaded.score(text).log_probabilities)
    assert (scores["memory 512"] - scores[OFF]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="holds its own backbone: leave out --backbone"):
        Scorer.load(str(SHIPPED), device="cpu", backbone="x")


def test_a_released_model(tmp_path):
    """Its side network takes the last hidden state normalized; its backbone alone must not be normalized twice."""
    path = ROOT / "tests" / "models" / "released" / "sidenet.pt"
    make_dictionary(196).save(str(tmp_path / "dict.txt"))
    settings = dict(memory_size=32, tokens_per_sample=16)
    scorer = Scorer.load(str(path), str(tmp_path), "cpu", **settings)
    model = LongMem.from_pretrained(str(path), data=str(tmp_path), device="cpu", **settings)
    tokens = tokens_of(70) % 196 + 4
    scores = DocumentStream(scorer, [32]).read(tokens)
    for system, loaded in (("memory 32", model), (OFF, model.without_memory())):
        loaded.encode = lambda text: tokens
        close(scores[system], loaded.score("").log_probabilities)
    inputs = torch.cat([torch.tensor([2]), tokens[:-1]])
    with torch.no_grad():
        alone = torch.cat([model.model.decoder.backbone.decoder(x[None])[0][0] for x in inputs.split(16)])
    close(scores[BACKBONE], alone.log_softmax(-1).gather(1, tokens[:, None])[:, 0])
    assert (scores["memory 32"] - scores[OFF]).abs().max() > 1e-3


def test_settings_and_errors(files, scorer):
    path, data = str(files.longmem), str(files.directory)
    changed = Scorer.load(path, data, "cpu", memory_size=64, k=9, tokens_per_sample=16, backbone=str(files.backbone))
    assert (changed.size, changed.memory_size, changed.decoder.cfg.k) == (16, 64, 9)
    assert Scorer.load(path, data, "cpu", memory_size=0).systems == [BACKBONE, OFF]
    for sentence, call in (
        (
            "not have the setting memory_dtype",
            lambda: Scorer.load(str(files.backbone), data, "cpu", memory_dtype="float16"),
        ),
        ("leave out --backbone", lambda: Scorer.load(str(files.backbone), data, "cpu", backbone=path)),
        ("longer than the backbone's 64 positions", lambda: Scorer.load(path, data, "cpu", tokens_per_sample=65)),
        ("carries a window .--carry-window 8.*fairseq-eval-lm", lambda: Scorer.load(path, data, "cpu", carry_window=8)),
        ("40 tokens does not fit into a window of 32", lambda: scorer.window(scorer.new_state(), None, 40)),
        ("longer than the room of 3", lambda: scorer.window(scorer.new_state(), None, 3).score([tokens_of(4)])),
        ("without tokens", lambda: scorer.window(scorer.new_state(), None, 3).score([tokens_of(0)])),
        ("--windows 48 is not a multiple of at most 64", lambda: DocumentStream(scorer, [64], [48])),
    ):
        with pytest.raises(ValueError, match=sentence):
            call()

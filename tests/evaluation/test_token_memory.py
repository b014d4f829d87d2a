"""The evaluations read a model's token memory as the model does."""

import pytest
import torch

from longmem_fairseq.evaluation.scoring.document_stream import DocumentStream
from longmem_fairseq.evaluation.scoring.generate import generate
from longmem_fairseq.evaluation.scoring.scorer import Scorer
from longmem_fairseq.evaluation.scoring.systems import BACKBONE, OFF, ON, with_memory
from longmem_fairseq.models.reading import DocumentReader
from tests.evaluation.conftest import T
from tests.evaluation.test_scorer import bank_bytes, close, tokens_of

SIZE, STEPS = 90, 5


@pytest.fixture(scope="module")
def scorer(files):
    settings = dict(token_memory=SIZE, token_memory_k=200, memory_dtype="float32")
    scorer = Scorer.load(str(files.longmem), str(files.directory), "cpu", **settings)
    with torch.no_grad():  # so that it matters
        scorer.decoder.predictor.token_mixture.output_bias.zero_()
    return scorer


def test_scores_are_those_of_the_model(scorer):
    """Of a document in one piece, and of its last segment behind the others."""
    document = tokens_of(5 * T)
    expected = DocumentReader(scorer.decoder, T).score(document)
    stream = DocumentStream(scorer, [128])
    scores = stream.read(document)
    close(scores[with_memory(128)], expected)
    assert (scores[with_memory(128)] - scores[OFF]).abs().max() > 0.1
    state = scorer.new_state()
    scorer.memorize(state, document[:-T])
    before = bank_bytes(state)
    window = scorer.window(state, document[-T:-8], room=8)
    (scores,) = window.score([document[-8:]])
    close(scores[ON], expected[-8:])
    symbols = window.next_symbols([document[-8:-1]])
    close(symbols[ON][0, document[-1]], expected[-1])
    (apart,) = scorer.window(state, None, room=T).score([document[-T:]])
    close(apart[ON], expected[-T:])
    assert bank_bytes(state) == before


def test_answers_are_the_likeliest_symbols(scorer):
    state = scorer.new_state()
    scorer.memorize(state, tokens_of(70, 9))
    prompts = [tokens_of(0), tokens_of(3, 1), tokens_of(20, 3)]
    silent = scorer.tokenizer.silent()
    for prompt, answer in zip(prompts, generate(scorer, ON, state, prompts, STEPS, one_line=False)):
        window, expected = scorer.window(state, None, room=T), prompt
        for step in range(STEPS):
            log_probs = window.next_symbols([expected])[ON][0]
            log_probs[silent] = float("-inf")
            if not step:  # at least one token
                log_probs[scorer.tokenizer.eos] = float("-inf")
            best = log_probs.argmax()
            if best == scorer.tokenizer.eos:
                break
            expected = torch.cat([expected, best[None]])
        assert answer.tolist() == expected[len(prompt) :].tolist()
    answers = generate(scorer, BACKBONE, state, prompts, STEPS, one_line=False)
    assert all(len(answer) for answer in answers)

"""Generated answers are the likeliest tokens, one after the other, by scores of whole windows."""

import pytest
import torch

from longmem_fairseq.evaluation.scoring.generate import generate
from longmem_fairseq.evaluation.scoring.systems import BACKBONE, ON
from longmem_fairseq.memory.cache import CacheSettings, distribution
from tests.evaluation.conftest import T
from tests.evaluation.test_scorer import bank_bytes, tokens_of

V, STEPS = 4096, 6
CACHE = {BACKBONE: CacheSettings(0.5, 0.5), ON: CacheSettings(0.6, 0.5)}


@torch.no_grad()
def greedily(scorer, system, state, prompt, one_line):
    """The same with the whole window read again for every token, and the cache as a plain distribution."""
    ends = scorer.tokenizer.line_ends().tolist() if one_line else []
    beyond = max(0, len(prompt) + STEPS + 1 - T)
    state = state.copy()
    scorer.memorize(state, prompt[:beyond])
    stream = torch.cat([torch.tensor([state.last]), prompt[beyond:]])
    base, with_cache = system.replace(" + cache", ""), system.endswith("cache")
    for step in range(STEPS):
        features, _ = scorer.features(stream[None], {ON: state})
        hidden, log_probs = features[BACKBONE][0], scorer.log_probs(features[base][0, -1:])
        if with_cache:
            parts = [(state.cache.hidden, state.cache.tokens), (hidden[:-1], stream[1:])]
            cached = distribution(hidden[-1:], parts, CACHE[base].theta, V)
            log_probs = ((1 - CACHE[base].weight) * log_probs.exp() + CACHE[base].weight * cached).log()
        scores = log_probs[0]
        ended = scores[[2, *ends]].logsumexp(0)
        scores[[0, 1, 3, *ends]] = float("-inf")
        scores[2] = ended if step else float("-inf")  # at least one token
        best = int(scores.argmax())
        if best == 2:
            break
        stream = torch.cat([stream, torch.tensor([best])])
    return stream[1 + len(prompt) - beyond :]


@pytest.fixture
def state(scorer):
    scorer.cache = CACHE
    state = scorer.new_state()
    scorer.memorize(state, tokens_of(90))
    return state


@pytest.mark.parametrize("system", ["backbone", "memory off", "memory on", "backbone + cache", "memory on + cache"])
def test_beam_1_is_greedy(scorer, state, system):
    """Prompts of several lengths in one batch: none, short, and one that moves into the memory."""
    before = bank_bytes(state)
    prompts = [tokens_of(0), tokens_of(3, 1), tokens_of(T + 9, 2), tokens_of(20, 3)]
    answers = generate(scorer, system, state, prompts, STEPS, one_line=False)
    assert bank_bytes(state) == before
    for prompt, answer in zip(prompts, answers):
        assert answer.tolist() == greedily(scorer, system, state, prompt, False).tolist()
    assert len({tuple(answer.tolist()) for answer in answers}) > 1


def test_systems_differ(scorer, state):
    prompts = [tokens_of(12, seed) for seed in range(8)]
    answers = [[x.tolist() for x in generate(scorer, system, state, prompts, STEPS)] for system in scorer.systems]
    assert all(a != b for i, a in enumerate(answers) for b in answers[:i])


def test_a_newline_ends_the_answer(scorer, state):
    """Its probability is that of all symbols that start with one, and of end-of-sentence."""
    ends = set(scorer.tokenizer.line_ends().tolist())
    for seed in range(3):
        (answer,) = generate(scorer, ON, state, [tokens_of(5, seed)], STEPS)
        assert answer.tolist() == greedily(scorer, ON, state, tokens_of(5, seed), True).tolist()
        assert len(answer) and not ends & set(answer.tolist())


@pytest.mark.parametrize("system", ["memory on + cache", "backbone + cache"])
def test_prompts_in_a_batch_are_answered_as_alone(scorer, state, system):
    """With a beam, whose hypotheses move between rows; its answer is at least as likely as the greedy answer."""
    prompts = [tokens_of(4, 1), tokens_of(9, 2), tokens_of(T + 5, 3)]
    together = generate(scorer, system, state, prompts, 4, beam=4, one_line=False)
    likelier = 0
    for prompt, answer in zip(prompts, together):
        (alone,) = generate(scorer, system, state, [prompt], 4, beam=4, one_line=False)
        assert alone.tolist() == answer.tolist()
        (greedy,) = generate(scorer, system, state, [prompt], 4, one_line=False)
        best, first = scorer.window(state, prompt, room=5).score([answer, greedy])
        assert float(best[system].mean()) >= float(first[system].mean()) - 1e-4 or len(answer) != len(greedy)
        likelier += answer.tolist() != greedy.tolist()
    assert likelier, "a beam finds something else"


def test_no_room(scorer, state):
    with pytest.raises(ValueError, match="--max-new-tokens 32 does not fit into the window of 32"):
        generate(scorer, ON, state, [tokens_of(3)], 32)

"""Incremental decoding scores every token as the full forward pass does."""

import numpy as np
import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.models.live_window import expand_state, prefill
from longmem_fairseq.modules.self_attention import SelfAttention
from tests.models.tiny import VOCABULARY, documents, longmem, read

T = 7  # tokens of a segment; the tiny memory holds 5 chunks of 3
# All that is held is read: of two entries that are equal up to rounding, either may be the last of the best.
TOKENS = dict(token_memory=11, token_memory_k=18, memory_dtype="float32")
MODELS = {
    "learned": dict(),
    "sinusoidal": dict(backbone={"decoder_learned_pos": False}),
    "alibi": dict(model="alibi_lm", retrieval_layer_index="1,3"),
    "llama": dict(model="llama_lm", retrieval_layer_index="1,3"),
    "no memory": dict(use_external_memory=False),
    "token memory": TOKENS,
}
CARRIED = {
    "learned": dict(carry_window=5, **TOKENS),
    "learned, more than a segment": dict(carry_window=16),
    "alibi": dict(model="alibi_lm", carry_window=5, **TOKENS),
    "llama": dict(model="llama_lm", carry_window=9),
    "llama, no memory": dict(model="llama_lm", carry_window=2, use_external_memory=False),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    return longmem(tmp_path_factory.mktemp("model"), **MODELS[request.param])


def decode(model, state, tokens):
    """Logits (B, steps, V) of tokens (B, steps), one at a time."""
    with torch.no_grad():
        return torch.cat(
            [model.decoder(tokens[:, : i + 1], incremental_state=state)[0] for i in range(tokens.size(1))], dim=1
        )


def teacher_forced(model, doc, starts):
    """Logits (length, V) of a document cut into segments at ``starts``; of tokens read twice those of the first time.

    A segment that starts at s is read with the memory of the s tokens before.
    """
    logits = {}
    for begin, end in zip(starts, [*starts[1:], len(doc)]):
        segments = Segments([0], [0], [begin], [end - begin], 1)
        window = doc[begin : begin + T]
        full = Segments([0], [0], [begin], [len(window)], 1)
        with torch.no_grad():
            last_rows = model(window[None], segments=full, read_only=True)[0][0]
            model(doc[begin:end][None], segments=segments)
        for i, row in enumerate(last_rows):
            logits.setdefault(begin + i, row)
    return torch.stack([logits[i] for i in range(len(doc))])


@pytest.mark.parametrize("past", [0, 1, 5, 6, 7, 8, 14, 20, 62])
def test_equals_full_forward(model, past):
    """With the memory empty (up to 7 tokens before), partly filled (14) and evicting (62)."""
    (doc,) = documents([(past // T + 1) * T])
    expected = read(model, [doc], T)[0][past:]
    actual = decode(model, prefill(model.decoder, [doc[:past]], T), doc[None, past:])[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", CARRIED)
def test_a_carried_window_equals_full_forward(tmp_path, kind):
    """Whatever was read before, for as long as generation lasts, rows of any lengths side by side."""
    model = longmem(tmp_path, **CARRIED[kind])
    pasts = [0, 1, 6, 7, 8, 20, 40]
    docs = documents([past + 4 * T + 2 for past in pasts], seed=2)
    state = prefill(model.decoder, [doc[:past] for doc, past in zip(docs, pasts)], T)
    together = decode(model, state, torch.stack([doc[past:] for doc, past in zip(docs, pasts)]))
    for doc, past, actual in zip(docs, pasts, together):
        model.decoder.reset_memory()
        torch.testing.assert_close(actual, read(model, [doc], T)[0][past:], atol=1e-4, rtol=1e-4)


def test_the_memory_matters(tmp_path):
    model = longmem(tmp_path)
    doc, other = documents([4 * T, 3 * T], seed=5)
    actual = decode(model, prefill(model.decoder, [doc[: 3 * T]], T), doc[None, 3 * T :])
    changed = decode(model, prefill(model.decoder, [other], T), doc[None, 3 * T :])
    assert (actual - changed).abs().max() > 1e-2


@pytest.mark.parametrize("past", [0, 3, 2 * T + 2])
def test_roll_over(model, past):
    """Four windows long: each time a window is full, its older half is remembered and the rest starts a segment."""
    (doc,) = documents([past + 4 * T], seed=1)
    moved = T - T // 2
    starts = list(range(0, past - past % T + 1, T))
    while starts[-1] + T < len(doc):
        starts.append(starts[-1] + moved)
    expected = teacher_forced(model, doc, starts)[past:]
    actual = decode(model, prefill(model.decoder, [doc[:past]], T), doc[None, past:])[0]
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


def test_unequal_rows(model):
    """Rows of any lengths side by side, rolling over at different steps, are as each alone."""
    pasts = [0, 1, 6, 7, 13, 40]
    docs = documents([past + 3 * T for past in pasts], seed=2)
    alone = [
        decode(model, prefill(model.decoder, [doc[:past]], T), doc[None, past:])[0] for doc, past in zip(docs, pasts)
    ]
    state = prefill(model.decoder, [doc[:past] for doc, past in zip(docs, pasts)], T)
    together = decode(model, state, torch.stack([doc[past:] for doc, past in zip(docs, pasts)]))
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-4, rtol=1e-4)


def test_reordered_rows(model):
    """Hypotheses that are chosen, repeated and dropped, across a roll-over, continue as their own history says."""
    rng = np.random.default_rng(0)
    prompts, steps = documents([2 * T + 3, 4], seed=3), 3 * T
    state = prefill(model.decoder, prompts, T)
    expand_state(model.decoder, state, 6)
    histories = [prompts[i // 3].tolist() for i in range(6)]
    for step in range(steps):
        if step:
            order = np.concatenate([rng.integers(0, 3, 3), rng.integers(3, 6, 3)])
            histories = [list(histories[i]) for i in order]
            model.decoder.reorder_incremental_state_scripting(state, torch.from_numpy(order))
        tokens = torch.from_numpy(rng.integers(4, len(VOCABULARY), (6, 1)))
        actual = decode(model, state, tokens)[:, 0]
        for history, token in zip(histories, tokens[:, 0].tolist()):
            history.append(token)
    for row, history in enumerate(histories):
        start = len(prompts[row // 3])
        alone = prefill(model.decoder, [torch.tensor(history[:start])], T)
        expected = decode(model, alone, torch.tensor(history[start:])[None])[0, -1]
        torch.testing.assert_close(actual[row], expected, atol=1e-4, rtol=1e-4)


def test_hypotheses_share_their_memory(tmp_path):
    model = longmem(tmp_path)
    state = prefill(model.decoder, documents([3 * T]), T)
    expand_state(model.decoder, state, 4)
    branches = state["longmem.window"]["window"].branches
    (prompt,) = {id(bank) for bank in branches.banks}
    same = torch.full((4, 1), 5)
    for _ in range(T):
        model.decoder(same, incremental_state=state)
    model.decoder(torch.tensor([[4], [5], [6], [7]]), incremental_state=state)  # after this, they differ
    assert {id(bank) for bank in branches.banks} == {prompt}, "all have moved the same tokens"
    for _ in range(T):
        model.decoder(same, incremental_state=state)
    assert len({id(bank) for bank in branches.banks}) == 4


def test_the_base_is_only_read(tmp_path):
    model = longmem(tmp_path)
    text, prompt = documents([5 * T, 3 * T], seed=4)
    base = prefill(model.decoder, [text], T)["longmem.window"]["window"].branches.banks[0]
    before = base.keys.clone()
    state = prefill(model.decoder, [prompt, prompt[:2]], T, base)
    logits = decode(model, state, torch.stack([prompt, prompt]))
    assert torch.equal(base.keys, before)
    without = decode(model, prefill(model.decoder, [prompt, prompt[:2]], T), torch.stack([prompt, prompt]))
    assert (logits - without).abs().max() > 1e-2


def test_half_precision_caches_keep_their_type(tmp_path):
    model = longmem(tmp_path).to(torch.bfloat16)
    (doc,) = documents([3 * T])
    state = prefill(model.decoder, [doc], T)
    decode(model, state, doc[None])
    caches = [m.cache(state)["prev_key"] for m in model.modules() if isinstance(m, SelfAttention)]
    assert {cache.dtype for cache in caches} == {torch.bfloat16}


@pytest.mark.parametrize("size, sentence", [(1, "at least 2 tokens"), (25, "backbone's 24 positions")])
def test_impossible_windows(tmp_path, size, sentence):
    with pytest.raises(ValueError, match=sentence):
        prefill(longmem(tmp_path).decoder, documents([3]), size)

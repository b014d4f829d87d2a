"""A model with a token memory: its predictions against a plain reference, and its weights in checkpoints."""

import logging
import math

import pytest
import torch

from longmem_fairseq.data.segments import Segments
from longmem_fairseq.models.live_window import expand_state, prefill
from longmem_fairseq.models.reading import DocumentReader
from tests.models.checkpoints import load, save
from tests.models.tiny import LONGMEM, batches, documents, longmem, randomize, read
from tests.modules.test_token_mixture import naive

T, SIZE, K = LONGMEM["tokens_per_sample"], 11, 5
OPTIONS = dict(token_memory=SIZE, token_memory_k=K, memory_dtype="float32")
DOCS = documents([4 * T, 2 * T + 3], seed=6)


def with_token_memory(directory, **options):
    """A model with a token memory whose mixture is random."""
    model = longmem(directory, **{**OPTIONS, **options})
    randomize(model.decoder.predictor, 4, std=0.05)
    return model


def expected_log_probs(model, plain, doc):
    """Log-probabilities (length, V) of a document by loops over its tokens, from a model without a token memory."""
    logits, unit = read(plain, [doc], T)[0], []
    for piece in doc.split(T):
        with torch.no_grad():
            hidden = model.decoder.backbone.final_hidden(model.decoder.backbone.encode(piece[None]))[0]
        unit += [h / h.norm() for h in hidden]
    rows = []
    for t in range(len(doc)):
        oldest = max(0, t // T * T - SIZE)  # what the ring holds before this segment, and the segment so far
        entries = sorted(((float(unit[t] @ unit[i]), int(doc[i + 1])) for i in range(oldest, t)), reverse=True)[:K]
        padded = [*entries, *[(-math.inf, 0)] * (K - len(entries))]
        mixture = model.decoder.predictor.token_mixture
        rows.append(naive(mixture, logits[t], *zip(*padded), float(t - oldest))[0])
    return torch.stack(rows)


@pytest.mark.parametrize("backbone", [{}, {"decoder_output_dim": 8, "share_decoder_input_output_embed": False}])
def test_equals_the_reference(tmp_path, backbone):
    """Two documents side by side, with the ring empty, filling and evicting."""
    model, plain = with_token_memory(tmp_path, backbone=backbone), longmem(tmp_path, backbone=backbone)
    for log_probs, doc in zip(read(model, DOCS, T), DOCS):
        expected = expected_log_probs(model, plain, doc).detach()
        torch.testing.assert_close(log_probs.double(), expected, atol=2e-3, rtol=1e-3)
    scores = DocumentReader(model.decoder, T).score(DOCS[0][1:])  # the same behind an end-of-sentence
    inputs = torch.cat([torch.tensor([2]), DOCS[0][1:-1]])
    (log_probs,) = read(model, [inputs], T)
    torch.testing.assert_close(scores, log_probs.gather(1, DOCS[0][1:, None])[:, 0], atol=1e-4, rtol=1e-4)


def test_documents_behind_a_given_memory(tmp_path):
    """Evaluation, scoring and decoding behind what was memorized, which may be forgotten again."""
    model = with_token_memory(tmp_path, token_memory_k=99)
    reader, (first, second) = DocumentReader(model.decoder, T), DOCS
    memory = reader.new_memory()
    reader.memorize(memory, "first", first)
    expected = reader.score(second, memory)
    model.decoder.lane_state.memories.base = memory.bank
    inputs = reader.inputs_of(second)
    (log_probs,) = read(model, [inputs], T)
    torch.testing.assert_close(log_probs.gather(1, second[:, None])[:, 0], expected, atol=1e-4, rtol=1e-4)
    state = prefill(model.decoder, [inputs[:T], inputs[:T]], T, memory.bank)
    expand_state(model.decoder, state, 4)
    with torch.no_grad():
        steps = [model.decoder(x.view(1, 1).repeat(4, 1), incremental_state=state)[0] for x in inputs[T : 2 * T]]
    for row in torch.cat(steps, dim=1):
        torch.testing.assert_close(row, log_probs[T : 2 * T], atol=1e-4, rtol=1e-4)
    (alone,) = read(longmem(tmp_path), [inputs], T)
    without = reader.score(second, memory, use_memory=False)
    plain = alone[:T].log_softmax(-1).gather(1, second[:T, None])[:, 0]  # the first segment, with nothing memorized
    torch.testing.assert_close(without[:T], plain, atol=1e-5, rtol=1e-5)
    reader.memorize(memory, "second", second[:5])
    memory.forget("first")
    other = reader.new_memory()
    reader.memorize(other, "second", second[:5])
    for memories in zip(memory.bank.token_bank.contents(0), other.bank.token_bank.contents(0)):
        assert torch.equal(*memories)


def test_a_token_memory_follows_its_stream(tmp_path):
    """A batch that comes again, replay from the middle, and a state that is restored give the same bits."""
    model, replayed, restored = (with_token_memory(tmp_path, token_memory=T + 2) for _ in range(3))
    parts = list(batches([documents([5 * T])[0]], T))
    for i, (tokens, segments) in enumerate(parts):
        with torch.no_grad():
            once = model(tokens, segments=segments)[0]
            assert torch.equal(model(tokens, segments=segments)[0], once)
        if i == 1:
            restored.memorize(tokens, segments, restart=True)  # a place that the state replaces
        if 1 <= i < 4:
            replayed.memorize(tokens, segments, restart=i == 1)
    (memory,), (other,) = ([*x.decoder.lane_state.memories] for x in (model, restored))
    tensors, places = memory.state()
    other.restore({name: x.clone() for name, x in tensors.items()}, places)
    later = Segments([0], [0], [5 * T], [T], 1)
    with torch.no_grad():
        tokens, segments = parts[-1]
        assert torch.equal(replayed(tokens, segments=segments)[0], once)
        expected = model(tokens, segments=later)[0]
        assert torch.equal(restored(tokens, segments=later)[0], expected)
        assert torch.equal(replayed(tokens, segments=later)[0], expected)
    assert not torch.equal(model(tokens, segments=Segments([0], [1], [0], [T], 1))[0], expected)


def test_checkpoints_have_its_weights_where_the_model_has_it(train, write_backbone, tmp_path, caplog):
    path = write_backbone()
    made = train(path, "--token-memory", 9, "--token-memory-k", 3)
    randomize(made.model.decoder.predictor, 3)
    made.model.eval()
    loaded = load(save(made, tmp_path / "with.pt"))
    assert all(torch.equal(a, b) for a, b in zip(read(loaded, DOCS, T), read(made.model, DOCS, T)))
    without = load(save(made, tmp_path / "with.pt"), token_memory=0)
    assert not [name for name in without.state_dict() if "predictor" in name]
    plain = train(path)
    plain.model.eval()
    assert not caplog.records or "without a token memory" not in caplog.text
    with caplog.at_level(logging.WARNING):
        added = load(save(plain, tmp_path / "without.pt"), token_memory=9)
    assert "was trained without a token memory: --token-memory 9 starts with a small constant weight" in caplog.text
    weights = added(DOCS[0][None, :T], segments=Segments([0], [0], [0], [T], 1))[1]["token_memory_weight"]
    torch.testing.assert_close(weights[0, 1:], torch.full((T - 1,), 0.05))

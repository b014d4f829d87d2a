"""Scores of documents: each gets its own tokens, and its results are written whole or not at all."""

import csv
import json
import math

import numpy as np
import pytest
import torch

from longmem_fairseq.data.lanes import Piece
from longmem_fairseq.data.text_meter import TextSize
from longmem_fairseq.tasks.document_scores import DocumentScores

V = 7


def batch(rows):
    """A batch of random logits; rows are lists of pieces. Returns the sample and logits with and without memory."""
    lengths = [sum(piece.stop - piece.start for piece in pieces) for pieces in rows]
    target = torch.full((len(rows), max(lengths)), 1)
    for row, length in enumerate(lengths):
        target[row, :length] = torch.randint(2, V, (length,))
    logits, without = torch.randn(2, len(rows), max(lengths), V)
    return {"target": target, "pieces": rows}, logits, without


def test_each_document_gets_its_own_tokens():
    torch.manual_seed(0)
    rows = [[Piece(0, 0, 3), Piece(2, 0, 2)], [Piece(1, 4, 8)]]
    sample, logits, without = batch(rows)
    scores = DocumentScores(4)
    scores.add(sample, logits, without)
    nll = -torch.log_softmax(logits.double(), -1).gather(-1, sample["target"].unsqueeze(-1)).squeeze(-1)
    np.testing.assert_array_equal(scores.sums[0], [3, 4, 2, 0])
    expected = [nll[0, :3].sum(), nll[1, :4].sum(), nll[0, 3:5].sum(), 0.0]
    np.testing.assert_allclose(scores.sums[1], [float(x) for x in expected], rtol=1e-6)
    assert scores.tokens == 9
    log_probabilities, normalized = torch.log_softmax(logits, -1), DocumentScores(4)
    others = torch.ones_like(log_probabilities, dtype=torch.bool).scatter(-1, sample["target"].unsqueeze(-1), False)
    log_probabilities[others] = 5.0  # as an adaptive softmax leaves them
    normalized.add(sample, log_probabilities, log_probabilities, normalized=True)
    np.testing.assert_allclose(normalized.sums[1], scores.sums[1], rtol=1e-6)
    assert scores.loss() == pytest.approx(float(sum(expected)) / 9 / math.log(2))
    assert scores.loss(without_memory=True) != pytest.approx(scores.loss())
    assert [row["name"] for row in scores.rows(list("abcd"), [None] * 4)] == ["a", "b", "c"]


def test_incomplete_scores_are_refused():
    scores = DocumentScores(3)
    scores.sums[0] = [5, 6, 7]
    scores.check(np.array([5, 6, 7]))
    with pytest.raises(RuntimeError, match="6 of the 8 tokens of document 1 were scored"):
        scores.check(np.array([5, 8, 7]))


def test_files(tmp_path):
    scores = DocumentScores(2)
    scores.sums[:] = [[4, 5], [4.0, 10.0], [8.0, 15.0]]
    scores.write(str(tmp_path), ["a,b", 'c "ü"\n\ud800'], [TextSize(words=2, bytes=10), None])
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text("utf-8").splitlines()]
    assert rows[0] == {
        "name": "a,b",
        "tokens": 4,
        "words": 2,
        "bytes": 10,
        "perplexity": pytest.approx(math.e),
        "perplexity_per_word": pytest.approx(math.e**2),
        "bits_per_byte": pytest.approx(0.5770780),  # 4 nats are 5.770780 bits
        "perplexity_without_memory": pytest.approx(math.e**2),
        "perplexity_per_word_without_memory": pytest.approx(math.e**4),
        "bits_per_byte_without_memory": pytest.approx(1.1541560),
    }
    unknown = ("words", "bytes", "perplexity_per_word", "bits_per_byte")
    assert [rows[1][name] for name in unknown] == [None] * 4 and rows[1]["perplexity"] == pytest.approx(math.e**2)
    assert scores.by_text([TextSize(2, 10), None]) == {"perplexity_per_word": None, "bits_per_byte": None}
    assert scores.by_text([TextSize(2, 10), TextSize(5, 0)]) == {
        "perplexity_per_word": pytest.approx(math.e**2),  # 14 nats, 7 words
        "bits_per_byte": pytest.approx(14 / math.log(2) / 10),
    }
    with open(tmp_path / "documents.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert [row["name"] for row in rows] == ["a,b", 'c "ü"\n\ud800']
    assert [row["name"] for row in table] == ["a,b", 'c "ü"\n\\ud800'] and table[1]["bytes"] == ""
    assert [float(row["perplexity"]) for row in table] == [row["perplexity"] for row in rows]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "documents.jsonl"
    path.write_text("old")
    scores = DocumentScores(1)
    scores.sums[:] = 1
    with pytest.raises(TypeError):
        scores.write(str(tmp_path), [object()], [None])
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["documents.jsonl"]


def test_a_failed_write_names_the_option_to_change(tmp_path):
    scores = DocumentScores(1)
    scores.sums[:] = 1
    with pytest.raises(OSError, match="cannot be written: .*: free the disk or change --results-path"):
        scores.write(str(tmp_path / "gone"), ["a"], [None])

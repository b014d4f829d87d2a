import csv
import json
import math

import numpy as np
import pytest
import torch

from longmem_fairseq.data.lanes import Piece
from longmem_fairseq.tasks.document_scores import DocumentScores, ShardScores, write_atomically

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
    assert scores.loss() == pytest.approx(float(sum(expected)) / 9 / math.log(2))
    assert scores.loss(without_memory=True) != pytest.approx(scores.loss())
    assert [row["name"] for row in scores.rows(list("abcd"))] == ["a", "b", "c"]


def test_incomplete_scores_are_refused():
    scores = DocumentScores(3)
    scores.sums[0] = [5, 6, 7]
    scores.check(np.array([5, 6, 7]))
    with pytest.raises(RuntimeError, match="6 of the 8 tokens of document 1 were scored"):
        scores.check(np.array([5, 8, 7]))


def test_files(tmp_path):
    scores = DocumentScores(2)
    scores.sums[:] = [[4, 5], [4.0, 10.0], [8.0, 15.0]]
    scores.write(str(tmp_path), ["a,b", 'c "ü"\n'])
    rows = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text("utf-8").splitlines()]
    assert rows[0] == {
        "name": "a,b",
        "tokens": 4,
        "perplexity": pytest.approx(math.e),
        "perplexity_without_memory": pytest.approx(math.e**2),
    }
    with open(tmp_path / "documents.csv", newline="", encoding="utf-8") as f:
        table = list(csv.DictReader(f))
    assert [row["name"] for row in table] == [row["name"] for row in rows] == ["a,b", 'c "ü"\n']
    assert [float(row["perplexity"]) for row in table] == [row["perplexity"] for row in rows]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "documents.jsonl"
    write_atomically(str(path), "old")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(str(path), "new \ud800")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["documents.jsonl"]


def shard(directory, which, sums, run=None):
    found = DocumentScores(3)
    found.sums[:] = sums
    return ShardScores(str(directory), run or {"checkpoint": [1, 2.5]}, 2, which), found


def test_the_last_shard_puts_all_together(tmp_path):
    first, first_scores = shard(tmp_path, 0, [[4, 0, 0], [0.1, 0, 0], [8.0, 0, 0]])
    second, second_scores = shard(tmp_path, 1, [[0, 5, 6], [0, 10.0, 1 / 3], [0, 15.0, 9.0]])
    assert first.merge(first_scores) == [1]
    assert second.merge(second_scores) == []
    np.testing.assert_array_equal(second_scores.sums, [[4, 5, 6], [0.1, 10.0, 1 / 3], [8.0, 15.0, 9.0]])
    assert first.merge(first_scores) == []  # whoever comes last


def test_shards_of_another_run_do_not_count(tmp_path):
    old, old_scores = shard(tmp_path, 0, [[4, 0, 0]] * 3, run={"checkpoint": [0, 0]})
    old.merge(old_scores)
    new, new_scores = shard(tmp_path, 1, [[0, 5, 6]] * 3)
    assert new.merge(new_scores) == [0]
    np.testing.assert_array_equal(new_scores.sums[0], [0, 5, 6])


def test_a_repeated_shard_withdraws_its_old_sums(tmp_path):
    first, scores = shard(tmp_path, 0, [[4, 0, 0]] * 3)
    first.merge(scores)
    shard(tmp_path, 0, [[4, 0, 0]] * 3)  # begins again
    second, scores = shard(tmp_path, 1, [[0, 5, 6]] * 3)
    assert second.merge(scores) == [0]

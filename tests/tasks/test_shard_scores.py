"""Scores of shards that run as independent processes."""

import numpy as np

from longmem_fairseq.tasks.document_scores import DocumentScores
from longmem_fairseq.tasks.shard_scores import ShardScores


def shard(directory, which, sums, run=None):
    scores = DocumentScores(3)
    scores.sums[:] = sums
    return ShardScores(str(directory), run or {"checkpoint": [1, 2.5]}, 2, which), scores


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
    shard(tmp_path, 0, [[4, 0, 0]] * 3)  # starts again
    second, scores = shard(tmp_path, 1, [[0, 5, 6]] * 3)
    assert second.merge(scores) == [0]

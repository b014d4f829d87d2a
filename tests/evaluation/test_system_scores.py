"""Bootstrap intervals: against figures worked out by hand and against their theory."""

import math

import numpy as np
import pytest

from longmem_fairseq.evaluation.reporting.statistic import ACCURACY, PERPLEXITY
from longmem_fairseq.evaluation.reporting.system_scores import SystemScores


def right(*flags):
    return SystemScores({str(i): (float(flag), 1.0) for i, flag in enumerate(flags)}, ACCURACY)


def test_figures():
    assert right(1, 0, 1, 1).interval().value == 75.0
    losses = SystemScores({"a": (2.0, 1), "b": (4.0, 3)}, PERPLEXITY)
    assert losses.interval().value == pytest.approx(math.exp(6 / 4))


def test_interval_of_a_share_is_near_its_normal_approximation():
    sample = right(*([1] * 120 + [0] * 280))
    interval = sample.interval()
    error = 100 * 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert interval.low == pytest.approx(30 - error, abs=0.6) and interval.high == pytest.approx(30 + error, abs=0.6)


def test_all_alike_have_no_width():
    assert right(1, 1, 1).interval() == (100.0, 100.0, 100.0)


def test_pairs_share_their_draws():
    """b is right wherever a is and once more: never below a, whatever is drawn; unpaired intervals would overlap."""
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 60)
    b = a.copy()
    b[np.flatnonzero(a == 0)[:6]] = 1
    difference = right(*b).difference(right(*a))
    assert difference.value == pytest.approx(10.0) and 0 < difference.low < 10 < difference.high
    assert right(*a).interval().high > right(*b).interval().low


def test_only_common_items_count():
    a = SystemScores({"x": (1, 1), "y": (0, 1), "z": (1, 1)}, ACCURACY)
    b = SystemScores({"y": (1, 1), "x": (1, 1)}, ACCURACY)
    assert a.difference(b).value == -50.0
    with pytest.raises(ValueError, match="no item in common"):
        a.difference(SystemScores({"q": (1, 1)}, ACCURACY))


def test_perplexities_differ_in_per_cent():
    a = SystemScores({"x": (math.log(9), 1)}, PERPLEXITY)
    b = SystemScores({"x": (math.log(10), 1)}, PERPLEXITY)
    assert a.difference(b) == pytest.approx((-10.0, -10.0, -10.0))


def test_the_same_data_give_the_same_interval():
    flags = np.random.default_rng(1).integers(0, 2, 50)
    assert right(*flags).interval() == right(*flags).interval()


def test_runs_are_drawn_too():
    """Two seeds that are all right and all wrong: every sentence scores one half, but little is known."""
    sample = SystemScores({str(i): ((1, 1), (0, 1)) for i in range(30)}, ACCURACY)
    assert sample.interval() == (50.0, 0.0, 100.0) and sample.deviation() == pytest.approx(100 / math.sqrt(2))
    better = SystemScores({str(i): ((1, 1), (i % 2, 1)) for i in range(30)}, ACCURACY)
    assert better.difference(sample).value == pytest.approx(25.0) and better.difference(sample).low == 0.0
    assert right(1, 0).deviation() is None
    with pytest.raises(ValueError, match="1 runs cannot be paired with 2"):
        right(1, 0).difference(sample)

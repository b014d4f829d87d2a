"""Confidence intervals by the bootstrap.

A figure is a function of sums over items, so a bootstrap sample is a matrix product: how often each item was drawn,
times the items' contributions.

Legend: n items, k sums, S bootstrap samples; runs: repetitions with other random choices.
"""

from typing import Callable, NamedTuple

import numpy as np

SAMPLES = 2000
_DRAWS_AT_ONCE = 1 << 24  # counts


class Interval(NamedTuple):
    """A figure with its 95 % confidence interval.

    Attributes:
        value: The figure.
        low: 2.5 % quantile of its bootstrap samples.
        high: 97.5 % quantile of its bootstrap samples.
    """

    value: float
    low: float
    high: float


def bootstrap(compute: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> Interval:
    """Return the interval of the mean over runs of a figure, by drawing items and runs with replacement.

    Values of the same shape get the same draws.

    Args:
        compute: Function from sums, shape (..., k), to figures, shape (...).
        values: Contributions of the items to the sums, shape (n, runs, k), float64.
    """
    n, runs, k = values.shape
    generator = np.random.default_rng(0)
    flat, at_once, parts = values.reshape(n, runs * k), max(1, _DRAWS_AT_ONCE // n), []
    for begin in range(0, SAMPLES, at_once):
        counts = generator.multinomial(n, np.full(n, 1 / n), size=min(at_once, SAMPLES - begin))  # (S, n)
        parts.append((counts @ flat).reshape(-1, runs, k))
    figures = compute(np.concatenate(parts))  # (S, runs)
    weights = generator.multinomial(runs, np.full(runs, 1 / runs), size=SAMPLES) / runs  # (S, runs)
    samples = np.where(weights > 0, figures * weights, 0.0).sum(1)
    samples = samples[np.isfinite(samples)]  # a sample may have drawn only items that contribute nothing
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) else (float("nan"),) * 2
    return Interval(float(compute(values.sum(0)).mean()), float(low), float(high))

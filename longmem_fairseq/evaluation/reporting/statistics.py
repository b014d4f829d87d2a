"""Figures with their uncertainty: the bootstrap over what was tested, and the paired bootstrap between two systems.

A figure is a function of sums over items, such as right answers and questions, or losses and tokens. So a bootstrap
sample is a matrix product: how often each item was drawn, times the items' contributions.

Legend: n items, k sums, S bootstrap samples; runs: repetitions with other random choices.
"""

from dataclasses import dataclass
from typing import Callable, Dict, NamedTuple, Optional, Sequence

import numpy as np

SAMPLES = 2000
_DRAWS = 1 << 24  # counts held at a time


class Statistic(NamedTuple):
    """How sums become a figure.

    Attributes:
        name: of the figure.
        unit: behind it in tables.
        compute: sums (..., k) to figures (...).
        relative: differences are in per cent of the other system's figure.
        digits: shown.
    """

    name: str
    unit: str
    compute: Callable[[np.ndarray], np.ndarray]
    relative: bool = False
    digits: int = 1


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


ACCURACY = Statistic("accuracy", " %", lambda sums: 100 * _ratio(sums))
PERPLEXITY = Statistic("perplexity", "", lambda sums: np.exp(np.minimum(_ratio(sums), 700.0)), relative=True, digits=2)


class Interval(NamedTuple):
    """A figure, and where the bootstrap puts 95 % of its samples."""

    value: float
    low: float
    high: float


@dataclass
class Sample:
    """What a system achieved, item by item.

    Where everything was done several times with other random choices (demonstrations, say), the figure is the mean of
    the runs' figures, and the bootstrap draws runs as well as items.

    Attributes:
        items: item -> its contributions to the sums, shape (k,), or (runs, k).
        statistic: what they are sums of.
    """

    items: Dict[str, Sequence]
    statistic: Statistic

    def __len__(self) -> int:
        return len(self.items)

    def interval(self) -> Interval:
        """The figure with its 95 % interval, by drawing items with replacement.

        Raises:
            ValueError: there are no items.
        """
        if not self.items:
            raise ValueError("nothing was scored, so there is no figure")
        return _bootstrap(self.statistic.compute, self._array(sorted(self.items)))

    def deviation(self) -> Optional[float]:
        """Standard deviation of the runs' figures; None where there is one run only."""
        figures = self.statistic.compute(self._array(sorted(self.items)).sum(0))  # (runs,)
        return float(figures.std(ddof=1)) if len(figures) > 1 else None

    def difference(self, other: "Sample") -> Interval:
        """How much this system's figure is above the other's on the items that both were given, paired.

        The same items and runs are drawn for both. For a relative statistic, in per cent of the other's figure.

        Raises:
            ValueError: they have no item in common, or another number of runs.
        """
        common = sorted(set(self.items) & set(other.items))
        if not common:
            raise ValueError("the two systems have no item in common")
        ours, theirs = self._array(common), other._array(common)
        if ours.shape != theirs.shape:
            raise ValueError(f"{ours.shape[1]} runs cannot be paired with {theirs.shape[1]}: give both the same seeds")
        k = ours.shape[2]

        def compute(sums: np.ndarray) -> np.ndarray:
            a, b = self.statistic.compute(sums[..., :k]), self.statistic.compute(sums[..., k:])
            return 100 * (a / b - 1) if self.statistic.relative else a - b

        return _bootstrap(compute, np.concatenate([ours, theirs], axis=2))

    def _array(self, names: Sequence[str]) -> np.ndarray:
        """Contributions of these items, shape (n, runs, k), float64."""
        values = np.array([self.items[name] for name in names], dtype=np.float64)
        return values if values.ndim == 3 else values[:, None]


def _bootstrap(compute: Callable[[np.ndarray], np.ndarray], values: np.ndarray) -> Interval:
    """Interval of the mean over runs of a function of sums; values (n, runs, k). The same draws for the same sizes."""
    n, runs, k = values.shape
    generator = np.random.default_rng(0)
    flat, at_once, parts = values.reshape(n, runs * k), max(1, _DRAWS // n), []
    for begin in range(0, SAMPLES, at_once):
        drawn = generator.multinomial(n, np.full(n, 1 / n), size=min(at_once, SAMPLES - begin))  # (S, n)
        parts.append((drawn @ flat).reshape(-1, runs, k))
    figures = compute(np.concatenate(parts))  # (S, runs)
    weights = generator.multinomial(runs, np.full(runs, 1 / runs), size=SAMPLES) / runs  # (S, runs)
    samples = np.where(weights > 0, figures * weights, 0.0).sum(1)
    samples = samples[np.isfinite(samples)]  # a sample may have drawn nothing that counts
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) else (float("nan"),) * 2
    return Interval(float(compute(values.sum(0)).mean()), float(low), float(high))

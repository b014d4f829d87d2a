"""Figures with their uncertainty: the bootstrap over what was tested, and the paired bootstrap between two systems.

A figure is a function of sums over items, such as right answers and questions, or losses and tokens. So a bootstrap
sample is a matrix product: how often each item was drawn, times the items' contributions.

Legend: n items, k sums, S bootstrap samples.
"""

from dataclasses import dataclass
from typing import Callable, Dict, NamedTuple, Sequence

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


PERCENT = Statistic("per cent", " %", lambda sums: 100 * _ratio(sums))
PERPLEXITY = Statistic("perplexity", "", lambda sums: np.exp(np.minimum(_ratio(sums), 700.0)), relative=True, digits=2)


class Interval(NamedTuple):
    """A figure, and where the bootstrap puts 95 % of its samples."""

    value: float
    low: float
    high: float


@dataclass
class Sample:
    """What a system achieved, item by item.

    Attributes:
        items: item -> its contributions to the sums, shape (k,).
        statistic: what they are sums of.
    """

    items: Dict[str, Sequence[float]]
    statistic: Statistic

    def __len__(self) -> int:
        return len(self.items)

    def array(self, names: Sequence[str]) -> np.ndarray:
        """Contributions of these items, shape (n, k), float64."""
        return np.array([self.items[name] for name in names], dtype=np.float64)

    def interval(self) -> Interval:
        """The figure with its 95 % interval, by drawing items with replacement.

        Raises:
            ValueError: there are no items.
        """
        if not self.items:
            raise ValueError("nothing was scored, so there is no figure")
        values = self.array(sorted(self.items))
        return _interval(self.statistic.compute(values.sum(0)), self.statistic.compute(_resampled(values)))

    def difference(self, other: "Sample") -> Interval:
        """How much this system's figure is above the other's on the items that both were given, paired.

        The same items are drawn for both. For a relative statistic, in per cent of the other's figure.

        Raises:
            ValueError: they have no item in common.
        """
        common = sorted(set(self.items) & set(other.items))
        if not common:
            raise ValueError("the two systems have no item in common")
        values = np.concatenate([self.array(common), other.array(common)], axis=1)  # (n, 2k)
        k = values.shape[1] // 2

        def compute(sums: np.ndarray) -> np.ndarray:
            ours, theirs = self.statistic.compute(sums[..., :k]), self.statistic.compute(sums[..., k:])
            return 100 * (ours / theirs - 1) if self.statistic.relative else ours - theirs

        return _interval(compute(values.sum(0)), compute(_resampled(values)))


def _resampled(values: np.ndarray) -> np.ndarray:
    """Sums of S bootstrap samples of items (n, k), shape (S, k); the same draws for the same n."""
    n = len(values)
    generator = np.random.default_rng(0)
    at_once = max(1, _DRAWS // n)
    probabilities = np.full(n, 1 / n)
    parts = [
        generator.multinomial(n, probabilities, size=min(at_once, SAMPLES - begin)) @ values
        for begin in range(0, SAMPLES, at_once)
    ]
    return np.concatenate(parts)


def _interval(value, samples: np.ndarray) -> Interval:
    samples = samples[np.isfinite(samples)]  # a sample may have drawn nothing that counts
    low, high = np.quantile(samples, [0.025, 0.975]) if len(samples) else (float("nan"),) * 2
    return Interval(float(value), float(low), float(high))

"""Scores of one system, item by item, and the figures they give: alone, and paired with those of another system.

Legend: n items, k sums; runs: repetitions with other random choices.
"""

from dataclasses import dataclass
from typing import Dict, Optional, Sequence

import numpy as np

from .bootstrap import Interval, bootstrap
from .statistic import Statistic


@dataclass
class SystemScores:
    """What each item contributes to the figure of one system.

    Where an evaluation is repeated with other random choices (of demonstrations, say), the figure is the mean of the
    runs' figures, and the bootstrap draws runs as well as items.

    Attributes:
        items: Contributions to the sums by item, shape (k,) or (runs, k).
        statistic: Statistic of these sums.
    """

    items: Dict[str, Sequence]
    statistic: Statistic

    def __len__(self) -> int:
        return len(self.items)

    def interval(self) -> Interval:
        """Return the figure with its 95 % interval, by drawing items with replacement.

        Raises:
            ValueError: There are no items.
        """
        if not self.items:
            raise ValueError("no item was scored: there is no figure")
        return bootstrap(self.statistic.compute, _contributions(self.items, sorted(self.items)))

    def deviation(self) -> Optional[float]:
        """Return the standard deviation of the runs' figures; None for a single run."""
        figures = self.statistic.compute(_contributions(self.items, sorted(self.items)).sum(0))  # (runs,)
        return float(figures.std(ddof=1)) if len(figures) > 1 else None

    def difference(self, other: "SystemScores") -> Interval:
        """Return by how much this system's figure is above another's, on the items that both have, paired.

        The same items and runs are drawn for both. The difference of a relative statistic is in per cent of the other
        system's figure.

        Args:
            other: Scores of the other system.

        Raises:
            ValueError: The two have no item in common, or different numbers of runs.
        """
        common = sorted(set(self.items) & set(other.items))
        if not common:
            raise ValueError("the two systems have no item in common")
        first, second = _contributions(self.items, common), _contributions(other.items, common)
        if first.shape != second.shape:
            raise ValueError(f"{first.shape[1]} runs cannot be paired with {second.shape[1]}: give both the same seeds")
        k = first.shape[2]

        def compute(sums: np.ndarray) -> np.ndarray:
            a, b = self.statistic.compute(sums[..., :k]), self.statistic.compute(sums[..., k:])
            return 100 * (a / b - 1) if self.statistic.relative else a - b

        return bootstrap(compute, np.concatenate([first, second], axis=2))


def _contributions(items: Dict[str, Sequence], names: Sequence[str]) -> np.ndarray:
    """Return the contributions of some items, shape (n, runs, k), float64."""
    values = np.array([items[name] for name in names], dtype=np.float64)
    return values if values.ndim == 3 else values[:, None]

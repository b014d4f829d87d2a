"""Statistics: figures that are functions of sums over items, such as an accuracy or a perplexity.

Legend: k sums.
"""

import math
from typing import Callable, NamedTuple

import numpy as np


class Statistic(NamedTuple):
    """A figure that is computed from sums over items.

    Attributes:
        name: Name of the figure.
        unit: Unit that follows the figure in tables.
        compute: Function from sums, shape (..., k), to figures, shape (...).
        relative: If true, differences are in per cent of the other system's figure.
        digits: Number of decimal digits in tables.
    """

    name: str
    unit: str
    compute: Callable[[np.ndarray], np.ndarray]
    relative: bool = False
    digits: int = 1


def _ratio(sums: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore", divide="ignore"):
        return sums[..., 0] / sums[..., 1]


ACCURACY = Statistic("accuracy", " %", lambda sums: 100 * _ratio(sums))  # sums: right answers, questions
MEAN = Statistic("mean", "", _ratio, digits=2)  # sums: values, items
PERPLEXITY = Statistic(  # sums: losses in nats, tokens
    "perplexity", "", lambda sums: np.exp(np.minimum(_ratio(sums), 700.0)), relative=True, digits=2
)
WORD_PERPLEXITY = PERPLEXITY._replace(name="perplexity per word")  # sums: losses in nats, words
BITS_PER_BYTE = Statistic(  # sums: losses in nats, bytes
    "bits per byte", "", lambda sums: _ratio(sums) / math.log(2), relative=True, digits=3
)

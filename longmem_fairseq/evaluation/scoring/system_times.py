"""The wall time of each system of a run, although the systems share one encoding of every text."""

import time
from contextlib import contextmanager
from typing import Dict, Iterator, Tuple

import torch

from .systems import WITH_CACHE


class SystemTimes:
    """Seconds and tokens of each system.

    Work that several systems share counts for each of them in full: the figures are those that the system would have
    by itself.

    Args:
        device: Device that computes; on a GPU its work is waited for before a clock is read.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        """Start from 0."""
        self._seconds: Dict[str, float] = {}
        self._tokens: Dict[str, int] = {}

    @contextmanager
    def measure(self, *systems: str) -> Iterator[None]:
        """Measure the time of a block that works for some systems."""
        begin = self._now()
        yield
        seconds = self._now() - begin
        for system in systems:
            self._seconds[system] = self._seconds.get(system, 0.0) + seconds

    def count(self, system: str, tokens: int) -> None:
        """Count tokens that a system has scored or generated."""
        self._tokens[system] = self._tokens.get(system, 0) + tokens

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def by_system(self) -> Dict[str, Tuple[float, int]]:
        """Return seconds and tokens of each system that scored or generated; with a cache, those without it included.

        A cache's own time is measured alone, and its tokens are those of the system that it is mixed with.
        """
        totals: Dict[str, Tuple[float, int]] = {}
        for system, seconds in self._seconds.items():
            base = system.partition(WITH_CACHE)[0]
            shared = self._seconds.get(base, 0.0) if base != system else 0.0
            tokens = self._tokens.get(base, 0)
            if tokens:
                totals[system] = (round(seconds + shared, 4), tokens)
        return totals

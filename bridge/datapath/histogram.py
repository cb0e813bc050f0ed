"""A histogram of durations."""

from __future__ import annotations

from bisect import bisect_left
from typing import Final

BOUNDS_S: Final = (
    *(10e-6, 20e-6, 50e-6, 100e-6, 200e-6, 500e-6),
    *(1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3),
    *(0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0),
)
"""A hit takes some 10 µs, a request to a server on this machine 50 to 200 µs, one to a distant
hard disk 20 ms, one that waits for a reconnect seconds."""


class Histogram:
    """How many durations were seen, by upper bound."""

    __slots__ = ("count", "counts", "sum_s")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        """Not cumulative; the last one is for all above the largest bound."""
        self.count = 0
        self.sum_s = 0.0

    def add(self, duration_s: float) -> None:
        """One duration more."""
        self.counts[bisect_left(BOUNDS_S, duration_s)] += 1
        self.count += 1
        self.sum_s += duration_s

    def cumulative(self) -> list[int]:
        """The same counts, each with those below it."""
        total = 0
        return [total := total + each for each in self.counts]

    def quantile(self, share: float) -> float | None:
        """The upper bound of the bucket below which `share` of the durations are; None: there are
        none, or it is above the largest bound."""
        if not self.count:
            return None
        for bound_s, below in zip(BOUNDS_S, self.cumulative(), strict=False):
            if below >= share * self.count:
                return bound_s
        return None

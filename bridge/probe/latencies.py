"""Many durations in little room: counts in classes that are 3 % wide."""

from __future__ import annotations

from typing import Final

_BITS: Final = 5
"""Of a duration's leading bits that tell classes apart: 32 classes from one power of two to the
next."""
_CLASSES: Final = 1 << _BITS
_POWERS: Final = 64 - _BITS


class Latencies:
    """How often each duration was seen; all in nanoseconds."""

    __slots__ = ("count", "counts", "max_ns", "sum_ns")

    def __init__(self) -> None:
        self.counts = [0] * (_CLASSES * _POWERS)
        self.count = 0
        self.sum_ns = 0
        self.max_ns = 0

    def add(self, duration_ns: int) -> None:
        """One duration more."""
        power = duration_ns.bit_length() - _BITS - 1
        if power < 0:
            self.counts[duration_ns] += 1
        else:
            self.counts[(power << _BITS) + (duration_ns >> power)] += 1
        self.count += 1
        self.sum_ns += duration_ns
        if duration_ns > self.max_ns:
            self.max_ns = duration_ns

    def merge(self, other: Latencies) -> None:
        """Add what `other` has seen."""
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.count += other.count
        self.sum_ns += other.sum_ns
        self.max_ns = max(self.max_ns, other.max_ns)

    @property
    def mean_ns(self) -> float:
        """0 if there are none."""
        return self.sum_ns / self.count if self.count else 0.0

    def quantile_ns(self, share: float) -> int:
        """A duration that `share` of all do not exceed, at most 3 % above the smallest such."""
        below = 0
        for index, count in enumerate(self.counts):
            below += count
            if count and below >= share * self.count:
                return min(_upper_ns(index), self.max_ns)
        return 0


def _upper_ns(index: int) -> int:
    """The longest duration of a class."""
    power = (index >> _BITS) - 1
    if power < 0:
        return index
    return (((index & (_CLASSES - 1)) | _CLASSES) + 1 << power) - 1

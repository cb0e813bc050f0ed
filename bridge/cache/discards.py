"""The ranges on which a discard or write-zeroes is in progress: nothing else changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedKeyList

if TYPE_CHECKING:
    from .exclusive import Exclusive


class Discards:
    """Discards in progress, none overlapping another; ranges are `first` … `end` in blocks."""

    __slots__ = ("_by_first", "_shift")

    def __init__(self, shift: int) -> None:
        """`shift`: blocks of a granule, as a power of two."""
        self._by_first: SortedKeyList[Exclusive, int] = SortedKeyList(key=_first)
        self._shift = shift

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def __len__(self) -> int:
        return len(self._by_first)

    def add(self, each: Exclusive) -> None:
        """`each` overlaps none that is here."""
        self._by_first.add(each)

    def remove(self, each: Exclusive) -> None:
        """`each` has ended."""
        self._by_first.remove(each)

    def overlapping(self, first: int, end: int) -> Exclusive | None:
        """The first one on any of the blocks `first` … `end`, or None."""
        if not self._by_first:
            return None
        at = self._by_first.bisect_key_right(first)
        if at and self._by_first[at - 1].end > first:
            return self._by_first[at - 1]
        if at < len(self._by_first) and self._by_first[at].first < end:
            return self._by_first[at]
        return None

    def hold(self, granule: int) -> bool:
        """One is on a part of `granule`."""
        if not self._by_first:
            return False
        first = granule << self._shift
        return self.overlapping(first, first + (1 << self._shift)) is not None


def _first(each: Exclusive) -> int:
    return each.first

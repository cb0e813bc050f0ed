"""The ranges on which a discard or write-zeroes is in progress: nothing else changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

if TYPE_CHECKING:
    from .exclusive import Exclusive


class Discards:
    """Discards in progress, none overlapping another; ranges are `first` … `end` in blocks."""

    __slots__ = ("_by_first", "_shift")

    def __init__(self, shift: int) -> None:
        """`shift`: blocks of a granule, as a power of two."""
        self._by_first: SortedDict[int, Exclusive] = SortedDict()
        self._shift = shift

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def __len__(self) -> int:
        return len(self._by_first)

    def add(self, each: Exclusive) -> None:
        """`each` overlaps none that is here."""
        self._by_first[each.first] = each

    def remove(self, each: Exclusive) -> None:
        """`each` has ended."""
        del self._by_first[each.first]

    def overlapping(self, first: int, end: int) -> Exclusive | None:
        """One that is in progress on any of the blocks `first` … `end`, or None."""
        if not self._by_first:
            return None
        at = self._by_first.bisect_left(end)
        if at:
            # The last one that begins before `end` is also the last to end.
            each: Exclusive = self._by_first.peekitem(at - 1)[1]
            if first < each.end:
                return each
        return None

    def hold(self, granule: int) -> bool:
        """One is on a part of `granule`."""
        if not self._by_first:
            return False
        first = granule << self._shift
        return self.overlapping(first, first + (1 << self._shift)) is not None

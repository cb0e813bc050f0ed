"""The ranges on which a discard or write-zeroes is in progress: nothing else changes them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sortedcontainers import SortedDict

from bridge.cache.common import Common

if TYPE_CHECKING:
    from bridge.cache.range_operations import RangeOperation


_NOWHERE = (0, 0)


class BusyRanges:
    """BusyRanges in progress, none overlapping another; ranges are `first` … `end` in blocks."""

    __slots__ = ("_by_first", "_image", "_shift", "_since")

    def __init__(self, common: Common) -> None:
        self._by_first: SortedDict[int, RangeOperation] = SortedDict()
        self._image = common.image
        self._shift = common.index.granule_shift - common.index.block_shift
        self._since: int | None = None
        """Since which epoch the header's `discarded` is for nothing older. None:
        it was there at the start."""

    def __bool__(self) -> bool:
        return bool(self._by_first)

    def __len__(self) -> int:
        return len(self._by_first)

    def add(self, each: RangeOperation) -> None:
        """`each` overlaps none that is here."""
        self._by_first[each.first] = each

    def remove(self, each: RangeOperation) -> None:
        """`each` has ended."""
        del self._by_first[each.first]

    def overlapping(self, first: int, end: int) -> RangeOperation | None:
        """One that is in progress on any of the blocks `first` … `end`, or None."""
        if not self._by_first:
            return None
        at = self._by_first.bisect_left(end)
        if at:
            # The last one that begins before `end` is also the last to end.
            each: RangeOperation = self._by_first.peekitem(at - 1)[1]
            if first < each.end:
                return each
        return None

    def hold(self, granule: int) -> bool:
        """One is on a part of `granule`."""
        if not self._by_first:
            return False
        first = granule << self._shift
        return self.overlapping(first, first + (1 << self._shift)) is not None

    # What the cache file's header says of them: a block that the server has or had to zero is no
    # evidence of another client's writes (see `sample`).

    def note(self, first: int, end: int, epoch: int) -> None:
        """The blocks `first` … `end` are about to be discarded or zeroed by the server."""
        before = self._image.header.discarded
        if before == _NOWHERE:
            self._since = epoch
        else:
            first, end = min(first, before[0]), max(end, before[1])
        if (first, end) != before:
            self._image.save_header(discarded=(first, end))

    def flushed(self, epoch: int) -> None:
        """Nothing is unflushed. If discards may have been lost before this, that stays noted:
        blocks that were read as zeroes are still in the cache."""
        if self._image.header.discarded != _NOWHERE and self._since == epoch and not self._by_first:
            self._image.save_header(discarded=_NOWHERE)

    def nothing_older(self, epoch: int) -> None:
        """Nothing clean is in the cache that is older than this."""
        self._since = epoch

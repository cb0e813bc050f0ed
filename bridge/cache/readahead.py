"""Read-ahead for several sequential streams.

Two reads that follow each other make a stream. Its first block beyond what was asked for is
fetched in a window, and the first block of that window carries a *mark*: it is not made `ready`,
so the read that reaches it takes the slow path and comes here, and the next window is fetched
while the reader works through this one. Hits in between cost nothing.

A window doubles each time the reader reaches a mark, and is halved when blocks that were read
ahead are gone before the reader came (the cache is too small for so many streams).
"""

from __future__ import annotations

from collections.abc import Callable

from bridge.cache.cache_options import Options
from bridge.cache.fetch import Fetcher
from bridge.cache.index import Index
from bridge.cache.upstream import Stats

_STREAMS = 32
"""Streams that are followed at a time; a table scan or a copy in a guest is one or two."""
_FIRST_WINDOW_BYTES = 128 * 1024


class _Stream:
    """A reader that was seen to go forward. All positions in blocks."""

    __slots__ = ("ahead", "begin", "mark", "next", "window")

    def __init__(self, begin: int, next_block: int) -> None:
        self.begin = begin
        self.next = next_block
        """Where the next read begins if it follows."""
        self.ahead = 0
        """Up to where was read ahead; 0: not yet."""
        self.mark = -1
        self.window = 0


class Readahead:
    """The streams of one cache."""

    def __init__(
        self,
        index: Index,
        fetcher: Fetcher,
        discount_scan_hits: Callable[[int], None],
        options: Options,
        stats: Stats,
    ) -> None:
        self._index = index
        self._forgive = discount_scan_hits
        self._fetcher = fetcher
        self._stats = stats
        self._shift = index.granule_shift - index.block_shift
        # Up to two windows are ahead of a reader, all of it on probation (a tenth of the cache):
        # one stream takes half of that at most, or it pushes out what it has not read yet.
        limit = min(options.readahead_bytes, index.slots * index.granule_bytes // 40)
        self._window_max = limit >> index.block_shift
        self._window_min = max(1, min(_FIRST_WINDOW_BYTES >> index.block_shift, self._window_max))
        self._bypass_blocks = options.bypass_bytes >> index.block_shift
        self._bypass_after_blocks = options.bypass_after_bytes >> index.block_shift
        self._streams: dict[int, _Stream] = {}
        """By `next`, the one that has not moved for longest first."""
        self._marks: dict[int, _Stream] = {}

    def accessed(self, start: int, end: int, missed: bool) -> None:
        """The bytes `start` … `end` were read, and not by the fast path."""
        if not self._window_max:
            return
        shift = self._index.block_shift
        first, last = start >> shift, (end - 1 >> shift) + 1
        stream = self._marked(first, last)
        if stream is None:
            stream = self._streams.get(first) or (self._ahead_of(first) if missed else None)
            if stream is None:
                self._remember(_Stream(first, last))
                return
        if self._streams.get(stream.next) is stream:
            del self._streams[stream.next]
        self._advance(stream, first, last, missed)
        self._remember(stream)

    def bypasses(self, start: int, end: int) -> bool:
        """A read of the bytes `start` … `end`, none of them cached, need not go through the
        cache: it is a large one of a long stream."""
        shift = self._index.block_shift
        first, last = start >> shift, (end - 1 >> shift) + 1
        stream = self._streams.get(first)
        if stream is None or not self._is_large(stream, first, last):
            return False
        del self._streams[first]
        stream.next = last
        self._remember(stream)
        return True

    def _is_large(self, stream: _Stream, first: int, last: int) -> bool:
        return (
            0 < self._bypass_blocks <= last - first
            and last - stream.begin > self._bypass_after_blocks
        )

    def marked(self, granule: int) -> int:
        """The blocks of `granule` that carry a mark."""
        shift = self._shift
        bits = 0
        for block in self._marks:
            if block >> shift == granule:
                bits |= 1 << (block & (1 << shift) - 1)
        return bits

    def _marked(self, first: int, last: int) -> _Stream | None:
        """The stream whose mark lies in the blocks `first` … `last`; the mark goes."""
        for block, stream in self._marks.items():
            if first <= block < last:
                del self._marks[block]
                stream.mark = -1
                return stream
        return None

    def _ahead_of(self, block: int) -> _Stream | None:
        """The stream that has read `block` ahead: it is gone again, or still to come."""
        for stream in self._streams.values():
            if stream.next <= block < stream.ahead:
                return stream
        return None

    def _remember(self, stream: _Stream) -> None:
        """It has moved: another that would go on at the same block is forgotten, or the oldest."""
        replaced = self._streams.pop(stream.next, None)
        self._streams[stream.next] = stream
        if len(self._streams) > _STREAMS:
            replaced = self._streams.pop(next(iter(self._streams)))
        if replaced is not None and self._marks.get(replaced.mark) is replaced:
            del self._marks[replaced.mark]  # Else a guest could leave any number of them.

    def _advance(self, stream: _Stream, first: int, last: int, missed: bool) -> None:
        """The stream has come to block `last`: fetch on if its window is used up."""
        # Reading a granule block by block is one use of it, not sixteen: otherwise every scan
        # would look like a hot set.
        for granule in range(stream.next >> self._shift, last >> self._shift):
            self._forgive(granule)
        stream.next = last
        if missed and first < stream.ahead and not self._is_coming(first):
            stream.window = max(self._window_min, stream.window // 2)
        elif stream.mark < 0:
            stream.window = min(self._window_max, max(self._window_min, stream.window * 2))
        if stream.mark >= 0 and last <= stream.mark:
            return
        if self._fetcher.busy or self._is_large(stream, first, last):
            return
        begin = max(last, stream.ahead)
        disk_blocks = self._index.geometry.disk_bytes >> self._index.block_shift
        end = min(last + stream.window * 2 if stream.ahead else last + stream.window, disk_blocks)
        if begin >= end:
            return
        self._fetch(begin, end)
        stream.ahead = end
        self._set_mark(stream, begin)

    def _is_coming(self, block: int) -> bool:
        return block >> self._shift in self._fetcher.fetching

    def _fetch(self, begin: int, end: int) -> None:
        """Fetch the absent ones of the blocks `begin` … `end`."""
        index, shift = self._index, self._shift
        at = begin
        while at < end:
            granule = at >> shift
            stop = min(end, granule + 1 << shift)
            slot = index.find(granule)
            valid = index.valid(slot) >> (at & (1 << shift) - 1) if slot else 0
            while at < stop:
                if valid & 1:
                    at += 1
                    valid >>= 1
                    continue
                absent = (valid & -valid).bit_length() - 1 if valid else stop - at
                until = min(stop, at + absent)
                self._fetcher.need(at, until, None)
                self._stats.readahead_bytes += until - at << index.block_shift
                valid >>= until - at
                at = until

    def _set_mark(self, stream: _Stream, block: int) -> None:
        """Have the read that reaches `block` come here."""
        if self._marks.get(stream.mark) is stream:
            del self._marks[stream.mark]
        stream.mark = block
        self._marks[block] = stream
        slot = self._index.find(block >> self._shift)
        bit = 1 << (block & (1 << self._shift) - 1)
        if slot and self._index.valid(slot) & bit:
            self._index.mark(slot, bit)
        elif self._is_coming(block):
            self._fetcher.need(block, block + 1, self)

    def fetched(self, first: int, end: int, view: memoryview, error: int, not_kept: int) -> None:
        """A marked block has come."""
        slot = self._index.find(first >> self._shift)
        if slot and first in self._marks:
            self._index.mark(slot, 1 << (first & (1 << self._shift) - 1))

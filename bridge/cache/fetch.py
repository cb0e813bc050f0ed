"""Reads from the server: merged misses, and filling the cache with what they bring.

A fetch is one run of absent blocks. All requests that need one of them wait for the same fetch.
Fetches asked for within a turn are merged into one READ when they are adjacent, and land in
private buffers: what is copied into the cache never was in the guest's hands.

A write, discard or write-zeroes that completes while a fetch of the same block is in flight
*overtakes* it: the block of that fetch is stale, it is not filled and no further request may wait
for it. Those that waited already asked before the write completed: the old bytes are right for
them.
"""

from __future__ import annotations

from bisect import insort
from errno import EIO
from typing import Protocol, cast

from bridge.cache.common import Common
from bridge.cache.file.layout import BITS
from bridge.datapath.request import READ, Request


class Waiter(Protocol):
    """A request that waits for a fetch."""

    def fetched(self, first: int, end: int, view: memoryview, error: int, not_kept: int) -> None:
        """The blocks `first` … `end` are in `view`, unless `error` is an errno. `not_kept`: the
        errno with which the cache file refused some of that fetch, or 0."""


class Fetch:
    """The blocks `first` … `end` of the disk, on their way from the server."""

    __slots__ = ("buffer", "end", "first", "stale", "waiters")

    def __init__(self, first: int, end: int) -> None:
        self.first = first
        self.end = end
        self.stale = 0
        """Bit i: block `first + i` was overtaken."""
        self.buffer = bytearray()
        self.waiters: list[tuple[Waiter, int, int]] = []
        """What waits, for blocks from first to end: others may have newer content elsewhere."""


def _falling(fetch: Fetch) -> int:
    return -fetch.first


class Fetcher:
    """All fetches of one cache."""

    def __init__(self, common: Common) -> None:
        index, options = common.index, common.options
        self._index = index
        self._slots = common.slots
        self._upstream = common.upstream
        self._stats = common.stats
        self._block_shift = index.block_shift
        self._shift = index.granule_shift - index.block_shift
        self._run_blocks = max(1, options.fetch_run_bytes >> index.block_shift)
        self._budget_blocks = max(self._run_blocks, options.fetch_bytes >> index.block_shift)
        self._blocks_in_flight = 0
        self._pending: list[Fetch] = []
        """Not sent yet, in falling disk order: the first of the disk is taken from the end."""
        self._look = False
        """Something changed that may let more be sent."""
        self.fetching: dict[int, list[Fetch]] = {}
        """Granule → the fetches, sent or not, that have blocks of it."""

    @property
    def waiting(self) -> int:
        """Fetches that are not sent yet."""
        return len(self._pending)

    @property
    def busy(self) -> bool:
        """True when reads in flight use up their memory: no time for read-ahead."""
        return self._blocks_in_flight * 2 > self._budget_blocks

    def need(self, first: int, end: int, waiter: Waiter | None) -> int:
        """See to it that the absent blocks `first` … `end` come; returns how often
        `waiter.fetched()` will be called."""
        count = 0
        at = gap = first
        while at < end:
            limit = min(end, ((at >> self._shift) + 1) << self._shift)
            fetch, until = self._covering(at, limit)
            if fetch is not None:
                count += self._start_runs(gap, at, waiter)
                if waiter is not None:
                    count += _attach(fetch, at, until, waiter)
                gap = until
            at = until
        return count + self._start_runs(gap, end, waiter)

    def overtaken(self, granule: int, bits: int) -> None:
        """Blocks of `granule` have newer content than any fetch in flight will bring."""
        for fetch in self.fetching.get(granule, ()):
            offset = (granule << self._shift) - fetch.first
            relative = bits << offset if offset >= 0 else bits >> -offset
            fetch.stale |= relative & (1 << fetch.end - fetch.first) - 1

    def overtaken_range(self, first: int, end: int) -> None:
        """The same for the blocks `first` … `end`."""
        granules = range(first >> self._shift, (end - 1 >> self._shift) + 1)
        # By whichever way is shorter.
        for granule in granules if len(granules) < len(self.fetching) else list(self.fetching):
            base = granule << self._shift
            clip_start = max(first - base, 0)
            clip_end = min(end - base, 1 << self._shift)
            if clip_start < clip_end:
                self.overtaken(granule, (1 << clip_end) - (1 << clip_start))

    def _covering(self, at: int, limit: int) -> tuple[Fetch | None, int]:
        """The fetch that brings block `at`, or None, and the block up to which that is so.

        `limit` is at most the end of the granule of `at`.
        """
        for fetch in self.fetching.get(at >> self._shift, ()):
            if at < fetch.first:
                limit = min(limit, fetch.first)
            elif at < fetch.end:
                stale = fetch.stale >> at - fetch.first
                if stale & 1:
                    # Another fetch may have been started for this block alone.
                    limit = min(limit, at + 1)
                    continue
                until = min(limit, fetch.end)
                if stale:
                    until = min(until, at + (stale & -stale).bit_length() - 1)
                return fetch, until
        return None, limit

    def _start_runs(self, first: int, end: int, waiter: Waiter | None) -> int:
        """Start fetches for blocks that nothing brings yet; returns how many."""
        count = 0
        while first < end:
            until = min(end, first + self._run_blocks)
            fetch = self._start(first, until)
            if waiter is not None:
                fetch.waiters.append((waiter, first, until))
            first = until
            count += 1
        return count

    def _start(self, first: int, end: int) -> Fetch:
        fetch = Fetch(first, end)
        for granule in range(first >> self._shift, (end - 1 >> self._shift) + 1):
            self.fetching.setdefault(granule, []).append(fetch)
        insort(self._pending, fetch, key=_falling)
        self._look = True
        return fetch

    def advance(self) -> bool:
        """See `Stage`: send what is pending, in disk order and merged, as far as memory allows."""
        if not self._look:
            return False
        self._look = False
        pending = self._pending
        while pending:
            group = [pending.pop()]
            blocks = group[0].end - group[0].first
            while pending and pending[-1].first == group[-1].end:
                more = pending[-1].end - pending[-1].first
                if blocks + more > self._run_blocks:
                    break
                blocks += more
                group.append(pending.pop())
            if self._blocks_in_flight and self._blocks_in_flight + blocks > self._budget_blocks:
                pending += reversed(group)
                break
            self._send(group, blocks)
        return True

    def _send(self, group: list[Fetch], blocks: int) -> None:
        index = self._index
        shift = index.block_shift
        self._blocks_in_flight += blocks
        buffers = []
        offset = group[0].first << shift
        # The disk may end within its last block: the rest of that block stays zero.
        length = min(group[-1].end << shift, index.geometry.disk_bytes) - offset
        left = length
        for fetch in group:
            fetch.buffer = bytearray(fetch.end - fetch.first << shift)
            view = memoryview(fetch.buffer)[:left]
            left -= len(view)
            buffers.append(view)
        self._stats.fetches += 1
        self._stats.fetched_bytes += length
        self._upstream.submit(Request(READ, offset, length, buffers, self._replied, owner=group))

    def _replied(self, request: Request) -> None:
        group = cast("list[Fetch]", request.owner)
        for fetch in group:
            self._blocks_in_flight -= fetch.end - fetch.first
            for granule in range(fetch.first >> self._shift, (fetch.end - 1 >> self._shift) + 1):
                fetches = self.fetching[granule]
                fetches.remove(fetch)
                if not fetches:
                    del self.fetching[granule]
        not_kept = [0 if request.error else self._fill(fetch) for fetch in group]
        for fetch, refused in zip(group, not_kept, strict=True):
            waiters, fetch.waiters = fetch.waiters, []
            view = memoryview(fetch.buffer)
            for waiter, first, end in waiters:
                start, stop = first - fetch.first, end - fetch.first
                part = view[start << self._block_shift : stop << self._block_shift]
                waiter.fetched(first, end, part, request.error, refused)
        self._look = bool(self._pending)

    def _fill(self, fetch: Fetch) -> int:
        """Store what is still absent and was not overtaken; the errno of the file where it failed,
        or 0."""
        index, refused = self._index, 0
        per_granule = 1 << self._shift
        for granule in range(fetch.first >> self._shift, (fetch.end - 1 >> self._shift) + 1):
            base = granule << self._shift
            clip_start, clip_end = max(fetch.first - base, 0), min(fetch.end - base, per_granule)
            wanted = (1 << clip_end) - (1 << clip_start)
            offset = base - fetch.first
            stale = fetch.stale >> offset if offset >= 0 else fetch.stale << -offset
            slot = index.find(granule)
            wanted &= ~stale & ~(index.valid(slot) if slot else 0)
            if not wanted:
                continue
            slot = slot or self._slots.obtain(granule)
            if not slot:
                continue
            try:
                self._store(slot, wanted, fetch.buffer, offset)
            except OSError as error:
                # The cache file fails: the readers have their bytes, nothing is cached.
                refused = error.errno or EIO
                self._stats.file_errors += 1
                if not index.state[slot]:
                    self._slots.drop(slot, BITS)
        return refused

    def _store(self, slot: int, bits: int, buffer: bytearray, offset: int) -> None:
        """Copy the blocks `bits` of `slot` out of `buffer`, whose block 0 is block -`offset`."""
        index = self._index
        shift = index.block_shift
        base = slot << index.granule_shift
        view = memoryview(buffer)
        left = bits
        while left:
            first = (left & -left).bit_length() - 1
            run = left >> first
            count = (~run & run + 1).bit_length() - 1
            at = base + (first << shift)
            source = view[offset + first << shift : offset + first + count << shift]
            index.put(at, source)
            left &= ~((1 << first + count) - (1 << first))
        index.fill(slot, bits)


def _attach(fetch: Fetch, first: int, end: int, waiter: Waiter) -> int:
    """Let `waiter` wait for some blocks of `fetch`; returns 0 when a wait was only extended."""
    if fetch.waiters:
        last, start, until = fetch.waiters[-1]
        if last is waiter and until == first:
            fetch.waiters[-1] = (waiter, start, end)
            return 0
    fetch.waiters.append((waiter, first, end))
    return 1

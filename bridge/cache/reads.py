"""Reads that are not plain hits: misses, blocks that left the page cache, mixtures."""

from __future__ import annotations

from collections import deque

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.common import Common
from bridge.cache.fetch import Fetcher
from bridge.cache.readahead import Readahead
from bridge.datapath.buffers import scatter
from bridge.datapath.request import READ, Request
from bridge.datapath.turn import Outcome, Turn


class _ReadOp:
    """One read in progress; completes its request when nothing is pending."""

    __slots__ = ("abandoned", "block_shift", "error", "pending", "request", "turn")

    def __init__(self, request: Request, block_shift: int, turn: Turn) -> None:
        self.request = request
        self.block_shift = block_shift
        self.turn = turn
        self.pending = 1
        self.error = 0
        self.abandoned = False

    def abandon(self, error: int) -> None:
        """Finish the request now: what it waits for may still come, and goes nowhere. What still
        knows this must not keep the guest's memory alive: a job on a stuck disk may last."""
        self.abandoned = True
        self.turn.finish(self.request, error)
        del self.request

    def fetched(self, first: int, end: int, view: memoryview, error: int, not_kept: int) -> None:
        """Some blocks have come from the server."""
        if error:
            self.error = self.error or error
        elif not self.abandoned and self.request.buffers:
            request = self.request
            at = first << self.block_shift
            clip_start = max(at, request.offset)
            clip_end = min(end << self.block_shift, request.offset + request.length)
            scatter(
                request.buffers, clip_start - request.offset, view[clip_start - at : clip_end - at]
            )
        self.release()

    def release(self) -> None:
        """One thing less is pending."""
        self.pending -= 1
        if not self.pending and not self.abandoned:
            self.turn.finish(self.request, self.error)


class _PartAgain:
    """A part of a read that waits until a discard of some of its blocks has ended."""

    __slots__ = ("_end", "_op", "_reads", "_start")

    def __init__(self, reads: Reads, op: _ReadOp, start: int, end: int) -> None:
        self._reads = reads
        self._op = op
        self._start = start
        self._end = end

    def range_freed(self) -> None:
        """See range_operations.WaitsForRange."""
        self._reads.go_on(self._op, self._start, self._end)


class Reads:
    """The slow path of READ, and PREFETCH."""

    def __init__(
        self, common: Common, fetcher: Fetcher, busy_ranges: BusyRanges, readahead: Readahead
    ) -> None:
        self._common = common
        self._upstream = common.upstream
        self._bypass_bytes = common.options.bypass_bytes
        self._index = common.index
        self._image = common.image
        self._slots = common.slots
        self._fetcher = fetcher
        self._busy_ranges = busy_ranges
        self._readahead = readahead
        self._stats = common.stats
        self._cold_ops: dict[_ReadOp, int] = {}
        """Reads that wait for the cache's disk, or to get there, and for how many jobs."""
        self._cold_budget_bytes = common.options.cold_bytes
        self._cold_bytes = 0
        self._cold_waiting: deque[tuple[_ReadOp, int, int]] = deque()
        """Parts of reads, in bytes of the disk, that there is no memory for now."""

    @property
    def waiting(self) -> int:
        """Reads that wait for the cache's disk."""
        return len(self._cold_ops)

    def refuse(self, errno: int) -> None:
        """Reads that wait for the cache's disk fail with `errno`, if that is not 0."""
        if errno:
            self._cold_waiting.clear()
            waiting, self._cold_ops = self._cold_ops, {}
            for op in waiting:
                op.abandon(errno)

    def read(self, request: Request) -> None:
        """Do a READ whose range lies within the disk."""
        end = request.offset + request.length
        if 0 < self._bypass_bytes <= request.length and self._bypass(request, end):
            return
        op = _ReadOp(request, self._index.block_shift, self._common.turn)
        missed = self._walk(op, request.offset, end)
        if missed:
            self._stats.read_misses += 1
        else:
            self._stats.read_hits += 1
        self._readahead.accessed(request.offset, end, missed)
        op.release()

    def _bypass(self, request: Request, end: int) -> bool:
        """Have the server fill the guest's buffers, if this is a read for that."""
        index = self._index
        first, last = request.offset >> index.granule_shift, end - 1 >> index.granule_shift
        fetching = self._fetcher.fetching
        for granule in range(first, last + 1):
            if granule in fetching or index.find(granule):
                return False
        if self._busy_ranges or not self._readahead.bypasses(request.offset, end):
            return False
        self._stats.read_bypassed += 1

        offset, length, buffers = request.offset, request.length, request.buffers
        self._upstream.submit(Request(READ, offset, length, buffers, self._bypassed, 0, request))
        return True

    def _bypassed(self, inner: Request) -> None:
        request = inner.owner
        assert isinstance(request, Request)
        self._common.turn.finish(request, inner.error)

    def prefetch(self, request: Request) -> None:
        """Have the absent blocks of a range fetched."""
        op = _ReadOp(request, self._index.block_shift, self._common.turn)
        self._walk(op, request.offset, request.offset + request.length)
        op.release()

    def _walk(self, op: _ReadOp, start: int, end: int) -> bool:
        """Copy what is cached, fetch the rest; True when there was a rest."""
        index = self._index
        granule_shift, shift = index.granule_shift, index.block_shift
        absent: list[tuple[int, int]] = []
        at = start
        while at < end:
            granule = at >> granule_shift
            base = granule << granule_shift
            stop = min(end, base + index.granule_bytes)
            first, last = at - base >> shift, (stop - 1 - base) >> shift
            bits = (2 << last) - (1 << first)
            slot = index.find(granule)
            valid = index.valid(slot) & bits if slot else 0
            if valid == bits:
                self._copy(op, slot, bits, at, stop)
            else:
                self._copy_some(op, slot, valid, base, at, stop)
                _add_runs(absent, bits & ~valid, base >> shift)
            at = stop
        for first, last in absent:
            self._fetch(op, first, last)
        return bool(absent)

    def _copy_some(
        self, op: _ReadOp, slot: int, valid: int, base: int, start: int, end: int
    ) -> None:
        """Copy the cached blocks `valid` of a granule within the bytes `start` … `end`."""
        runs: list[tuple[int, int]] = []
        _add_runs(runs, valid, 0)
        shift = self._index.block_shift
        for first, last in runs:
            clip_start, clip_end = (
                max(start, base + (first << shift)),
                min(end, base + (last << shift)),
            )
            self._copy(op, slot, (1 << last) - (1 << first), clip_start, clip_end)

    def _copy(self, op: _ReadOp, slot: int, bits: int, start: int, end: int) -> None:
        """Copy the bytes `start` … `end` of the disk, blocks `bits` of `slot`, all valid."""
        request, index = op.request, self._index
        if not request.buffers:
            return
        self._index_touch(slot)
        at_bytes = (slot << index.granule_shift) + (start & index.granule_bytes - 1)
        if index.ready[slot] & bits == bits or self._is_resident(slot, bits, start, end):
            source = index.data[at_bytes : at_bytes + end - start]
            scatter(request.buffers, start - request.offset, source)
            return
        op.pending += 1
        self._cold_ops[op] = self._cold_ops.get(op, 0) + 1
        if not self._may_read_cold(start, end):
            self._cold_waiting.append((op, start, end))
            return
        # Not into the guest's memory: the disk may answer when that is no longer ours.
        data = memoryview(bytearray(end - start))
        self._cold_bytes += end - start
        self._stats.read_cold += 1
        self._slots.pin(slot)

        def done(outcome: Outcome) -> None:
            self._slots.unpin(slot)
            self._cold_bytes -= end - start
            self._read_waiting()
            if op.abandoned:
                return
            self._cold_ended(op)
            if outcome.error:
                self._unreadable(op, slot, bits, start, end, outcome.error)
            else:
                request = op.request
                scatter(request.buffers, start - request.offset, data)
                if index.valid(slot) & bits == bits:
                    index.found_resident(slot, bits)
            op.release()

        self._common.cold.run(lambda: self._image.read_wait([data], at_bytes), Outcome(done))

    def _may_read_cold(self, start: int, end: int) -> bool:
        """There is memory for a copy of these bytes of the disk; one there always is."""
        return not self._cold_bytes or self._cold_bytes + end - start <= self._cold_budget_bytes

    def _cold_ended(self, op: _ReadOp) -> None:
        """One job less for `op`."""
        self._cold_ops[op] -= 1
        if not self._cold_ops[op]:
            del self._cold_ops[op]

    def _read_waiting(self) -> None:
        """There is memory for cold reads again: what waits goes on from its look-up, for much may
        have happened to its blocks meanwhile."""
        waiting = self._cold_waiting
        while waiting and self._may_read_cold(*waiting[0][1:]):
            op, start, end = waiting.popleft()
            self._walk(op, start, end)
            self._cold_ended(op)
            op.release()

    def _is_resident(self, slot: int, bits: int, start: int, end: int) -> bool:
        """Ask about blocks of `slot` that are not believed to be in the page cache."""
        index = self._index
        base = slot << index.granule_shift
        # One question for the whole granule, so that a hot set is believed again quickly.
        if self._image.resident(base, index.granule_bytes):
            granule = start >> index.granule_shift
            index.found_all_resident(slot, marked=self._readahead.marked(granule))
            return True
        if self._image.resident(base + (start & index.granule_bytes - 1), end - start):
            index.found_resident(slot, bits)
            return True
        return False

    def _unreadable(
        self, op: _ReadOp, slot: int, bits: int, start: int, end: int, error: int
    ) -> None:
        """The cache file cannot be read there: the server still has what is clean."""
        self._stats.file_errors += 1
        index = self._index
        # Meanwhile the slot may have been dropped, and the granule have come back in another one.
        if index.find(start >> index.granule_shift) == slot:
            if index.dirty(slot) & bits:
                # Never old bytes from the server for a dirty block.
                op.error = op.error or error
                return
            if clean := bits & index.valid(slot):
                self._slots.drop(slot, clean)
        self._walk(op, start, end)

    def _index_touch(self, slot: int) -> None:
        touched = self._slots.touched
        if touched[slot] < 3:
            touched[slot] += 1

    def _fetch(self, op: _ReadOp, first: int, end: int) -> None:
        """Get absent blocks from the server, after a discard of them has ended."""
        before = self._busy_ranges.overlapping(first, end)
        if before is None:
            op.pending += self._fetcher.need(first, end, op)
            return
        op.pending += 1
        shift = self._index.block_shift
        clip_start = max(op.request.offset, first << shift)
        clip_end = min(op.request.offset + op.request.length, end << shift)
        before.waiting.append(_PartAgain(self, op, clip_start, clip_end))

    def go_on(self, op: _ReadOp, start: int, end: int) -> None:
        """The bytes `start` … `end` of `op` had to wait; try them again."""
        if op.abandoned:
            return
        self._walk(op, start, end)
        op.release()


def _add_runs(runs: list[tuple[int, int]], bits: int, base: int) -> None:
    """Append the runs of set bits as (first, end) blocks from `base` on, joining adjacent."""
    while bits:
        clip_start = (bits & -bits).bit_length() - 1
        run = bits >> clip_start
        count = (~run & run + 1).bit_length() - 1
        first, end = base + clip_start, base + clip_start + count
        if runs and runs[-1][1] == first:
            runs[-1] = (runs[-1][0], end)
        else:
            runs.append((first, end))
        bits &= ~((1 << clip_start + count) - (1 << clip_start))

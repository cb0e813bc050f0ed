"""When the write-out in the background goes on, and how much of it may be in flight."""

from __future__ import annotations

from bridge.cache.common import Common
from bridge.cache.dirty_ring import DirtyRing
from bridge.datapath.cells import BACKGROUND_SLOTS, FLUSH_SLOTS, HARD_SLOTS


class Pace:
    """The pace of one cache's write-out, which no request waits for: by age, by amount, with
    pauses."""

    def __init__(self, common: Common, ring: DirtyRing) -> None:
        self._common = common
        self._index = common.index
        self._cells = common.index.cells
        self._options = common.options
        self._ring = ring
        self.set_limits()
        self.paused_until = 0.0
        self._pause_s = common.options.retry_s

    def set_limits(self) -> None:
        """Take the limits from the sizes of cache and disk, at the start and when that grows."""
        index, cells = self._index, self._cells
        limits = self._options.dirty_limits(slots=index.slots, granules=index.geometry.granules)
        cells[BACKGROUND_SLOTS], cells[FLUSH_SLOTS] = limits.background, limits.flush
        cells[HARD_SLOTS] = limits.hard

    def next_deadline(self) -> float | None:
        """When `goal` may have something to say."""
        if self._ring.resting <= 0:
            return None
        oldest_s = self._ring.oldest_s
        if oldest_s is not None and not self.over_background():
            return max(oldest_s + self._options.writeback_age_s, self.paused_until)
        return self.paused_until

    def goal(self, now: float) -> int:
        """Up to which position of the ring to write out now: what is old enough, or more when too
        much is dirty. 0: nothing."""
        ring = self._ring
        if now < self.paused_until or ring.head >= ring.tail:
            return 0
        if ring.oldest_s is None:
            return ring.tail
        goal = ring.due(now, self._options.writeback_age_s)
        if self.over_background():
            # The oldest go; what was written last may still grow into a longer run.
            goal = max(goal, ring.tail - self._cells[BACKGROUND_SLOTS] * 3 // 4)
        return goal

    def over_background(self) -> bool:
        """More stands in the ring than should wait for its age."""
        return self._ring.resting > self._cells[BACKGROUND_SLOTS]

    def requests_allowed(self, *, awaited: bool) -> int:
        """How many write-outs may be in flight: all while a request waits for one, else few."""
        options, cells = self._options, self._cells
        if awaited:
            return options.writeback_requests
        background = cells[BACKGROUND_SLOTS]
        above = self._index.dirty_slots - background
        if above <= 0:
            return options.background_requests
        more = options.writeback_requests * above // max(1, cells[FLUSH_SLOTS] - background)
        return min(options.writeback_requests, options.background_requests + more)

    def succeeded(self) -> None:
        """The server took something: the next pause is a short one again."""
        self._pause_s = self._options.retry_s

    def failed(self) -> None:
        """It did not: pause, for longer each time."""
        self.paused_until = self._common.clock() + self._pause_s
        self._pause_s = min(self._pause_s * 2, self._options.retry_max_s)

"""Which clean granule goes when room is needed: S3-FIFO over linked lists in flat arrays.

New granules enter a small probation queue; those touched again there, and those that come back
soon after they left (the ghost remembers them), live in the main queue, where a granule that was
touched since it last came to the end gets another round. So a scan passes through probation and
leaves the hot set alone, and a hit costs one store into `touched`.

A granule with dirty blocks, or one that a thread reads from, is never chosen: met at the end of
its queue it is *parked* outside the queues until it is released, so it is looked at once, not
every time.

Yang et al., "FIFO queues are all you need for cache eviction", SOSP 2023.
"""

from __future__ import annotations

from .index import zeroed

_NONE, _SMALL, _MAIN, _PARKED = range(4)

UP = bytes((1, 2, 3, 3))
"""`touched[slot] = UP[touched[slot]]` is a hit."""

_SMALL_SHARE = 10
"""Percent of the slots that probation keeps when the main queue has something to give."""
_GHOST_HASH = 0x9E3779B1


class Evictor:
    """The order of all slots that hold a granule."""

    def __init__(self, slots: int) -> None:
        count = slots + 1
        self.touched = bytearray(count)
        """0 to 3: how often each slot was hit lately."""
        self._queue = bytearray(count)
        self._origin = bytearray(count)
        # Circular lists through sentinels: one node per slot, two more for the queues' ends.
        self._next = zeroed("I", count + 2)
        self._prev = zeroed("I", count + 2)
        self._ends = (0, count, count + 1)
        for end in self._ends[1:]:
            self._next[end] = self._prev[end] = end
        self._length = [0, 0, 0, 0]
        self._small_target = max(1, slots * _SMALL_SHARE // 100)
        ghosts = 1 << max(4, (slots - 1).bit_length())
        self._ghost = zeroed("I", ghosts)
        self._ghost_stamp = zeroed("I", ghosts)
        self._ghost_mask = ghosts - 1
        self._ghost_life = max(1, slots)
        self._stamp = self._ghost_life + 1
        self.evicted = 0

    def admit(self, slot: int, granule: int) -> None:
        """`slot` holds `granule` from now on."""
        self.touched[slot] = 0
        self._push(_MAIN if self._was_here(granule) else _SMALL, slot)

    def remove(self, slot: int) -> None:
        """`slot` holds nothing any more."""
        self._unlink(slot)
        self._queue[slot] = _NONE

    def park(self, slot: int) -> None:
        """`slot` may not go until `release(slot)`."""
        queue = self._queue[slot]
        if queue in (_SMALL, _MAIN):
            self._unlink(slot)
            self._origin[slot] = queue
            self._queue[slot] = _PARKED
            self._length[_PARKED] += 1

    def release(self, slot: int) -> None:
        """A parked slot may go again."""
        if self._queue[slot] == _PARKED:
            self._length[_PARKED] -= 1
            self._push(self._origin[slot], slot)

    def candidate(self) -> int:
        """The slot that should go next (it stays until `evict()` or `park()`), or 0."""
        touched = self.touched
        while True:
            length = self._length
            if length[_SMALL] and (length[_SMALL] > self._small_target or not length[_MAIN]):
                slot = self._prev[self._ends[_SMALL]]
                if touched[slot] < 1:
                    return slot
                self._unlink(slot)
                touched[slot] = 0
                self._push(_MAIN, slot)
            elif length[_MAIN]:
                slot = self._prev[self._ends[_MAIN]]
                if not touched[slot]:
                    return slot
                touched[slot] -= 1
                self._unlink(slot)
                self._push(_MAIN, slot)
            else:
                return 0

    def evict(self, slot: int, granule: int) -> None:
        """The candidate goes; its granule is remembered for a while."""
        if self._queue[slot] == _SMALL:
            at = granule * _GHOST_HASH >> 8 & self._ghost_mask
            self._ghost[at] = granule
            self._ghost_stamp[at] = self._stamp & 0xFFFFFFFF
            self._stamp += 1
        self.evicted += 1
        self.remove(slot)

    def _was_here(self, granule: int) -> bool:
        at = granule * _GHOST_HASH >> 8 & self._ghost_mask
        if self._ghost[at] != granule or not self._ghost_stamp[at]:
            return False
        age: int = (self._stamp - self._ghost_stamp[at]) & 0xFFFFFFFF
        self._ghost_stamp[at] = 0
        return age <= self._ghost_life

    def _push(self, queue: int, slot: int) -> None:
        end = self._ends[queue]
        first = self._next[end]
        self._next[slot] = first
        self._prev[slot] = end
        self._prev[first] = slot
        self._next[end] = slot
        self._queue[slot] = queue
        self._length[queue] += 1

    def _unlink(self, slot: int) -> None:
        queue = self._queue[slot]
        if queue in (_SMALL, _MAIN):
            before, after = self._prev[slot], self._next[slot]
            self._next[before] = after
            self._prev[after] = before
        self._length[queue] -= 1

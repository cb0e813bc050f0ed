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

from collections.abc import Iterable

from bridge.cache.blocks import zeroed

_NONE, _SMALL, _MAIN, _PARKED = range(4)

UP = bytes((1, 2, 3, 3))
"""`touched[slot] = UP[touched[slot]]` is a hit."""

_SMALL_SHARE = 10
"""Percent of the slots that probation keeps when the main queue has something to give."""
_HASH = 0x9E3779B97F4A7C15
_WAYS = 4
_AGES = 256
"""Steps in which the age of a ghost is known; ages wrap after 256 lives."""


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
        self._ghost = Ghost(slots)
        self.evicted = 0

    def admit(self, slot: int, granule: int) -> None:
        """`slot` holds `granule` from now on."""
        self.touched[slot] = 0
        # While the cache fills, probation keeps its size and the rest begins in the main queue:
        # a loop larger than the cache then keeps a part of itself instead of nothing.
        filling = not self.evicted and self._length[_SMALL] >= self._small_target
        self._push(_MAIN if filling or self._ghost.take(granule) else _SMALL, slot)

    def adopt(self, slots: Iterable[int]) -> None:
        """All of `slots` hold something from an earlier run: they begin in the main queue."""
        after, before, queue = self._next, self._prev, self._queue
        end = previous = self._ends[_MAIN]
        count = 0
        for slot in slots:
            after[previous] = slot
            before[slot] = previous
            queue[slot] = _MAIN
            previous = slot
            count += 1
        after[previous] = end
        before[end] = previous
        self._length[_MAIN] = count

    def remove(self, slot: int) -> None:
        """`slot` is empty now."""
        self._unlink(slot)
        self._queue[slot] = _NONE

    def on_probation(self, slot: int) -> bool:
        """`slot` has yet to prove itself."""
        return self._queue[slot] == _SMALL

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

    @property
    def has_candidates(self) -> bool:
        """Not every slot is parked."""
        return self._length[_SMALL] + self._length[_MAIN] > 0

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
            self._ghost.add(granule)
        self.evicted += 1
        self.remove(slot)

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


class Ghost:
    """Which granules left lately: as many as there are slots, 4 bytes each.

    A hash table of buckets of four; an entry is 16 bits of the granule's hash and 16 bits of the
    time it left, in steps of 1/256 of the number of slots. The oldest entry of a full bucket
    goes. A wrong answer (1 in 16,000) costs a place in the main queue.
    """

    def __init__(self, slots: int) -> None:
        entries = 1 << max(4, (slots * 5 // 4 - 1).bit_length())
        self._entries = zeroed("I", entries)
        self._mask = entries - _WAYS
        self._per_step = max(1, slots // _AGES)
        self._life = -(-slots // self._per_step)
        self._count = 0

    def add(self, granule: int) -> None:
        """`granule` left now."""
        entries = self._entries
        self._count += 1
        # A fingerprint is never 0, so that an empty entry matches nothing.
        now = self._count // self._per_step & 0xFFFF
        mixed = granule * _HASH >> 20
        bucket = mixed & self._mask
        oldest, age = bucket, -1
        for at in range(bucket, bucket + _WAYS):
            entry = entries[at]
            if not entry:
                oldest = at
                break
            entry_age = now - entry & 0xFFFF
            if entry_age > age:
                oldest, age = at, entry_age
        entries[oldest] = (mixed >> 28 & 0xFFFF | 1) << 16 | now

    def take(self, granule: int) -> bool:
        """Was `granule` here? It is forgotten with the answer."""
        entries = self._entries
        mixed = granule * _HASH >> 20
        bucket = mixed & self._mask
        fingerprint = mixed >> 28 & 0xFFFF | 1
        for at in range(bucket, bucket + _WAYS):
            entry = entries[at]
            if entry >> 16 == fingerprint:
                entries[at] = 0
                return (self._count // self._per_step - entry & 0xFFFF) <= self._life
        return False

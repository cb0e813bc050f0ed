"""The dirty slots that are to be sent, in the order in which they became dirty, and since when."""

from __future__ import annotations

from collections import deque

from bridge.cache.blocks import zeroed
from bridge.datapath.cells import RING_GOAL, RING_HEAD, RING_TAIL, Cells

_MARK_EVERY_S = 1.0
"""One mark a second bounds their number; ages are right to a second."""


class DirtyRing:
    """Slots stand in it at most once. Positions run freely: `head` is the oldest, `tail` the next
    to be put in, and what stands before `goal` is to be written out now.

    All but the times is flat, for code that puts slots in by itself while that needs no new mark
    (`is_marked`): a slot into `slots` at the tail, modulo its length, and into `queued`.
    """

    __slots__ = ("_cells", "_marked_s", "_marks", "_size", "queued", "slots")

    def __init__(self, slots: int, cells: Cells[int]) -> None:
        """`cells`: of the cache."""
        self._size = slots + 1
        self._cells = cells
        self.slots = zeroed("I", self._size)
        self.queued = bytearray(self._size)
        """1 for a slot that stands in the ring."""
        self._marks: deque[tuple[float, int]] = deque()
        """(time, position): what stands before the position was dirty at that time, but for what
        the one before is about."""
        self._marked_s: float | None = None
        """The time of the last mark, whose position is the tail; None: there is none after
        `_marks`."""

    def put(self, slot: int, now: float) -> None:
        """`slot`, which is not in the ring, became dirty."""
        cells = self._cells
        self.queued[slot] = 1
        tail = cells[RING_TAIL]
        marked_s = self._marked_s
        if marked_s is None or now - marked_s >= _MARK_EVERY_S:
            if marked_s is not None:
                self._marks.append((marked_s, tail))
            self._marked_s = now
        self.slots[tail % self._size] = slot
        cells[RING_TAIL] = tail + 1

    def is_marked(self, now: float) -> bool:
        """What is put in now makes no other mark."""
        return self._marked_s is not None and now - self._marked_s < _MARK_EVERY_S

    def take(self, most: int) -> list[int]:
        """The oldest slots before the goal, at most so many, which leave the ring."""
        cells = self._cells
        head, tail = cells[RING_HEAD], cells[RING_TAIL]
        end = min(cells[RING_GOAL], tail, head + most)
        ring, size, queued = self.slots, self._size, self.queued
        slots = [ring[position % size] for position in range(head, end)]
        for slot in slots:
            queued[slot] = 0
        cells[RING_HEAD] = end
        while self._marks and self._marks[0][1] <= end:
            self._marks.popleft()
        if end == tail:
            self._marked_s = None
        return slots

    @property
    def head(self) -> int:
        """The position of the oldest."""
        return self._cells[RING_HEAD]

    @property
    def tail(self) -> int:
        """The position after the last."""
        return self._cells[RING_TAIL]

    @property
    def has_goal(self) -> bool:
        """Something in the ring is to be written out now."""
        cells = self._cells
        return cells[RING_HEAD] < min(cells[RING_GOAL], cells[RING_TAIL])

    @property
    def resting(self) -> int:
        """How many slots wait for their age."""
        cells = self._cells
        return cells[RING_TAIL] - max(cells[RING_HEAD], cells[RING_GOAL])

    def write_out_to(self, position: int) -> None:
        """Write out what stands before `position`."""
        self._cells[RING_GOAL] = max(self._cells[RING_GOAL], position)

    def stop(self) -> None:
        """What was to be written out now waits again."""
        self._cells[RING_GOAL] = min(self._cells[RING_GOAL], self._cells[RING_HEAD])

    def due(self, now: float, age_s: float) -> int:
        """The position before which everything is dirty for `age_s` by now; 0 if nothing is."""
        position = 0
        # The same sum as for the deadline: a difference may round to less than the age, and what
        # waits for the deadline would come back until the clock has moved.
        while self._marks and self._marks[0][0] + age_s <= now:
            position = self._marks.popleft()[1]
        if not self._marks and self._marked_s is not None and self._marked_s + age_s <= now:
            position, self._marked_s = self._cells[RING_TAIL], None
        return position

    @property
    def oldest_s(self) -> float | None:
        """When the oldest became dirty, as far as is known."""
        return self._marks[0][0] if self._marks else self._marked_s

"""The dirty slots that are to be sent, in the order in which they became dirty, and since when."""

from __future__ import annotations

from collections import deque

from bridge.cache.blocks import zeroed

_MARK_EVERY_S = 1.0
"""One mark a second bounds their number; ages are right to a second."""


class DirtyRing:
    """Slots stand in it at most once. Positions run freely: `head` is the oldest, `tail` the next
    to be put in, and what stands before `goal` is to be written out now."""

    __slots__ = ("_marks", "_ring", "_size", "goal", "head", "queued", "tail")

    def __init__(self, slots: int) -> None:
        self._size = slots + 1
        self._ring = zeroed("I", self._size)
        self.queued = bytearray(self._size)
        """1 for a slot that stands in the ring."""
        self.head = 0
        self.tail = 0
        self.goal = 0
        self._marks: deque[tuple[float, int]] = deque()
        """(time, position): what stands before the position was dirty at that time."""

    def put(self, slot: int, now: float) -> None:
        """`slot`, which is not in the ring, became dirty."""
        self.queued[slot] = 1
        marks = self._marks
        if not marks or now - marks[-1][0] >= _MARK_EVERY_S:
            marks.append((now, self.tail + 1))
        else:
            marks[-1] = (marks[-1][0], self.tail + 1)
        self._ring[self.tail % self._size] = slot
        self.tail += 1

    def take(self, most: int) -> list[int]:
        """The oldest slots before the goal, at most so many, which leave the ring."""
        end = min(self.goal, self.tail, self.head + most)
        ring, size, queued = self._ring, self._size, self.queued
        slots = [ring[position % size] for position in range(self.head, end)]
        for slot in slots:
            queued[slot] = 0
        self.head = end
        while self._marks and self._marks[0][1] <= end:
            self._marks.popleft()
        return slots

    @property
    def has_goal(self) -> bool:
        """Something in the ring is to be written out now."""
        return self.head < min(self.goal, self.tail)

    @property
    def resting(self) -> int:
        """How many slots wait for their age."""
        return self.tail - max(self.head, self.goal)

    def write_out_to(self, position: int) -> None:
        """Write out what stands before `position`."""
        self.goal = max(self.goal, position)

    def stop(self) -> None:
        """What was to be written out now waits again."""
        self.goal = min(self.goal, self.head)

    def due(self, now: float, age_s: float) -> int:
        """The position before which everything is dirty for `age_s` by now; 0 if nothing is."""
        position = 0
        # The same sum as for the deadline: a difference may round to less than the age, and what
        # waits for the deadline would come back until the clock has moved.
        while self._marks and self._marks[0][0] + age_s <= now:
            position = self._marks.popleft()[1]
        return position

    @property
    def oldest_s(self) -> float | None:
        """When the oldest became dirty, as far as is known."""
        return self._marks[0][0] if self._marks else None

"""Which slots are waited for, and by what: writes that must reach the server, and the flush."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.cache.blocks import zeroed
from bridge.cache.wait import WriteOutWait


class AwaitedSlots:
    """A wait has one token for each slot here, from `want` or `mark` to the `take` of the slot.

    A flush waits for many slots, so they are marks in a flat array. One flush at a time has any.
    """

    __slots__ = ("_flush", "_marked", "_marks", "_waits")

    def __init__(self, slots: int) -> None:
        self._waits: dict[int, list[WriteOutWait]] = {}
        self._flush: WriteOutWait | None = None
        self._marked = zeroed("B", slots + 1)
        self._marks = 0

    def __bool__(self) -> bool:
        return bool(self._marks or self._waits)

    def __len__(self) -> int:
        """How many slots are waited for; one that a flush and a write wait for counts twice."""
        return self._marks + len(self._waits)

    def want(self, slot: int, wait: WriteOutWait) -> None:
        """`wait`, which is no flush, waits for `slot`."""
        wait.pending += 1
        self._waits.setdefault(slot, []).append(wait)

    def begin_flush(self, wait: WriteOutWait) -> None:
        """It is `wait` that marks stand for from here on."""
        assert not self._marks
        self._flush = wait

    def mark(self, slots: Iterable[int]) -> None:
        """The flush waits for these."""
        marked, count = self._marked, 0
        for slot in slots:
            if not marked[slot]:
                marked[slot] = 1
                count += 1
        self._marks += count
        if self._flush is not None:
            self._flush.pending += count

    def of(self, slot: int) -> list[WriteOutWait]:
        """What waits for `slot`."""
        waits = self._waits.get(slot, [])
        if self._marked[slot] and self._flush is not None:
            return [*waits, self._flush]
        return waits

    def take(self, slot: int) -> list[WriteOutWait]:
        """What waits for `slot`, and now for other things: the caller has the tokens."""
        waits = self._waits.pop(slot, []) if self._waits else []
        if self._marked[slot] and self._flush is not None:
            self._marked[slot] = 0
            self._marks -= 1
            waits.append(self._flush)
        return waits

    def want_fua(self, parts: list[tuple[int, int]]) -> bool:
        """Something waits for one of these slots and wants FUA."""
        if not (self._waits or (self._flush is not None and self._flush.fua)):
            return False
        return any(wait.fua for slot, _ in parts for wait in self.of(slot))

"""The write-outs in flight, found by slot: that costs the same however many there are."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.cache.wait import WriteOutWait
from bridge.datapath.request import FUA, Request

_KEY_SHIFT = 16
"""A part is found by its slot and its lowest bit."""


class WriteOut(Request):
    """One WRITE in flight: blocks of one or more slots, one contiguous range of the disk."""

    __slots__ = ("epoch", "parts", "waits")

    parts: list[tuple[int, int]]
    """(slot, bits) in disk order; the bits of each part follow one another."""
    epoch: int
    """The one in which it was sent."""
    waits: list[WriteOutWait]

    def attach(self, wait: WriteOutWait) -> None:
        """`wait` waits for this, once."""
        if wait in self.waits:
            return
        self.waits.append(wait)
        wait.pending += 1
        if not self.flags & FUA:
            wait.unstable = True


class InFlight:
    """All that are in flight. `count` of them carry `size_bytes`."""

    __slots__ = ("_by_part", "count", "size_bytes")

    def __init__(self) -> None:
        self._by_part: dict[int, WriteOut] = {}
        self.count = 0
        self.size_bytes = 0

    def add(self, write_out: WriteOut) -> None:
        """It is about to be sent."""
        for slot, bits in write_out.parts:
            self._by_part[slot << _KEY_SHIFT | bits & -bits] = write_out
        self.count += 1
        self.size_bytes += write_out.length

    def remove(self, write_out: WriteOut) -> None:
        """The server has replied to it."""
        for slot, bits in write_out.parts:
            del self._by_part[slot << _KEY_SHIFT | bits & -bits]
        self.count -= 1
        self.size_bytes -= write_out.length

    def each(self) -> Iterable[WriteOut]:
        """All, the oldest first."""
        return dict.fromkeys(self._by_part.values())

    def of(self, slot: int, bits: int) -> list[WriteOut]:
        """Those with blocks of `slot`, of which `bits` are in flight."""
        key, found = slot << _KEY_SHIFT, []
        while bits:
            low = bits & -bits
            if (write_out := self._by_part.get(key | low)) is not None:
                found.append(write_out)
            bits ^= low
        return found

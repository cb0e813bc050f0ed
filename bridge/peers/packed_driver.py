"""The guest's side of a packed virtqueue; the same methods as `split_driver.SplitDriver`.

One ring holds what is available and what is used; two flag bits and a wrap counter on each side
tell which. `set_slot` and `set_driver_event` write anything, for tests that play a bad driver.

Source: virtio 1.3 §2.8 (packed virtqueues), §2.8.10 (event suppression structures).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from bridge.datapath.fence import fence
from bridge.peers.split_driver import Buffer, QueueFull
from bridge.spec.virtqueue import (
    DESC_AVAIL,
    DESC_NEXT,
    DESC_USED,
    DESCRIPTOR,
    EVENT_AT_DESCRIPTOR,
    EVENT_DISABLE,
    EVENT_ENABLE,
)

_pack_descriptor = DESCRIPTOR.pack_into
_pack_first = struct.Struct("=QIH").pack_into
_WRAP = 1 << 15


def write_packed_chain(table: memoryview, buffers: Sequence[Buffer]) -> int:
    """Fill an indirect table from its beginning; its length in bytes.

    In a packed ring the table's descriptors follow one another without NEXT (virtio 1.3 §2.8.7).
    """
    for index, (address, length, flags) in enumerate(buffers):
        _pack_descriptor(table, index * 16, address, length, 0, flags)
    return len(buffers) * 16


class PackedDriver:
    """One packed virtqueue from the driver's side, in `area` (`area_bytes(size)` bytes, zeroed).

    Descriptor ring, driver area and device area lie there one after the other, the latter two at
    `avail_offset` and `used_offset`. The size need not be a power of two. A chain is available as
    soon as it was added; `publish` only says whether to kick.
    """

    @staticmethod
    def area_bytes(size: int) -> int:
        """How much memory a ring of `size` descriptors takes."""
        return 16 * size + 8

    def __init__(self, area: memoryview, *, size: int, event_idx: bool = False) -> None:
        self.size = size
        self.avail_offset = 16 * size
        self.used_offset = 16 * size + 4
        self.table = area[: 16 * size]
        self._flags = self.table.cast("H")
        self._words = self.table.cast("I")
        self._driver_event = area[16 * size : 16 * size + 4].cast("H")
        self._device_event = area[16 * size + 4 : 16 * size + 8].cast("H")
        self._event_idx = event_idx
        self._free_ids = list(range(size - 1, -1, -1))
        self._free_slots = size
        self._chains: list[tuple[int, int] | None] = [None] * size
        self.avail_idx = 0
        """Slot of the next descriptor to make available."""
        self._avail_wrap = 1
        self.used_idx = 0
        """Slot of the next used descriptor."""
        self._used_wrap = 1
        self._added = 0

    def add(self, token: int, buffers: Sequence[Buffer]) -> None:
        """Make a chain of `buffers` available; `poll` gives `token` back when it is used.

        Raises QueueFull.
        """
        count = len(buffers)
        if count > self._free_slots:
            raise QueueFull(f"{self._free_slots} descriptors free, {count} needed")
        identity = self._free_ids.pop()
        self._chains[identity] = (token, count)
        self._free_slots -= count
        self._added += count
        table = self.table
        first = slot = self.avail_idx
        wrap = self._avail_wrap
        last = count - 1
        first_flags = 0
        for position, (address, length, flags) in enumerate(buffers):
            flags |= (DESC_AVAIL if wrap else DESC_USED) | (DESC_NEXT if position < last else 0)
            if position:
                _pack_descriptor(table, slot * 16, address, length, identity, flags)
            else:
                _pack_first(table, slot * 16, address, length, identity)
                first_flags = flags
            slot += 1
            if slot == self.size:
                slot = 0
                wrap ^= 1
        self.avail_idx = slot
        self._avail_wrap = wrap
        fence()  # the whole chain must be visible before its first descriptor is available
        self._flags[first * 8 + 7] = first_flags

    def publish(self) -> bool:
        """True when the device wants to be kicked for what was added since the last time."""
        added = self._added
        if not added:
            return False
        self._added = 0
        fence()  # the descriptors must be visible before the device's wish is read
        flags = self._device_event[1]
        if flags != EVENT_AT_DESCRIPTOR or not self._event_idx:
            return flags != EVENT_DISABLE
        wish = self._device_event[0]
        event = wish & ~_WRAP
        new = self.avail_idx
        if wish >> 15 != self._avail_wrap:
            event -= self.size
        return ((new - event - 1) & 0xFFFF) < (added & 0xFFFF)

    def poll(self) -> list[tuple[int, int]]:
        """Every new completion: token and used length in bytes (as the device says, unchecked).

        Raises ValueError for a buffer that the device was not given.
        """
        done: list[tuple[int, int]] = []
        slot, wrap = self.used_idx, self._used_wrap
        while self._is_used(slot, wrap):
            identity = self._flags[slot * 8 + 6]
            chain = self._chains[identity] if identity < self.size else None
            if chain is None:
                raise ValueError(f"device used buffer {identity}, which it was not given")
            self._chains[identity] = None
            token, count = chain
            self._free_ids.append(identity)
            self._free_slots += count
            done.append((token, self._words[slot * 4 + 2]))
            slot += count
            if slot >= self.size:
                slot -= self.size
                wrap ^= 1
        self.used_idx, self._used_wrap = slot, wrap
        return done

    def _is_used(self, slot: int, wrap: int) -> bool:
        flags = self._flags[slot * 8 + 7]
        return flags & (DESC_AVAIL | DESC_USED) == (DESC_AVAIL | DESC_USED if wrap else 0)

    def arm(self) -> bool:
        """Ask for a call at the next completion; True when there is one already."""
        if self._event_idx:
            self._driver_event[0] = self.used_idx | self._used_wrap << 15
            self._driver_event[1] = EVENT_AT_DESCRIPTOR
        else:
            self._driver_event[1] = EVENT_ENABLE
        fence()  # the wish must be visible before the device's progress is read
        return self.has_used

    def disarm(self) -> None:
        """Ask for no calls."""
        self._driver_event[1] = EVENT_DISABLE

    @property
    def has_used(self) -> bool:
        """`poll` would return something."""
        return self._is_used(self.used_idx, self._used_wrap)

    @property
    def in_flight(self) -> int:
        """Number of chains whose completion was not taken yet."""
        return self.size - len(self._free_ids)

    @property
    def base(self) -> int:
        """What SET_VRING_BASE says for a ring that goes on where this driver is."""
        return _base(self.avail_idx, self._avail_wrap, self.used_idx, self._used_wrap)

    @property
    def restore_base(self) -> int:
        """What SET_VRING_BASE says after the back-end died: both positions are the used one."""
        slot, wrap = self.used_idx, self._used_wrap
        left = self.in_flight
        while left and self._is_used(slot, wrap):
            chain = self._chains[self._flags[slot * 8 + 6]]
            if chain is None:
                break
            left -= 1
            slot += chain[1]
            if slot >= self.size:
                slot -= self.size
                wrap ^= 1
        return _base(slot, wrap, slot, wrap)

    # The hostile way.

    def set_slot(self, slot: int, address: int, length: int, identity: int, flags: int) -> None:
        """Store any descriptor in the ring, available or not by its flags."""
        _pack_descriptor(self.table, slot * 16, address, length, identity, flags)

    def available_flags(self, flags: int = 0) -> int:
        """`flags` as those of a descriptor that is available in the current round."""
        return flags | (DESC_AVAIL if self._avail_wrap else DESC_USED)

    def set_driver_event(self, off_wrap: int, flags: int) -> None:
        """Store any driver event suppression structure."""
        self._driver_event[0] = off_wrap
        self._driver_event[1] = flags

    @property
    def device_event(self) -> tuple[int, int]:
        """The device event suppression structure: off_wrap and flags."""
        return self._device_event[0], self._device_event[1]


def _base(avail: int, avail_wrap: int, used: int, used_wrap: int) -> int:
    return avail | avail_wrap << 15 | used << 16 | used_wrap << 31

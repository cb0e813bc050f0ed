"""The guest's side of a split virtqueue: adds buffers, kicks, takes completions.

Used by `driver_queue`, and by the tests, which need a driver that can also do what a driver must
not: `write_descriptor`, `put_head` and `set_avail_idx` write anything. Plain and synchronous; the
owner of the eventfds kicks and waits.

Source: virtio 1.3 §2.7 (split virtqueues), §2.7.7 and §2.7.10 (notification suppression).
"""

from __future__ import annotations

from collections.abc import Sequence

from bridge.datapath.fence import fence
from bridge.spec.virtqueue import (
    AVAIL_NO_INTERRUPT,
    DESC_NEXT,
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    USED_NO_NOTIFY,
)

_pack_descriptor = DESCRIPTOR.pack_into

Buffer = tuple[int, int, int]
"""Guest address, length in bytes, flags (0, DESC_WRITE, or DESC_INDIRECT)."""


class QueueFull(Exception):
    """No descriptors left until completions are taken."""


def write_descriptor(
    table: memoryview, index: int, address: int, length: int, flags: int, next_index: int
) -> None:
    """Put any descriptor into any table, ring or indirect."""
    _pack_descriptor(table, index * DESCRIPTOR_BYTES, address, length, flags, next_index)


def write_chain(table: memoryview, buffers: Sequence[Buffer]) -> int:
    """Fill an indirect table from its beginning with a chain; its length in bytes."""
    last = len(buffers) - 1
    for index, (address, length, flags) in enumerate(buffers):
        if index < last:
            write_descriptor(table, index, address, length, flags | DESC_NEXT, index + 1)
        else:
            write_descriptor(table, index, address, length, flags, 0)
    return len(buffers) * DESCRIPTOR_BYTES


class SplitDriver:
    """One split virtqueue from the driver's side, in `area` (`area_bytes(size)` bytes, zeroed).

    Descriptor table, available ring and used ring lie there one after the other, at `avail_offset`
    and `used_offset`. `base` is where the available and used indexes start; both are written.
    """

    @staticmethod
    def area_bytes(size: int) -> int:
        """How much memory a ring of `size` descriptors takes, all parts aligned."""
        return SplitDriver._used_offset(size) + 6 + 8 * size + 2

    @staticmethod
    def _used_offset(size: int) -> int:
        return (16 * size + 6 + 2 * size + 3) & ~3

    def __init__(
        self, area: memoryview, *, size: int, event_idx: bool = False, base: int = 0
    ) -> None:
        self.size = size
        self.avail_offset = 16 * size
        self.used_offset = self._used_offset(size)
        self.table = area[: 16 * size]
        avail = area[self.avail_offset : self.avail_offset + 6 + 2 * size]
        used = area[self.used_offset : self.used_offset + 6 + 8 * size]
        self._avail = avail.cast("H")
        self._used = used[: 4 + 8 * size].cast("H")
        self._used_elements = used[4 : 4 + 8 * size].cast("I")
        self._avail_event = used[4 + 8 * size :].cast("H")
        self._event_idx = event_idx
        self._mask = size - 1
        self._used_event = 2 + size
        self._free = list(range(size - 1, -1, -1))
        self._chains: list[tuple[int, list[int]] | None] = [None] * size
        self.avail_idx = base
        """Index after the last head that was put into the ring; visible from `publish` on."""
        self._published_idx = base
        self.used_idx = base
        """Index after the last completion that was taken."""
        self._avail[1] = base
        self._used[1] = base

    # The ordinary way.

    def add(self, token: int, buffers: Sequence[Buffer]) -> None:
        """Put a chain of `buffers` into the ring; `poll` gives `token` back when it is used.

        Raises QueueFull.
        """
        free = self._free
        if len(buffers) > len(free):
            raise QueueFull(f"{len(free)} descriptors free, {len(buffers)} needed")
        table = self.table
        idx = self.avail_idx
        if len(buffers) == 1:
            # The usual case: one indirect descriptor.
            head = free.pop()
            address, length, flags = buffers[0]
            _pack_descriptor(table, head * 16, address, length, flags, 0)
            self._chains[head] = (token, [head])
        else:
            heads = [free.pop() for _ in buffers]
            head = heads[0]
            last = len(buffers) - 1
            for position, (address, length, flags) in enumerate(buffers):
                if position < last:
                    flags |= DESC_NEXT
                    following = heads[position + 1]
                else:
                    following = 0
                _pack_descriptor(table, heads[position] * 16, address, length, flags, following)
            self._chains[head] = (token, heads)
        self._avail[2 + (idx & self._mask)] = head
        self.avail_idx = (idx + 1) & 0xFFFF

    def publish(self) -> bool:
        """Show the device what was added; True when it wants to be kicked."""
        old = self._published_idx
        new = self.avail_idx
        if old == new:
            return False
        self._avail[1] = new
        self._published_idx = new
        fence()  # the index must be visible before the device's wish is read
        if self._event_idx:
            event = self._avail_event[0]
            return ((new - event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        return not self._used[0] & USED_NO_NOTIFY

    def poll(self) -> list[tuple[int, int]]:
        """Every new completion: token and used length in bytes (as the device says, unchecked).

        Raises ValueError for a descriptor that the device was not given.
        """
        end = self._used[1]
        idx = self.used_idx
        done: list[tuple[int, int]] = []
        elements = self._used_elements
        while idx != end:
            slot = (idx & self._mask) * 2
            head = elements[slot]
            chain = self._chains[head] if head < self.size else None
            if chain is None:
                raise ValueError(f"device used descriptor {head}, which it was not given")
            self._chains[head] = None
            self._free += chain[1]
            done.append((chain[0], elements[slot + 1]))
            idx = (idx + 1) & 0xFFFF
        self.used_idx = idx
        return done

    def arm(self) -> bool:
        """Ask for a call at the next completion; True when there is one already."""
        if self._event_idx:
            self._avail[self._used_event] = self.used_idx
        else:
            self._avail[0] = 0
        fence()  # the wish must be visible before the device's progress is read
        return self._used[1] != self.used_idx

    def disarm(self) -> None:
        """Ask for no calls (a hint to the device)."""
        if self._event_idx:
            self._avail[self._used_event] = (self.used_idx + 0x8000) & 0xFFFF
        else:
            self._avail[0] = AVAIL_NO_INTERRUPT

    @property
    def has_used(self) -> bool:
        """`poll` would return something."""
        return self._used[1] != self.used_idx

    @property
    def in_flight(self) -> int:
        """Number of chains that the device has not used yet."""
        return sum(chain is not None for chain in self._chains)

    @property
    def base(self) -> int:
        """What SET_VRING_BASE says for a ring that starts now."""
        return self.avail_idx

    @property
    def restore_base(self) -> int:
        """What SET_VRING_BASE says after the back-end died: where it has got to."""
        return self._used[1]

    # The hostile way.

    def put_head(self, head: int) -> None:
        """Put any head into the available ring, to be shown by the next `publish`."""
        self._avail[2 + (self.avail_idx & self._mask)] = head
        self.avail_idx = (self.avail_idx + 1) & 0xFFFF

    def expect(self, head: int, token: int) -> None:
        """Take a completion of `head` as that of `token`, for chains not made with `add`."""
        self._chains[head] = (token, [])

    def set_avail_idx(self, idx: int) -> None:
        """Store any available index, at once."""
        self.avail_idx = self._published_idx = idx
        self._avail[1] = idx

    def set_avail_flags(self, flags: int) -> None:
        """Store any available flags."""
        self._avail[0] = flags

    def set_used_event(self, idx: int) -> None:
        """Store any used_event."""
        self._avail[self._used_event] = idx

    @property
    def device_used_idx(self) -> int:
        """The used index as the device wrote it."""
        return self._used[1]

    @property
    def device_used_flags(self) -> int:
        """The used flags as the device wrote them."""
        return self._used[0]

    @property
    def device_avail_event(self) -> int:
        """The avail_event as the device wrote it."""
        return self._avail_event[0]

    def used_element(self, idx: int) -> tuple[int, int]:
        """Head and length of the used element at a free-running index."""
        slot = (idx & self._mask) * 2
        return self._used_elements[slot], self._used_elements[slot + 1]

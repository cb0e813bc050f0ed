"""The guest's side of a packed virtqueue, for tests (virtio 1.3 §2.8)."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from bridge.datapath.fence import fence
from bridge.peers.split_driver import Buffer
from bridge.spec.virtqueue import DESC_AVAIL, DESC_NEXT, DESC_USED

_DESCRIPTOR = struct.Struct("=QIHH")


class PackedDriver:
    """One packed ring in `area`: descriptors, then the driver's and the device's event area.

    `start` is where both indexes begin, in the lap of wrap counter `wrap`.
    """

    @staticmethod
    def area_bytes(size: int) -> int:
        return 16 * size + 8

    def __init__(self, area: memoryview, *, size: int, start: int = 0, wrap: int = 1) -> None:
        self.size = size
        self.ring = area[: 16 * size]
        self._halves = self.ring.cast("H")
        self.driver_event = area[16 * size : 16 * size + 4].cast("H")
        self.device_event = area[16 * size + 4 : 16 * size + 8].cast("H")
        self.next_avail = self.next_used = start
        self.avail_wrap = self.used_wrap = wrap
        self.start_base = start | wrap << 15 | start << 16 | wrap << 31
        self._chains: dict[int, tuple[int, int]] = {}
        self._ids = list(range(size))
        for slot in range(size):
            lap = wrap if slot < start else wrap ^ 1
            self._halves[8 * slot + 7] = DESC_AVAIL | DESC_USED if lap else 0

    @property
    def free(self) -> int:
        return self.size - sum(count for _, count in self._chains.values())

    def add(self, token: int, buffers: Sequence[Buffer], *, buffer_id: int | None = None) -> None:
        """Make a chain available, at once."""
        assert len(buffers) <= self.free
        id_ = self._ids.pop() if buffer_id is None else buffer_id
        first: tuple[int, int] | None = None
        for position, (address, length, flags) in enumerate(buffers):
            slot = self.next_avail
            if position < len(buffers) - 1:
                flags |= DESC_NEXT
            flags |= DESC_AVAIL if self.avail_wrap else DESC_USED
            _DESCRIPTOR.pack_into(
                self.ring, 16 * slot, address, length, id_, self._halves[8 * slot + 7]
            )
            if first is None:
                first = slot, flags
            else:
                self._halves[8 * slot + 7] = flags
            self.next_avail += 1
            if self.next_avail == self.size:
                self.next_avail = 0
                self.avail_wrap ^= 1
        self._chains[id_] = token, len(buffers)
        fence()
        assert first is not None
        self._halves[8 * first[0] + 7] = first[1]

    def poll(self) -> list[tuple[int, int]]:
        """Every new completion: token and used length."""
        done = []
        while True:
            slot = self.next_used
            _, length, id_, flags = _DESCRIPTOR.unpack_from(self.ring, 16 * slot)
            if not (flags >> 7 & 1) == (flags >> 15 & 1) == self.used_wrap:
                return done
            if id_ not in self._chains:
                raise ValueError(f"device used buffer {id_}, which it was not given")
            token, count = self._chains.pop(id_)
            self._ids.append(id_)
            done.append((token, length))
            self.next_used += count
            if self.next_used >= self.size:
                self.next_used -= self.size
                self.used_wrap ^= 1

    def wants_kick(self, old: int) -> bool:
        """Whether the device asked for a kick for descriptors from `old` to `next_avail`."""
        position, flags = self.device_event
        if flags != 2:
            return flags == 0
        wanted = position & 0x7FFF
        if position >> 15 != self.avail_wrap:
            wanted -= self.size
        if self.next_avail <= old:
            old -= self.size
        return old <= wanted < self.next_avail

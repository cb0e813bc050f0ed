"""One virtqueue of the built-in guest: request slots in shared memory, submitted and collected.

Everything here is plain and synchronous, but for `wait`.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Sequence

import trio

from bridge.peers.packed_driver import PackedDriver, write_packed_chain
from bridge.peers.shared_memory import SharedMemory
from bridge.peers.split_driver import QueueFull, SplitDriver, write_chain
from bridge.spec.virtio_blk import T_DISCARD, T_OUT, T_WRITE_ZEROES
from bridge.spec.virtqueue import (
    DESC_INDIRECT,
    DESC_WRITE,
    DESCRIPTOR_BYTES,
    F_EVENT_IDX,
    F_INDIRECT,
    F_RING_PACKED,
)

STATUS_NONE = 0xFF
"""What a status byte holds until the device has written it."""

_PAGE_BYTES = 4096
_HEADER = struct.Struct("<IIQ")


def queue_memory_bytes(*, size: int, depth: int, request_bytes: int, segments: int) -> int:
    """At most this much memory a `DriverQueue` takes, alignment included."""
    table_bytes = (segments + 2) * DESCRIPTOR_BYTES + 64
    per_slot = request_bytes + _PAGE_BYTES + table_bytes + 32
    return SplitDriver.area_bytes(size) + 2 * _PAGE_BYTES + depth * per_slot


class DriverQueue:
    """One virtqueue with `depth` request slots: the fast, synchronous way.

    `submit` puts a request into the ring and returns its slot, `kick` shows what was submitted to
    the device, `poll` returns what is complete. Before a slot is submitted again its data can be
    read with `data(slot)`.
    """

    def __init__(
        self,
        index: int,
        memory: SharedMemory,
        *,
        size: int,
        depth: int,
        request_bytes: int,
        features: int,
        segment_bytes: int | None = None,
        base: int = 0,
    ) -> None:
        """`base`: of a split ring, the index that it starts at."""
        self.index = index
        self.size = size
        self.depth = depth
        self.request_bytes = request_bytes
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.error_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicks = 0
        """Kicks sent, and calls waited for: what notification suppression saves."""
        self.calls = 0
        self._indirect = bool(features & F_INDIRECT)
        self._segment_bytes = segment_bytes or request_bytes
        is_packed = bool(features & F_RING_PACKED)
        kind = PackedDriver if is_packed else SplitDriver
        self._write_table = write_packed_chain if is_packed else write_chain
        area_bytes = kind.area_bytes(size)
        self.ring_address = memory.allocate(area_bytes, align=4096)
        area = memory.view(self.ring_address, area_bytes)
        event_idx = bool(features & F_EVENT_IDX)
        self.driver: SplitDriver | PackedDriver = (
            PackedDriver(area, size=size, event_idx=event_idx)
            if is_packed
            else SplitDriver(area, size=size, event_idx=event_idx, base=base)
        )
        self._make_slots(memory)
        self.free = list(range(depth - 1, -1, -1))
        """Slots that are not in flight."""

    def _make_slots(self, memory: SharedMemory) -> None:
        """Header, status byte, data buffer and indirect table of every slot."""
        depth = self.depth
        segments = -(-self.request_bytes // self._segment_bytes)
        headers = memory.allocate(depth * 16)
        statuses = memory.allocate(depth)
        self._headers = memory.view(headers, depth * 16)
        self._statuses = memory.view(statuses, depth)
        self._header_buffers = [(headers + slot * 16, 16, 0) for slot in range(depth)]
        self._status_buffers = [(statuses + slot, 1, DESC_WRITE) for slot in range(depth)]
        self._data_addresses = [
            memory.allocate(self.request_bytes, align=4096) for _ in range(depth)
        ]
        self._data = [memory.view(each, self.request_bytes) for each in self._data_addresses]
        table_bytes = (segments + 2) * DESCRIPTOR_BYTES
        tables = [memory.allocate(table_bytes) for _ in range(depth)] if self._indirect else []
        self._table_addresses = tables
        self._tables = [memory.view(each, table_bytes) for each in tables]
        self._shapes: list[tuple[int, int]] = [(-1, -1)] * depth
        self._chains: list[Sequence[tuple[int, int, int]]] = [()] * depth

    # The fast way.

    def submit(
        self,
        kind: int,
        sector: int = 0,
        length: int = 0,
        data: bytes | bytearray | memoryview | None = None,
    ) -> int:
        """Put a request of `length` data bytes into the ring; its slot. Nothing is kicked.

        `data` is copied into the slot's buffer; None leaves that as it is. Raises QueueFull.
        """
        free = self.free
        if not free:
            raise QueueFull("every slot is in flight")
        slot = free[-1]
        if data is not None:
            self._data[slot][: len(data)] = data
        _HEADER.pack_into(self._headers, slot * 16, kind, 0, sector)
        self._statuses[slot] = STATUS_NONE
        flags = 0 if kind in (T_OUT, T_DISCARD, T_WRITE_ZEROES) else DESC_WRITE
        if self._shapes[slot] != (length, flags):
            self._shape(slot, length, flags)
        self.driver.add(slot, self._chains[slot])
        free.pop()
        return slot

    def _shape(self, slot: int, length: int, flags: int) -> None:
        """Describe the slot's buffers anew; most of the time the old description still fits."""
        start = self._data_addresses[slot]
        step = self._segment_bytes
        chain = [
            self._header_buffers[slot],
            *(
                (start + offset, min(step, length - offset), flags)
                for offset in range(0, length, step)
            ),
            self._status_buffers[slot],
        ]
        if self._indirect:
            table_bytes = self._write_table(self._tables[slot], chain)
            self._chains[slot] = [(self._table_addresses[slot], table_bytes, DESC_INDIRECT)]
        else:
            self._chains[slot] = chain
        self._shapes[slot] = (length, flags)

    def kick(self) -> None:
        """Show the device what was submitted, and wake it if it wants to be woken."""
        if self.driver.publish():
            self.kicks += 1
            os.eventfd_write(self.kick_fd, 1)

    def poll(self) -> list[tuple[int, int]]:
        """Every new completion: slot and status byte. Its buffers stay until the next submit."""
        done = self.driver.poll()
        if not done:
            return []
        statuses = self._statuses
        free = self.free
        results = []
        for slot, _ in done:
            free.append(slot)
            results.append((slot, statuses[slot]))
        return results

    def data(self, slot: int, length: int | None = None) -> memoryview:
        """The slot's data buffer."""
        return self._data[slot][:length]

    async def wait(self) -> None:
        """Return when `poll` has something to return, asleep until the device calls."""
        if self.driver.arm():
            await trio.lowlevel.checkpoint()
        else:
            while not self.driver.has_used:
                await trio.lowlevel.wait_readable(self.call_fd)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self.call_fd)
                self.calls += 1
        self.driver.disarm()

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick_fd, self.call_fd, self.error_fd):
            os.close(fd)

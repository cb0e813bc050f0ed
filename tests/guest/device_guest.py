"""A guest and its front-end on a `BlkDevice`, without a socket: memory, rings, eventfds."""

from __future__ import annotations

import contextlib
import mmap
import os
import struct
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import trio

from bridge.datapath.loop import Loop
from bridge.datapath.request import Request
from bridge.errors import LeftBehind
from bridge.guest.above import Above
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user.device_interface import MemoryRegion, RingSetup
from bridge.guest.virtio.blk_config import DiskGeometry
from bridge.peers.split_driver import Buffer, SplitDriver
from bridge.spec.virtqueue import DESC_WRITE, F_RING_PACKED
from tests.guest.virtio.mock import FakeDisk
from tests.guest.virtio.packed_driver import PackedDriver

MEMORY_BYTES = 4 << 20
USER_BASE = 0x7F00_0000_0000
RING_BYTES = 0x8000
_DATA = 0x100000


class GuestRing:
    """One ring, at guest address `index * RING_BYTES`, with its eventfds."""

    def __init__(
        self, memory: memoryview, index: int, *, size: int, packed: bool, event_idx: bool
    ) -> None:
        self.index = index
        self.size = size
        self.packed = packed
        self.at = index * RING_BYTES
        area = memory[self.at : self.at + RING_BYTES]
        self.driver: Any
        if packed:
            self.driver = PackedDriver(area, size=size)
            self.offsets = (0, 16 * size, 16 * size + 4)
            self.base = self.driver.start_base
        else:
            self.driver = SplitDriver(area, size=size, event_idx=event_idx)
            self.offsets = (0, self.driver.avail_offset, self.driver.used_offset)
            self.base = 0
        self.kick, self.call, self.error = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))

    def setup(self, **changes: Any) -> RingSetup:
        """How the front-end describes it."""
        desc, avail, used = (USER_BASE + self.at + offset for offset in self.offsets)
        values: dict[str, Any] = {
            "size": self.size,
            "desc_user_address": desc,
            "avail_user_address": avail,
            "used_user_address": used,
            "log_guest_address": None,
            "base": self.base,
            "kick_fd": self.kick,
            "call_fd": self.call,
            "error_fd": self.error,
        }
        return RingSetup(**(values | changes))

    def add(self, token: int, buffers: list[Buffer]) -> None:
        self.driver.add(token, buffers)
        if not self.packed:
            self.driver.publish()

    def kick_device(self) -> None:
        os.eventfd_write(self.kick, 1)

    def calls(self) -> int:
        """Calls since the last look."""
        return signals(self.call)

    def close(self) -> None:
        for fd in (self.kick, self.call, self.error):
            os.close(fd)


def signals(fd: int) -> int:
    """What an eventfd has counted since the last look."""
    try:
        return os.eventfd_read(fd)
    except BlockingIOError:
        return 0


_CALLS = (
    *("on_abandoned", "on_all_stopped", "on_left_behind", "on_starting"),
    *("on_recovered", "on_inherited", "on_fresh_guest"),
)


class StorageSide(Above):
    """The layer above a device, which does what a test wants of it."""

    def __init__(self, **calls: Callable[..., Any]) -> None:
        assert set(calls) <= set(_CALLS)
        self.calls = calls

    def abandoned(self, requests: Sequence[Request]) -> None:
        if "on_abandoned" in self.calls:
            self.calls["on_abandoned"](requests)

    async def all_stopped(self) -> None:
        if "on_all_stopped" in self.calls:
            await self.calls["on_all_stopped"]()

    async def left_behind(self) -> LeftBehind | None:
        if "on_left_behind" not in self.calls:
            return None
        left: LeftBehind | None = await self.calls["on_left_behind"]()
        return left

    def starting(self, go: Callable[[], None]) -> bool:
        return "on_starting" not in self.calls or bool(self.calls["on_starting"](go))

    def recovered(self) -> None:
        if "on_recovered" in self.calls:
            self.calls["on_recovered"]()

    def inherited(self, unflushed_on: int, loss_unreported: bool) -> None:
        if "on_inherited" in self.calls:
            self.calls["on_inherited"](unflushed_on, loss_unreported)

    def fresh_guest(self) -> None:
        if "on_fresh_guest" in self.calls:
            self.calls["on_fresh_guest"]()


class DeviceGuest:
    """A device with its front-end's view of it."""

    def __init__(
        self,
        loop: Loop,
        disk: FakeDisk,
        *,
        packed: bool = False,
        event_idx: bool = True,
        size: int = 16,
        max_queues: int = 4,
        geometry: DiskGeometry | None = None,
        **options: Any,
    ) -> None:
        self.loop = loop
        self.disk = disk
        disk.turn = loop.turn
        self.stopped_all = 0
        self.above = StorageSide(
            on_abandoned=options.get("on_abandoned", disk.abandoned),
            on_all_stopped=options.get("on_all_stopped", self._all_stopped),
            **{name: each for name, each in options.items() if name in _CALLS[2:]},
        )
        self.device = BlkDevice(
            loop,
            disk,
            geometry or DiskGeometry(len(disk.data)),
            serial="serial",
            max_queues=max_queues,
            above=self.above,
            **{name: each for name, each in options.items() if name not in self.above.calls},
        )
        self.packed = packed
        self.size = size
        self.event_idx = event_idx
        self.fd = os.memfd_create("device-guest")
        os.ftruncate(self.fd, MEMORY_BYTES)
        self.memory = memoryview(mmap.mmap(self.fd, MEMORY_BYTES))
        self.rings: dict[int, GuestRing] = {}
        self._next = _DATA
        self._token = 0

    async def _all_stopped(self) -> None:
        self.stopped_all += 1

    def region(self, address: int = 0, length: int = MEMORY_BYTES) -> MemoryRegion:
        return MemoryRegion(address, length, USER_BASE + address, address, self.fd)

    async def connect(self, features: int | None = None) -> None:
        """Negotiate everything (packed rings only if wanted), share the memory."""
        if features is None:
            features = self.device.offered_features()
            if not self.packed:
                features &= ~F_RING_PACKED
            if not self.event_idx:
                features &= ~(1 << 29)
        self.device.set_features(features)
        await self.device.replace_memory([self.region()])

    def make_ring(self, index: int = 0) -> GuestRing:
        ring = GuestRing(
            self.memory, index, size=self.size, packed=self.packed, event_idx=self.event_idx
        )
        self.rings[index] = ring
        return ring

    def start(self, index: int = 0, **changes: Any) -> GuestRing:
        """A ring that runs."""
        ring = self.rings.get(index) or self.make_ring(index)
        self.device.start_ring(index, ring.setup(**changes))
        return ring

    def alloc(self, content: bytes) -> int:
        address = -(-self._next // 16) * 16
        self._next = address + len(content)
        self.memory[address : address + len(content)] = content
        return address

    def put(
        self, type_: int, sector: int = 0, *, out: bytes = b"", room: int = 0, index: int = 0
    ) -> PendingRequest:
        """Make a request available (no kick)."""
        self._token += 1
        buffers = [(self.alloc(struct.pack("<IIQ", type_, 0, sector)), 16, 0)]
        if out:
            buffers.append((self.alloc(out), len(out), 0))
        data = self.alloc(b"\xee" * room)
        if room:
            buffers.append((data, room, DESC_WRITE))
        status = self.alloc(b"\xee")
        buffers.append((status, 1, DESC_WRITE))
        self.rings[index].add(self._token, buffers)
        return PendingRequest(self, self._token, data, room, status)

    async def request(self, type_: int, sector: int = 0, **options: Any) -> tuple[int, bytes]:
        """One request from kick to completion: status and data."""
        pending = self.put(type_, sector, **options)
        ring = self.rings[options.get("index", 0)]
        ring.kick_device()
        done: list[tuple[int, int]] = []

        def answered() -> bool:
            done.extend(ring.driver.poll())
            return any(token == pending.token for token, _ in done)

        await until(answered)
        return pending.status, pending.data

    def close(self) -> None:
        for ring in self.rings.values():
            ring.close()
        os.close(self.fd)
        # Not left to the garbage collector: another test may be counting descriptors.
        self.rings.clear()
        self.disk.requests.clear()
        del self.memory, self.device


class PendingRequest:
    """Where a request's answer will be."""

    def __init__(self, guest: DeviceGuest, token: int, data: int, room: int, status: int) -> None:
        self.token = token
        self.data_address = data
        self.status_address = status
        self._guest = guest
        self._room = room

    @property
    def status(self) -> int:
        return self._guest.memory[self.status_address]

    @property
    def data(self) -> bytes:
        return bytes(self._guest.memory[self.data_address : self.data_address + self._room])


async def until(condition: Callable[[], bool]) -> None:
    """Let the others work until `condition`; no clock is involved."""
    for _ in range(2000):
        if condition():
            return
        await trio.lowlevel.checkpoint()
    raise AssertionError("it did not happen")


async def a_while() -> None:
    """Let the others do whatever they can."""
    for _ in range(30):
        await trio.lowlevel.checkpoint()


@contextlib.asynccontextmanager
async def running_device(
    *, disk: FakeDisk | None = None, **options: Any
) -> AsyncIterator[DeviceGuest]:
    """A device whose loop runs; nothing is negotiated yet."""
    loop = Loop(poll_us=0)
    guest = DeviceGuest(loop, disk or FakeDisk(), **options)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        nursery.start_soon(guest.device.run)
        try:
            yield guest
        finally:
            with trio.CancelScope(shield=True):
                await guest.device.disconnected()
            nursery.cancel_scope.cancel()
    loop.close()
    guest.close()

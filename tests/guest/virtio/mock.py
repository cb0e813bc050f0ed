"""A guest without a VM: memory, a split ring in it, and the device's queue and engine over it."""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Iterable

from bridge.datapath.request import READ, WRITE, Request
from bridge.datapath.turn import Turn
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.chain import Chain
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.guest.virtio.queue import VirtQueue
from bridge.guest.virtio.split_queue import SplitQueue, ring_sizes_bytes
from bridge.peers import split_driver as guest_driver
from bridge.peers.split_driver import Buffer, SplitDriver, write_chain
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_WRITE
from tests import turns
from tests.guest.memory_target import MemoryTarget

DEVICE_WRITES = DESC_WRITE
MEMORY_BYTES = 4 << 20
USER_BASE = 0x7F00_0000_0000
"""Where the front-end has guest address 0 in its own memory."""
UNWRITTEN = 0xEE
"""What status bytes and data hold before the device writes to them."""

_PATTERN = bytes((at // 512 + at) & 0xFF for at in range(1 << 16))


class QueueRig:
    """`memory` with a ring of `size` at address 0; `put` adds chains, `queue` is the device's."""

    def __init__(
        self,
        *,
        size: int = 16,
        event_idx: bool = True,
        indirect: bool = True,
        base: int = 0,
        regions: Iterable[tuple[int, int, int]] = ((0, 0, MEMORY_BYTES),),
    ) -> None:
        """`regions`: guest address, offset in the shared memory, length. The first holds the
        ring at its start."""
        self.shared = memoryview(mmap.mmap(-1, MEMORY_BYTES))
        self.memory = GuestMemory(
            [
                Region(address, USER_BASE + offset, self.shared[offset : offset + length])
                for address, offset, length in regions
            ]
        )
        self.size = size
        area = self.memory.views(0, SplitDriver.area_bytes(size))[0]
        self.driver = SplitDriver(area, size=size, event_idx=event_idx, base=base)
        table, available, used = ring_sizes_bytes(size)
        at, of = self.driver.avail_offset, self.driver.used_offset
        self.areas = (area[:table], area[at : at + available], area[of : of + used])
        self.event_idx = event_idx
        self.indirect = indirect
        self._next = 0x10000
        self._token = 0
        self.queue: VirtQueue = self.make_queue(base=base)

    def make_queue(self, *, base: int) -> SplitQueue:
        """Another device on the same ring."""
        return SplitQueue(
            self.memory,
            self.areas,
            size=self.size,
            base=base,
            event_idx=self.event_idx,
            indirect=self.indirect,
        )

    def alloc(self, content: bytes | int, *, alignment: int = 16) -> int:
        """The address of new memory: `content`, or that many bytes of UNWRITTEN."""
        data = content if isinstance(content, bytes) else bytes([UNWRITTEN]) * content
        address = -(-self._next // alignment) * alignment
        self._next = address + len(data)
        self.write(address, data)
        return address

    def write(self, address: int, data: bytes) -> None:
        """Store into guest memory."""
        for view in self.memory.views(address, len(data)) if data else ():
            view[:] = data[: len(view)]
            data = data[len(view) :]

    def read(self, address: int, length: int) -> bytes:
        """Load from guest memory."""
        return b"".join(self.memory.views(address, length)) if length else b""

    def put(self, *buffers: Buffer, indirect: bool = False) -> int:
        """Make a chain available (direct, or in an indirect table); its token."""
        self._token += 1
        chain = list(buffers)
        if indirect:
            table = self.alloc(bytes(16 * len(chain)))
            view = self.memory.views(table, 16 * len(chain))[0]
            write_chain(view, chain)
            chain = [(table, 16 * len(chain), DESC_INDIRECT)]
        self.driver.add(self._token, chain)
        self.driver.publish()
        return self._token

    def raw(self, index: int, address: int, length: int, flags: int, following: int = 0) -> None:
        """Put any descriptor into the ring's table."""
        guest_driver.write_descriptor(self.areas[0], index, address, length, flags, following)

    def put_head(self, head: int) -> None:
        """Make a chain available that was written by hand."""
        self.driver.put_head(head)
        self.driver.publish()


class FakeDisk(MemoryTarget):
    """A `MemoryTarget` with a pattern on it, whose requests can be released in parts."""

    def __init__(self, size_bytes: int = 1 << 20) -> None:
        data = bytearray(_PATTERN * -(-size_bytes // len(_PATTERN)))[:size_bytes]
        super().__init__(turns.turn(), size_bytes, data)
        self.requests: list[Request] = []
        """All that was submitted, oldest first."""

    def submit(self, request: Request) -> None:
        self.requests.append(request)
        super().submit(request)

    def release(self, count: int | None = None, error: int = 0) -> None:
        """Finish the oldest `count` requests that are held, all by default, with `error`."""
        batch, self.held = self.held[:count], self.held[len(self.held[:count]) :]
        for request in batch:
            self.error = error
            self.execute(request)
        self.error = 0
        turns.deliver()


class FakeHits:
    """Has the bytes of a `FakeDisk` at hand below `end`, and says which hits it was asked for."""

    def __init__(self, disk: FakeDisk, end: int) -> None:
        self._disk = disk
        self._end = end
        self.asked: list[tuple[int, int]] = []

    def read_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        return self._hit(Request(READ, offset, length, buffers, lambda _: None))

    def write_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        return self._hit(Request(WRITE, offset, length, buffers, lambda _: None))

    def _hit(self, request: Request) -> bool:
        self.asked.append((request.op, request.offset))
        if request.offset + request.length > self._end:
            return False
        self._disk.execute(request)
        return True


class UnpublishedRing:
    """What the engine sees of a ring: writes status and used element at once, and publishes
    nothing."""

    def __init__(self, queue: VirtQueue) -> None:
        self.queue = queue

    def complete(self, chain: Chain, status: int, length: int) -> None:
        head, *_, status_view, status_at, _ = chain
        if status_view is not None:
            status_view[status_at] = status
        self.queue.push(head, length)


class MockRing(UnpublishedRing):
    """The same, and the driver sees each at once."""

    def complete(self, chain: Chain, status: int, length: int) -> None:
        super().complete(chain, status, length)
        self.queue.publish()


class BlkGuest(QueueRig):
    """A guest with a virtio-blk device over a `FakeDisk`."""

    def __init__(
        self,
        *,
        geometry: DiskGeometry | None = None,
        features: int | None = None,
        disk: FakeDisk | None = None,
        hits: FakeHits | None = None,
        serial: str = "serial",
        size: int = 64,
        indirect: bool = True,
        turn: Turn | None = None,
    ) -> None:
        super().__init__(size=size, indirect=indirect)
        self.disk = disk or FakeDisk()
        self.disk.turn = turn or turns.turn()
        self.config = BlkConfig(geometry or DiskGeometry(len(self.disk.data)), num_queues=1)
        self.faults: Counter[str] = Counter()
        self.epoch = 0
        """Of what the server has acknowledged: see `lanes.Job`."""
        self.engine = BlkEngine(
            self.config,
            self.disk,
            hits=hits,
            serial=serial,
            fault=self._fault,
            turn=self.disk.turn,
            epoch=lambda: self.epoch,
        )
        self.engine.negotiated(self.config.features() if features is None else features)
        self.ring = MockRing(self.queue)

    def _fault(self, kind: str) -> None:
        self.faults[kind] += 1

    def run(self) -> list[tuple[int, int]]:
        """Let the device work; tokens and used lengths of what it completed."""
        self.engine.start(self.ring, self.queue.pop())
        turns.deliver()
        return self.driver.poll()

    def header(self, type_: int, sector: int = 0, priority: int = 0) -> bytes:
        return struct.pack("<IIQ", type_, priority, sector)

    def request(
        self,
        type_: int,
        sector: int = 0,
        *,
        out: bytes = b"",
        room: int = 0,
        indirect: bool = False,
    ) -> tuple[int, int, bytes]:
        """One request in the usual framing; its status, used length, and the data it read."""
        buffers: list[Buffer] = [(self.alloc(self.header(type_, sector)), 16, 0)]
        data = 0
        if out:
            buffers.append((self.alloc(out), len(out), 0))
        if room:
            data = self.alloc(room)
            buffers.append((data, room, DEVICE_WRITES))
        status = self.alloc(1)
        buffers.append((status, 1, DEVICE_WRITES))
        token = self.put(*buffers, indirect=indirect)
        [(done, used_bytes)] = self.run()
        assert done == token
        return self.read(status, 1)[0], used_bytes, self.read(data, room)


def data_of(chain: Chain) -> tuple[bytes, bytes]:
    """The bytes of a chain's readable and writable data."""
    return b"".join(chain[3]), b"".join(chain[4])

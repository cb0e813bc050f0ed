"""A virtio-blk driver behind a vhost-user front-end: a guest without a virtual machine.

It does to a back-end what a virtual machine does: it shares memory, sets up virtqueues, puts
requests into them, kicks, waits for calls. `BlkDriver` has the comfortable methods (`await
guest.read(offset, length)`). Under it are `DriverQueue`s, whose `submit`, `kick` and `poll` are
plain functions for a caller that keeps many requests in flight at full speed.

    async with await BlkDriver.connect("/run/disk.sock") as guest:
        await guest.write(0, b"…")
        await guest.flush()

Memory: ring areas, request headers, status bytes and one data buffer per request slot, in one
memfd or several. Nothing is copied on the way to the back-end but what `write` and `read` copy
between the caller and the slot's buffer.

Source: virtio 1.3 §5.2 (block device), vhost-user.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import trio

from bridge.errors import RequestError
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    P_BACKEND_REQ,
    P_INFLIGHT_SHMFD,
    InflightRange,
    MessageType,
)
from bridge.peers.disk_config import CONFIG_BYTES, WRITEBACK_OFFSET, DiskConfig
from bridge.peers.driver_queue import DriverQueue, queue_memory_bytes
from bridge.peers.frontend import PROTOCOL_FEATURES, FrontEnd
from bridge.peers.pending_requests import PendingRequests
from bridge.peers.shared_memory import SharedMemory
from bridge.spec.virtio_blk import (
    ID_BYTES,
    SEGMENT,
    SEGMENT_UNMAP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from bridge.spec.virtqueue import F_INDIRECT, F_RING_PACKED
from bridge.units import SECTOR_BYTES

FEATURES = ((1 << 64) - 1) & ~F_RING_PACKED & ~F_LOG_ALL
"""Accept every feature that is offered, but packed rings and the dirty log."""
PACKED_FEATURES = FEATURES | F_RING_PACKED
"""The same with packed rings."""

_GUEST_MEMORY_START = 0x1_0000_0000
_REGION_GAP = 0x1000_0000


class BlkDriver:
    """A virtio-blk disk as its guest sees it. Make one with `await BlkDriver.connect(path)`.

    The async methods may be used by many tasks at once. They fail with RequestError (EIO for
    IOERR, ENOTSUP for UNSUPP); cancelled, the request goes on and its result is dropped. When the
    back-end hangs up they raise ConnectionLost, or, with `inflight`, wait for `reconnect`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        num_queues: int = 1,
        queue_size: int = 128,
        depth: int | None = None,
        request_bytes: int = 65536,
        features: int = FEATURES,
        protocol_features: int = PROTOCOL_FEATURES,
        segment_bytes: int | None = None,
        regions: int = 1,
        inflight: bool = False,
        base: int = 0,
    ) -> None:
        """`num_queues` virtqueues of `queue_size` descriptors, with at most `depth` requests in
        flight each (None: as many as fit) of at most `request_bytes` of data each, in descriptors
        of at most `segment_bytes` (None: one).

        `features` and `protocol_features` are masks of what to accept of the back-end's offer.
        `regions`: how many regions the memory is made of. `inflight`: use an in-flight region, so
        that `reconnect` loses no request. `base`: the index that split rings start at.
        """
        self.path = path
        self._wanted_features = features
        self._wanted_protocol_features = protocol_features
        self._num_queues = num_queues
        self._queue_size = queue_size
        self._depth = depth
        self._request_bytes = request_bytes
        self._segment_bytes = segment_bytes
        self._regions = regions
        self._use_inflight = inflight
        self._base = base
        self._inflight: tuple[InflightRange, int] | None = None
        self.memory = SharedMemory()
        self.queues: list[DriverQueue] = []
        self.front_end: FrontEnd | None = None
        self.features = 0
        self.config = DiskConfig.unpack(bytes(CONFIG_BYTES))
        self._pending = PendingRequests(lambda: self._use_inflight or self.is_alive)
        self._turn = 0

    @classmethod
    async def connect(cls, path: str | os.PathLike[str], **options: object) -> BlkDriver:
        """Connect, negotiate and start every queue. `options` are those of the constructor."""
        guest = cls(path, **options)  # type: ignore[arg-type]
        try:
            await guest.start()
        except BaseException:
            guest.close()
            raise
        return guest

    # Connecting.

    async def start(self) -> None:
        """Connect and negotiate, make memory and queues, and let the rings run."""
        await self.negotiate()
        await self.start_rings()

    async def start_rings(self) -> None:
        """After `negotiate`: make memory and queues, and let the rings run."""
        self._make_queues()
        await self._share()
        for queue in self.queues:
            await self._start_queue(queue, base=queue.driver.base)

    async def reconnect(self) -> None:
        """Connect again after the back-end died, as QEMU does: same memory, same rings.

        Rings go on from their used index; with an in-flight region the new back-end finds out what
        the old one had begun, without one those requests are lost.
        """
        if self.front_end is not None:
            self.front_end.close()
            self.front_end = None
        await self.negotiate()
        await self._share()
        for queue in self.queues:
            await self._start_queue(queue, base=queue.driver.restore_base)

    async def negotiate(self) -> None:
        """Connect and agree on features; `features` and `config` are known then."""
        self.front_end = await FrontEnd.connect(self.path)
        features, protocol = await self.front_end.negotiate(
            self._wanted_features | F_PROTOCOL_FEATURES, self._wanted_protocol_features
        )
        self.features = features
        if protocol & P_BACKEND_REQ:
            await self.front_end.open_channel()
        await self.refresh_config()
        await self.front_end.set_features()

    def _make_queues(self) -> None:
        """Memory for everything, in as many regions as were asked for, then the queues in it."""
        segments = -(-self._request_bytes // (self._segment_bytes or self._request_bytes))
        descriptors = 1 if self.features & F_INDIRECT else segments + 2
        depth = max(1, self._queue_size // descriptors)
        depth = min(self._depth or depth, depth)
        per_queue = queue_memory_bytes(
            size=self._queue_size,
            depth=depth,
            request_bytes=self._request_bytes,
            segments=segments,
        )
        total = per_queue * self._num_queues + 65536
        share = max(-(-total // self._regions) + self._request_bytes, 65536)
        for number in range(self._regions):
            gap = -(-share // _REGION_GAP) * _REGION_GAP
            self.memory.add(share, guest_address=_GUEST_MEMORY_START + number * gap)
        for index in range(self._num_queues):
            self.queues.append(
                DriverQueue(
                    index,
                    self.memory,
                    size=self._queue_size,
                    depth=depth,
                    request_bytes=self._request_bytes,
                    features=self.features,
                    segment_bytes=self._segment_bytes,
                    base=self._base,
                )
            )

    async def _share(self) -> None:
        """Hand over memory and, if wanted, the in-flight region."""
        front_end = self._connected()
        await front_end.set_memory([(each.region, each.fd) for each in self.memory.regions])
        if self._use_inflight and front_end.protocol_features & P_INFLIGHT_SHMFD:
            if self._inflight is None:
                self._inflight = await front_end.get_inflight(self._num_queues, self._queue_size)
            await front_end.set_inflight(*self._inflight)

    async def _start_queue(self, queue: DriverQueue, *, base: int) -> None:
        front_end = self._connected()
        user = self.memory.user_address(queue.ring_address)
        await front_end.set_ring_file(MessageType.SET_VRING_ERR, queue.index, queue.error_fd)
        await front_end.set_ring(
            queue.index,
            size=queue.size,
            base=base,
            desc=user,
            avail=user + queue.driver.avail_offset,
            used=user + queue.driver.used_offset,
            kick_fd=queue.kick_fd,
            call_fd=queue.call_fd,
        )
        if self.features & F_PROTOCOL_FEATURES:
            await front_end.enable_ring(queue.index)

    def _connected(self) -> FrontEnd:
        if self.front_end is None:
            raise RuntimeError("the guest is not connected")
        return self.front_end

    async def stop(self) -> list[int]:
        """Stop every ring as a migration or a shutdown does; their bases."""
        front_end = self._connected()
        for queue in self.queues:
            if self.features & F_PROTOCOL_FEATURES:
                await front_end.enable_ring(queue.index, False)
        return [await front_end.stop_ring(queue.index) for queue in self.queues]

    def close(self) -> None:
        """Hang up without a word and give everything back. Idempotent."""
        if self.front_end is not None:
            self.front_end.close()
            self.front_end = None
        while self.queues:
            self.queues.pop().close()
        if self._inflight is not None:
            os.close(self._inflight[1])
            self._inflight = None
        self.memory.close()

    async def __aenter__(self) -> BlkDriver:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    # Configuration.

    async def refresh_config(self) -> DiskConfig:
        """Read the configuration space again."""
        self.config = DiskConfig.unpack(await self._connected().get_config(0, CONFIG_BYTES))
        return self.config

    async def config_changed(self) -> DiskConfig:
        """Wait for the back-end to announce a change (a resize); the new configuration."""
        await self._connected().config_changed()
        return await self.refresh_config()

    async def set_writeback(self, enabled: bool) -> None:
        """Turn the disk's write cache on or off (VIRTIO_BLK_F_CONFIG_WCE)."""
        await self._connected().set_config(WRITEBACK_OFFSET, bytes([enabled]))

    @property
    def size_bytes(self) -> int:
        """The disk's capacity, as last read."""
        return self.config.capacity_sectors * SECTOR_BYTES

    # Requests.

    async def read(self, offset: int, length: int, *, queue: int | None = None) -> bytes:
        """`length` bytes from `offset`; both whole sectors."""
        data = bytearray(length)

        def part(position: int, size: int) -> Callable[[DriverQueue], int]:
            return lambda on: on.submit(T_IN, (offset + position) // SECTOR_BYTES, size)

        def take(on: DriverQueue, slot: int, position: int, size: int) -> None:
            data[position : position + size] = on.data(slot, size)

        await self._in_parts(length, part, queue, take)
        return bytes(data)

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, queue: int | None = None
    ) -> None:
        """Write whole sectors of `data` from `offset` on."""
        view = memoryview(data)

        def part(position: int, size: int) -> Callable[[DriverQueue], int]:
            piece = view[position : position + size]
            return lambda on: on.submit(T_OUT, (offset + position) // SECTOR_BYTES, size, piece)

        await self._in_parts(len(view), part, queue, None)

    async def flush(self, *, queue: int | None = None) -> None:
        """Make everything durable that was completed before."""
        await self.request(T_FLUSH, queue=queue)

    async def discard(self, ranges: Sequence[tuple[int, int]], *, queue: int | None = None) -> None:
        """Forget the bytes of `ranges` (offset and length, whole sectors), in one request."""
        await self.request(T_DISCARD, data=_segments(ranges, 0), queue=queue)

    async def write_zeroes(
        self,
        ranges: Sequence[tuple[int, int]],
        *,
        unmap: bool = False,
        queue: int | None = None,
    ) -> None:
        """Zero the bytes of `ranges`, in one request."""
        data = _segments(ranges, SEGMENT_UNMAP if unmap else 0)
        await self.request(T_WRITE_ZEROES, data=data, queue=queue)

    async def get_id(self, *, queue: int | None = None) -> str:
        """The disk's serial number."""
        found = b""

        def take(on: DriverQueue, slot: int) -> None:
            nonlocal found
            found = bytes(on.data(slot, ID_BYTES))

        on = self._pick(queue)
        await self._pending.complete(on, lambda on: on.submit(T_GET_ID, 0, ID_BYTES), take)
        return found.split(b"\0")[0].decode("ascii", "replace")

    async def request(
        self, kind: int, sector: int = 0, data: bytes = b"", *, queue: int | None = None
    ) -> None:
        """Any request that writes nothing but its status. `kind`: virtio 1.3 §5.2.6; `sector`
        counts 512 bytes. Raises as the class says."""
        await self._pending.complete(
            self._pick(queue), lambda on: on.submit(kind, sector, len(data), data), None
        )

    async def _in_parts(
        self,
        length: int,
        part: Callable[[int, int], Callable[[DriverQueue], int]],
        queue: int | None,
        take: Callable[[DriverQueue, int, int, int], None] | None,
    ) -> None:
        """Requests of at most a slot's buffer each, several at a time, on one queue."""
        on = self._pick(queue)
        limit = trio.CapacityLimiter(on.depth)

        async def one(position: int, size: int) -> None:
            async with limit:
                await self._pending.complete(
                    on,
                    part(position, size),
                    None if take is None else lambda q, slot: take(q, slot, position, size),
                )

        if length <= on.request_bytes:
            await one(0, length)
            return
        errors: list[RequestError] = []

        async def guarded(position: int, size: int) -> None:
            try:
                await one(position, size)
            except RequestError as error:
                errors.append(error)

        async with trio.open_nursery() as nursery:
            for position in range(0, length, on.request_bytes):
                nursery.start_soon(guarded, position, min(on.request_bytes, length - position))
        if errors:
            raise errors[0]

    @property
    def is_alive(self) -> bool:
        """The back-end has not hung up."""
        return self.front_end is not None and self.front_end.is_alive

    def _pick(self, queue: int | None) -> DriverQueue:
        """The queue asked for, or each in turn."""
        if queue is None:
            queue = self._turn
            self._turn = (queue + 1) % len(self.queues)
        return self.queues[queue]


def _segments(ranges: Sequence[tuple[int, int]], flags: int) -> bytes:
    """The payload of DISCARD and WRITE_ZEROES."""
    return b"".join(
        SEGMENT.pack(offset // SECTOR_BYTES, length // SECTOR_BYTES, flags)
        for offset, length in ranges
    )

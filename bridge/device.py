"""The vhost-user-blk device: guest memory, rings and the request engine over one disk.

Implements `vhost_user.device.VhostUserDevice`, which says what each call means. Two things are
this module's own: a ring that has to stop is drained within `drain_timeout_s` (QEMU's main loop
waits for that answer without a limit of its own), and what is still unanswered then is failed.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import replace
from errno import EIO

import structlog
import trio

from bridge.errors import ProtocolError
from bridge.loop import Loop
from bridge.request import Target
from bridge.ring import RunningRing
from bridge.vhost_user.device import MemoryRegion, RingSetup
from bridge.virtio.blk import BlkEngine
from bridge.virtio.blk_config import F_EVENT_IDX, F_INDIRECT, BlkConfig, DiskGeometry
from bridge.virtio.chain import MAX_QUEUE_SIZE
from bridge.virtio.memory import GuestMemory, Region, map_region
from bridge.virtio.split_queue import SplitQueue, ring_sizes_bytes

_log = structlog.get_logger(__name__)

_KICKLESS_POLL_S = 0.0005
"""How often a ring without a kick descriptor is looked at."""


class BlkDevice:
    """One virtio-blk disk as a vhost-user session sees it."""

    supports_inflight = False
    supports_dirty_log = False

    def __init__(
        self,
        loop: Loop,
        target: Target,
        geometry: DiskGeometry,
        *,
        serial: str,
        max_queues: int = 1,
        max_queue_size: int = MAX_QUEUE_SIZE,
        drain_timeout_s: float = 30.0,
        fail_pending: Callable[[int], None] = lambda errno: None,
        on_all_stopped: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`fail_pending(errno)` finishes everything unfinished below, at once.

        `on_all_stopped` is awaited before the last ring's stop is answered: whoever opens the
        image next must find everything there.
        """
        self.max_queues = max_queues
        self.max_queue_size = max_queue_size
        self.on_config_changed: Callable[[], None] | None = None
        self._loop = loop
        self._config = BlkConfig(geometry, num_queues=max_queues)
        self.guest_faults: Counter[str] = Counter()
        self._engine = BlkEngine(self._config, target, serial=serial, fault=self._guest_fault)
        self._drain_timeout_s = drain_timeout_s
        self._fail_pending = fail_pending
        self._on_all_stopped = on_all_stopped
        self._memory = GuestMemory([])
        self._features = 0
        self._setups: dict[int, RingSetup] = {}
        self._rings: dict[int, RunningRing] = {}
        self._kickless = trio.Event()

    # Features and configuration space

    def offered_features(self) -> int:
        """See VhostUserDevice."""
        return self._config.features()

    def set_features(self, features: int) -> None:
        """See VhostUserDevice."""
        self._features = features
        self._engine.negotiated(features)

    def read_config(self, offset: int, size: int) -> bytes:
        """See VhostUserDevice."""
        return self._config.read(offset, size)

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        """See VhostUserDevice. A migrated configuration restores only `writeback`."""
        if migration:
            data = data[32 - offset : 33 - offset] if offset <= 32 < offset + len(data) else b""
            offset = 32
            if not data:
                return
        self._config.write(offset, data)
        self._engine.writeback_changed()

    def resize(self, size_bytes: int) -> None:
        """The disk below has another size: the guest is told."""
        self._config.resize(size_bytes)
        self._engine.geometry_changed()
        if self.on_config_changed is not None:
            self.on_config_changed()

    # Memory

    async def replace_memory(self, regions: list[MemoryRegion]) -> None:
        """See VhostUserDevice."""
        await self._with_rings_quiesced(lambda: GuestMemory([_map(region) for region in regions]))

    async def add_memory(self, region: MemoryRegion) -> None:
        """See VhostUserDevice."""
        await self._with_rings_quiesced(lambda: self._memory.with_region(_map(region)))

    async def remove_memory(
        self, *, guest_address: int, user_address: int, size_bytes: int
    ) -> None:
        """See VhostUserDevice."""
        await self._with_rings_quiesced(
            lambda: self._memory.without_region(
                guest_address=guest_address, user_address=user_address, size_bytes=size_bytes
            )
        )

    async def _with_rings_quiesced(self, change: Callable[[], GuestMemory]) -> None:
        """Change the memory while no request uses it; rings that ran go on in the new one."""
        running = dict(self._setups)
        bases = {index: await self._close_ring(index) for index in running}
        try:
            self._memory = change()
        finally:
            for index, setup in running.items():
                self._open_ring(index, setup, base=bases[index])

    # Rings

    def start_ring(self, index: int, ring: RingSetup) -> None:
        """See VhostUserDevice."""
        self._open_ring(index, ring, base=ring.base)

    def _open_ring(self, index: int, setup: RingSetup, *, base: int) -> None:
        queue = self._make_queue(setup, base)

        def broken(reason: str) -> None:
            _log.error("the guest broke a ring, it is stopped", ring=index, reason=reason)
            self.guest_faults["a broken ring"] += 1

        self._rings[index] = RunningRing(
            self._loop,
            queue,
            self._engine,
            kick_fd=setup.kick_fd,
            call_fd=setup.call_fd,
            error_fd=setup.error_fd,
            broken=broken,
        )
        self._setups[index] = setup
        self._kickless.set()

    def _make_queue(self, setup: RingSetup, base: int) -> SplitQueue:
        """The virtqueue at the set-up's addresses. Raises ProtocolError if it cannot be one."""
        size = setup.size
        if not 0 < size <= self.max_queue_size or size & (size - 1):
            raise ProtocolError(f"ring size {size} is no power of two up to {self.max_queue_size}")
        lengths = ring_sizes_bytes(size)
        addresses = (setup.desc_user_address, setup.avail_user_address, setup.used_user_address)
        for address, alignment in zip(addresses, (16, 2, 4), strict=True):
            if address % alignment:
                raise ProtocolError(f"ring address {address:#x} is not aligned to {alignment}")
        areas = sorted(zip(addresses, lengths, strict=True))
        for (low, length), (high, _) in itertools.pairwise(areas):
            if low + length > high:
                raise ProtocolError(f"ring areas at {low:#x} and {high:#x} overlap")
        descriptors, available, used = (
            self._memory.user_view(address, length)
            for address, length in zip(addresses, lengths, strict=True)
        )
        return SplitQueue(
            self._memory,
            size=size,
            descriptors=descriptors,
            available=available,
            used=used,
            base=base,
            event_idx=bool(self._features & F_EVENT_IDX),
            indirect=bool(self._features & F_INDIRECT),
        )

    async def stop_ring(self, index: int) -> int:
        """See VhostUserDevice."""
        base = await self._close_ring(index)
        if not self._rings and self._on_all_stopped is not None:
            with trio.move_on_after(self._drain_timeout_s):
                await self._on_all_stopped()
        return base

    async def _close_ring(self, index: int) -> int:
        ring = self._rings.pop(index)
        del self._setups[index]
        with trio.move_on_after(self._drain_timeout_s) as scope:
            await ring.drain()
        if scope.cancelled_caught:
            _log.error(
                "requests were not answered in time while a ring stopped, failing them",
                ring=index,
                timeout_s=self._drain_timeout_s,
            )
            self._fail_pending(EIO)
            await ring.drain()
        return ring.close()

    def suspend_ring(self, index: int) -> None:
        """See VhostUserDevice."""
        self._rings[index].suspend()

    def resume_ring(self, index: int) -> None:
        """See VhostUserDevice."""
        self._rings[index].resume()

    def set_kick(self, index: int, fd: int | None) -> None:
        """See VhostUserDevice."""
        self._rings[index].set_kick(fd)
        self._setups[index] = replace(self._setups[index], kick_fd=fd)
        self._kickless.set()

    def set_call(self, index: int, fd: int | None) -> None:
        """See VhostUserDevice."""
        self._rings[index].set_call(fd)
        self._setups[index] = replace(self._setups[index], call_fd=fd)

    def set_error(self, index: int, fd: int | None) -> None:
        """See VhostUserDevice."""
        self._rings[index].set_error(fd)
        self._setups[index] = replace(self._setups[index], error_fd=fd)

    def set_ring_log(self, index: int, log_guest_address: int | None) -> None:
        """See VhostUserDevice."""
        self._setups[index] = replace(self._setups[index], log_guest_address=log_guest_address)

    async def run(self) -> None:
        """Look after rings without a kick descriptor, for ever."""
        while True:
            if any(ring.must_be_polled for ring in self._rings.values()):
                self._loop.wake()
                await trio.sleep(_KICKLESS_POLL_S)
            else:
                self._kickless = trio.Event()
                await self._kickless.wait()

    # Crash recovery and migration

    def create_inflight(self, num_queues: int, queue_size: int) -> tuple[int, int]:
        """See VhostUserDevice."""
        raise ProtocolError("in-flight tracking is not supported")

    def set_inflight(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int
    ) -> None:
        """See VhostUserDevice."""
        raise ProtocolError("in-flight tracking is not supported")

    def set_log(self, fd: int, offset: int, size: int) -> None:
        """See VhostUserDevice."""
        raise ProtocolError("dirty logging is not supported")

    def set_logging(self, enabled: bool) -> None:
        """See VhostUserDevice."""
        if enabled:
            raise ProtocolError("dirty logging is not supported")

    # The end

    async def reset(self) -> None:
        """See VhostUserDevice."""
        for index in list(self._rings):
            await self.stop_ring(index)
        self.set_features(0)

    async def disconnected(self) -> None:
        """See VhostUserDevice."""
        await self.reset()
        self._memory = GuestMemory([])
        self.on_config_changed = None

    def _guest_fault(self, kind: str) -> None:
        """Count what a guest does wrong; say it once per kind, however often it happens."""
        self.guest_faults[kind] += 1
        if self.guest_faults[kind] == 1:
            _log.warning("the guest sent a bad request (said once, counted)", what=kind)


def _map(region: MemoryRegion) -> Region:
    return map_region(
        region.fd,
        guest_address=region.guest_address,
        user_address=region.user_address,
        size_bytes=region.size_bytes,
        mmap_offset_bytes=region.mmap_offset_bytes,
    )

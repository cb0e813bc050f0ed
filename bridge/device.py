"""The vhost-user-blk device: guest memory, rings and the request engine over one disk.

Implements `vhost_user.device.VhostUserDevice`, which says what each call means. Two things are
this module's own: rings that have to stop, or whose memory changes, are drained within
`drain_timeout_s` (QEMU's main loop waits for the answer without a limit of its own), and what is
still unanswered then is failed; and if even that does not answer it, forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from errno import EIO
from math import inf

import structlog
import trio

from bridge.errors import ProtocolError
from bridge.loop import Loop
from bridge.request import FLUSH, Hits, Request, Target
from bridge.ring import RunningRing
from bridge.ring_setup import make_queue, ring_areas, written_areas
from bridge.vhost_user.device import MemoryRegion, RingSetup
from bridge.virtio.blk import BlkEngine
from bridge.virtio.blk_config import F_RING_PACKED, BlkConfig, DiskGeometry
from bridge.virtio.chain import MAX_QUEUE_SIZE
from bridge.virtio.dirty_log import DirtyBitmap, DirtyLog
from bridge.virtio.inflight import InflightRegion, queue_size_by_region
from bridge.virtio.long_chains import LongViews
from bridge.virtio.memory import GuestMemory, Region, map_region

_log = structlog.get_logger(__name__)

_KICKLESS_POLL_S = 0.0005
"""How often a ring without a kick descriptor is looked at."""

_FAILED_DRAIN_S = 1.0
"""Failing everything takes a few turns of the loop; this is for our own bugs."""


class BlkDevice:
    """One virtio-blk disk as a vhost-user session sees it."""

    supports_inflight = True
    supports_dirty_log = True

    def __init__(
        self,
        loop: Loop,
        target: Target,
        geometry: DiskGeometry,
        *,
        serial: str,
        hits: Hits | None = None,
        max_queues: int = 1,
        max_queue_size: int = MAX_QUEUE_SIZE,
        drain_timeout_s: float = 30.0,
        on_recovered: Callable[[], None] | None = None,
        failing: Callable[[int], AbstractContextManager[object]] = nullcontext,
        on_all_stopped: Callable[[], Awaitable[object]] | None = None,
        withheld_features: int = 0,
    ) -> None:
        """`on_recovered` is called before requests that another process began are executed again.

        `hits`: what can be asked before `target`. Within `failing(errno)` everything unfinished
        below fails, and whatever that leads to.

        `on_all_stopped` is awaited before the last ring's stop is answered: whoever opens the
        image next must find everything there. `withheld_features`: see BlkConfig.
        """
        self.max_queues = max_queues
        self.max_queue_size = max_queue_size
        self.on_config_changed: Callable[[], None] | None = None
        self._loop = loop
        self._config = BlkConfig(
            geometry, num_queues=max_queues, withheld_features=withheld_features
        )
        self.guest_faults: Counter[str] = Counter()
        self._target = target
        self._engine = BlkEngine(
            self._config, target, hits=hits, serial=serial, fault=self._guest_fault, turns=loop
        )
        self._drain_timeout_s = drain_timeout_s
        self._on_recovered = on_recovered
        self._gave_up_until_s = -inf
        self._failing = failing
        self._on_all_stopped = on_all_stopped
        self._memory = GuestMemory([])
        self._features = 0
        self._setups: dict[int, RingSetup] = {}
        self._rings: dict[int, RunningRing] = {}
        self._kickless = trio.Event()
        self._inflight: InflightRegion | None = None
        self._bitmap: DirtyBitmap | None = None
        self._logging = False
        self._long_views = LongViews()
        self._told_of_unsealed = False

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
        was_writeback = self._config.writeback
        self._config.write(offset, data)
        self._engine.writeback_changed()
        self._remember_writeback()
        if was_writeback and not self._config.writeback:
            # From now on the guest sends no flushes; what it wrote before is not to wait for one.
            self._target.submit(Request(FLUSH, 0, 0, [], _flushed))

    def _remember_writeback(self) -> None:
        """For the process after this one: the guest will not write it again."""
        if self._inflight is not None:
            self._inflight.write_through = self._config.writeback_refused

    def resize(self, size_bytes: int) -> None:
        """The disk below has another size: the guest is told."""
        self._config.resize(size_bytes)
        self._engine.geometry_changed()
        if self.on_config_changed is not None:
            self.on_config_changed()

    # Memory

    async def replace_memory(self, regions: list[MemoryRegion]) -> None:
        """See VhostUserDevice. Front-ends without memory slots do this to add a region."""
        try:
            memory = GuestMemory([_map(region) for region in regions])
        except ProtocolError:
            await self._use_memory(GuestMemory([]))
            raise
        if memory.has_all_of(self._memory):
            self._move_rings(memory)
        else:
            await self._use_memory(memory)

    async def add_memory(self, region: MemoryRegion) -> None:
        """See VhostUserDevice. Nothing that was there goes away, so nothing has to wait."""
        added = _map(region)
        former = self._memory.region_at(added.guest_address)
        if former is None or not former.has_the_addresses_of(added):
            memory = self._memory.with_region(added)
        elif self._rings and not former.is_the_same_as(added):
            raise ProtocolError(
                f"the memory region at {added.guest_address:#x} changes while rings run"
            )
        else:
            memory = self._memory.with_region_again(added)
        self._move_rings(memory)

    async def remove_memory(
        self, *, guest_address: int, user_address: int, size_bytes: int
    ) -> None:
        """See VhostUserDevice."""
        await self._use_memory(
            self._memory.without_region(
                guest_address=guest_address, user_address=user_address, size_bytes=size_bytes
            )
        )

    async def _use_memory(self, memory: GuestMemory) -> None:
        """Change the memory while no request uses it; rings that ran go on in the new one.

        A request that takes too long is no reason to fail it: it keeps the mapping that it
        uses, which the guest has given up.
        """
        rings = list(self._rings.values())
        try:
            if not await self._drained(rings):
                _log.warning("requests are still in flight in memory that is taken away")
            self._move_rings(memory)
        finally:
            for ring in rings:
                ring.unpause()

    def _move_rings(self, memory: GuestMemory) -> None:
        self._memory = memory
        if not self._told_of_unsealed and not all(each.is_sealed for each in memory.regions):
            self._told_of_unsealed = True
            _log.info(
                "guest memory is in a file that cannot be sealed: if the front-end made it shorter "
                "while it is mapped, this process would end with a bus error"
            )
        for index, ring in self._rings.items():
            try:
                ring.move(memory, ring_areas(memory, self._setups[index], packed=self._packed))
            except ProtocolError:
                ring.move(memory, None)
        self._update_logs()

    # Rings

    def start_ring(self, index: int, ring: RingSetup) -> None:
        """See VhostUserDevice."""
        queue = make_queue(
            ring,
            index,
            memory=self._memory,
            features=self._features,
            max_size=self.max_queue_size,
            inflight=self._inflight,
        )

        queue.long.join(self._long_views)
        if queue.in_flight and self._on_recovered is not None:
            # In flight before the ring runs: begun by another process, perhaps sent by it.
            self._on_recovered()

        def broken(reason: str) -> None:
            self._ring_broken(index, reason)

        self._rings[index] = RunningRing(
            self._loop,
            queue,
            self._engine,
            kick_fd=ring.kick_fd,
            call_fd=ring.call_fd,
            error_fd=ring.error_fd,
            broken=broken,
        )
        self._setups[index] = ring
        self._kickless.set()
        try:
            self._update_logs()
        except BaseException:
            # All of it or nothing: nobody else knows of this ring.
            del self._setups[index]
            self._rings.pop(index).close(told=False)
            raise

    @property
    def _packed(self) -> bool:
        return bool(self._features & F_RING_PACKED)

    async def stop_ring(self, index: int) -> int:
        """See VhostUserDevice."""
        bases = await self._close_rings([index], told=True)
        return bases[index]

    async def _close_rings(self, indexes: Collection[int], *, told: bool = False) -> dict[int, int]:
        """Drain and close these rings, all within one `drain_timeout_s`; their bases."""
        try:
            await self._drain([self._rings[index] for index in indexes])
        finally:
            bases = {index: self._rings.pop(index).close(told=told) for index in indexes}
            for index in indexes:
                del self._setups[index]
        if bases and not self._rings and self._on_all_stopped is not None:
            with trio.move_on_after(self._drain_timeout_s) as scope:
                await self._on_all_stopped()
            if scope.cancelled_caught:
                _log.error("the disk was not brought up to date in time", after="the last ring")
        return bases

    async def _drain(self, rings: Collection[RunningRing]) -> None:
        """Pause `rings`; return when everything they popped is answered, or given up."""
        if await self._drained(rings):
            return
        unanswered = sum(ring.in_flight for ring in rings)
        _log.error(
            "requests were not answered in time while rings stopped, failing them",
            requests=unanswered,
            timeout_s=self._drain_timeout_s,
        )
        with self._failing(EIO), trio.move_on_after(_FAILED_DRAIN_S, shield=True) as scope:
            for ring in rings:
                self._engine.drop(ring, EIO)
            for ring in rings:
                await ring.drained()
        if scope.cancelled_caught:
            _log.error("requests could not even be failed, they are forgotten")

    async def _drained(self, rings: Collection[RunningRing]) -> bool:
        """Pause `rings`; whether everything they popped was answered in time.

        Cancellation has to wait for that: what is in flight writes to the guest's memory.
        """
        for ring in rings:
            ring.pause()
        limit_s = self._drain_timeout_s
        if trio.current_time() < self._gave_up_until_s:
            limit_s = _FAILED_DRAIN_S  # many rings stop one after the other: not each that long
        with trio.move_on_after(limit_s, shield=True) as scope:
            for ring in rings:
                await ring.drained()
        if scope.cancelled_caught:
            self._gave_up_until_s = trio.current_time() + self._drain_timeout_s
        return not scope.cancelled_caught

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
        """See VhostUserDevice.

        The region is for queues of the largest size, whatever `queue_size` says: QEMU 10 asks for
        its `queue-size` (128), and then its guest's driver starts a ring of 1024 (SeaBIOS: 256).
        """
        self._inflight = None
        self._inflight, fd, size_bytes = InflightRegion.create(
            num_queues=num_queues,
            queue_size=max(queue_size, self.max_queue_size),
            packed=self._packed,
        )
        self._remember_writeback()
        return fd, size_bytes

    def set_inflight(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int
    ) -> None:
        """See VhostUserDevice. A region from `create_inflight` has room for more than it says, but
        only up to what we make: its size is the front-end's to choose."""
        room = queue_size_by_region(size, num_queues, packed=self._packed)
        if room > MAX_QUEUE_SIZE:
            room = 0
        self._inflight = InflightRegion.map(
            fd,
            offset,
            size,
            num_queues=num_queues,
            queue_size=max(queue_size, room),
            packed=self._packed,
        )
        if self._inflight.write_through:
            self._config.refuse_writeback()
            self._engine.writeback_changed()
        self._remember_writeback()

    def set_log(self, fd: int, offset: int, size: int) -> None:
        """See VhostUserDevice."""
        self._bitmap = DirtyBitmap.map(fd, offset, size)
        self._update_logs()

    def set_logging(self, enabled: bool) -> None:
        """See VhostUserDevice."""
        self._logging = enabled
        self._update_logs()

    def set_ring_log(self, index: int, log_guest_address: int | None) -> None:
        """See VhostUserDevice."""
        self._setups[index] = replace(self._setups[index], log_guest_address=log_guest_address)
        self._update_logs()

    def _update_logs(self) -> None:
        """Every ring marks what it writes if that is wanted."""
        for index, ring in self._rings.items():
            if self._bitmap is None or not self._logging:
                ring.set_log(None)
            else:
                areas = written_areas(self._memory, self._setups[index], packed=self._packed)
                ring.set_log(DirtyLog(self._bitmap, self._memory, areas))

    # The end

    async def reset(self) -> None:
        """See VhostUserDevice."""
        await self._close_rings(list(self._rings))
        self._config.reset()
        self.set_features(0)
        self._forget_shared()

    async def disconnected(self) -> None:
        """See VhostUserDevice. The guest may run on and come back with another front-end, so
        what it set in the configuration space stays."""
        try:
            await self._close_rings(list(self._rings))
        finally:
            while self._rings:
                # Something went wrong above; nothing may touch the guest's memory all the same.
                index, ring = self._rings.popitem()
                self._setups.pop(index, None)
                with suppress(Exception):
                    ring.close(told=False)
            self.set_features(0)
            self._forget_shared()
            self._memory = GuestMemory([])
            self.on_config_changed = None

    def _forget_shared(self) -> None:
        self._inflight = None
        self._bitmap = None
        self._logging = False

    def _ring_broken(self, index: int, reason: str) -> None:
        self.guest_faults["a broken ring"] += 1
        count = self.guest_faults["a broken ring"]
        if not count & (count - 1):
            # A guest can reset its disk and break it again for ever: said at 1, 2, 4, 8 …
            _log.error("a ring broke, it is stopped", ring=index, reason=reason, count=count)

    def _guest_fault(self, problem: str) -> None:
        """Count what a guest does wrong; say it once per kind, however often it happens."""
        kind = problem.partition(":")[0]
        self.guest_faults[kind] += 1
        if self.guest_faults[kind] == 1:
            _log.warning("the guest sent a bad request (said once, counted)", what=problem)


def _flushed(flush: Request) -> None:
    """Nobody waits for it: the guest sends no more flushes that could fail."""
    if flush.error:
        _log.error("what was written before the write cache was turned off may not be durable")


def _map(region: MemoryRegion) -> Region:
    return map_region(
        region.fd,
        guest_address=region.guest_address,
        user_address=region.user_address,
        size_bytes=region.size_bytes,
        mmap_offset_bytes=region.mmap_offset_bytes,
    )

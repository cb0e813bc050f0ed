"""The vhost-user-blk device: guest memory, rings and the request engine over one disk.

Implements `device_interface.VhostUserDevice`, which says what each call means. Two things are
this module's own: rings that have to stop, or whose memory changes, are drained within
`drain_timeout_s` (QEMU's main loop waits for the answer without a limit of its own), and a stop
that was answered is a promise to the host that opens the image next.

**A stop.** What a ring has popped is answered; what is still unanswered at the limit is
*abandoned*: nothing touches its buffers from then on, and unsent parts are never sent. With an
in-flight region it stays in that, neither completed nor failed, and is executed when the ring runs
again; without one it fails, for that ring alone.

**The last stop.** When the last ring has stopped the guest may go on elsewhere: see `last_stop`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial

import structlog
import trio

from bridge.datapath.loop import Loop
from bridge.datapath.request import Hits, Target
from bridge.datapath.rows import Usual
from bridge.errors import ProtocolError
from bridge.guest.above import Above
from bridge.guest.dirty_logs import DirtyLogs
from bridge.guest.drain import Drain
from bridge.guest.guest_faults import GuestFaults
from bridge.guest.last_stop import LastStop
from bridge.guest.regions import mapped, with_added
from bridge.guest.remembered import Remembered
from bridge.guest.ring import RunningRing
from bridge.guest.ring_setup import make_queue, ring_areas
from bridge.guest.vhost_user.device_interface import ConfigListener, MemoryRegion, RingSetup
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.blk_request import BlkRequest
from bridge.guest.virtio.chain import MAX_QUEUE_SIZE
from bridge.guest.virtio.dirty_log import DirtyBitmap
from bridge.guest.virtio.long_chains import LongViews
from bridge.guest.virtio.memory import GuestMemory
from bridge.guest.write_cache import WriteCacheFlush
from bridge.spec.virtqueue import F_RING_PACKED

_log = structlog.get_logger(__name__)

_KICKLESS_POLL_S = 0.0005
"""How often a ring without a kick descriptor is looked at."""


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
        usual: Usual | None = None,
        max_queues: int = 1,
        max_queue_size: int = MAX_QUEUE_SIZE,
        drain_timeout_s: float = 30.0,
        above: Above | None = None,
        withheld_features: int = 0,
    ) -> None:
        """`hits`: what can be asked before `target`; `usual`: what rings may ask before they pop a
        chain. `withheld_features`: see BlkConfig."""
        above = self._above = above or Above()
        self.max_queues = max_queues
        self.max_queue_size = max_queue_size
        self._loop = loop
        config = self._config = BlkConfig(
            geometry, num_queues=max_queues, withheld_features=withheld_features
        )
        self._faults = GuestFaults()
        self._write_cache = WriteCacheFlush(target, loop.turn)
        self._engine = BlkEngine(
            config,
            target,
            hits=hits,
            usual=usual,
            serial=serial,
            fault=self._faults.bad_request,
            turn=loop.turn,
            epoch=above.epoch,
        )
        self._drain = Drain(drain_timeout_s)
        self._remembered = Remembered(config)
        self._last_stop = LastStop(above, self._drain, self._remembered)
        self._share_nothing()

    def _share_nothing(self) -> None:
        """Nothing of the guest's is known yet: no memory, no rings, no dirty log."""
        self.listener: ConfigListener | None = None
        self._features = 0
        self._setups: dict[int, RingSetup] = {}
        self._rings: dict[int, RunningRing] = {}
        self._kickless = trio.Event()
        self._requests_of_closed = 0
        self._general_of_closed: Counter[str] = Counter()
        self._memory = GuestMemory([])
        self._dirty_logs = DirtyLogs()
        self._long_views = LongViews()
        self._told_of_unsealed = False

    @property
    def guest_faults(self) -> Counter[str]:
        """What the guest did wrong: the kind, and how often."""
        return self._faults.counts

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
        self._remembered.remember()
        if was_writeback and not self._config.writeback:
            # From now on the guest sends no flushes; what it wrote before is not to wait for one.
            self._write_cache.flush_what_was_written()

    def remember_durability(self, *, unflushed_on: int, loss_unreported: bool) -> None:
        """Keep for the process after this one: on which server instance something is unflushed
        (a number of 56 bits, 0: on none that has a name), and that the guest's next flush must
        fail."""
        self._remembered.unflushed_on = unflushed_on
        self._remembered.loss_unreported = loss_unreported
        self._remembered.remember()

    def resize(self, size_bytes: int) -> None:
        """The disk below has another size: the guest is told."""
        self._config.resize(size_bytes)
        self._engine.geometry_changed()
        if self.listener is not None:
            self.listener.config_changed()

    # Memory

    async def replace_memory(self, regions: list[MemoryRegion]) -> None:
        """See VhostUserDevice. Front-ends without memory slots do this to add a region."""
        try:
            memory = mapped(regions)
        except ProtocolError:
            await self._use_memory(GuestMemory([]))
            raise
        if memory.has_all_of(self._memory):
            self._move_rings(memory)
        else:
            await self._use_memory(memory)

    async def add_memory(self, region: MemoryRegion) -> None:
        """See VhostUserDevice. Nothing that was there goes away, so nothing has to wait."""
        self._move_rings(with_added(self._memory, region, in_use=bool(self._rings)))

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
        """Change the memory while no request uses what goes away; rings go on in the new one.

        A request that takes too long does not make this fail: it keeps the mapping that it
        uses, which the guest has given up. Those elsewhere are not even waited for: QEMU's main
        loop would stand still for them while the server is away.
        """
        gone = memory.missing_of(self._memory)
        rings = [ring for ring in self._rings.values() if ring.uses(gone)]
        try:
            if not await self._drain.rings(rings, self._drain.deadline_s()):
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
        log = self._dirty_logs.of(self._memory, ring, packed=self._packed)
        remembered = self._remembered
        queue = make_queue(
            ring,
            index,
            memory=self._memory,
            features=self._features,
            max_size=self.max_queue_size,
            inflight=remembered.region,
        )
        queue.long.join(self._long_views)
        if not remembered.has_served:
            remembered.has_served = True
            self._note_guest(ring)
        if queue.in_flight and not remembered.was_left(index):
            # In flight before the ring runs: begun by another process, perhaps sent by it.
            self._above.recovered()
        remembered.starting(index)
        ready = self._above.starting(self._let_go)
        self._rings[index] = RunningRing(
            self._loop,
            queue,
            self._engine,
            kick_fd=ring.kick_fd,
            call_fd=ring.call_fd,
            error_fd=ring.error_fd,
            broken=partial(self._faults.ring_broken, index),
            held=not ready,
            log=log,
        )
        self._setups[index] = ring
        self._kickless.set()

    def _note_guest(self, ring: RingSetup) -> None:
        """The first ring is about to run, here. It may have run somewhere else."""
        fresh = (0x8000, 0x8000_8000) if self._packed else (0,)
        if self._remembered.has_inherited:
            return
        if ring.base in fresh:
            self._above.fresh_guest()
        else:
            self._above.inherited(0, False)

    @property
    def _packed(self) -> bool:
        return bool(self._features & F_RING_PACKED)

    async def stop_ring(self, index: int) -> int:
        """See VhostUserDevice."""
        bases = await self._close_rings([index], told=True)
        return bases[index]

    async def quiesce(self, limit_s: float) -> bool:
        """Pause all rings; whether everything that they popped is answered within `limit_s`.

        If it is not, they go on.
        """
        rings = list(self._rings.values())
        if await self._drain.rings(rings, trio.current_time() + limit_s):
            return True
        self.go_on()
        return False

    def go_on(self) -> None:
        """The end of `quiesce`, for a device that serves on."""
        for ring in self._rings.values():
            ring.unpause()

    @property
    def is_quiet(self) -> bool:
        """Every ring is paused, and nothing is in flight."""
        return all(ring.is_quiet for ring in self._rings.values())

    def hand_over_rings(self) -> dict[int, int]:
        """Close all rings, which are quiet; their bases. Another process goes on with them here,
        so that nothing has to be at the server."""
        assert self.is_quiet
        bases = {index: self._close_ring(ring) for index, ring in self._rings.items()}
        self._rings.clear()
        self._setups.clear()
        return bases

    def _let_go(self) -> None:
        """Rings that were held at their start may run."""
        for ring in self._rings.values():
            ring.let_go()

    def hurry(self, limit_s: float) -> None:
        """The process stops: from here on, and for what waits now, drains take at most that."""
        self._drain.hurry(limit_s)

    async def _close_rings(
        self, indexes: Collection[int], *, told: bool = False, answered: bool = True
    ) -> dict[int, int]:
        """Drain and close these rings, all within one limit; their bases.

        If they were the last ones, and the stop is to be `answered`, that is a promise (see
        `last_stop`): raises LeftBehind when it cannot be given.
        """
        deadline_s = self._drain.deadline_s()
        rings = [self._rings[index] for index in indexes]
        try:
            await self._stop(rings, deadline_s)
        finally:
            bases = {}
            for index in indexes:
                ring = self._rings.pop(index)
                bases[index] = self._close_ring(ring)
                if ring.in_flight and ring.keeps_in_flight:
                    self._remembered.leave(index)
                del self._setups[index]
        if bases and not self._rings:
            failure, is_late = await self._last_stop.bring_up_to_date(deadline_s)
            if answered:
                await self._last_stop.promise(
                    failure, is_late=is_late, migrates=self._dirty_logs.is_enabled
                )
            elif failure or is_late:
                _log.error(
                    "the guest has gone, and the server has not taken everything yet: it goes "
                    "there when the server takes it",
                    reason=failure or "no answer in time",
                )
        if told:
            # Not before there is an answer: a front-end without one goes on from an older base.
            for ring in rings:
                ring.base_was_reported()
        return bases

    async def _stop(self, rings: Collection[RunningRing], deadline_s: float) -> None:
        """Pause `rings`; return when everything they popped is answered, or abandoned."""
        if await self._drain.rings(rings, deadline_s):
            return
        failed = 0
        abandoned: list[BlkRequest] = []
        for ring in rings:
            requests = ring.unanswered()
            if not ring.keeps_in_flight:
                ring.fail(requests)
                failed += len(requests)
            abandoned += requests
        self._abandon(abandoned)
        if failed:
            _log.error(
                "requests were not answered in time while rings stopped, they fail",
                requests=failed,
                timeout_s=self._drain.timeout_s,
            )

    def _abandon(self, requests: list[BlkRequest]) -> None:
        self._engine.abandon(requests)
        self._above.abandoned(requests)

    def _close_ring(self, ring: RunningRing) -> int:
        """See RunningRing.close. What was not drained before, after an error, is abandoned: writes
        without their bytes must not be sent."""
        if requests := ring.unanswered():
            self._abandon(requests)
        self._requests_of_closed += ring.requests
        self._general_of_closed += ring.general
        return ring.close(told=False)

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

    @property
    def requests_total(self) -> int:
        """How many requests came, in all rings since the start."""
        return self._requests_of_closed + sum(ring.requests for ring in self._rings.values())

    @property
    def general_total(self) -> Counter[str]:
        """Those of them that went the general way, by reason (see `general`)."""
        return sum((ring.general for ring in self._rings.values()), self._general_of_closed)

    async def run(self) -> None:
        """Look after rings without a kick descriptor, until cancelled."""
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
        return self._remembered.create(
            num_queues, max(queue_size, self.max_queue_size), packed=self._packed
        )

    def set_inflight(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int
    ) -> None:
        """See VhostUserDevice."""
        remembered = self._remembered
        region = remembered.map(fd, offset, size, num_queues, queue_size, packed=self._packed)
        if region.write_through:
            self._config.refuse_writeback()
            self._engine.writeback_changed()
        unflushed_on, loss_unreported = region.unflushed_on, region.loss_unreported
        if remembered.take_over(region):
            self._above.inherited(unflushed_on, loss_unreported)
        remembered.remember()

    def set_log(self, fd: int, offset: int, size: int) -> None:
        """See VhostUserDevice."""
        self._dirty_logs.bitmap = DirtyBitmap.map(fd, offset, size)
        self._update_logs()

    def set_logging(self, enabled: bool) -> None:
        """See VhostUserDevice."""
        self._dirty_logs.is_enabled = enabled
        self._update_logs()

    def set_ring_log(self, index: int, log_guest_address: int | None) -> None:
        """See VhostUserDevice."""
        self._setups[index] = replace(self._setups[index], log_guest_address=log_guest_address)
        self._update_logs()

    def _update_logs(self) -> None:
        """Every ring marks what it writes if that is wanted."""
        for index, ring in self._rings.items():
            ring.set_log(
                self._dirty_logs.of(self._memory, self._setups[index], packed=self._packed)
            )

    # The end

    async def reset(self) -> None:
        """See VhostUserDevice."""
        try:
            await self._close_rings(list(self._rings))
        finally:
            self._config.reset()
            self.set_features(0)
            self._remembered.clear()
            self._forget_shared()

    async def disconnected(self) -> None:
        """See VhostUserDevice. The guest may run on and come back with another front-end, so
        what it set in the configuration space stays."""
        try:
            await self._close_rings(list(self._rings), answered=False)
        finally:
            while self._rings:
                # Something went wrong above; nothing may touch the guest's memory all the same.
                index, ring = self._rings.popitem()
                self._setups.pop(index, None)
                with suppress(Exception):
                    self._close_ring(ring)
            self.set_features(0)
            self._forget_shared()
            self._memory = GuestMemory([])
            self.listener = None

    def _forget_shared(self) -> None:
        self._remembered.forget()
        self._dirty_logs = DirtyLogs()

"""The vhost-user-blk device: guest memory, rings and the request engine over one disk.

Implements `device_interface.VhostUserDevice`, which says what each call means. Two things are
this module's own: rings that have to stop, or whose memory changes, are drained within
`drain_timeout_s` (QEMU's main loop waits for the answer without a limit of its own), and a stop
that was answered is a promise to the host that opens the image next.

**A stop.** What a ring has popped is answered; what is still unanswered at the limit is
*abandoned*: nothing touches its buffers any more, and what was not sent of it never is. With an
in-flight region it stays in that, neither completed nor failed, and is executed when the ring runs
again; without one it fails, for that ring alone.

**The last stop.** When no ring runs any more the guest may go on elsewhere. So everything that it
wrote is brought to the server and flushed first (`Above.all_stopped`). If that does not succeed
within the limit the storage side sees to it that nothing of the guest's is sent from here any
more (`Above.left_behind`), and when something is left here that the next host would miss the stop
is not answered with success: LeftBehind, and the session says no, or hangs up. What was left in an
in-flight region counts as missing while the dirty log is on: such a region does not migrate, and
neither does what the guest has still to be told of a loss.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import replace

import structlog
import trio

from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, UNASKED, Hits, Request, Target
from bridge.datapath.rows import Usual
from bridge.errors import LeftBehind, ProtocolError
from bridge.guest.above import Above
from bridge.guest.drain import Drain
from bridge.guest.regions import mapped, with_added
from bridge.guest.ring import RunningRing
from bridge.guest.ring_setup import make_queue, ring_areas, written_areas
from bridge.guest.vhost_user.device_interface import ConfigListener, MemoryRegion, RingSetup
from bridge.guest.virtio.blk import BlkEngine, BlkRequest
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.chain import MAX_QUEUE_SIZE
from bridge.guest.virtio.dirty_log import DirtyBitmap, DirtyLog
from bridge.guest.virtio.inflight import InflightRegion, queue_size_by_region
from bridge.guest.virtio.long_chains import LongViews
from bridge.guest.virtio.memory import GuestMemory
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
        self.listener: ConfigListener | None = None
        self._loop = loop
        self._config = BlkConfig(
            geometry, num_queues=max_queues, withheld_features=withheld_features
        )
        self.guest_faults: Counter[str] = Counter()
        self._requests_of_closed = 0
        self._target = target
        self._engine = BlkEngine(
            self._config,
            target,
            hits=hits,
            usual=usual,
            serial=serial,
            fault=self._guest_fault,
            turn=loop.turn,
            epoch=above.epoch,
        )
        self._drain = Drain(drain_timeout_s)
        self._has_inherited = False
        """The guest with the present in-flight region has run with another process."""
        self._has_served = False
        """A ring ran here: what a guest left unflushed when it stopped is known."""
        self._unflushed_on = 0
        self._loss_untold = False
        self._memory = GuestMemory([])
        self._features = 0
        self._setups: dict[int, RingSetup] = {}
        self._rings: dict[int, RunningRing] = {}
        self._kickless = trio.Event()
        self._inflight: InflightRegion | None = None
        self._inflight_source: tuple[int, int, int] | None = None
        self._left: dict[int, int] = {}
        """How many requests of a stopped ring were left in the in-flight region `_left_in`."""
        self._left_in: tuple[int, int, int] | None = None
        self._bitmap: DirtyBitmap | None = None
        self._logging = False
        self._long_views = LongViews()
        self._told_of_unsealed = False
        self._write_cache_flushes = 0
        """Flushes for a write cache that was turned off: in flight, and one more to come."""

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
        self._remember()
        if was_writeback and not self._config.writeback:
            # From now on the guest sends no flushes; what it wrote before is not to wait for one.
            self._flush_what_was_written()

    def _flush_what_was_written(self) -> None:
        """One at a time: a guest may turn its write cache off as often as it likes."""
        if self._write_cache_flushes:
            self._write_cache_flushes = 2  # Once more, for what was written since.
            return
        self._write_cache_flushes = 1
        self._target.submit(Request(FLUSH, 0, 0, [], self._written_flushed, UNASKED))
        self._loop.turn.want()

    def _written_flushed(self, flush: Request) -> None:
        again = self._write_cache_flushes > 1
        self._write_cache_flushes = 0
        if flush.error:
            _log.error("what was written before the write cache was turned off may not be durable")
        if again:
            self._flush_what_was_written()

    def remember_durability(self, *, unflushed_on: int, loss_untold: bool) -> None:
        """Keep for the process after this one: on which server instance something is unflushed
        (a number of 56 bits, 0: on none that has a name), and that the guest's next flush must
        fail."""
        self._unflushed_on = unflushed_on
        self._loss_untold = loss_untold
        self._remember()

    def _remember(self) -> None:
        """For the process after this one: the guest will not say any of it again."""
        if self._inflight is not None:
            self._inflight.remember(
                write_through=self._config.writeback_refused,
                loss_untold=self._loss_untold,
                unflushed_on=self._unflushed_on,
            )

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

        A request that takes too long is no reason to fail it: it keeps the mapping that it
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
        queue = make_queue(
            ring,
            index,
            memory=self._memory,
            features=self._features,
            max_size=self.max_queue_size,
            inflight=self._inflight,
        )

        queue.long.join(self._long_views)
        if not self._has_served:
            self._has_served = True
            self._note_guest(ring)
        left_by_us = self._left_in == self._inflight_source and index in self._left
        if queue.in_flight and not left_by_us:
            # In flight before the ring runs: begun by another process, perhaps sent by it.
            self._above.recovered()
        self._left.pop(index, None)
        if self._inflight is None:
            self._left.clear()
        ready = self._above.starting(self._let_go)

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
            held=not ready,
        )
        self._setups[index] = ring
        self._kickless.set()
        try:
            self._update_logs()
        except BaseException:
            # All of it or nothing: nobody else knows of this ring.
            del self._setups[index]
            self._close_ring(self._rings.pop(index))
            raise

    def _note_guest(self, ring: RingSetup) -> None:
        """The first ring is about to run, here. It may have run somewhere else."""
        fresh = (0x8000, 0x8000_8000) if self._packed else (0,)
        if self._has_inherited:
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

        If they were the last ones, and the stop is to be `answered`, that is a promise (see the
        module's text): raises LeftBehind when it cannot be given.
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
                    self._left[index] = ring.in_flight
                    self._left_in = self._inflight_source
                del self._setups[index]
        if bases and not self._rings:
            failure, is_late = await self._bring_up_to_date(deadline_s)
            if answered:
                await self._promise(failure, is_late=is_late)
            elif failure or is_late:
                _log.error(
                    "the guest has gone, and the server has not taken everything yet: it goes "
                    "there when the server takes it",
                    reason=failure or "no answer in time",
                )
        if told:
            # Not before there is an answer: a front-end without one goes on from an older base.
            for ring in rings:
                ring.was_told()
        return bases

    async def _bring_up_to_date(self, deadline_s: float) -> tuple[LeftBehind | None, bool]:
        """Have everything that the guest wrote brought to the server; why that failed, or whether
        it took too long."""
        failure: LeftBehind | None = None

        async def bring() -> None:
            nonlocal failure
            try:
                await self._above.all_stopped()
            except LeftBehind as error:
                failure = error

        in_time = await self._drain.last(bring, deadline_s)
        return failure, not in_time

    async def _promise(self, failure: LeftBehind | None, *, is_late: bool) -> None:
        """No ring runs, and the front-end is about to be told so: see the module's text."""
        left_here = None
        if failure or is_late:
            with trio.CancelScope(shield=True):
                left_here = await self._above.left_behind()
        if (left_behind := left_here or failure) is not None:
            raise _logged(left_behind)
        in_region = sum(self._left.values())
        if self._logging and (is_late or in_region):
            what = f"{in_region} requests" if in_region else "the last flush"
            raise _logged(
                LeftBehind(
                    f"the server has not answered {what} in time, and the guest migrates: it "
                    "cannot before that is answered; let it go on here and migrate it later"
                )
            )
        if self._logging and self._loss_untold:
            raise _logged(
                LeftBehind(
                    "the server may have lost writes of the guest's, which its next flush has to "
                    "tell it, and only here: let the guest go on here and migrate it later"
                )
            )
        if in_region:
            _log.warning(
                "requests are left in the in-flight region until the guest goes on",
                requests=in_region,
            )
        if is_late:
            _log.error(
                "the server has not answered the last flush in time: what the guest wrote since "
                "the flush before may not be durable yet"
            )

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
        region, fd, size_bytes = InflightRegion.create(
            num_queues=num_queues,
            queue_size=max(queue_size, self.max_queue_size),
            packed=self._packed,
        )
        self._forget_inflight()
        self._inflight = region
        self._inflight_source = _source(fd, 0)
        self._remember()
        return fd, size_bytes

    def set_inflight(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int
    ) -> None:
        """See VhostUserDevice. A region from `create_inflight` has room for more than it says, but
        only up to what we make: its size is the front-end's to choose."""
        room = queue_size_by_region(size, num_queues, packed=self._packed)
        if room > MAX_QUEUE_SIZE:
            room = 0
        region = InflightRegion.map(
            fd,
            offset,
            size,
            num_queues=num_queues,
            queue_size=max(queue_size, room),
            packed=self._packed,
        )
        self._forget_inflight()
        self._inflight = region
        self._inflight_source = _source(fd, offset)
        if self._inflight.write_through:
            self._config.refuse_writeback()
            self._engine.writeback_changed()
        unflushed_on, loss_untold = self._inflight.unflushed_on, self._inflight.loss_untold
        self._has_inherited = self._inflight.was_used and (
            not self._has_served or bool(unflushed_on) or loss_untold
        )
        if self._has_inherited:
            self._above.inherited(unflushed_on, loss_untold)
        self._remember()

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
        try:
            await self._close_rings(list(self._rings))
        finally:
            self._config.reset()
            self.set_features(0)
            if self._inflight is not None:
                # The driver has forgotten what it had in flight, and uses that memory again.
                self._inflight.clear()
            self._left.clear()
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

    def _forget_inflight(self) -> None:
        self._inflight = None
        self._has_inherited = False
        self._inflight_source = None

    def _forget_shared(self) -> None:
        self._forget_inflight()
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


def _logged(error: LeftBehind) -> LeftBehind:
    _log.error(error)
    return error


def _source(fd: int, offset: int) -> tuple[int, int, int]:
    """Which bytes of which file: the same region comes with another descriptor each time."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, offset

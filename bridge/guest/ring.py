"""A ring that runs: the join of a virtqueue, the request engine and the loop.

This is the one place where chains become requests and finished requests become used elements:

    poll      let the usual case take what it can; pop every chain that is left, hand each to the
              engine                                                   (once per turn)
    complete  a request is finished: its element goes to the used ring (any time in a turn)
    publish   one store of used.idx, at most one call                  (once per turn)

A request may be in flight while the dirty log begins or ends, or the ring is closed: `complete`
looks at how it is then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial

import structlog
import trio

from bridge.datapath.cells import NEXT_AVAIL, STOPPED, Queue
from bridge.datapath.loop import EPOLLET, EPOLLIN, Loop
from bridge.datapath.request import Request
from bridge.datapath.rows import UsualRing
from bridge.datapath.usual import segments_of
from bridge.errors import ProtocolError
from bridge.guest import general
from bridge.guest.eventfds import writer
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_request import BlkRequest
from bridge.guest.virtio.chain import MAX_QUEUE_SIZE, Chain, QueueBroken
from bridge.guest.virtio.dirty_log import DirtyLog
from bridge.guest.virtio.long_chains import LONG_CHAIN_VIEWS
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.guest.virtio.queue import RingAreas, VirtQueue

_log = structlog.get_logger(__name__)


class RunningRing:
    """One started virtqueue of a disk."""

    def __init__(
        self,
        loop: Loop,
        queue: VirtQueue,
        engine: BlkEngine,
        *,
        kick_fd: int | None,
        call_fd: int | None,
        error_fd: int | None,
        broken: Callable[[str], None],
        held: bool = False,
        log: DirtyLog | None = None,
    ) -> None:
        """The descriptors stay the caller's. `broken(reason)` is told when the guest broke the
        ring. `held`: nothing is begun before `let_go`. `log`: where what is written is marked, from
        the first request on (see `set_log`). Raises ProtocolError for a descriptor that cannot be
        waited for."""
        self._loop = loop
        self._turn = loop.turn
        self._queue = queue
        self._push = queue.push  # bound once
        self._publish_pushed: Callable[[], bool] = queue.publish
        self._engine = engine
        self._usual = engine.usual
        self._flat: Queue | None = None
        """The queue, if it takes part in the usual case (see `rows`)."""
        self._usual_ring: UsualRing | None = None
        self._takes = False
        """Usual chains are taken from it. Not while the dirty log is on."""
        self._broken = broken
        self._suspended = False
        self._stopping = False
        self._held = held
        self._popping = not held
        self._publishing = False
        self._drained: trio.Event | None = None
        self._log = log
        self._kick_fd: int | None = None
        self._call_fd: int | None = None
        self._error_fd: int | None = None
        self.requests = 0
        self.general: Counter[str] = Counter()
        """Those of them that went the general way, by reason (see `general`)."""
        self.is_broken = False
        self._closed = False
        self._leaves = False
        """There may be requests in the ring that were left there when every ring was looked at (see
        `Turn.after_look`)."""
        self.set_error(error_fd)
        self.set_call(call_fd)
        self.set_kick(kick_fd)
        if self._usual is not None and isinstance(queue, Queue) and self._usual.enter(queue, self):
            self._flat = queue
            self._takes = log is None
            self._publish_pushed = partial(self._usual.engine.publish, queue)
            self._take = self._usual.take  # bound once
            self._answers_at_once = self._usual.answers_at_once
            self._describe()
        self._note_left()
        loop.add_poller(self)
        if not held:
            self._start_recovered()

    def _start_recovered(self) -> None:
        """Execute the requests again that were in flight when the ring ran last."""
        if recovered := self._queue.recovered():
            self.requests += len(recovered)
            self.general[general.RECOVERED] += len(recovered)
            self._engine.start_late(self, recovered)
            self._turn.want()

    def _describe(self) -> None:
        """Tell compiled turns of the ring."""
        if self._flat is not None and self._usual is not None and self._usual.engine.has_turns:
            kick_fd = -1 if self._kick_fd is None else self._kick_fd
            self._usual_ring = UsualRing(
                *(self._flat, kick_fd, self.call, self._took, self.publish_later),
                *(self._engine.limits, self._usual),
            )

    # The data path

    def poll(self) -> bool:
        """Start every request that the guest has made available; True if there was one."""
        if not self._popping:
            return False
        flat = self._flat
        if flat is None:
            return self._pop(general.OFF, MAX_QUEUE_SIZE)
        state = flat.cells
        worked = False
        most = MAX_QUEUE_SIZE if self._leaves else 1
        while self._popping and flat.avail[1] != state[NEXT_AVAIL]:
            if not self._takes or self._waits_for_long():
                return self._pop(general.OFF, MAX_QUEUE_SIZE, after_others=worked) or worked
            state[STOPPED] = 0
            # (What a flush tells of that was left in the ring is not known.)
            taken = self._take(flat, self._engine.limits, flushes=not self._leaves)
            if taken:
                worked = True
                most = MAX_QUEUE_SIZE if self._leaves else 1
                self.requests += taken
                if self._answers_at_once and not self._publishing:
                    self.publish_later()
            stop = state[STOPPED]
            if not stop:
                # (Hits in a cache may have left some, of which no flush can tell anything.)
                self._leaves = False
                return worked
            # What is behind an unusual chain may be usual again. Where nothing is, ever more at
            # once: asking costs as much as a tenth of what follows.
            if not self._pop(stop, most, after_others=worked):
                return worked
            worked = True
            most *= 2
        else:
            self._leaves = False  # Nothing is in the ring.
        return worked

    def _pop(self, stop: int, most: int, *, after_others: bool = False) -> bool:
        """Start up to `most` requests the general way, because of `stop` (see `general`); True if
        there was one, or the ring is broken. `after_others`: of this turn."""
        try:
            chains = self._queue.pop(most)
        except QueueBroken as error:
            if not after_others:  # Those were good; the next turn says what is wrong.
                self._break(str(error))
            return not after_others
        if not chains:
            return False
        self.requests += len(chains)
        general.count(self.general, chains, stop)
        if self._leaves:
            self._leaves = False
            self._engine.start_late(self, chains)
        else:
            self._engine.start(self, chains)
        if self._queue.long.too_many:
            self._leaves = True
        return True

    def complete(self, chain: Chain, status: int, length: int) -> None:
        """A request is finished with `length` bytes written (see `blk_request.UsedRing`)."""
        if self._closed:
            return
        head, _, _, _, _, status_view, status_at, _ = chain
        if status_view is not None:
            status_view[status_at] = status
        self._push(head, length)
        if not self._publishing:
            self.publish_later()
        if self._log is not None:
            self._log.mark_chain(chain)  # After it was written: who reads the log may be fast.

    def publish_later(self) -> None:
        """Publish what was pushed at the end of this turn."""
        if not self._publishing:
            self._publishing = True
            self._turn.at_end(self._publish)

    def usual_ring(self) -> UsualRing | tuple[()] | None:
        """See rows.MaybeUsual."""
        if not self._popping:
            return ()
        if not self._takes or self._drained is not None or self._waits_for_long():
            return None
        if self._leaves:
            return None  # `poll` knows what was left.
        return self._usual_ring

    def _waits_for_long(self) -> bool:
        """What is in the ring waits until there are fewer long chains (see `LongChains`)."""
        long = self._queue.long
        return long.views > 0 and long.too_many

    def _took(self, count: int) -> None:
        self.requests += count

    def adopt(self, head: int, cookie: int, row: tuple[int, ...]) -> BlkRequest:
        """See rows.RowOwner. There are rows only while `_flat` is there."""
        flat = self._flat
        assert flat is not None
        _, at, _, length, _, region, status_region, segments, *_ = row
        pieces = [(region, at, length)] if segments else []
        if segments > 1:
            pieces = segments_of(flat.segments, head, segments)
        if (n_views := segments + 2) > LONG_CHAIN_VIEWS:
            self._queue.long.popped(head, n_views)
        views = flat.views
        buffers = [views[region][at : at + n_bytes] for region, at, n_bytes in pieces]
        return self._engine.adopt(self, head, cookie, row, buffers, views[status_region])

    def finish(self, request: Request, error: int) -> None:
        """See rows.RowOwner."""
        self._turn.finish(request, error)

    def submit_alone(self, request: Request) -> None:
        """See rows.RowOwner."""
        self._engine.submit_again(request)

    def _adopt_all(self) -> None:
        """Rows in flight become requests."""
        if self._usual is not None:
            self._usual.adopt_all()

    def _publish(self) -> None:
        if not self._publishing:
            return  # closed meanwhile
        self._publishing = False
        wants_call = self._publish_pushed()
        if self._log is not None:
            self._log.mark_ring()
        if wants_call:
            self.call()
        if self._drained is not None and not self._queue.in_flight:
            self._drained.set()

    def call(self) -> None:
        """Call the driver: something was published."""
        if self._call_fd is not None and not _signal(self._call_fd):
            self._call_blocks()

    def _call_blocks(self) -> None:
        """The front-end made the call descriptor block: the loop does not wait for it twice."""
        self._call_fd = None
        _log.error(
            "writing to the call eventfd of a ring blocked: the front-end has changed it, and gets "
            "no more calls"
        )

    def arm(self) -> bool:
        """Ask the guest for kicks; True if there are requests already (see `loop.Poller`)."""
        if not self._popping:
            return False
        more = self._queue.arm()
        if self._log is not None:
            self._log.mark_ring()
        return more

    def disarm(self) -> None:
        """Kicks are not needed for now."""
        if self._popping:
            self._queue.disarm()
            if self._log is not None:
                self._log.mark_ring()

    def _break(self, reason: str) -> None:
        """The guest broke the ring: it is no longer served; the other rings are."""
        self.is_broken = True
        self._set_popping()
        if self._error_fd is not None:
            _signal(self._error_fd)
        self._broken(reason)

    # Control

    @property
    def must_be_polled(self) -> bool:
        """The guest sends no kicks: the device has to wake the loop."""
        return self._kick_fd is None and self._popping

    @property
    def in_flight(self) -> int:
        """Requests that are not answered."""
        return self._queue.in_flight

    def set_kick(self, fd: int | None) -> None:
        """Wait for `fd` from now on. Raises ProtocolError, and waits for the old one still, if
        that is not possible."""
        if fd is not None:
            try:
                # Edge-triggered: the counter need not be read, every write to it is an event.
                self._loop.add(fd, _kicked, EPOLLIN | EPOLLET)
            except OSError as error:
                raise ProtocolError(f"the kick descriptor cannot be waited for: {error}") from error
        if self._kick_fd is not None:
            self._loop.remove(self._kick_fd)
        self._kick_fd = fd
        self._describe()
        self._loop.wake()

    def set_call(self, fd: int | None) -> None:
        """Signal `fd` from now on, and once now: an earlier call may have got lost."""
        self._call_fd = fd
        if fd is not None and not _signal(fd):
            self._call_blocks()

    def set_error(self, fd: int | None) -> None:
        """Signal `fd` when the ring breaks; now, if it has."""
        self._error_fd = fd
        if fd is not None and self.is_broken:
            _signal(fd)

    def set_log(self, log: DirtyLog | None) -> None:
        """Mark what is written from now on in `log`, including for what is in flight."""
        self._adopt_all()
        self._takes = self._flat is not None and log is None
        self._log = log

    def suspend(self) -> None:
        """Leave new requests in the ring."""
        self._suspended = True
        self._set_popping()

    def resume(self) -> None:
        """Serve again."""
        self._suspended = False
        self._set_popping()

    def pause(self) -> None:
        """Pop no more until `unpause` or `close`, whatever suspend and resume say."""
        self._stopping = True
        self._set_popping()

    def unpause(self) -> None:
        """The end of `pause`."""
        self._stopping = False
        self._set_popping()

    @property
    def is_quiet(self) -> bool:
        """It pops nothing, and nothing is in flight or to be published."""
        return self._stopping and not (self._queue.in_flight or self._publishing or self._held)

    @property
    def is_held(self) -> bool:
        """Nothing was begun yet: see `let_go`."""
        return self._held

    def let_go(self) -> None:
        """The storage side is ready for a ring that was started as `held`."""
        if self._held:
            self._held = False
            self._start_recovered()
            self._set_popping()

    def _set_popping(self) -> None:
        popped = self._popping
        self._popping = not (self._suspended or self._stopping or self._held or self.is_broken)
        if self._popping:
            if not popped:
                self._note_left()
            self._loop.wake()

    def _note_left(self) -> None:
        """Requests that are in the ring now may have been there for long."""
        self._leaves = self._leaves or self.arm()
        self.disarm()

    async def drained(self) -> None:
        """Return when everything popped is published. May be cancelled."""
        while (self._queue.in_flight or self._publishing) and not self._held:
            self._drained = trio.Event()
            await self._drained.wait()

    @property
    def keeps_in_flight(self) -> bool:
        """Requests unanswered when the ring is closed are executed when it runs again."""
        return self._queue.keeps_in_flight and not self.is_broken

    def unanswered(self) -> list[BlkRequest]:
        """The requests of this ring that the storage side has, oldest first."""
        return self._engine.unanswered(self)

    def uses(self, regions: list[Region]) -> bool:
        """Something that is not answered has buffers in one of `regions`."""
        mappings = [region.view.obj for region in regions]
        for request in self.unanswered():
            _, _, _, readable, writable, status_view, _, _ = request.chain
            views = [*readable, *writable]
            if status_view is not None:
                views.append(status_view)
            if any(view.obj is mapping for view in views for mapping in mappings):
                return True
        return False

    def fail(self, requests: list[BlkRequest]) -> None:
        """Tell the guest that `requests` of this ring failed."""
        self._engine.fail(requests)

    def move(self, memory: GuestMemory, areas: RingAreas | None) -> None:
        """The guest's memory was mapped anew; without `areas` the ring is no longer in it,
        and is broken."""
        self._adopt_all()
        if areas is not None:
            self._queue.use_memory(memory, areas)
        elif not self.is_broken:
            self._break("its memory was taken away")

    def close(self, *, told: bool) -> int:
        """Let go of the ring and its descriptors; the base to go on from (see VirtQueue.close).

        Requests that are still unanswered then are forgotten: their end is not reported to the
        guest, and nothing is written to the ring or a status byte any more. (With an in-flight
        region they stay in that.)
        """
        self.pause()
        self._loop.remove_poller(self)
        if self._kick_fd is not None:
            self._loop.remove(self._kick_fd)
            self._kick_fd = None
        if self._publishing:
            self._publish()
        if not self.is_broken:
            # The back-end that serves the ring next finds a driver that kicks.
            self._queue.arm()
            if self._log is not None:
                self._log.mark_ring()
        self._closed = True
        self._engine.abandon(self._engine.unanswered(self))
        if self._usual is not None and self._flat is not None:
            self._usual.leave(self._flat)
            self._takes = False
            self._flat = None
            self._usual_ring = None
        self._queue.long.leave()
        self._call_fd = None
        self._error_fd = None
        self._log = None
        return self._queue.close(told=told)

    def base_was_reported(self) -> None:
        """The front-end gets the base of this closed ring after all."""
        self._queue.base_was_reported()


def _kicked(events: int) -> None:
    """A kick says only that a turn is due; `poll` looks at the ring in every turn."""


_signal = writer.signal

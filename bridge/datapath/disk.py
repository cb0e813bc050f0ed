"""The disk: the one seam between the guest's side and the storage side.

`Disk` is a `Target` over a back-end: the NBD client, or the cache over it, which do themselves
what a server lacks. It adds the periodic flush timer; requests go on untouched, without an
object of their own, except for flushes; a back-end with a cache may serve `hits` without any.

**The flush timer.** A guest that never flushes would leave its writes in the server's volatile
cache without end. The first write after a flush arms a timer; when it fires, everything is flushed.
A guest's own flush clears it. A timed flush that fails is logged, counted and tried again, and
the guest's next flush fails, too: a server that could not flush may have dropped what it had, and
the storage side says so only once.

Of the flushes that the guest did not send (the timer's, the last one before a stop, the one when
it turns its write cache off) one is in flight at a time: while the server is away they would pile
up. A caller that wants one meanwhile shares the next, or the same one if nothing was written since
(a cache that holds something may have got it since, from a write submitted long before).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import ECANCELED
from math import inf
from time import perf_counter_ns
from typing import Protocol, cast

import structlog
import trio

from bridge.datapath.flush_rows import TurnedFlushes
from bridge.datapath.histogram import Histogram
from bridge.datapath.request import FLUSH, INTERNAL, READ, REPEATED, Hits, Request, Target
from bridge.datapath.rows import Usual
from bridge.datapath.turn import Outcome, Turn

_log = structlog.get_logger(__name__)


class DiskTarget(Target, Protocol):
    """What a disk needs of the storage side."""

    @property
    def can_flush(self) -> bool:
        """FLUSH means something."""

    @property
    def in_flight(self) -> int:
        """How many requests are not finished."""

    @property
    def holds_writes(self) -> bool:
        """It holds data that the server lacks, perhaps from before this process: a cache."""

    @property
    def hits(self) -> Hits | None:
        """What serves requests on the spot; None: nothing does."""

    def usual(self, wrote: Callable[[], None]) -> Usual | None:
        """What serves the usual requests of rings; None: nothing does. `wrote()` is called after
        some of them were writes, before any of that is sent or published."""


class Above(Protocol):
    """What remembers, for the process after this one, how it stands with the disk."""

    def durability_changed(self) -> None:
        """`Disk.is_durable`, `unreported` or `is_telling` may have changed. Called before a write
        goes on that makes the disk no longer durable."""


class Disk:
    """The guest's disk over `target`. See the module's text."""

    def __init__(
        self,
        target: DiskTarget,
        *,
        turn: Turn,
        flush_interval_s: float,
        now: Callable[[], float],
        above: Above | None = None,
        usual: bool = True,
    ) -> None:
        """`turn` is the one of `target`. `flush_interval_s` 0 turns the timer off; `now` is a
        monotonic clock in seconds. `usual`: the usual case goes its own way (see `usual`)."""
        self._above = above
        self._target = target
        self._turn = turn
        self._submit = target.submit
        hits = target.hits
        self.hits: Hits | None = None
        """What may be asked before `submit`."""
        if hits is not None:
            self.hits = self
            self.read_hit = hits.read_hit  # bound once: no second call per request
            self._write_hit = hits.write_hit
        self._flush_interval_s = flush_interval_s
        self.usual = target.usual(self._wrote) if usual else None
        """What rings may ask before they pop a chain; None: there is nothing."""
        if self.usual is not None:
            self.usual.is_armed = self._is_armed
            self.usual.tells(self)
        self._now = now
        self._deadline_s: float | None = None
        self._armed = trio.Event()
        self._loss_error = 0
        self._losses = 0
        """What the guest has to hear of by a flush that fails, and how many there were of it."""
        self._told = 0
        """Of how many of them it has heard. A flush that was submitted before fails as well."""
        self.is_telling = False
        """A flush of the guest's has failed, which it may not have seen: if the process dies now,
        the next one executes that flush again, and must know that it was to fail."""
        self._unanswered_flushes = 0
        self._internal: list[Callable[[Request], None]] | None = None
        """Who waits for the flush in flight that the guest did not send; None: there is none."""
        self._next_internal: list[Callable[[Request], None]] = []
        self._internal_covers = False
        """Something was written that this flush is to make durable."""
        self._internal_ended = trio.Event()
        self._internal_began_s = 0.0
        self.flush_times = Histogram()
        """How long the guest's flushes took, from here on."""
        self.internal_flush_times = Histogram()
        """The same for those that the guest did not send."""
        self.is_durable = True
        """All that was submitted is durable, as far as is known here."""
        self.timed_flushes = 0
        self.timed_flush_failures = 0

    def submit(self, request: Request) -> None:
        """Start `request` (see `Target`)."""
        op = request.op
        if op == READ:
            self._submit(request)
        elif op == FLUSH and request.flags & INTERNAL:
            self._flush_internally(lambda flush: self._turn.finish(request, flush.error))
        elif op == FLUSH:
            was_armed = self._clear_timer()
            self._unanswered_flushes += 1
            owner = request, was_armed, self._now(), self._told
            flush = Request(FLUSH, 0, 0, [], self._flush_done, request.flags, owner)
            self._submit(flush)
        else:
            if self._deadline_s is None:
                self._arm_timer()
            self._submit(request)

    def write_hit(self, offset: int, length: int, buffers: list[memoryview]) -> bool:
        """See `Hits`. Only where `hits` is not None."""
        if not self._write_hit(offset, length, buffers):
            return False
        if self._deadline_s is None:
            self._arm_timer()
        return True

    # The flush timer

    @property
    def flush_deadline_s(self) -> float | None:
        """When the timer fires, on the clock `now`; None while it is not armed."""
        return None if self._deadline_s == inf else self._deadline_s

    @property
    def flush_interval_s(self) -> float:
        """May be changed. What is not flushed by then waits no longer than the new one, too."""
        return self._flush_interval_s

    @flush_interval_s.setter
    def flush_interval_s(self, interval_s: float) -> None:
        self._flush_interval_s = interval_s
        if self._deadline_s is not None:
            due_s = self._due_s()
            self._deadline_s = due_s if due_s == inf else min(self._deadline_s, due_s)
            self._armed.set()

    def _due_s(self) -> float:
        """When what is written now is to be flushed at the latest."""
        return self._now() + ((self._target.can_flush and self._flush_interval_s) or inf)

    def _arm_timer(self) -> None:
        """Something is not durable. (Without a timer the deadline never comes.)"""
        self._deadline_s = self._due_s()
        self._armed.set()
        if self.is_durable:
            self.is_durable = False
            self._durability_changed()

    def _is_armed(self) -> bool:
        return self._deadline_s is not None

    def _wrote(self) -> None:
        """There were usual writes."""
        if self._deadline_s is None:
            self._arm_timer()

    # Flushes that are rows: see flush_rows.FlushedDisk.

    def in_flight_at_server(self) -> int:
        """See FlushedDisk."""
        return self._target.in_flight

    def may_flush(self, rows: int) -> bool:
        """See FlushedDisk."""
        return self._told == self._losses and self._unanswered_flushes == rows

    def flush_taken(self, *, armed: bool) -> None:
        """See FlushedDisk."""
        self._unanswered_flushes += 1
        self._deadline_s = None
        if armed:
            self._arm_timer()

    def flush_answered(self, took_ns: int) -> None:
        """See FlushedDisk."""
        self.flush_times.add(took_ns / 1e9)
        self._turn.finish(Outcome(self._row_flushed))

    def _row_flushed(self, _: Outcome) -> None:
        self._flush_ended(0)

    def flushes_turned(self, flushes: TurnedFlushes, *, armed: bool) -> None:
        """See FlushedDisk."""
        if flushes.taken:
            self._deadline_s = None
            if armed:
                self._arm_timer()
        self._unanswered_flushes += flushes.taken - len(flushes.took_ns)
        for took_ns in flushes.took_ns:
            self.flush_times.add(took_ns / 1e9)
        if flushes.took_ns:
            if flushes.durable or (self._deadline_s is None and not self._unanswered_flushes):
                self.is_durable = True
            self._durability_changed()

    def adopt_flush(self, request: Request, began_ns: int, *, armed: bool) -> Request:
        """See FlushedDisk."""
        began_s = self._now() - (perf_counter_ns() - began_ns) / 1e9
        owner = request, armed, began_s, self._told
        return Request(FLUSH, 0, 0, [], self._flush_done, request.flags, owner)

    def _clear_timer(self) -> bool:
        """A flush is about to be submitted: it covers what was completed before it.

        True if there was anything to flush, as far as is known here.
        """
        if self._deadline_s is None:
            return False
        self._deadline_s = None
        if self._target.in_flight:
            self._arm_timer()
        return True

    def _flush_done(self, flush: Request) -> None:
        """A guest's flush is done. One that failed has made nothing durable."""
        request, was_armed, began_s, told = cast("tuple[Request, bool, float, int]", flush.owner)
        self.flush_times.add(self._now() - began_s)
        if flush.error and was_armed and self._deadline_s is None:
            self._arm_timer()
        if request.is_abandoned:
            # The guest does not hear of it. (ECANCELED: it was not carried out. No harm.)
            if flush.error not in (0, ECANCELED):
                self._note_failure(flush.error)
            self._flush_ended(flush.error)
            self._turn.finish(request, flush.error)
            return
        error = flush.error or (self._loss_error if self._losses > told else 0)
        if not request.flags & REPEATED:
            self._told = self._losses
            if error and not self.is_telling:
                self.is_telling = True
                self._turn.after_look(self._was_told)
        self._flush_ended(flush.error)
        self._turn.finish(request, error)

    def _was_told(self) -> None:
        """What was answered until now is in the ring."""
        self.is_telling = False
        self._durability_changed()

    def _flush_ended(self, error: int) -> None:
        self._unanswered_flushes -= 1
        # Another one in flight may be for something that this one was too early for.
        if not error and self._deadline_s is None and not self._unanswered_flushes:
            self.is_durable = True
        self._durability_changed()

    def _durability_changed(self) -> None:
        if self._above is not None:
            self._above.durability_changed()

    @property
    def unreported(self) -> bool:
        """The guest's next flush fails, for a loss that it has not heard of."""
        return self._told < self._losses

    def tell(self, error: int) -> None:
        """Something may be lost that the guest believes to be on the disk: its next flush fails."""
        self._note_loss(error)
        self._durability_changed()

    def _note_loss(self, errno: int) -> None:
        if self.usual is not None:
            self.usual.adopt_all()  # A flush that is a row has to fail.
        self._loss_error = errno
        self._losses += 1

    def flush_inherited(self) -> None:
        """A guest comes that has run with another process, which may have left something unflushed:
        what becomes of that is not to depend on how long this server lives."""
        if self._target.can_flush:
            if self._deadline_s is None:
                self._arm_timer()
            self._flush_internally(_ignore)

    def flush_now(self) -> None:
        """The timer fired: flush, even if others do."""
        self.timed_flushes += 1
        self._flush_internally(self._timed_flush_done)

    def _timed_flush_done(self, flush: Request) -> None:
        if flush.error:
            self.timed_flush_failures += 1
            reason = os.strerror(flush.error)
            _log.warning("timed flush failed, will be tried again", reason=reason)

    async def flush(self, *, quiet: bool = False) -> int:
        """Bring what was written to the server and flush it, for a clean stop; 0 or an errno.

        Failure is logged, unless `quiet`; when cancelled, the flush goes on without a caller
        waiting for it.
        """
        target = self._target
        covers = self._internal is not None and self._internal_covers
        if not target.can_flush or not (
            self._deadline_s is not None or covers or target.holds_writes
        ):
            return 0
        finished = trio.Event()
        result = 0

        def done(flush: Request) -> None:
            nonlocal result
            result = flush.error
            if flush.error and not quiet:
                _log.error("the last flush failed", reason=os.strerror(flush.error))
            finished.set()

        self._flush_internally(done)
        await finished.wait()
        return result

    def _flush_internally(self, then: Callable[[Request], None]) -> None:
        """A flush that the guest did not send. If it fails, the guest's next one does, too."""
        if self._internal is None:
            self._start_internal([then])
        elif self._deadline_s is None and not self._target.holds_writes:
            self._internal.append(then)
        else:
            self._next_internal.append(then)

    def _start_internal(self, waiters: list[Callable[[Request], None]]) -> None:
        self._internal = waiters
        self._internal_began_s = self._now()
        self._internal_covers = self._clear_timer()
        self._unanswered_flushes += 1
        self._submit(Request(FLUSH, 0, 0, [], self._internal_done, INTERNAL))
        self._turn.want()  # Most who ask for this are tasks.

    def _internal_done(self, flush: Request) -> None:
        waiters, self._internal = self._internal or [], None
        self.internal_flush_times.add(self._now() - self._internal_began_s)
        if flush.error:
            self._note_failure(flush.error)
            if self._deadline_s is None:
                self._arm_timer()
        self._flush_ended(flush.error)
        following, self._next_internal = self._next_internal, []
        if following:
            self._start_internal(following)
        self._internal_ended.set()
        for then in waiters:
            then(flush)

    def _note_failure(self, errno: int) -> None:
        """A flush failed that the guest does not hear of: its next one has to. What a cache still
        holds it sends again, and its flush tells the truth by itself."""
        if not self._target.holds_writes:
            self._note_loss(errno)

    async def run_flush_timer(self) -> None:
        """Fire the timer whenever it is due, until cancelled."""
        while True:
            deadline_s = self._deadline_s
            left_s = inf if deadline_s is None else deadline_s - self._now()
            if left_s > 0:
                self._armed = trio.Event()
                with trio.move_on_after(left_s):
                    await self._armed.wait()
            elif self._internal is not None:
                self._internal_ended = trio.Event()
                await self._internal_ended.wait()
            else:
                self.flush_now()


def _ignore(flush: Request) -> None:
    """No request waits for it; the guest's next flush tells of a failure."""

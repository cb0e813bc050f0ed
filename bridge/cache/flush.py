"""The flush: write out, wait for those replies, NBD flush, wait; and its timer.

One flush is in progress at a time. A guest's flush joins the one in progress only if no write
completed since that began, otherwise it waits for the next: so a burst of flushes from several
queues costs two. A flush of few dirty blocks sends them as writes with FUA, all at once, which
saves the second round trip; that is right only when the server holds nothing else unflushed.

A block becomes clean when a flush succeeded that was sent after the block's reply, on the same
connection generation as that reply. If the connection was replaced in between, or the server
failed to make something else durable, everything begins again: the server may have lost what it
acknowledged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from bridge.request import FLUSH, Request

from .backend import Backend, Stats
from .index import Index
from .options import Options
from .slots import Slots
from .ticket import Ticket
from .writeback import Writeback


class Flushed(Protocol):
    """Who waits for a flush."""

    def flushed(self, error: int) -> None:
        """Everything completed before is durable, or `error` is an errno."""


class _Pass(Ticket):
    """One flush in progress."""

    __slots__ = ("_ended", "covered", "epoch", "generation", "waiters", "writes_seen")

    def __init__(
        self,
        ended: Callable[[_Pass], None],
        *,
        fua: bool,
        generation: int,
        epoch: int,
        writes_seen: int,
    ) -> None:
        super().__init__(fua=fua)
        self._ended = ended
        self.generation = generation
        self.epoch = epoch
        self.writes_seen = writes_seen
        self.covered: list[int] = []
        self.waiters: list[Flushed] = []

    def settled(self) -> None:
        self._ended(self)


class Flusher:
    """All flushes of one cache."""

    def __init__(
        self,
        index: Index,
        slots: Slots,
        writeback: Writeback,
        backend: Backend,
        options: Options,
        stats: Stats,
        clock: Callable[[], float],
    ) -> None:
        self._index = index
        self._slots = slots
        self._writeback = writeback
        self._backend = backend
        self._options = options
        self._stats = stats
        self._clock = clock
        self._pass: _Pass | None = None
        self._next: list[Flushed] = []
        self._retry_at = 0.0
        self._retry_s = options.retry_s
        self.due: float | None = None
        """When the timer fires; None: nothing was written since the last flush."""
        self.writes = 0
        """Raised by every write that changes what is dirty or sent, and by every discard."""
        self.ended: Callable[[], None] = _nothing
        """Called when a flush ended, whatever its result."""

    @property
    def running(self) -> bool:
        """A flush is in progress."""
        return self._pass is not None

    def arm(self) -> None:
        """Something was written: it is to be durable within the flush interval."""
        if self.due is None and self._options.flush_interval_s:
            self.due = self._clock() + self._options.flush_interval_s
            self._writeback.woken()

    def request(self, waiter: Flushed) -> None:
        """Tell `waiter` when everything completed until now is durable."""
        running = self._pass
        if running is not None and running.writes_seen == self.writes:
            running.waiters.append(waiter)
        elif running is not None:
            self._next.append(waiter)
        else:
            self._start([waiter])

    def press(self) -> None:
        """Too much is dirty: start a flush, unless one failed a moment ago."""
        if self._pass is None and self._clock() >= self._retry_at:
            self._start([])

    def tick(self, now: float) -> None:
        """Start the flush that is due."""
        if self.due is not None and self.due <= now and self._pass is None:
            self._stats.timed_flushes += 1
            self._start([])

    def _start(self, waiters: list[Flushed]) -> None:
        writeback = self._writeback
        few = writeback.tail - writeback.head <= self._options.fua_granules
        fua = self._backend.can_fua and few and not writeback.unflushed
        running = self._pass = _Pass(
            self._written_out,
            fua=fua,
            generation=self._backend.generation,
            epoch=writeback.epoch,
            writes_seen=self.writes,
        )
        running.waiters = waiters
        self.due = None
        writeback.want_all(running)

    def _written_out(self, running: _Pass) -> None:
        """Every dirty block was replied to."""
        if running.error:
            self._end(running, running.error)
        elif (
            running.lost
            or running.generation != self._backend.generation
            or running.epoch != self._writeback.epoch
        ):
            self._restart(running)
        elif not self._backend.can_flush:
            self._writeback.take_written()
            self._end(running, 0)
        elif not self._writeback.unflushed:
            # Nothing but FUA writes happened since the last flush was sent: all is durable.
            self._stats.fua_flushes += 1
            self._end(running, 0)
        else:
            running.covered = self._writeback.take_written()
            for slot in running.covered:
                self._index.flush_sent(slot)
            self._stats.flushes += 1
            self._backend.submit(Request(FLUSH, 0, 0, [], self._replied, owner=running))

    def _replied(self, request: Request) -> None:
        running: _Pass = request.owner
        index = self._index
        lost = (
            not request.generation == running.generation == self._backend.generation
            or running.epoch != self._writeback.epoch
        )
        if request.error or lost:
            self._writeback.unflushed = True
            for slot in running.covered:
                self._writeback.send_again(slot, index.flush_lost(slot))
            if request.error:
                self._writeback.could_not_flush()
                self._stats.flush_errors += 1
                self._end(running, request.error)
            else:
                self._restart(running)
            return
        for slot in running.covered:
            if index.flush_ok(slot):
                self._slots.cleaned(slot)
        self._end(running, 0)

    def _restart(self, running: _Pass) -> None:
        """The same flush once more, for a new server."""
        self._pass = None
        self._start(running.waiters)

    def _end(self, running: _Pass, error: int) -> None:
        self._pass = None
        if error:
            self._retry_at = self._clock() + self._retry_s
            self._retry_s = min(self._retry_s * 2, self._options.retry_max_s)
            self.due = self._retry_at if self.due is None else min(self.due, self._retry_at)
        else:
            self._retry_s = self._options.retry_s
            self._retry_at = 0.0
        for waiter in running.waiters:
            waiter.flushed(error)
        if self._next and self._pass is None:
            waiters, self._next = self._next, []
            self._start(waiters)
        if self.due is not None:
            # Armed while the flush was in progress, when nobody looked at it.
            self._writeback.woken()
        self.ended()


def _nothing() -> None:
    """Nobody wants to know."""

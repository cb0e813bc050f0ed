"""The flush: write out, wait for those replies, NBD flush, wait; and its timer.

One flush is in progress at a time. A guest's flush joins the one in progress only if no write
completed since that began, otherwise it waits for the next: so a burst of flushes from several
queues costs two. A flush of few dirty blocks sends them as writes with FUA, all at once, which
saves the second round trip; that is right only when the server holds nothing else unflushed.

A block becomes clean when a flush succeeded that was sent after the block's reply, in the same
epoch (see `durability`). If that ended in between, because the connection was replaced or the
server failed to make something else durable, everything begins again: the server may have lost
what it acknowledged.
"""

from __future__ import annotations

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.common import Common
from bridge.cache.wait import WriteOutWait
from bridge.cache.writeback import Writeback
from bridge.datapath.cells import CHANGES
from bridge.datapath.request import FLUSH, Request


class _Pass(WriteOutWait):
    """One flush in progress."""

    __slots__ = ("answered", "changes_seen", "covered", "epoch", "flusher", "waiting")

    answered: int
    """How much had been when the FLUSH was sent."""
    covered: list[int]
    """The slots with blocks that the FLUSH covers."""
    epoch: int
    """The one in which it began."""
    changes_seen: int
    """The cell CHANGES, when it began."""
    waiting: list[Request]
    """Whose end this flush is: guests' flushes, and writes that have to be durable. Empty when
    they are finished: `AwaitedSlots` keeps the last pass, and would keep the guest's memory."""

    def __init__(self, flusher: Flusher, *, fua: bool) -> None:
        super().__init__(fua=fua)
        self.flusher = flusher

    def join_written_out(self) -> None:
        """See WriteOutWait."""
        self.flusher.written_out.append(self)


class Flusher:
    """All flushes of one cache."""

    def __init__(self, common: Common, writeback: Writeback, busy_ranges: BusyRanges) -> None:
        self._common = common
        self._index = common.index
        self._cells = common.index.cells
        self._slots = common.slots
        self._upstream = common.upstream
        self._options = common.options
        self._writeback = writeback
        self._busy_ranges = busy_ranges
        self._durability = common.durability
        self._pass: _Pass | None = None
        self.written_out: list[_Pass] = []
        """The pass in progress, once every block it waits for was replied to."""
        self._next: list[Request] = []
        """What waits for the next pass."""
        self.interval_s = common.options.flush_interval_s
        """0: no timer. Changed by `set_interval`."""
        self._retries_later = False
        """The last one failed: the next that no request asks for is the timer's."""
        self._retry_s = common.options.retry_s
        self.due: float | None = None
        """When the timer fires; None: nothing was written since the last flush."""

    @property
    def running(self) -> bool:
        """A flush is in progress."""
        return self._pass is not None

    @property
    def waiting(self) -> int:
        """How many requests wait for a flush."""
        return len(self._next) + (len(self._pass.waiting) if self._pass is not None else 0)

    @property
    def is_armed(self) -> bool:
        """A write has nothing to arm."""
        return self.due is not None or not self.interval_s

    def arm(self) -> None:
        """Something was written: it is to be durable within the flush interval."""
        if self.due is None and self.interval_s:
            self.due = self._common.clock() + self.interval_s

    def set_interval(self, interval_s: float) -> None:
        """From now on; for what was written before as well, if that makes it durable earlier."""
        self.interval_s = interval_s
        if interval_s and (self._index.dirty_slots or not self._durability.all_flushed):
            due = self._common.clock() + interval_s
            self.due = due if self.due is None else min(self.due, due)

    def request(self, request: Request) -> None:
        """Finish `request` when everything completed until now is durable."""
        running = self._pass
        if running is not None and running.changes_seen == self._cells[CHANGES]:
            running.waiting.append(request)
        elif running is not None:
            self._next.append(request)
        else:
            self._start([request])

    def press(self) -> bool:
        """Too much is dirty: start a flush. False if none is of use: one is in progress, the last
        one failed and waits for the timer, or nothing is dirty."""
        if self._pass is not None or self._retries_later or not self._index.dirty_slots:
            return False
        self._start([])
        return True

    def tick(self, now: float) -> None:
        """Start the flush that is due."""
        if self.due is not None and self.due <= now and self._pass is None:
            self._common.stats.timed_flushes += 1
            self._start([])

    def advance(self) -> bool:
        """See `Stage`: go on with a pass that was written out."""
        if not self.written_out:
            return False
        (running,) = self.written_out
        self.written_out.clear()
        self._flush(running)
        return True

    def _start(self, waiting: list[Request]) -> None:
        assert self._pass is None
        writeback = self._writeback
        few = writeback.ring.tail - writeback.ring.head <= self._options.fua_granules
        fua = self._upstream.can_fua and few and self._durability.all_flushed
        running = self._pass = _Pass(self, fua=fua)
        running.epoch = self._durability.epoch
        running.changes_seen = self._cells[CHANGES]
        running.covered = []
        running.waiting = waiting
        self.due = None
        writeback.want_all(running)

    def _flush(self, running: _Pass) -> None:
        """Every dirty block was replied to."""
        writeback, durability = self._writeback, self._durability
        if running.error:
            self._end(running, running.error)
        elif running.lost or running.epoch != durability.epoch:
            self._restart(running)
        elif not self._upstream.can_flush:
            writeback.take_written()
            durability.flushed(durability.answered, running.epoch)
            self._end(running, 0)
        elif durability.all_flushed:
            # Nothing but FUA writes happened since the last flush was sent: all is durable.
            self._common.stats.fua_flushes += 1
            self._end(running, 0)
        else:
            running.covered = writeback.take_written()
            for slot in running.covered:
                self._index.flush_sent(slot)
            running.answered = durability.answered
            self._common.stats.flushes += 1
            self._upstream.submit(Request(FLUSH, 0, 0, [], self._replied, owner=running))

    def _replied(self, request: Request) -> None:
        running = request.owner
        assert isinstance(running, _Pass)
        index, writeback = self._index, self._writeback
        if request.error or not self._durability.flushed(running.answered, running.epoch):
            for slot in running.covered:
                writeback.send_again(slot, index.flush_lost(slot))
            if request.error:
                writeback.flush_failed()
                self._common.stats.flush_errors += 1
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
        self._start(running.waiting)

    def _end(self, running: _Pass, error: int) -> None:
        self._pass = None
        self._retries_later = bool(error)
        if error:
            retry_at = self._common.clock() + self._retry_s
            self._retry_s = min(self._retry_s * 2, self._options.retry_max_s)
            self.due = retry_at if self.due is None else min(self.due, retry_at)
        else:
            self._retry_s = self._options.retry_s
        finished, running.waiting = running.waiting, []
        for request in finished:
            self._common.turn.finish(request, error)
        if self._durability.all_flushed:
            self._busy_ranges.flushed(self._durability.epoch)
        if self._next:
            waiting, self._next = self._next, []
            self._start(waiting)

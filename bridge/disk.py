"""The disk: the one seam between the guest's side and the storage side.

`Disk` is a `Target` over a back-end (the NBD client, or the cache over it). It adds what the
back-end's server may lack (FUA by write and flush, write-zeroes by writing zeroes) and the
periodic flush timer. Pass-through requests go on untouched, without an object of their own.

**The flush timer.** A guest that never flushes would leave its writes in the server's volatile
cache for ever. The first write after a flush arms a timer; when it fires, everything is flushed.
A guest's own flush clears it. A timed flush that fails is logged, counted and tried again.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Any, Protocol

import structlog
import trio

from bridge.request import FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request, Target

_log = structlog.get_logger(__name__)

_ZERO_CHUNK_BYTES = 1 << 20
_ZERO_CHUNKS_IN_FLIGHT = 4
"""Zeroes written for a server without WRITE_ZEROES: big enough to be fast, few enough not to
starve the guest's other requests."""
_ZEROES = memoryview(bytes(_ZERO_CHUNK_BYTES))


class Backend(Target, Protocol):
    """What a disk needs of the storage side."""

    @property
    def can_flush(self) -> bool:
        """FLUSH means something."""

    @property
    def can_fua(self) -> bool:
        """The FUA flag means something."""

    @property
    def can_write_zeroes(self) -> bool:
        """WRITE_ZEROES is understood."""

    @property
    def in_flight(self) -> int:
        """How many requests are not finished."""


class Disk:
    """The guest's disk over `backend`. See the module's text."""

    def __init__(
        self, backend: Backend, *, flush_interval_s: float, now: Callable[[], float]
    ) -> None:
        """`flush_interval_s` 0 turns the timer off; `now` is a monotonic clock in seconds."""
        self._backend = backend
        self._submit = backend.submit
        self._flush_interval_s = (backend.can_flush and flush_interval_s) or inf
        self._now = now
        self._deadline_s: float | None = None
        self._armed = trio.Event()
        self._emulate_fua = not backend.can_fua
        self._emulate_zeroes = not backend.can_write_zeroes
        self.timed_flushes = 0
        self.timed_flush_failures = 0

    def submit(self, request: Request) -> None:
        """Start `request` (see `Target`)."""
        op = request.op
        if op == READ:
            self._submit(request)
        elif op == FLUSH:
            was_armed = self._clear_timer()
            flush = Request(FLUSH, 0, 0, [], self._flush_done, owner=(request, was_armed))
            self._submit(flush)
        else:
            if self._deadline_s is None:
                self._arm_timer()
            if request.flags & FUA and self._emulate_fua:
                self._write_then_flush(request)
            elif op == WRITE_ZEROES and self._emulate_zeroes:
                self._write_zeroes(request)
            else:
                self._submit(request)

    # What the server cannot do by itself

    def _write_then_flush(self, request: Request) -> None:
        """FUA for a server without it: the write, and a flush after its reply."""

        def written(part: Request) -> None:
            if part.error or not self._backend.can_flush:
                request.finish(part.error)
            else:
                self._submit(Request(FLUSH, 0, 0, [], flushed))

        def flushed(flush: Request) -> None:
            request.finish(flush.error)

        flags = request.flags & ~FUA
        part = Request(request.op, request.offset, request.length, request.buffers, written, flags)
        if part.op == WRITE_ZEROES and self._emulate_zeroes:
            self._write_zeroes(part)
        else:
            self._submit(part)

    def _write_zeroes(self, request: Request) -> None:
        """WRITE_ZEROES for a server without it: zeroes are written, a few pieces at a time."""
        _ZeroWriter(request, self._submit).run()

    # The flush timer

    @property
    def flush_deadline_s(self) -> float | None:
        """When the timer fires, on the clock `now`; None while it is not armed."""
        return None if self._deadline_s == inf else self._deadline_s

    def _arm_timer(self) -> None:
        """Something is not durable. (Without a timer the deadline never comes.)"""
        self._deadline_s = self._now() + self._flush_interval_s
        self._armed.set()

    def _clear_timer(self) -> bool:
        """A flush is about to be submitted: it covers what was completed before it.

        True if there was anything to flush, as far as is known here.
        """
        if self._deadline_s is None:
            return False
        self._deadline_s = None
        if self._backend.in_flight:
            self._arm_timer()
        return True

    def _flush_done(self, flush: Request) -> None:
        """A guest's flush is done. One that failed has made nothing durable."""
        request, was_armed = flush.owner
        if flush.error and was_armed and self._deadline_s is None:
            self._arm_timer()
        request.finish(flush.error)

    def flush_now(self) -> None:
        """The timer fired: flush, whoever else does."""
        self._clear_timer()
        self.timed_flushes += 1
        self._submit(Request(FLUSH, 0, 0, [], self._timed_flush_done))

    def _timed_flush_done(self, flush: Request) -> None:
        if flush.error:
            self.timed_flush_failures += 1
            _log.warning("timed flush failed, will be tried again", errno=flush.error)
            if self._deadline_s is None:
                self._arm_timer()

    async def flush(self) -> None:
        """Flush what was written since the last flush, for a clean stop.

        Failure is logged; when cancelled, the flush goes on without anybody waiting for it.
        """
        if self._deadline_s is None or not self._backend.can_flush:
            return
        finished = trio.Event()
        request = Request(FLUSH, 0, 0, [], lambda _: finished.set())
        self.submit(request)
        await finished.wait()
        if request.error:
            _log.error("the last flush failed", errno=request.error)

    async def run_flush_timer(self) -> None:
        """Fire the timer whenever it is due, for ever."""
        while True:
            deadline_s = self._deadline_s
            if deadline_s is None:
                self._armed = trio.Event()
                await self._armed.wait()
            elif (left_s := deadline_s - self._now()) > 0:
                await trio.sleep(left_s)
            else:
                self.flush_now()


class _ZeroWriter:
    """A write-zeroes that is carried out by writing zeroes. The first error ends it."""

    __slots__ = ("_error", "_in_flight", "_left", "_request", "_running", "_submit")

    def __init__(self, request: Request, submit: Callable[[Request], None]) -> None:
        self._request = request
        self._submit = submit
        self._left = request.length
        self._in_flight = 0
        self._error = 0
        self._running = False

    def run(self) -> None:
        """Keep some pieces in flight; finish the request when none is left."""
        if self._running:
            return  # a piece was done before its submit returned: the loop below goes on
        self._running = True
        request = self._request
        while self._left and not self._error and self._in_flight < _ZERO_CHUNKS_IN_FLIGHT:
            length = min(self._left, _ZERO_CHUNK_BYTES)
            offset = request.offset + request.length - self._left
            self._left -= length
            self._in_flight += 1
            flags = request.flags & FUA
            self._submit(Request(WRITE, offset, length, [_ZEROES[:length]], self._done, flags))
        self._running = False
        if not self._in_flight:
            request.finish(self._error)

    def _done(self, piece: Any) -> None:
        self._in_flight -= 1
        self._error = self._error or piece.error
        self.run()

"""A request as several commands: limits of length, missing commands, FUA without FUA.

NBD "Block size constraints", "Request types". A `Split` owns one request and sends parts of it,
at most `PARTS_IN_FLIGHT` at a time, so that the discard of a terabyte does not starve the reads
beside it. The first error wins; nothing new is sent after it. All parts of a write end up on the
same generation of connections. Commands without payload may be longer than the maximum payload,
but a server may refuse that: then they are tried again smaller.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final

from bridge.datapath.buffers import ZEROES, slices
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.server.export import Export

PARTS_IN_FLIGHT: Final = 4
_EFFECT_MAX_BYTES: Final = 1 << 30
"""Longest TRIM or WRITE_ZEROES: a power of two below 2^32, so that pieces stay on every grid."""

Send = Callable[[Request], None]
Finish = Callable[[Request, int], None]


class Limits:
    """The longest command of each kind that the server takes; learns from refusals."""

    __slots__ = ("effect_bytes", "payload_bytes")

    def __init__(self, export: Export) -> None:
        self.payload_bytes = export.max_payload_bytes
        self.effect_bytes = _EFFECT_MAX_BYTES

    def shrink(self) -> bool:
        """A command without payload was too long; False if it was not longer than a payload."""
        if self.effect_bytes <= self.payload_bytes:
            return False
        self.effect_bytes = self.payload_bytes
        return True


class Split:
    """One request, sent in parts. See the module's text."""

    __slots__ = (
        "_export",
        "_finish",
        "_in_flight",
        "_limits",
        "_mixed",
        "_next",
        "_request",
        "_send",
        "_stop",
        "_then_flush",
    )

    def __init__(
        self, request: Request, export: Export, limits: Limits, send: Send, finish: Finish
    ) -> None:
        self._request = request
        self._export = export
        self._limits = limits
        self._send = send
        self._finish = finish
        self._next = 0
        self._stop = 0
        self._in_flight = 0
        self._mixed = False
        self._then_flush = bool(request.flags & FUA) and not export.can_fua

    def start(self) -> None:
        """Send the first parts."""
        request = self._request
        request.error = 0
        request.generation = 0
        self._mixed = False
        self._next = request.offset
        self._stop = request.offset + request.length
        self._pump()

    def _pump(self) -> None:
        """Send what may be sent; finish when nothing is left."""
        while self._next < self._stop and self._in_flight < PARTS_IN_FLIGHT:
            self._send_part()
        if not self._in_flight:
            self._all_done()

    def _send_part(self) -> None:
        request = self._request
        offset = self._next
        limit_bytes = self._limit_bytes(request.op)
        # On the grid of the limit, so that pieces of an aligned range stay aligned.
        length = min(self._stop - offset, limit_bytes - offset % limit_bytes)
        self._next = offset + length
        part = self._part(offset, length)
        self._in_flight += 1
        self._send(part)

    def _limit_bytes(self, op: int) -> int:
        if op in (READ, WRITE):
            return self._limits.payload_bytes
        if op == WRITE_ZEROES and not self._export.can_write_zeroes:
            return min(len(ZEROES), self._limits.payload_bytes)
        return self._limits.effect_bytes

    def _part(self, offset: int, length: int) -> Request:
        request = self._request
        op = request.op
        flags = request.flags & ~FUA if self._then_flush else request.flags
        buffers: list[memoryview] = []
        if op in (READ, WRITE):
            buffers = slices(request.buffers, offset - request.offset, length)
        elif op == WRITE_ZEROES and not self._export.can_write_zeroes:
            op = WRITE
            flags &= FUA
            buffers = [ZEROES[:length]]
        return Request(op, offset, length, buffers, self._part_done, flags, request)

    def _part_done(self, part: Request) -> None:
        request = self._request
        error = part.error
        if error in (errno.EINVAL, errno.EOVERFLOW) and self._retry_smaller(part):
            return
        if not request.generation:
            request.generation = part.generation
        elif part.generation != request.generation:
            self._mixed = True
        self._finished(error)

    def _retry_smaller(self, part: Request) -> bool:
        limits = self._limits
        if part.op not in (DISCARD, WRITE_ZEROES, PREFETCH):
            return False
        if part.length <= limits.payload_bytes:
            return False
        limits.shrink()
        again = Request(part.op, part.offset, part.length, [], self._again_done, part.flags, part)
        Split(again, self._export, limits, self._send, self._finish).start()
        return True

    def _again_done(self, again: Request) -> None:
        part = again.owner
        assert isinstance(part, Request)
        part.generation = again.generation
        part.length = 0  # Not once more.
        part.error = again.error
        self._part_done(part)

    def _finished(self, error: int) -> None:
        request = self._request
        self._in_flight -= 1
        if error:
            request.error = request.error or error
            self._next = self._stop
        self._pump()

    def _all_done(self) -> None:
        request = self._request
        if self._mixed and not request.error and request.op in (WRITE, WRITE_ZEROES):
            # Some parts went to a server that died since, unflushed: a flush that failed before
            # this request is complete would not have told of them. So all of it once more.
            self.start()
        elif self._then_flush and not request.error and self._export.can_flush:
            self._send(Request(FLUSH, 0, 0, [], self._flushed, 0, request))
        else:
            self._finish(request, request.error)

    def _flushed(self, flush: Request) -> None:
        request = self._request
        if not flush.error and flush.generation != request.generation:
            # Written to one server, flushed on another: the bytes are still here, so once more.
            self.start()
            return
        self._finish(request, flush.error)

"""Requests in sectors on an export with larger blocks (NBD "Block size constraints").

Reads take the whole blocks and leave out what was not asked for. Writes read the blocks at their
two ends first (read-modify-write); the caller sees to it that nobody else changes those blocks
meanwhile. A trim is a hint and shrinks to whole blocks; zeroes at the ends are written.
"""

from __future__ import annotations

from collections.abc import Callable

from bridge.nbd.chunks import StatusRequest
from bridge.request import (
    BLOCK_STATUS,
    DISCARD,
    FUA,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)

Send = Callable[[Request], None]


def cover(offset: int, length: int, block_bytes: int) -> tuple[int, int]:
    """Start and end of the whole blocks that hold the range."""
    start = offset - offset % block_bytes
    stop = offset + length
    return start, stop + -stop % block_bytes


def send_aligned(request: Request, block_bytes: int, send: Send) -> None:
    """Do `request`, which is not aligned to `block_bytes`, with aligned ones through `send`."""
    op = request.op
    if op == READ:
        _read(request, block_bytes, send)
    elif op == WRITE:
        _ReadModifyWrite(request, block_bytes, send).start()
    elif op == WRITE_ZEROES:
        _WriteZeroes(request, block_bytes, send).start()
    elif op == DISCARD:
        _discard(request, block_bytes, send)
    else:
        assert op in (PREFETCH, BLOCK_STATUS)
        _widen(request, block_bytes, send)


def _finish_owner(part: Request) -> None:
    request: Request = part.owner
    request.generation = part.generation
    request.finish(part.error)


def _read(request: Request, block_bytes: int, send: Send) -> None:
    start, stop = cover(request.offset, request.length, block_bytes)
    before = memoryview(bytearray(request.offset - start))
    after = memoryview(bytearray(stop - request.offset - request.length))
    buffers = [view for view in (before, *request.buffers, after) if len(view)]
    send(Request(READ, start, stop - start, buffers, _finish_owner, 0, request))


def _discard(request: Request, block_bytes: int, send: Send) -> None:
    start = request.offset + -request.offset % block_bytes
    stop = request.offset + request.length
    stop -= stop % block_bytes
    if start >= stop:
        request.finish(0)
        return
    send(Request(DISCARD, start, stop - start, [], _finish_owner, request.flags, request))


def _widen(request: Request, block_bytes: int, send: Send) -> None:
    start, stop = cover(request.offset, request.length, block_bytes)
    if request.op == PREFETCH:
        send(Request(PREFETCH, start, stop - start, [], _finish_owner, 0, request))
        return
    wide = StatusRequest(BLOCK_STATUS, start, stop - start, [], _cut_extents, 0, request)
    wide.extents = []
    send(wide)


def _cut_extents(wide: StatusRequest) -> None:
    request = wide.owner
    assert isinstance(request, StatusRequest)
    position = wide.offset
    stop = request.offset + request.length
    extents: list[tuple[int, int]] = []
    for length, flags in wide.extents:
        first = max(position, request.offset)
        position += length
        if min(position, stop) > first:
            extents.append((min(position, stop) - first, flags))
    request.extents = extents
    _finish_owner(wide)


class _ReadModifyWrite:
    """Read the blocks at the ends, then write them with the new bytes in between."""

    __slots__ = (
        "_block_bytes",
        "_blocks",
        "_error",
        "_reads",
        "_request",
        "_send",
        "_start",
        "_stop",
    )

    def __init__(self, request: Request, block_bytes: int, send: Send) -> None:
        self._request = request
        self._block_bytes = block_bytes
        self._send = send
        self._start, self._stop = cover(request.offset, request.length, block_bytes)
        self._blocks: dict[int, memoryview] = {}
        self._reads = 0
        self._error = 0

    def start(self) -> None:
        request = self._request
        block_bytes = self._block_bytes
        ends = []
        if request.offset != self._start:
            ends.append(self._start)
        last = self._stop - block_bytes
        if request.offset + request.length != self._stop and last not in ends:
            ends.append(last)
        self._reads = len(ends)
        for offset in ends:
            view = self._blocks[offset] = memoryview(bytearray(block_bytes))
            self._send(Request(READ, offset, block_bytes, [view], self._have_read, 0, request))

    def _have_read(self, part: Request) -> None:
        self._reads -= 1
        self._error = self._error or part.error
        if self._reads:
            return
        request = self._request
        if self._error:
            request.finish(self._error)
            return
        before = request.offset - self._start
        after = self._stop - request.offset - request.length
        buffers = list(request.buffers)
        if before:
            buffers.insert(0, self._blocks[self._start][:before])
        if after:
            buffers.append(self._blocks[self._stop - self._block_bytes][-after:])
        self._send(
            Request(
                WRITE,
                self._start,
                self._stop - self._start,
                buffers,
                _finish_owner,
                request.flags,
                request,
            )
        )


class _WriteZeroes:
    """Zero the whole blocks with a command, write zeroes at the ends."""

    __slots__ = ("_block_bytes", "_left", "_mixed", "_request", "_send")

    def __init__(self, request: Request, block_bytes: int, send: Send) -> None:
        self._request = request
        self._block_bytes = block_bytes
        self._send = send
        self._left = 0
        self._mixed = False

    def start(self) -> None:
        request = self._request
        block_bytes = self._block_bytes
        stop = request.offset + request.length
        first = min(request.offset + -request.offset % block_bytes, stop)
        last = max(stop - stop % block_bytes, first)
        request.error = 0
        request.generation = 0
        self._mixed = False
        parts = []
        for start, end in ((request.offset, first), (last, stop)):
            if start < end:
                zeroes = [memoryview(bytes(end - start))]
                flags = request.flags & FUA
                parts.append(Request(WRITE, start, end - start, zeroes, self._done, flags, request))
        if first < last:
            flags = request.flags
            parts.append(Request(WRITE_ZEROES, first, last - first, [], self._done, flags, request))
        self._left = len(parts)
        for part in parts:
            self._send(part)

    def _done(self, part: Request) -> None:
        request = self._request
        request.error = request.error or part.error
        if not request.generation:
            request.generation = part.generation
        elif part.generation != request.generation:
            self._mixed = True
        self._left -= 1
        if self._left:
            return
        if self._mixed and not request.error:
            self.start()  # As in `split`: all of it by the same generation.
        else:
            request.finish(request.error)

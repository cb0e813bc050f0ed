"""Requests in sectors on an export with larger blocks (NBD "Block size constraints").

Reads take the whole blocks and leave out what was not asked for. Writes read the blocks at their
two ends first (read-modify-write); the caller sees to it that nothing else changes those blocks
meanwhile. A trim is a hint and shrinks to whole blocks; zeroes at the ends are written.
"""

from __future__ import annotations

from collections.abc import Callable

from bridge.datapath.buffers import ZEROES
from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    FUA,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.server.chunks import StatusRequest

Send = Callable[[Request], None]
Finish = Callable[[Request, int], None]


def cover(offset: int, length: int, block_bytes: int) -> tuple[int, int]:
    """Start and end of the whole blocks that hold the range."""
    start = offset - offset % block_bytes
    stop = offset + length
    return start, stop + -stop % block_bytes


class Aligner:
    """Does requests that are not aligned with aligned ones."""

    __slots__ = ("finish", "send")

    def __init__(self, send: Send, finish: Finish) -> None:
        """`send` takes the aligned ones; `finish(request, error)` ends the request."""
        self.send = send
        self.finish = finish

    def do(self, request: Request, block_bytes: int) -> None:
        """Do `request`, which is not aligned to `block_bytes`."""
        op = request.op
        if op == READ:
            self._read(request, block_bytes)
        elif op == WRITE:
            _ReadModifyWrite(request, block_bytes, self).start()
        elif op == WRITE_ZEROES:
            _WriteZeroes(request, block_bytes, self).start()
        elif op == DISCARD:
            self._discard(request, block_bytes)
        else:
            assert op in (PREFETCH, BLOCK_STATUS)
            self._widen(request, block_bytes)

    def finish_owner(self, part: Request) -> None:
        """`part` was all of its owner."""
        request = part.owner
        assert isinstance(request, Request)
        request.generation = part.generation
        self.finish(request, part.error)

    def _read(self, request: Request, block_bytes: int) -> None:
        start, stop = cover(request.offset, request.length, block_bytes)
        before = memoryview(bytearray(request.offset - start))
        after = memoryview(bytearray(stop - request.offset - request.length))
        buffers = [view for view in (before, *request.buffers, after) if len(view)]
        self.send(Request(READ, start, stop - start, buffers, self.finish_owner, 0, request))

    def _discard(self, request: Request, block_bytes: int) -> None:
        start = request.offset + -request.offset % block_bytes
        stop = request.offset + request.length
        stop -= stop % block_bytes
        if start >= stop:
            self.finish(request, 0)
            return
        length, flags = stop - start, request.flags
        self.send(Request(DISCARD, start, length, [], self.finish_owner, flags, request))

    def _widen(self, request: Request, block_bytes: int) -> None:
        start, stop = cover(request.offset, request.length, block_bytes)
        if request.op == PREFETCH:
            self.send(Request(PREFETCH, start, stop - start, [], self.finish_owner, 0, request))
            return
        wide = StatusRequest(BLOCK_STATUS, start, stop - start, [], self._cut_extents, 0, request)
        wide.extents = []
        self.send(wide)

    def _cut_extents(self, wide: StatusRequest) -> None:
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
        self.finish_owner(wide)


class _ReadModifyWrite:
    """Read the blocks at the ends, then write them with the new bytes in between."""

    __slots__ = (
        "_aligner",
        "_block_bytes",
        "_blocks",
        "_error",
        "_reads",
        "_request",
        "_start",
        "_stop",
    )

    def __init__(self, request: Request, block_bytes: int, aligner: Aligner) -> None:
        self._request = request
        self._block_bytes = block_bytes
        self._aligner = aligner
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
            self._aligner.send(
                Request(READ, offset, block_bytes, [view], self._have_read, 0, request)
            )

    def _have_read(self, part: Request) -> None:
        self._reads -= 1
        self._error = self._error or part.error
        if self._reads:
            return
        request = self._request
        if self._error:
            self._aligner.finish(request, self._error)
            return
        before = request.offset - self._start
        after = self._stop - request.offset - request.length
        buffers = list(request.buffers)
        if before:
            buffers.insert(0, self._blocks[self._start][:before])
        if after:
            buffers.append(self._blocks[self._stop - self._block_bytes][-after:])
        self._aligner.send(
            Request(
                WRITE,
                self._start,
                self._stop - self._start,
                buffers,
                self._aligner.finish_owner,
                request.flags,
                request,
            )
        )


class _WriteZeroes:
    """Zero the whole blocks with a command, write zeroes at the ends."""

    __slots__ = ("_aligner", "_block_bytes", "_left", "_mixed", "_request")

    def __init__(self, request: Request, block_bytes: int, aligner: Aligner) -> None:
        self._request = request
        self._block_bytes = block_bytes
        self._aligner = aligner
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
        for start, end in ((request.offset, first), (last, stop)):
            if start < end:
                zeroes = [ZEROES[: end - start]]  # less than a block of 64 KiB
                self._send(WRITE, start, end, zeroes, request.flags & FUA)
        if first < last:
            self._send(WRITE_ZEROES, first, last, [], request.flags)

    def _send(self, op: int, start: int, stop: int, data: list[memoryview], flags: int) -> None:
        self._left += 1
        self._aligner.send(Request(op, start, stop - start, data, self._done, flags, self._request))

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
            self._aligner.finish(request, request.error)

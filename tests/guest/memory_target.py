"""A disk of bytes in memory, in the place of everything below the virtio engine."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from errno import EOPNOTSUPP

from bridge.datapath.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES, Request
from bridge.datapath.turn import Turn


class MemoryTarget:
    """A `Target` that executes requests at once, or with `hold` when it is told to."""

    def __init__(self, turn: Turn, size_bytes: int, data: bytearray | mmap.mmap | None = None):
        self.turn = turn
        """The one in which it is asked: the loop's, of a test that has a loop."""
        self.data = bytearray(size_bytes) if data is None else data
        self.seen: list[tuple[int, int, int]] = []
        """(op, offset, length) of all that was submitted, oldest first. Not the requests: those
        would keep the memory of a guest that is gone mapped."""
        self.hold = False
        self.held: list[Request] = []
        self.error = 0
        """An errno: every request fails with it."""

    def submit(self, request: Request) -> None:
        """See `Target`."""
        self.seen.append((request.op, request.offset, request.length))
        if self.hold:
            self.held.append(request)
        else:
            self.execute(request)

    def release(self) -> None:
        """Execute what was held, and hold nothing more."""
        self.hold = False
        held, self.held = self.held, []
        for request in held:
            self.execute(request)

    def abandoned(self, requests: Sequence[Request]) -> None:
        """Do nothing more of these, as the storage side does when a ring stops without them."""
        self.held = [each for each in self.held if not each.is_abandoned]

    def execute(self, request: Request) -> None:
        """Do it and finish it."""
        start, end = request.offset, request.offset + request.length
        assert 0 <= start <= end <= len(self.data), request
        if self.error:
            self.turn.finish(request, self.error)
            return
        if request.op in (READ, WRITE):
            assert sum(map(len, request.buffers)) == request.length, request
            for buffer in request.buffers:
                if request.op == READ:
                    buffer[:] = self.data[start : start + len(buffer)]
                else:
                    self.data[start : start + len(buffer)] = buffer
                start += len(buffer)
        elif request.op in (DISCARD, WRITE_ZEROES):
            self.data[start:end] = bytes(end - start)
        elif request.op != FLUSH:
            self.turn.finish(request, EOPNOTSUPP)
            return
        self.turn.finish(request)

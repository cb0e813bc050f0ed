"""A guest's request on its way to the disk, and the pieces in which a lane does a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

from bridge.datapath.lanes import PIECE_BYTES, RANGE_COST_BYTES, WHOLE_BYTES
from bridge.datapath.request import Request
from bridge.guest.virtio.chain import Chain

_NO_BYTES = memoryview(b"")


class UsedRing(Protocol):
    """Where a finished request goes: the ring it came from."""

    def complete(self, chain: Chain, status: int, length: int) -> None:
        """Write the status byte (if there is one) and use the chain, `length` bytes written."""


class BlkRequest(Request):
    """A guest's request on its way: a `Request` that knows its ring and its chain."""

    __slots__ = ("chain", "ring", "used_bytes")

    def __init__(
        self,
        ring: UsedRing,
        chain: Chain,
        op: int,
        offset: int,
        length: int,
        buffers: list[memoryview],
        done: Callable[[BlkRequest], None],
        flags: int,
        used_bytes: int,
    ) -> None:
        """`used_bytes` is the used length if the request succeeds."""
        # All slots in one call: another level of __init__ is 10 % of a request's cost.
        self.op = op
        self.offset = offset
        self.length = length
        self.buffers = buffers
        self.done = done
        self.flags = flags
        self.owner = None
        self.error = 0
        self.cookie = 0
        self.generation = 0
        self.progress = 0
        self.ring = ring
        self.chain = chain
        self.used_bytes = used_bytes


def data_pieces(request: BlkRequest) -> Iterator[tuple[int, Request]]:
    """The request in pieces of PIECE_BYTES, or in one if it is not longer than WHOLE_BYTES."""
    op, flags, offset, left = request.op, request.flags, request.offset, request.length
    piece_bytes = left if left <= WHOLE_BYTES else PIECE_BYTES
    views = iter(request.buffers)
    view = next(views)
    while left:
        length = wanted = min(piece_bytes, left)
        buffers = []
        while wanted >= len(view):
            # Only once through the views, however many there are.
            buffers.append(view)
            wanted -= len(view)
            view = next(views, _NO_BYTES)
            if not view:
                break
        if wanted:
            buffers.append(view[:wanted])
            view = view[wanted:]
        yield length, Request(op, offset, length, buffers, _set_by_job, flags)
        offset += length
        left -= length


def range_pieces(
    request: BlkRequest, parts: list[tuple[int, int, int]]
) -> Iterator[tuple[int, Request]]:
    """The segments of a discard or write-zeroes."""
    op, flags = request.op, request.flags
    for offset, length, part_flags in parts:
        yield RANGE_COST_BYTES, Request(op, offset, length, [], _set_by_job, flags | part_flags)


def _set_by_job(request: Request) -> None:
    raise AssertionError("a piece that no job began")

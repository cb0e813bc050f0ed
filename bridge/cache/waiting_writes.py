"""A guest's write that could not complete at once, and what it waits for."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, Protocol

from bridge.cache.wait import WriteOutWait
from bridge.datapath.request import FUA, Request


class WaitReason(Enum):
    """Why a write cannot be stored now."""

    ROOM = "room"
    """The hard dirty limit, or no slot can be had: writes wait in order."""
    FETCH = "fetch"
    """It covers part of an absent block, which has to come from the server first."""
    LOAD = "load"
    """It covers part of a block that is only on the cache's disk."""
    DISCARD = "discard"
    """A discard or write-zeroes of some of its blocks comes first."""
    FAILED = "failed"
    """The cache file refused it: nothing removes that."""


class Wait(NamedTuple):
    """What stands in the way of the granule at `offset` of the disk."""

    why: WaitReason
    offset: int = 0
    slot: int = 0
    bits: int = 0
    """Blocks of that granule to be fetched or loaded."""
    error: int = 0


TOO_DIRTY = Wait(WaitReason.ROOM)
NO_SLOT = Wait(WaitReason.ROOM)


class Waited(Protocol):
    """`Writes`, as the writes that wait in it see it."""

    fetched: list[WriteOp]
    written_out: list[WriteOp]

    def go_on(self, op: WriteOp) -> None:
        """Try again from where `op` stopped: its wait may be gone."""


class WriteOp(WriteOutWait):
    """A write that could not complete at once."""

    __slots__ = ("done_bytes", "fetches", "needs_slot", "not_kept", "request", "writes")

    def __init__(self, request: Request, writes: Waited, done_bytes: int) -> None:
        super().__init__(fua=bool(request.flags & FUA))
        self.request = request
        self.writes = writes
        self.done_bytes = done_bytes
        """Bytes that are in the cache already."""
        self.fetches = 0
        """How many fetches are still to come; 0: it waits for none."""
        self.not_kept = 0
        """The errno of the cache file where it refused what was fetched."""
        self.needs_slot = False
        """What it waits for is not only that less is dirty, but a slot."""

    def fetched(self, first: int, end: int, view: memoryview, error: int, not_kept: int) -> None:
        """See fetch.Waiter. The blocks are in the cache now if there was room."""
        self.error = self.error or error
        self.not_kept = self.not_kept or not_kept
        self.fetches -= 1
        if not self.fetches:
            self.writes.fetched.append(self)

    def range_freed(self) -> None:
        """See range_operations.WaitsForRange."""
        self.writes.go_on(self)

    def join_written_out(self) -> None:
        """See WriteOutWait."""
        self.writes.written_out.append(self)

"""The one object that travels from a guest's request to the server's reply.

A `Request` is one operation on a byte range. The virtio engine makes it; the disk, the cache and
the client pass it on, or make requests of their own for parts of it. The one that finishes it says
so to the turn (`Turn.finish`), which calls its maker. It is a plain object that a reply completes,
not a coroutine: a task or a checkpoint per request would cost more than the request.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, Self

READ = 0
WRITE = 1
FLUSH = 2
DISCARD = 3
WRITE_ZEROES = 4
PREFETCH = 5
BLOCK_STATUS = 6

CHANGES = (WRITE, DISCARD, WRITE_ZEROES)
"""What alters the content of a disk."""

OP_NAMES = ("read", "write", "flush", "discard", "write_zeroes", "prefetch", "block_status")
N_OPS = len(OP_NAMES)

FUA = 1
"""Durable on the server before it is complete (WRITE, DISCARD, WRITE_ZEROES)."""
MAY_UNMAP = 2
"""WRITE_ZEROES may leave a hole behind."""
INTERNAL = 4
"""A FLUSH that the guest did not send: it learns of a loss from its own next one."""
REPEATED = 8
"""A FLUSH that is executed again, after a pause or by another process, or that was left in its ring
for a while. When the guest sent it is not known, so its failure tells nothing of what is complete
by now: the next one has to fail, too.
"""


class Request:
    """One operation on the bytes `offset` … `offset + length` of a disk.

    `buffers` are the bytes: the source of a WRITE, the destination of a READ (their lengths add
    up to `length`), empty for every other operation. `error` is 0 or an errno, valid once `done`
    was called. `done(request)` is called exactly once, by the turn: never by a thread, and never
    before `submit()` has returned. The buffers may not be touched by the callee after that.
    `owner` belongs to the maker of the request, which alone knows its type and narrows it. Where
    this request is a part of another one, it is that one or a tuple that begins with it
    (`is_abandoned` wants that). `cookie`, `generation` and `progress` belong to the NBD client.
    """

    __slots__ = (
        "__weakref__",
        "_abandoned",
        "buffers",
        "cookie",
        "done",
        "error",
        "flags",
        "generation",
        "length",
        "offset",
        "op",
        "owner",
        "progress",
    )

    def __init__(
        self,
        op: int,
        offset: int,
        length: int,
        buffers: list[memoryview],
        done: Callable[[Self], None],
        flags: int = 0,
        owner: object = None,
    ) -> None:
        self.op = op
        self.offset = offset
        self.length = length
        self.buffers = buffers
        self.done = done
        self.flags = flags
        self.owner = owner
        self.error = 0
        self.cookie = 0
        self.generation = 0
        self.progress = 0

    def abandon(self, done: Callable[[Self], None], scratch: memoryview) -> None:
        """The guest no longer waits for this request, and its buffers are no longer its own.

        It may still come to its end, which `done` is told of: a READ lands in `scratch`, a WRITE
        whose bytes are still needed fails. Parts that keep views of the buffers have to be told.
        """
        self._abandoned = True
        self.done = done
        # In place: commands made for this request have the same list.
        self.buffers[:] = [scratch[: self.length]] if self.op == READ else []

    @property
    def is_abandoned(self) -> bool:
        """This request, or the one that it is a part of, was abandoned."""
        request: object = self
        while isinstance(request, Request):
            # The slot is empty until then: setting it would cost every request.
            if getattr(request, "_abandoned", False):
                return True
            owner = request.owner
            request = owner[0] if type(owner) is tuple else owner
        return False

    def __repr__(self) -> str:
        return f"<{OP_NAMES[self.op]} {self.length} at {self.offset} error={self.error}>"


class Target(Protocol):
    """What takes requests: the NBD client, the cache over it, the disk over both."""

    def submit(self, request: Request) -> None:
        """Start `request`; the turn tells of its end, never before this returns. Never raises,
        never blocks. Outside a turn, the caller ends it, or wants one (`Turn.end`, `want`)."""


class Hits(Protocol):
    """What can serve a request on the spot, without an object for it: the cache, for what it holds.

    Most requests of a guest with a warm cache are hits, and making, passing on and finishing a
    `Request` costs more than the copy. After False nothing has happened: submit a `Request`.
    """

    def read_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """Fill `buffers` with the bytes `offset` … `offset + length`, or return False."""

    def write_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """Complete a write of `buffers` that need not be durable, or return False."""

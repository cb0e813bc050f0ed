"""A ring that runs: the join of a virtqueue, the request engine and the loop.

This is the one place where chains become requests and finished requests become used elements:

    poll      pop every available chain, hand each to the engine       (once per turn)
    complete  a request is finished: its element goes to the used ring (any time in a turn)
    publish   one store of used.idx, at most one call                  (once per turn)
"""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from bridge.errors import ProtocolError
from bridge.loop import EPOLLET, EPOLLIN, Loop
from bridge.virtio.blk import BlkEngine
from bridge.virtio.chain import QueueBroken
from bridge.virtio.split_queue import SplitQueue


class RunningRing:
    """One started virtqueue of a disk."""

    def __init__(
        self,
        loop: Loop,
        queue: SplitQueue,
        engine: BlkEngine,
        *,
        kick_fd: int | None,
        call_fd: int | None,
        error_fd: int | None,
        broken: Callable[[str], None],
    ) -> None:
        """The descriptors stay the caller's. `broken(reason)` is told when the guest broke the
        ring. Raises ProtocolError for a descriptor that is no eventfd."""
        self._loop = loop
        self._queue = queue
        self._engine = engine
        self._broken = broken
        self._popping = True
        self._publishing = False
        self._drained: trio.Event | None = None
        self._kick_fd: int | None = None
        self._call_fd: int | None = None
        self._error_fd: int | None = None
        self.requests = 0
        self.is_broken = False
        self.set_error(error_fd)
        self.set_call(call_fd)
        self.set_kick(kick_fd)
        loop.add_poller(self)

    # The data path

    def poll(self) -> bool:
        """Start every request that the guest has made available; True if there was one."""
        queue = self._queue
        if not self._popping or not queue.has_available():
            return False
        try:
            chains = queue.pop()
        except QueueBroken as error:
            self._break(str(error))
            return True
        self.requests += len(chains)
        start = self._engine.start
        for chain in chains:
            start(self, chain)
        return True

    def complete(self, head: int, length: int) -> None:
        """The chain `head` is finished with `length` bytes written (see `blk.UsedRing`)."""
        self._queue.push(head, length)
        if not self._publishing:
            self._publishing = True
            self._loop.at_turn_end(self._publish)

    def _publish(self) -> None:
        self._publishing = False
        if self._queue.publish() and self._call_fd is not None:
            os.eventfd_write(self._call_fd, 1)
        if self._drained is not None and not self._queue.in_flight:
            self._drained.set()

    def arm(self) -> bool:
        """Ask the guest for kicks; True if there are requests already (see `loop.Poller`)."""
        return self._popping and self._queue.arm()

    def disarm(self) -> None:
        """Kicks are not needed for now."""
        if self._popping:
            self._queue.disarm()

    def _break(self, reason: str) -> None:
        """The guest broke the ring: it is not served any more; the other rings are."""
        self._popping = False
        self.is_broken = True
        if self._error_fd is not None:
            os.eventfd_write(self._error_fd, 1)
        self._broken(reason)

    # Control

    @property
    def must_be_polled(self) -> bool:
        """The guest sends no kicks: somebody has to wake the loop."""
        return self._kick_fd is None and self._popping

    def set_kick(self, fd: int | None) -> None:
        """Wait for `fd` from now on."""
        _check_eventfd(fd, "kick")
        if self._kick_fd is not None:
            self._loop.remove(self._kick_fd)
        self._kick_fd = fd
        if fd is not None:
            # Edge-triggered: the counter need not be read, every write to it is an event.
            self._loop.add(fd, _kicked, EPOLLIN | EPOLLET)
        self._loop.wake()

    def set_call(self, fd: int | None) -> None:
        """Signal `fd` from now on, and once now: an earlier call may have got lost."""
        _check_eventfd(fd, "call")
        self._call_fd = fd
        if fd is not None:
            os.eventfd_write(fd, 1)

    def set_error(self, fd: int | None) -> None:
        """Signal `fd` when the ring breaks; now, if it has."""
        _check_eventfd(fd, "error")
        self._error_fd = fd
        if fd is not None and self.is_broken:
            os.eventfd_write(fd, 1)

    def suspend(self) -> None:
        """Leave new requests in the ring."""
        self._popping = False

    def resume(self) -> None:
        """Serve again."""
        self._popping = not self.is_broken
        self._loop.wake()

    async def drain(self) -> None:
        """Pop no more; return when everything popped is published. May be cancelled."""
        self._popping = False
        while self._queue.in_flight or self._publishing:
            self._drained = trio.Event()
            await self._drained.wait()

    def close(self) -> int:
        """Let go of the ring and its descriptors; the base to go on from."""
        self._popping = False
        self._loop.remove_poller(self)
        if self._kick_fd is not None:
            self._loop.remove(self._kick_fd)
            self._kick_fd = None
        self._call_fd = None
        return self._queue.base


def _kicked(events: int) -> None:
    """A kick says only that a turn is due; `poll` looks at the ring in every turn."""


def _check_eventfd(fd: int | None, what: str) -> None:
    """Raises ProtocolError unless `fd` is an eventfd: writing to anything else could block."""
    if fd is not None and os.readlink(f"/proc/self/fd/{fd}") != "anon_inode:[eventfd]":
        raise ProtocolError(f"the {what} descriptor that the front-end sent is no eventfd")

"""A running ring: what it tells the driver, and what it does not do any more once closed."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from bridge.datapath.loop import Loop
from bridge.guest.ring import RunningRing
from bridge.spec.virtio_blk import S_OK, T_FLUSH, T_IN
from tests.guest.device_guest import a_while, signals
from tests.guest.virtio.mock import BlkGuest


class RingGuest(BlkGuest):
    """A guest whose ring runs in a loop, with eventfds."""

    def __init__(self, loop: Loop) -> None:
        super().__init__(turn=loop.turn)
        self.kick, self.call, self.error = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
        self.broken: list[str] = []
        self.running = RunningRing(
            loop,
            self.queue,
            self.engine,
            kick_fd=self.kick,
            call_fd=self.call,
            error_fd=self.error,
            broken=self.broken.append,
        )

    def add(self, type_: int, *, room: int = 0) -> int:
        """A request, kicked if the device asked for that; where its status will be."""
        buffers = [(self.alloc(self.header(type_)), 16, 0)]
        if room:
            buffers.append((self.alloc(room), room, 2))
        status = self.alloc(1)
        self._token += 1
        self.driver.add(self._token, [*buffers, (status, 1, 2)])
        if self.driver.publish():
            os.eventfd_write(self.kick, 1)
        return status

    def close(self) -> None:
        for fd in (self.kick, self.call, self.error):
            os.close(fd)


@asynccontextmanager
async def running() -> AsyncIterator[RingGuest]:
    loop = Loop(poll_us=0)
    guest = RingGuest(loop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await a_while()
        yield guest
        nursery.cancel_scope.cancel()
    loop.close()
    guest.close()


async def test_kick_is_answered_and_the_next_one_asked_for() -> None:
    async with running() as guest:
        for _ in range(3):
            status = guest.add(T_FLUSH)
            await a_while()
            assert guest.read(status, 1) == bytes([S_OK])
        assert guest.running.requests == 3


async def test_driver_that_asks_for_no_call_gets_none() -> None:
    async with running() as guest:
        guest.add(T_FLUSH)
        await a_while()
        signals(guest.call)
        guest.driver.poll()
        guest.driver.disarm()
        guest.add(T_FLUSH)
        await a_while()
        assert signals(guest.call) == 0
        assert len(guest.driver.poll()) == 1


async def test_closed_ring_pops_nothing_and_sends_no_call() -> None:
    async with running() as guest:
        signals(guest.call)
        assert guest.running.close(told=True) == 0
        status = guest.add(T_FLUSH)
        os.eventfd_write(guest.kick, 1)
        await a_while()
        assert guest.read(status, 1) != bytes([S_OK])
        assert signals(guest.call) == 0


async def test_closed_ring_leaves_a_driver_that_kicks() -> None:
    """NO_NOTIFY would otherwise stay behind for the next one to serve the ring."""
    async with running() as guest:
        guest.disk.hold = True
        guest.add(T_IN, room=512)
        await a_while()
        guest.running.close(told=True)
        guest.add(T_FLUSH)
        assert signals(guest.kick) > 0


async def test_request_that_ends_after_the_close_is_forgotten() -> None:
    async with running() as guest:
        guest.disk.hold = True
        status = guest.add(T_IN, room=512)
        await a_while()
        guest.running.close(told=False)
        before = bytes(guest.areas[2])
        guest.disk.release()
        await a_while()
        assert guest.read(status, 1) == b"\xee"
        assert bytes(guest.areas[2]) == before


async def test_request_that_ended_just_before_the_close_is_published() -> None:
    async with running() as guest:
        guest.disk.hold = True
        guest.add(T_FLUSH)
        await a_while()
        guest.disk.release()
        guest.disk.turn.settle()  # told of, and not published yet
        guest.running.close(told=True)
        assert len(guest.driver.poll()) == 1


async def test_request_that_ended_and_was_not_told_of_before_the_close_is_forgotten() -> None:
    async with running() as guest:
        guest.disk.hold = True
        status = guest.add(T_IN, room=512)
        await a_while()
        guest.disk.release()
        guest.running.close(told=False)
        before = bytes(guest.areas[2])
        await a_while()
        assert guest.read(status, 1) == b"\xee"
        assert bytes(guest.areas[2]) == before


async def test_ring_with_requests_in_flight_breaks_and_still_answers_them() -> None:
    async with running() as guest:
        guest.disk.hold = True
        status = guest.add(T_FLUSH)
        await a_while()
        guest.driver.set_avail_idx(40000)
        os.eventfd_write(guest.kick, 1)
        await a_while()
        assert len(guest.broken) == 1
        assert signals(guest.error) == 1
        guest.disk.release()
        await a_while()
        assert guest.read(status, 1) == bytes([S_OK])


@pytest.mark.parametrize("spurious", [1, 100])
async def test_notify_spurious_kicks_are_nothing(spurious: int) -> None:
    """T68, T69, T71."""
    async with running() as guest:
        for _ in range(spurious):
            os.eventfd_write(guest.kick, 1)
            await trio.lowlevel.checkpoint()
        status = guest.add(T_FLUSH)
        await a_while()
        assert guest.read(status, 1) == bytes([S_OK])

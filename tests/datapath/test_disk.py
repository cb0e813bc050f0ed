"""The disk: the flush timer."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from errno import EIO
from math import inf

import pytest
import trio
from trio.testing import MockClock

from bridge.datapath.disk import Disk
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    INTERNAL,
    MAY_UNMAP,
    OP_NAMES,
    READ,
    REPEATED,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.turn import Turn
from tests.guest.virtio.mock import FakeDisk, FakeHits
from tests.turns import Turns, deliver, turn


class FakeDiskTarget(FakeDisk):
    """A server with or without flush, and with what it has at hand, if anything."""

    def __init__(self, *, flush: bool = True, hits_end: int = 0) -> None:
        super().__init__(8 << 20)
        self.can_flush = flush
        self.hits = FakeHits(self, hits_end) if hits_end else None
        self.holds_writes = bool(hits_end)
        self.turns = Turns()

    @property
    def in_flight(self) -> int:
        return len(self.held)

    def usual(self, wrote: object) -> None:
        return None

    def execute(self, request: Request) -> None:
        assert self.can_flush or request.op != FLUSH, request
        super().execute(request)
        self.turns.want()

    @property
    def ops(self) -> list[str]:
        """What reached the server, oldest first."""
        return [OP_NAMES[request.op] for request in self.requests]


class Client:
    """Makes requests on a disk and remembers how they ended."""

    def __init__(self, disk: Disk) -> None:
        self.disk = disk
        self.errors: list[int] = []

    def do(self, op: int, offset: int = 0, length: int = 4096, flags: int = 0) -> None:
        buffers = [memoryview(bytearray(b"w" * length))] if op in (READ, WRITE) else []
        if op == FLUSH:
            length = 0
        self.disk.submit(Request(op, offset, length, buffers, self._done, flags))
        deliver()

    def _done(self, request: Request) -> None:
        self.errors.append(request.error)


@asynccontextmanager
async def timed(target: FakeDiskTarget, interval_s: float = 60) -> AsyncIterator[Client]:
    """A disk whose timer runs."""
    disk = Disk(target, turn=turn(), flush_interval_s=interval_s, now=trio.current_time)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(disk.run_flush_timer)
        nursery.start_soon(target.turns.run)
        yield Client(disk)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def after_an_untold_failure() -> AsyncIterator[tuple[FakeDiskTarget, Client]]:
    """A flush that the guest did not send has failed."""
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.error = EIO
        client.do(FLUSH, flags=INTERNAL)
        target.error = 0
        yield target, client


# The timer


async def test_timer_flushes_a_minute_after_the_first_write(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        started_s = trio.current_time()
        client.do(WRITE)
        await trio.sleep(30)
        client.do(WRITE)
        assert client.disk.flush_deadline_s == started_s + 60
        await trio.sleep(29)
        assert target.ops == ["write", "write"]
        await trio.sleep(2)
        assert target.ops == ["write", "write", "flush"]
        assert client.disk.flush_deadline_s is None
        assert client.disk.timed_flushes == 1


@pytest.mark.parametrize("before_s", [0, 3600])
async def test_timer_made_shorter_counts_for_what_was_written_before(
    before_s: float, autojump_clock: MockClock
) -> None:
    """A guest that never flushes would keep the former timer, or none at all."""
    target = FakeDiskTarget()
    async with timed(target, before_s) as client:
        client.do(WRITE)
        await trio.sleep(100)
        client.disk.flush_interval_s = 10
        await trio.sleep(9)
        assert target.ops == ["write"]
        await trio.sleep(2)
        assert target.ops == ["write", "flush"]


async def test_timer_that_is_turned_off_no_longer_fires(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        await trio.sleep(1)
        client.disk.flush_interval_s = 0
        await trio.sleep(3600)
        assert target.ops == ["write"]
        assert client.disk.flush_deadline_s is None


@pytest.mark.parametrize("op", [WRITE, DISCARD, WRITE_ZEROES])
async def test_timer_is_armed_by_whatever_changes_the_disk(
    op: int, autojump_clock: MockClock
) -> None:
    async with timed(FakeDiskTarget()) as client:
        client.do(op)
        assert client.disk.flush_deadline_s is not None


async def test_timer_is_armed_by_a_write_hit_alone(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget(hits_end=4096)
    async with timed(target) as client:
        hits = client.disk.hits
        assert hits is not None
        data = [memoryview(bytearray(512))]
        assert hits.read_hit(0, 512, data)
        assert not hits.write_hit(4096, 512, data)
        assert client.disk.flush_deadline_s is None
        assert hits.write_hit(0, 512, data)
        assert client.disk.flush_deadline_s == trio.current_time() + 60
        await trio.sleep(61)
        assert target.ops == ["flush"]


async def test_timer_is_not_armed_by_reads_and_flushes(autojump_clock: MockClock) -> None:
    async with timed(FakeDiskTarget()) as client:
        client.do(READ)
        client.do(FLUSH)
        assert client.disk.flush_deadline_s is None


async def test_timer_is_cleared_by_a_guests_flush(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        client.do(FLUSH)
        await trio.sleep(120)
        assert target.ops == ["write", "flush"]


async def test_timer_stays_armed_when_a_flush_overtakes_a_write(
    autojump_clock: MockClock,
) -> None:
    """A flush covers what was complete before it: not what is in flight."""
    target = FakeDiskTarget()
    async with timed(target) as client:
        target.hold = True
        client.do(WRITE)
        client.do(FLUSH)
        assert client.disk.flush_deadline_s is not None
        target.hold = False
        target.release()
        await trio.sleep(61)
        assert target.ops == ["write", "flush", "flush"]


async def test_timer_is_armed_again_when_a_guests_flush_fails(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.error = EIO
        client.do(FLUSH)
        assert client.errors == [0, EIO]
        target.error = 0
        await trio.sleep(61)
        assert target.ops == ["write", "flush", "flush"]


async def test_timed_flush_that_fails_is_counted_said_and_tried_again(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.error = EIO
        await trio.sleep(61)
        assert client.disk.timed_flush_failures == 1
        said = capsys.readouterr().out
        assert "timed flush failed" in said
        assert os.strerror(EIO) in said
        target.error = 0
        await trio.sleep(61)
        assert target.ops == ["write", "flush", "flush"]
        assert client.disk.flush_deadline_s is None


async def test_guest_is_told_of_a_timed_flush_that_failed_once(autojump_clock: MockClock) -> None:
    """The storage side has forgotten by then, and says that all is well."""
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.error = EIO
        await trio.sleep(61)
        target.error = 0
        await trio.sleep(61)
        client.do(FLUSH)
        client.do(FLUSH)
        assert client.errors == [0, EIO, 0]


async def test_guest_is_told_of_a_flush_at_a_stop_that_failed(autojump_clock: MockClock) -> None:
    """The guest was only paused, and goes on."""
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.error = EIO
        await client.disk.flush()
        target.error = 0
        assert client.disk.flush_deadline_s is not None
        client.do(FLUSH)
        client.do(FLUSH)
        assert client.errors == [0, EIO, 0]


@pytest.mark.parametrize("flush", [True, False])
async def test_timer_that_is_off_never_fires(flush: bool, autojump_clock: MockClock) -> None:
    target = FakeDiskTarget(flush=flush)
    async with timed(target, 0 if flush else 60) as client:
        client.do(WRITE)
        assert client.disk.flush_deadline_s is None
        await trio.sleep(80_000)
        assert target.ops == ["write"]


async def test_timer_goes_on_through_many_rounds(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        for _ in range(5):
            client.do(WRITE)
            await trio.sleep(100)
        assert target.ops == ["write", "flush"] * 5


# One of our own at a time


async def test_timed_flushes_do_not_pile_up_while_the_server_is_away(
    autojump_clock: MockClock,
) -> None:
    target = FakeDiskTarget()
    async with timed(target, 1) as client:
        client.do(WRITE)
        target.hold = True
        await trio.sleep(2)
        client.do(WRITE)
        await trio.sleep(600)
        assert target.ops == ["write", "flush", "write"]
        target.hold = False
        target.release()
        await trio.sleep(2)
        assert target.ops == ["write", "flush", "write", "flush"]
        await trio.sleep(600)
        assert len(target.ops) == 4


async def test_flush_at_the_end_waits_for_the_one_in_flight(autojump_clock: MockClock) -> None:
    """A stop that gave that one up has not found out that everything is durable."""
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.hold = True
        for _ in range(2):
            with trio.move_on_after(1) as scope:
                await client.disk.flush()
            assert scope.cancelled_caught
        assert target.ops == ["write", "flush"]
        target.release(error=EIO)
        target.hold = False
        assert await client.disk.flush() == 0
        assert target.ops == ["write", "flush", "flush"]


async def test_flush_at_the_end_covers_what_came_after_the_one_in_flight(
    autojump_clock: MockClock,
) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client, trio.open_nursery() as nursery:
        client.do(WRITE)
        target.hold = True
        client.disk.flush_now()
        target.hold = False
        client.do(WRITE)
        nursery.start_soon(client.disk.flush)
        await trio.sleep(1)
        assert target.ops == ["write", "flush", "write"]
        target.release()
        await trio.sleep(1)
        assert target.ops == ["write", "flush", "write", "flush"]


async def test_flush_at_the_end_covers_a_write_that_a_cache_took_after_the_one_in_flight(
    autojump_clock: MockClock,
) -> None:
    """It had waited for room, and counts as submitted before."""

    class Cached(FakeDiskTarget):
        in_flight = 0  # type: ignore[assignment]

    target = Cached()
    target.holds_writes = True
    async with timed(target) as client, trio.open_nursery() as nursery:
        target.hold = True
        client.do(WRITE)
        client.disk.flush_now()
        target.release(1)
        nursery.start_soon(client.disk.flush)
        await trio.sleep(1)
        assert target.ops == ["write", "flush"]
        target.release()
        await trio.sleep(1)
        assert target.ops == ["write", "flush", "flush"]
        target.release()


async def test_flush_that_the_guest_did_not_send_is_marked_and_told_later(
    autojump_clock: MockClock,
) -> None:
    """The flush when the write cache is turned off: the guest does not hear of its failure."""
    async with after_an_untold_failure() as (target, client):
        assert target.requests[-1].flags == INTERNAL
        assert client.disk.unreported
        client.do(FLUSH)
        client.do(FLUSH)
        assert client.errors == [0, EIO, EIO, 0]
        assert [each.flags for each in target.requests[-2:]] == [0, 0]


async def test_every_flush_that_was_submitted_before_a_loss_was_told_of_fails(
    autojump_clock: MockClock,
) -> None:
    """Two queues flush at once: who waits for the second does not hear of the first."""
    async with after_an_untold_failure() as (target, client):
        target.hold = True
        client.do(FLUSH)
        client.do(FLUSH)
        target.release()
        target.hold = False
        client.do(FLUSH)
        assert client.errors == [0, EIO, EIO, EIO, 0]


async def test_flush_that_is_executed_again_tells_nothing_of_a_failure_before(
    autojump_clock: MockClock,
) -> None:
    """The guest may have sent it before a write that is complete by now."""
    async with after_an_untold_failure() as (target, client):
        client.do(FLUSH, flags=REPEATED)
        assert target.requests[-1].flags == REPEATED
        assert client.disk.unreported
        client.do(FLUSH)
        client.do(FLUSH)
        assert client.errors == [0, EIO, EIO, EIO, 0]


async def test_flush_for_a_guest_of_another_process_counts_as_its_own(
    autojump_clock: MockClock,
) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        target.hold = True
        client.disk.flush_inherited()
        assert not client.disk.is_durable
        with trio.move_on_after(1) as scope:
            await client.disk.flush()
        assert scope.cancelled_caught
        target.release()
        assert client.disk.is_durable


def test_flush_that_a_task_asks_for_wants_a_turn() -> None:
    """The back-end may only have queued it, and the loop that ends the turns sleeps."""
    target = FakeDiskTarget()
    target.hold = True
    woken: list[None] = []
    own = Turn(lambda: woken.append(None))
    own.asleep = True
    disk = Disk(target, turn=own, flush_interval_s=60, now=lambda: 0.0)
    disk.flush_now()
    assert woken
    assert own.pending


def test_disk_is_durable_when_a_flush_has_covered_everything_submitted() -> None:
    class Remembering:
        def durability_changed(self) -> None:
            changes.append(disk.is_durable)

    target = FakeDiskTarget()
    changes: list[bool] = []
    disk = Disk(target, turn=turn(), flush_interval_s=60, now=lambda: 0.0, above=Remembering())
    client = Client(disk)
    assert disk.is_durable
    client.do(WRITE)
    assert changes == [False]
    client.do(FLUSH)
    assert disk.is_durable
    client.do(WRITE)
    target.hold = True
    client.do(FLUSH)  # Too early for the next write.
    client.do(WRITE)
    target.release(1)
    assert not disk.is_durable
    target.release()
    client.do(FLUSH)
    target.release(error=EIO)
    assert not disk.is_durable
    client.do(FLUSH)
    target.release()
    assert disk.is_durable


def test_loss_is_remembered_until_the_guest_can_see_the_flush_that_tells_of_it() -> None:
    """Killed in between, the process has told nothing, and the flush is executed again: the next
    process has to know that it was to fail. It succeeded."""

    class Remembering:
        def durability_changed(self) -> None:
            remembered.append(disk.unreported or disk.is_telling)

    target = FakeDiskTarget()
    remembered: list[bool] = []
    disk = Disk(target, turn=turn(), flush_interval_s=60, now=lambda: 0.0, above=Remembering())
    errors: list[int] = []
    disk.tell(EIO)
    disk.submit(Request(FLUSH, 0, 0, [], lambda flush: errors.append(flush.error)))
    turn().end()
    assert errors == [EIO]
    assert remembered[-1]
    turn().looked()
    assert not remembered[-1]


# The last flush


@pytest.mark.parametrize("interval_s", [0, 60])
async def test_flush_at_the_end_flushes_what_was_written(
    interval_s: float, autojump_clock: MockClock
) -> None:
    target = FakeDiskTarget()
    async with timed(target, interval_s) as client:
        await client.disk.flush()
        assert target.ops == []
        client.do(WRITE)
        await client.disk.flush()
        assert target.ops == ["write", "flush"]


async def test_flush_at_the_end_that_fails_is_said(
    autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.error = EIO
        await client.disk.flush()
        assert "the last flush failed" in capsys.readouterr().out


async def test_flush_at_the_end_can_be_cancelled(autojump_clock: MockClock) -> None:
    target = FakeDiskTarget()
    async with timed(target) as client:
        client.do(WRITE)
        target.hold = True
        with trio.move_on_after(1) as scope:
            await client.disk.flush()
        assert scope.cancelled_caught
        target.release()


async def test_flush_at_the_end_of_a_server_without_flush_is_nothing(
    autojump_clock: MockClock,
) -> None:
    async with timed(FakeDiskTarget(flush=False)) as client:
        client.do(WRITE)
        await client.disk.flush()


async def test_flush_at_the_end_brings_out_what_a_cache_held_before(
    autojump_clock: MockClock,
) -> None:
    """Found in the file of a bridge that was killed, or completed after the guest's last flush."""
    target = FakeDiskTarget(hits_end=4096)
    async with timed(target) as client:
        await client.disk.flush()
        assert target.ops == ["flush"]


# Everything else


def client_of(target: FakeDiskTarget) -> Client:
    return Client(Disk(target, turn=turn(), flush_interval_s=60, now=lambda: 0.0))


@pytest.mark.parametrize("op", [READ, WRITE, DISCARD, WRITE_ZEROES])
def test_request_goes_through_untouched(op: int) -> None:
    target = FakeDiskTarget()
    client = client_of(target)
    request = Request(op, 512, 512, [memoryview(bytearray(512))], client._done, FUA | MAY_UNMAP)
    if op in (DISCARD, WRITE_ZEROES):
        request.buffers = []
    client.disk.submit(request)
    assert target.requests == [request]
    assert request.flags == FUA | MAY_UNMAP


def test_back_end_without_hits_has_none() -> None:
    assert Disk(FakeDiskTarget(), turn=turn(), flush_interval_s=0, now=lambda: 0.0).hits is None


def test_deadline_without_a_timer_is_none() -> None:
    disk = Disk(FakeDiskTarget(), turn=turn(), flush_interval_s=0, now=lambda: 5.0)
    Client(disk).do(WRITE)
    assert disk.flush_deadline_s is None
    assert disk._deadline_s == inf

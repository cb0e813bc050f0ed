"""The link without I/O: rules one by one, then a simulated server that dies at any moment.

The simulation knows every value that a block may hold: reads and the server's stable storage are
checked against the history of completed and overlapping writes. A failing seed is in the message.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from itertools import count
from random import Random
from traceback import walk_stack

import pytest

from bridge.datapath.buffers import scatter
from bridge.datapath.lanes import TURN_BYTES, Job, Lane
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    READ,
    REPEATED,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.link import Link, Phase
from bridge.spec.nbd import TransmissionFlags
from tests.server.helpers import LayerAbove
from tests.turns import deliver, finish, forget, submit, turn

BLOCK = 512
GRACE_S = 5.0


_cookies = count(1)


class FakeChannel:
    """A connection that a test answers by hand."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._generation = link.generation + 1
        self.pending: list[Request] = []
        self.payloads: dict[Request, bytes] = {}
        """What was put into the output: it cannot be taken back."""
        self.unflushed = 0
        self.answered = False

    flat = wire = None

    def is_one_of_several(self) -> None:
        pass

    def flush_later(self) -> None:
        raise AssertionError("nothing is put into the output of this one")

    @property
    def in_flight(self) -> int:
        return len(self.pending)

    def changes(self) -> list[Request]:
        return [each for each in self.pending if each.op in (WRITE, DISCARD, WRITE_ZEROES)]

    sent_before_replies = 0

    def durable_changes(self, before: int) -> list[Request]:
        return [each for each in self.changes() if each.flags & FUA]

    def send(self, request: Request) -> None:
        request.cookie = next(_cookies)
        self.pending.append(request)
        if request.op == WRITE:
            payload = self.payloads[request] = b"".join(request.buffers)
            assert len(payload) == request.length, "half a frame"

    def abandon(self) -> list[Request]:
        found = [request for request in self.pending if request.is_abandoned]
        for request in found:
            length = request.length
            request.buffers = [memoryview(bytearray(length))] if request.op == READ else []
        return found

    def answer(self, request: Request, error: int = 0) -> None:
        self.reply(request, error)
        deliver()

    def reply(self, request: Request, error: int = 0) -> None:
        """The same amid a turn."""
        self.pending.remove(request)
        self.payloads.pop(request, None)
        self.answered = True
        if not error and request.op in (WRITE, WRITE_ZEROES) and not request.flags & FUA:
            self.unflushed += 1
        request.generation = self._generation
        turn().finish(request, error)

    def answer_present(self) -> None:
        """Answer what is there; what is sent then stays."""
        for request in list(self.pending):
            self.answer(request)

    def answer_all(self) -> None:
        while self.pending:
            self.answer(self.pending[0])


def export(size: int = 1 << 20, flags: TransmissionFlags = DEFAULT_FLAGS, **more: object) -> Export:
    return Export("", size, flags, **more)  # type: ignore[arg-type]


class World:
    """A link with fake channels and a clock."""

    def __init__(
        self,
        options: ClientOptions | None = None,
        above: LayerAbove | None = None,
        **more: object,
    ) -> None:
        self.link = Link(options or ClientOptions(), turn(), above=above, random=Random(1))
        turn().add_stage(self.link)
        self.now = 0.0
        self.export = export(**more)  # type: ignore[arg-type]
        self.channels: list[FakeChannel] = []
        self.log: list[tuple[int, int]] = []
        self.finished: list[Request] = []
        self.up()
        # What a process before this one may have left is flushed.
        if self.export.can_flush:
            self.ask(FLUSH)
            self.channels[0].answer_all()
            self.channels[0].answered = False
            self.log.clear()

    def up(self, changed: Export | None = None, count: int = 1) -> None:
        self.connect(changed, count)
        deliver()

    def connect(self, changed: Export | None = None, count: int = 1) -> None:
        """The same amid a turn."""
        self.channels = [FakeChannel(self.link) for _ in range(count)]
        self.link.established(self.now, changed or self.export, self.channels)

    def down(self, *, stale_possible: bool = False, hung_up: bool = False) -> None:
        self.leaving()
        self.lose(stale_possible=stale_possible, hung_up=hung_up)
        deliver()

    def lose(self, *, stale_possible: bool = False, hung_up: bool = False) -> None:
        """The same amid a turn."""
        self.link.leaving()
        unanswered = [request for channel in self.channels for request in channel.pending]
        unanswered.sort(key=lambda request: request.cookie)
        self.link.lost(
            self.now,
            unanswered,
            stale_possible=stale_possible,
            answered=any(channel.answered for channel in self.channels),
            blamed=unanswered[0] if hung_up and unanswered else None,
        )

    def tick(self, now: float) -> None:
        self.link.tick(now)
        deliver()

    def leaving(self) -> None:
        self.link.leaving()
        deliver()

    def expect_stale_writes(self, now: float) -> None:
        self.link.expect_stale_writes(now)
        deliver()

    def fail_pending(self, now: float, unanswered: list[Request], errno: int) -> None:
        self.link.fail_pending(now, unanswered, errno)
        deliver()

    def closed(self, unanswered: list[Request]) -> None:
        self.link.closed(unanswered)
        deliver()

    def ask(self, op: int, block: int = 0, count: int = 1, flags: int = 0) -> Request:
        """What the guest asks, or a task in a turn of its own."""
        request = self.submit(op, block, count, flags)
        deliver()
        return request

    def submit(self, op: int, block: int = 0, count: int = 1, flags: int = 0) -> Request:
        """The same amid a turn."""
        length = 0 if op == FLUSH else count * BLOCK
        buffers = [memoryview(bytearray(length))] if op in (READ, WRITE) else []
        offset = 0 if op == FLUSH else block * BLOCK
        request = Request(op, offset, length, buffers, self._done, flags)
        request.error = -1
        self.link.submit(request)
        return request

    def _done(self, request: Request) -> None:
        self.log.append((request.op, request.error))
        self.finished.append(request)

    @property
    def pending(self) -> list[Request]:
        return [request for channel in self.channels for request in channel.pending]

    @property
    def sent(self) -> list[tuple[int, int]]:
        return [(r.op, r.offset // BLOCK) for channel in self.channels for r in channel.pending]


def test_unanswered_commands_are_sent_again_in_order_before_those_that_waited() -> None:
    world = World()
    for block in (3, 1, 2):
        world.ask(WRITE, block)
    world.channels[0].answer(world.channels[0].pending[1])
    world.down()
    world.ask(READ, 9)
    assert world.link.phase is Phase.DOWN
    world.up()
    assert world.sent == [(WRITE, 3), (WRITE, 2), (READ, 9)]
    assert world.link.resent_total == 2


def test_answered_write_is_never_sent_again() -> None:
    world = World()
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    world.down()
    world.up()
    assert world.sent == []


def test_backoff_grows_with_jitter_to_its_limit() -> None:
    world = World(ClientOptions(reconnect_first_s=0.1, reconnect_max_s=2.0))
    world.down()
    delays = [world.link.next_delay_s() for _ in range(2000)]
    assert delays[0] == 0
    assert 0.05 <= delays[1] <= 0.1
    assert all(1.0 <= delay <= 2.0 for delay in delays[6:])
    assert len(set(delays[6:])) > 100
    world.up()
    world.now += 10
    world.down()
    assert world.link.next_delay_s() == 0


def test_backoff_goes_on_while_connections_are_good_for_nothing() -> None:
    """Dropped as soon as they are up, or refusing the same command again and again."""
    world = World()
    for request in (None, world.ask(READ, 1)):
        delays = []
        for _ in range(8):
            world.down()
            delays.append(world.link.next_delay_s())
            world.up()
        assert min(delays[3:]) >= 0.1, request


def test_backoff_begins_anew_when_something_was_answered() -> None:
    world = World()
    for _ in range(8):
        world.ask(READ, 1)
        world.ask(READ, 2)
        world.channels[0].answer(world.channels[0].pending[0])
        world.down()
        assert world.link.next_delay_s() == 0
        world.up()


def test_reconnect_timeout_fails_what_waits_and_what_comes_until_up() -> None:
    world = World(ClientOptions(reconnect_timeout_s=10))
    first = world.ask(WRITE, 1)
    world.down()
    second = world.ask(READ, 1)
    assert world.link.next_deadline_s() == 10
    world.tick(9.9)
    assert (first.error, second.error) == (-1, -1)
    world.tick(10)
    assert (first.error, second.error) == (errno.EIO, errno.EIO)
    assert world.ask(READ, 1).error == errno.EIO
    assert world.ask(FLUSH).error == errno.EIO
    world.up()
    assert world.ask(READ, 1).error == -1
    assert world.sent == [(READ, 1)]


def test_no_reconnect_timeout_waits_without_a_limit() -> None:
    world = World()
    request = world.ask(WRITE, 1)
    world.down()
    world.tick(1e9)
    assert request.error == -1
    assert world.link.next_deadline_s() is None


def test_flush_mark_is_what_was_answered_when_the_flush_was_sent() -> None:
    """Rule `flush_order`: a flush covers only writes whose replies we had received."""
    world = World()
    world.ask(WRITE, 1)
    flush = world.ask(FLUSH)
    world.channels[0].answer_all()
    assert flush.error == 0
    world.down()
    world.up()
    assert world.ask(FLUSH).error == errno.EIO  # the write was answered after the flush was sent


def test_flush_order_flush_over_several_connections_is_one_command() -> None:
    world = World()
    world.down()
    world.up(count=3)
    for block in range(3):
        world.ask(WRITE, block)
        assert len(world.channels[(block + 1) % 3].pending) == 1
    for channel in world.channels:
        channel.answer_all()
    world.ask(FLUSH)
    assert world.sent == [(FLUSH, 0)]


def test_flush_fails_once_although_two_wait() -> None:
    world = World()
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    flushes = [world.ask(FLUSH), world.ask(FLUSH)]
    world.down()
    third = world.ask(FLUSH)
    world.up()
    assert [flush.error for flush in (*flushes, third)] == [errno.EIO] * 3
    assert world.ask(FLUSH).error == -1
    assert world.link.flushes_refused_total == 3


def test_fua_writes_and_trims_need_no_flush() -> None:
    world = World()
    world.ask(WRITE, 1, flags=FUA)
    world.ask(DISCARD, 2)
    world.channels[0].answer_all()
    world.down()
    world.up()
    assert world.ask(FLUSH).error == -1


def test_same_instance_keeps_answered_writes_through_two_reconnects() -> None:
    world = World(description="instance=a")
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    world.down()
    world.up()
    assert world.ask(FLUSH).error == -1
    world.down()
    world.up(export(description="instance=b"))
    assert world.log[-1] == (FLUSH, errno.EIO)  # never flushed, and another instance now


def test_empty_instance_proves_nothing() -> None:
    world = World(description="instance=")
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    world.down()
    world.up()
    assert world.ask(FLUSH).error == errno.EIO


def test_layer_above_is_told_before_anything_is_sent_again() -> None:
    def resend() -> None:
        assert world.sent == []
        world.submit(WRITE, 1)

    world = World(above=LayerAbove(reconnected=resend))
    world.link.keeps_unflushed = True
    world.ask(WRITE, 1)
    world.channels[0].answer_all()
    world.ask(WRITE, 2)
    world.down()
    world.up()
    assert world.sent == [(WRITE, 1), (WRITE, 2)]
    assert world.ask(FLUSH).error == -1


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (export(1 << 19), "shrank"),
        (export(flags=DEFAULT_FLAGS | TransmissionFlags.READ_ONLY), "read-only"),
        (export(flags=DEFAULT_FLAGS & ~TransmissionFlags.SEND_FLUSH), "flush"),
        (export(min_block_bytes=4096), "block size"),
        (export(2 << 20), None),
        (export(flags=DEFAULT_FLAGS & ~TransmissionFlags.SEND_TRIM), None),
        (export(max_payload_bytes=4096), None),
    ],
)
def test_worse_export_is_refused_other_is_not(changed: Export, says: str | None) -> None:
    world = World()
    world.down()
    reason = world.link.refusal(changed)
    assert (reason is None) if says is None else (says in (reason or ""))


def test_smaller_limits_after_a_reconnect_apply_to_commands_sent_again() -> None:
    world = World()
    write = world.ask(WRITE, 0, count=8)
    trim = world.ask(DISCARD, 0, count=8)
    world.down()
    flags = DEFAULT_FLAGS & ~TransmissionFlags.SEND_TRIM
    world.up(export(flags=flags, max_payload_bytes=1024))
    assert trim.error == 0
    assert world.sent == [(WRITE, 0), (WRITE, 2), (WRITE, 4), (WRITE, 6)]
    world.channels[0].answer_all()
    assert write.error == 0


def test_fua_lost_at_reconnect_becomes_write_and_flush() -> None:
    world = World()
    write = world.ask(WRITE, 0, flags=FUA)
    world.down()
    world.up(export(flags=DEFAULT_FLAGS & ~TransmissionFlags.SEND_FUA))
    assert world.sent == [(WRITE, 0)]
    world.channels[0].answer_all()
    assert write.error == 0
    assert world.log == [(WRITE, 0)]


def test_emulated_fua_whose_flush_meets_another_server_starts_again() -> None:
    world = World(flags=DEFAULT_FLAGS & ~TransmissionFlags.SEND_FUA, description="instance=1")
    write = world.ask(WRITE, 0, flags=FUA)
    world.channels[0].answer(world.channels[0].pending[0])
    assert world.sent == [(FLUSH, 0)]
    world.down()
    world.up()
    world.channels[0].answer(world.channels[0].pending[0])
    assert world.sent == [(WRITE, 0)]  # once more, on this server
    world.channels[0].answer_all()
    assert write.error == 0


@pytest.mark.parametrize("op", [WRITE, WRITE_ZEROES])
def test_split_write_that_outlives_a_server_is_written_whole_to_the_next(op: int) -> None:
    """Found by the simulation: the first part died with the old server, unflushed; a flush that
    failed before the write was complete told of it too early, and the next one said yes."""
    flags = DEFAULT_FLAGS & ~TransmissionFlags.SEND_WRITE_ZEROES
    world = World(flags=flags, max_payload_bytes=1024)
    write = world.ask(op, 0, count=4)
    world.channels[0].answer(world.channels[0].pending[0])
    world.down()
    world.up()
    assert world.ask(FLUSH).error == errno.EIO
    world.channels[0].answer(world.channels[0].pending[0])
    assert world.log == [(FLUSH, errno.EIO)]
    assert world.sent == [(WRITE, 0), (WRITE, 2)]
    world.channels[0].answer_all()
    assert (write.error, write.generation) == (0, 2)


def test_grace_holds_overlapping_changes_only_and_only_for_its_time() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.ask(WRITE, 4, count=2)
    world.down(stale_possible=True)
    world.up()
    world.channels[0].answer_all()
    world.ask(WRITE, 5)
    world.ask(WRITE, 6)
    world.ask(READ, 4)
    world.ask(DISCARD, 0, count=5)
    assert world.sent == [(WRITE, 6), (READ, 4)]
    assert world.link.next_deadline_s() == GRACE_S
    world.tick(GRACE_S - 0.1)
    assert len(world.sent) == 2
    world.tick(GRACE_S)
    assert world.sent == [(WRITE, 6), (READ, 4), (WRITE, 5), (DISCARD, 0)]
    assert world.link.next_deadline_s() is None


def test_grace_also_stops_writes_that_were_waiting_already() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.down()
    world.up(count=2)
    world.ask(WRITE, 1)
    world.ask(WRITE, 1)  # waits for the first
    world.down(stale_possible=True)
    world.up(count=2)
    for channel in world.channels:
        channel.answer_all()
    assert world.sent == []
    world.tick(GRACE_S)
    assert world.sent == [(WRITE, 1)]


def fail_by_pending(world: World) -> None:
    unanswered = [request for channel in world.channels for request in channel.pending]
    world.fail_pending(world.now, unanswered, errno.EIO)


def fail_by_timeout(world: World) -> None:
    world.down(stale_possible=True)
    world.now += 2
    world.tick(world.now)


FAILING = pytest.mark.parametrize("fail", [fail_by_pending, fail_by_timeout])


def world_with_grace() -> World:
    return World(ClientOptions(stale_write_grace_s=GRACE_S, reconnect_timeout_s=2))


@FAILING
@pytest.mark.parametrize("op", [WRITE, DISCARD, WRITE_ZEROES])
def test_grace_also_holds_where_a_change_was_failed_instead_of_sent_again(fail, op) -> None:
    """The guest is told of the failure, writes anew, and flushes: that must stay."""
    world = world_with_grace()
    failed = world.ask(op, 4, count=2)
    fail(world)
    assert failed.error == errno.EIO
    world.now += 1
    world.up()
    world.ask(WRITE, 5)
    world.ask(WRITE, 6)
    world.ask(READ, 4)
    assert world.sent == [(WRITE, 6), (READ, 4)]
    world.tick(world.now + GRACE_S - 0.1)
    assert len(world.sent) == 2
    world.tick(world.now + GRACE_S)
    assert world.sent == [(WRITE, 6), (READ, 4), (WRITE, 5)]
    assert world.link.next_deadline_s() is None
    world.ask(WRITE, 5)
    assert len(world.sent) == 4


def test_grace_holds_what_comes_between_a_failure_and_the_reconnect() -> None:
    world = world_with_grace()
    world.ask(WRITE, 4)
    fail_by_pending(world)
    world.ask(WRITE, 4)
    world.ask(WRITE, 5)
    world.up()
    assert world.sent == [(WRITE, 5)]
    world.tick(world.now + GRACE_S)
    assert world.sent == [(WRITE, 5), (WRITE, 4)]


def test_change_that_was_never_sent_leaves_nothing_behind_when_it_fails() -> None:
    world = world_with_grace()
    world.down(stale_possible=True)
    world.ask(WRITE, 4)
    world.tick(2)
    world.up()
    world.ask(WRITE, 4)
    assert world.sent == [(WRITE, 4)]


def test_failed_change_of_a_connection_that_the_server_ended_leaves_nothing_behind() -> None:
    world = world_with_grace()
    world.ask(WRITE, 4)
    world.down(stale_possible=False)
    world.tick(2)
    world.up()
    world.ask(WRITE, 4)
    assert world.sent == [(WRITE, 4)]


@pytest.mark.parametrize("fences", [True, False])
def test_nothing_waits_for_failed_changes_with_a_fence_or_without_a_grace(fences) -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S if fences else 0))
    world.ask(WRITE, 4)
    fail_by_pending(world)
    world.ask(WRITE, 4)
    world.up(export(description="session=yes") if fences else None)
    assert world.sent == [(WRITE, 4)]
    world.ask(WRITE, 4)
    assert world.sent == [(WRITE, 4)] * 2


def test_grace_outlives_a_failure_of_everything() -> None:
    """What the server may still do does not depend on how often we fail what waits for it."""
    world = world_with_grace()
    world.ask(WRITE, 4)
    world.down(stale_possible=True)
    world.up()
    world.channels[0].answer_all()
    held = world.ask(WRITE, 4)
    world.now = 1.0
    fail_by_pending(world)
    assert held.error == errno.EIO
    world.up()
    world.ask(WRITE, 4)
    world.tick(GRACE_S - 0.1)
    assert world.sent == []
    world.tick(GRACE_S)
    assert world.sent == [(WRITE, 4)]


@FAILING
def test_change_that_waits_for_a_grace_fails_with_everything_else(fail) -> None:
    world = World(ClientOptions(stale_write_grace_s=3600, reconnect_timeout_s=2))
    world.ask(WRITE, 4)
    world.down(stale_possible=True)
    world.up()
    held = world.ask(WRITE, 4)
    fail(world)
    assert held.error == errno.EIO


def test_given_up_change_fails_at_once_although_its_range_is_held() -> None:
    world = world_with_grace()
    world.ask(WRITE, 4)
    fail_by_timeout(world)
    assert world.ask(WRITE, 4).error == errno.EIO
    assert world.link.in_flight == 0


def test_many_failed_changes_hold_all_of_the_disk() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S), size=2 << 20)
    for number in range(1025):  # None touches another one.
        world.ask(WRITE, 2 * number)
    fail_by_pending(world)
    world.up()
    world.ask(WRITE, 1)
    world.ask(WRITE, 4095)
    assert world.sent == []
    world.tick(GRACE_S)
    assert world.sent == [(WRITE, 1), (WRITE, 4095)]


@pytest.mark.parametrize("op", [WRITE, DISCARD, WRITE_ZEROES])
def test_expected_stale_writes_hold_every_change_for_the_grace_time(op) -> None:
    """A killed process may have left them anywhere."""
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.expect_stale_writes(10.0)
    world.ask(op, 4)
    world.ask(READ, 4)
    world.ask(FLUSH)
    assert world.sent == [(READ, 4), (FLUSH, 0)]
    assert world.link.next_deadline_s() == 10 + GRACE_S
    world.tick(10 + GRACE_S - 0.1)
    assert len(world.sent) == 2
    world.tick(10 + GRACE_S)
    assert world.sent == [(READ, 4), (FLUSH, 0), (op, 4)]
    world.ask(op, 5)
    assert world.sent[3:] == [(op, 5)]


def test_expected_stale_writes_also_hold_the_grown_part_after_a_reconnect() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.expect_stale_writes(0.0)
    world.ask(WRITE, 1)
    world.down(stale_possible=False)
    world.ask(WRITE, 2)
    world.up(export(4 << 20))
    world.ask(WRITE, 8000)
    assert world.sent == []
    world.tick(GRACE_S)
    assert world.sent == [(WRITE, 1), (WRITE, 2), (WRITE, 8000)]


def test_expected_stale_writes_twice_wait_for_the_later_time() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.expect_stale_writes(0.0)
    world.expect_stale_writes(2.0)
    world.ask(WRITE, 1)
    world.tick(GRACE_S)
    assert world.sent == []
    world.tick(2 + GRACE_S)
    assert world.sent == [(WRITE, 1)]


@pytest.mark.parametrize("fences", [True, False])
def test_no_stale_writes_are_expected_with_a_fence_or_without_a_grace(fences) -> None:
    options = ClientOptions(stale_write_grace_s=GRACE_S if fences else 0)
    world = World(options, description="session=yes" if fences else "")
    world.expect_stale_writes(0.0)
    world.ask(WRITE, 1)
    assert world.sent == [(WRITE, 1)]
    assert not world.link.may_leave_writes


def test_may_leave_writes_while_a_grace_lasts() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    assert not world.link.may_leave_writes
    world.expect_stale_writes(0.0)
    assert world.link.may_leave_writes
    world.tick(GRACE_S)
    assert not world.link.may_leave_writes


@pytest.mark.parametrize(
    ("op", "description", "leaves"),
    [
        (READ, "", False),
        (WRITE, "", True),
        (DISCARD, "", True),
        (WRITE, "session=yes", False),
    ],
)
def test_may_leave_writes_when_closed_with_a_change_in_flight(op, description, leaves) -> None:
    world = World(description=description)
    world.ask(op, 1)
    world.closed(list(world.channels[0].pending))
    assert world.link.may_leave_writes == leaves
    assert world.ask(WRITE, 1).error == errno.EIO


def test_closed_link_fails_everything_held() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.ask(WRITE, 1)
    world.down(stale_possible=True)
    world.up()
    held = world.ask(WRITE, 1)
    pending = list(world.channels[0].pending)
    world.closed(pending)
    assert held.error == errno.EIO
    assert world.link.in_flight == 0
    assert world.ask(READ).error == errno.EIO


def test_fail_pending_fails_everything_once_and_goes_on() -> None:
    world = World()
    requests = [world.ask(WRITE, 1), world.ask(READ, 2), world.ask(FLUSH)]
    unanswered = list(world.channels[0].pending)
    world.fail_pending(0.0, unanswered, errno.ENODEV)
    assert [request.error for request in requests] == [errno.ENODEV] * 3
    later = world.ask(READ, 3)
    assert later.error == -1
    world.up()
    assert world.sent == [(READ, 3)]


MANY = 64 * 1024
"""What 64 queues of 1024 can have in flight."""


def fail_by_closing(world: World) -> None:
    world.closed(world.pending)


WAYS_TO_FAIL = pytest.mark.parametrize(
    "fail", [fail_by_pending, fail_by_timeout, fail_by_closing], ids=lambda way: way.__name__
)


@pytest.mark.slow
@WAYS_TO_FAIL
def test_65536_overlapping_writes_all_fail_when_they_are_given_up(fail) -> None:
    """Each waits for the one before: failing one must not fail the next from inside of it."""
    world = World(ClientOptions(reconnect_timeout_s=2))
    world.down()
    world.up(count=2)
    requests = [world.ask(WRITE, number % 3, count=2) for number in range(MANY)]
    assert len(world.sent) < 3
    assert world.link.in_flight == MANY
    fail(world)
    assert {request.error for request in requests} == {errno.EIO}
    assert len(world.log) == MANY
    assert world.link.in_flight == 0


@pytest.mark.slow
@WAYS_TO_FAIL
def test_65536_writes_that_wait_for_a_grace_all_fail_when_they_are_given_up(fail) -> None:
    world = World(ClientOptions(stale_write_grace_s=3600, reconnect_timeout_s=2))
    world.ask(WRITE, 4)
    world.down(stale_possible=True)
    world.up()
    requests = [world.ask(WRITE, 4) for _ in range(MANY)]
    fail(world)
    assert {request.error for request in requests} == {errno.EIO}
    assert world.link.in_flight == 0


@pytest.mark.slow
def test_65536_writes_that_waited_for_a_grace_are_sent_when_it_ends() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S), size=MANY * BLOCK)
    world.expect_stale_writes(0.0)
    for number in range(MANY):
        world.ask(WRITE, number)
    assert world.sent == []
    world.tick(GRACE_S)
    assert world.sent == [(WRITE, number) for number in range(MANY)]


class PromptChannel(FakeChannel):
    """Once it is prompt, the server answers in the same turn whatever it is sent."""

    is_prompt = False
    deepest = 0

    def send(self, request: Request) -> None:
        super().send(request)
        self.deepest = max(self.deepest, depth())
        if self.is_prompt:
            self.reply(request)


def depth() -> int:
    """How many frames the stack has."""
    return len(list(walk_stack(None)))


def deepest(n_writes: int, **limits: int) -> int:
    """The most frames there are where commands are sent and where owners are told, with so many
    writes over one another that all wait until the first is answered."""
    world = World(**limits)
    world.down()
    channels = [PromptChannel(world.link) for _ in range(2)]
    world.link.established(world.now, world.export, channels)
    depths: list[int] = []
    buffer = memoryview(bytearray(4 * BLOCK))

    def told(request: Request) -> None:
        assert request.error == 0
        depths.append(depth())

    for number in range(n_writes):
        offset = number % 3 * BLOCK
        world.link.submit(Request(WRITE, offset, len(buffer), [buffer], told))
    deliver()
    first = [request for channel in channels for request in channel.pending]
    assert 0 < len(first) <= 4
    for channel in channels:
        channel.is_prompt = True
        channel.answer_all()
    assert len(depths) == n_writes
    assert world.link.in_flight == 0
    return max(*depths, *(channel.deepest for channel in channels))


@pytest.mark.slow
@pytest.mark.parametrize(
    "limits",
    [{}, {"max_payload_bytes": BLOCK}, {"min_block_bytes": 4096}],
    ids=["whole", "in parts", "read first"],
)
def test_stack_is_no_deeper_with_65536_overlapping_writes_than_with_10(
    limits: dict[str, int],
) -> None:
    assert deepest(MANY, **limits) == deepest(10, **limits)


@pytest.mark.parametrize("fail", [fail_by_pending, fail_by_closing])
def test_successors_of_overlapping_writes_are_failed_before_the_call_returns(fail) -> None:
    """They must neither stay behind with the guest's memory nor be sent later, also if the end of
    the write before them is told of only afterwards."""
    world = World()
    world.down()
    world.up(count=2)
    requests = [world.ask(WRITE, 1), world.ask(WRITE, 1), world.ask(DISCARD, 0, count=4)]
    finished_with: list[int] = []
    # As if the completion of what is in flight were put off until after the call.
    late = world.channels[1].pending[0]
    done, late.done = late.done, lambda request: finished_with.append(request.error)
    fail(world)
    assert [request.error for request in requests] == [-1, errno.EIO, errno.EIO]
    assert finished_with == [errno.EIO]
    done(late)
    assert [request.error for request in requests] == [errno.EIO] * 3
    if fail is fail_by_pending:
        world.up()
        assert world.sent == []
        assert world.ask(WRITE, 9).error == -1
        assert world.sent == [(WRITE, 9)]
        assert world.link.in_flight == 1


def test_failed_successor_is_finished_once() -> None:
    world = World()
    world.down()
    world.up(count=2)
    for _ in range(5):
        world.ask(WRITE, 1)
    fail_by_pending(world)
    assert world.log == [(WRITE, errno.EIO)] * 5
    world.up()
    assert world.log == [(WRITE, errno.EIO)] * 5


# A server that hangs up on a command.


class Poisoned(World):
    """A server that hangs up on one kind of command, and answers all others one by one."""

    def __init__(
        self, poison: int, at_block: int | None = None, options: ClientOptions | None = None
    ) -> None:
        self.poison = poison
        self.at_block = at_block
        self.connections = 0
        super().__init__(options)

    def is_poison(self, request: Request) -> bool:
        return request.op == self.poison and self.at_block in (None, request.offset // BLOCK)

    def serve(self, rounds: int = 20, last: bool = False) -> None:
        """Answer what there is; hang up and be connected to again as often as it takes.

        `last`: the newest commands are answered first.
        """
        for _ in range(rounds):
            while pending := [each for channel in self.channels for each in channel.pending]:
                request = pending[-1 if last else 0]
                if self.is_poison(request):
                    break
                channel = next(each for each in self.channels if request in each.pending)
                channel.answer(request)
            if not pending:
                return
            self.down(hung_up=True)
            self.now += self.link.next_delay_s()
            self.tick(self.now)
            self.connections += 1
            self.up(count=len(self.channels))


@pytest.mark.parametrize("op", [READ, WRITE, DISCARD, WRITE_ZEROES, FLUSH])
def test_command_on_which_the_server_hangs_up_fails_and_all_else_goes_on(op) -> None:
    world = Poisoned(op, None if op == FLUSH else 4)
    before, poison, after = world.ask(READ, 1), world.ask(op, 4), world.ask(READ, 2)
    world.down(hung_up=True)
    world.up()
    waiting = world.ask(WRITE, 9)
    world.serve()
    assert poison.error == errno.EIO
    assert (before.error, after.error, waiting.error) == (0, 0, 0)
    assert world.link.in_flight == 0
    assert world.ask(READ, 3).error == -1
    assert world.sent == [(READ, 3)]


def test_command_that_fails_for_a_hang_up_is_logged_in_one_line(monkeypatch) -> None:
    logged: list[str] = []
    monkeypatch.setattr(
        "bridge.server.link._log.error", lambda text, **more: logged.append(f"{text} {more}")
    )
    world = Poisoned(DISCARD)
    world.ask(DISCARD, 4, count=2)
    world.serve()
    assert len(logged) == 1
    assert "discard" in logged[0]
    assert "2048" in logged[0]


def test_many_commands_on_which_the_server_hangs_up_all_fail_soon() -> None:
    """The discards of a mkfs: after the first one has been found the others take two connections
    each."""
    world = Poisoned(DISCARD)
    poison = [world.ask(DISCARD, 2 * number) for number in range(50)]
    reads = [world.ask(READ, number) for number in range(50)]
    world.serve(1000)
    assert {request.error for request in poison} == {errno.EIO}
    assert {request.error for request in reads} == {0}
    assert world.connections <= 4 + 2 * 50


def test_culprit_is_found_among_slow_commands_that_were_sent_before_it() -> None:
    """A server with threads hangs up before it has answered the older ones."""
    world = Poisoned(WRITE, 7)
    requests = [world.ask(WRITE, number) for number in range(10)]
    for _ in range(3):
        world.down(hung_up=True)
        world.up()
    world.serve()
    assert [request.error for request in requests] == [0] * 7 + [errno.EIO] + [0] * 2


def test_culprit_is_found_although_all_others_are_answered_each_time() -> None:
    world = Poisoned(WRITE, 7)
    poison = world.ask(WRITE, 7)
    for round_ in range(12):
        world.ask(READ, round_)
        world.serve(1, last=True)
    assert poison.error == errno.EIO
    assert {error for _, error in world.log if _ == READ} == {0}


def test_culprit_is_sent_alone_and_what_comes_meanwhile_waits() -> None:
    world = Poisoned(DISCARD)
    world.down()
    world.up(count=2)
    world.ask(DISCARD, 4)
    world.ask(WRITE, 6)
    for _ in range(3):
        world.down(hung_up=True)
        world.up(count=2)
    assert world.sent == [(READ, 0)]  # The probe: does it answer at all?
    world.ask(READ, 5)
    world.channels[0].answer_present()
    assert world.sent == [(DISCARD, 4)]
    world.down(hung_up=True)
    assert world.log == [(DISCARD, errno.EIO)]
    world.up(count=2)
    assert sorted(world.sent) == [(READ, 5), (WRITE, 6)]


def test_trial_without_a_culprit_ends_with_everything_answered() -> None:
    world = World()
    for number in range(5):
        world.ask(WRITE, number)
    for _ in range(3):
        world.down(hung_up=True)
        world.up()
    assert world.sent == [(READ, world.link.export.size_bytes // BLOCK - 1)]
    world.ask(READ, 9)
    world.channels[0].answer_all()
    assert world.log == [(WRITE, 0)] * 5 + [(READ, 0)]
    assert world.link.in_flight == 0


def test_server_that_hangs_up_on_everything_is_waited_for() -> None:
    """That is an outage: no command is to blame, and none fails without a reconnect timeout."""
    world = World()
    requests = [world.ask(op, 8) for op in (READ, WRITE, DISCARD, FLUSH)]
    delays = []
    for _ in range(100):
        world.down(hung_up=True)
        delays.append(world.link.next_delay_s())
        world.up()
    assert world.log == []
    assert min(delays[20:]) > 1
    for _ in range(20):
        if world.link.in_flight:
            world.channels[0].answer_all()
    assert {request.error for request in requests} == {0}


def test_server_that_is_stuck_and_lost_again_and_again_fails_no_request() -> None:
    """It had answered much before, which was believed to show that only one request was at fault:
    whoever restarts a stuck server until it is well gave the guest an error."""
    world = World()
    world.ask(READ, 1)
    world.channels[0].answer_all()
    stuck = world.ask(READ, 4)
    for _ in range(5):
        world.down(hung_up=True)
        world.up()
    assert stuck.error == -1
    for _ in range(2):  # The probe, and what waits for it.
        world.channels[0].answer_all()
    assert stuck.error == 0


def test_server_that_hangs_up_on_all_reads_still_takes_writes() -> None:
    world = Poisoned(READ)
    read = world.ask(READ, 4)
    for _ in range(10):
        world.down(hung_up=True)
        world.up()
    write = world.ask(WRITE, 4)
    world.serve(30)
    assert write.error == 0
    assert read.error == errno.EIO


def test_silence_or_a_lost_network_never_fails_a_command() -> None:
    """The server may be busy with it: what was promised is to wait."""
    world = World()
    request = world.ask(WRITE, 1)
    for _ in range(100):
        world.down(stale_possible=True)
        world.now += 60
        world.up()
    assert request.error == -1
    assert world.sent == [(WRITE, 1)]


def test_trial_that_the_network_ends_blames_no_request() -> None:
    world = World()
    request = world.ask(WRITE, 1)
    for _ in range(3):
        world.down(hung_up=True)
        world.up()
    world.channels[0].answer_present()  # the probe
    assert world.sent == [(WRITE, 1)]
    assert request.error == -1
    world.down()
    world.up()
    assert world.sent == [(WRITE, 1)]
    world.ask(READ, 2)
    world.channels[0].answer_all()
    assert world.log == [(WRITE, 0), (READ, 0)]


@WAYS_TO_FAIL
@pytest.mark.parametrize("probed", [False, True])
def test_commands_on_trial_fail_once_with_everything_else(fail, probed) -> None:
    world = World(ClientOptions(reconnect_timeout_s=2))
    requests = [world.ask(WRITE, number) for number in range(4)]
    for _ in range(3):
        world.down(hung_up=True)
        world.up()
    requests.append(world.ask(READ, 7))
    if probed:
        world.channels[0].answer_present()
    assert world.link.in_flight
    fail(world)
    assert world.log == [(WRITE, errno.EIO)] * 4 + [(READ, errno.EIO)]
    assert {request.error for request in requests} == {errno.EIO}
    assert world.link.in_flight == 0


def test_failed_culprit_may_be_executed_late_and_is_kept_away_from() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.ask(WRITE, 4)
    for _ in range(4):
        if world.sent == [(READ, 0)]:
            world.channels[0].answer_present()
        world.down(stale_possible=True, hung_up=True)
        world.up()
    assert world.log == [(WRITE, errno.EIO)]
    world.ask(WRITE, 4)
    assert world.sent == []
    world.tick(world.now + GRACE_S)
    assert world.sent == [(WRITE, 4)]


def test_connections_that_answer_nothing_do_not_begin_the_reconnect_timeout_anew() -> None:
    world = World(ClientOptions(reconnect_timeout_s=10))
    request = world.ask(READ, 8)
    for _ in range(4):
        world.down()
        world.now += 1.5
        world.tick(world.now)
        world.up()
        world.now += 1
    assert request.error == -1
    world.down()
    assert request.error == errno.EIO
    assert world.link.given_up


def test_idle_connection_that_is_lost_begins_the_reconnect_timeout() -> None:
    world = World(ClientOptions(reconnect_timeout_s=10))
    world.down()
    world.up()
    world.now = 3600
    request = world.ask(READ, 1)
    world.down()
    world.tick(world.now + 9.9)
    assert request.error == -1
    world.tick(world.now + 10)
    assert request.error == errno.EIO


def test_connection_that_answers_begins_the_reconnect_timeout_anew() -> None:
    world = World(ClientOptions(reconnect_timeout_s=10))
    world.ask(READ, 1)
    request = world.ask(READ, 8)
    for _ in range(4):
        world.down()
        world.now += 6
        world.up()
        world.ask(READ, 1)
        world.channels[0].answer(world.channels[0].pending[0])
        request = world.ask(READ, 8)
    world.down()
    world.tick(world.now + 9.9)
    assert request.error == -1


# Requests that are abandoned.


def abandon(world: World, *requests: Request) -> None:
    for request in requests:
        request.abandon(lambda request: None, memoryview(bytearray(request.length)))
    world.link.abandon()
    deliver()


def test_write_over_an_abandoned_one_waits_for_its_answer() -> None:
    """It is in the server's hands: executed late, it would go over the newer one."""
    world = World()
    old = world.ask(WRITE, 1)
    abandon(world, old)
    newer, elsewhere = world.ask(WRITE, 1), world.ask(WRITE, 5)
    reading = world.ask(READ, 1)
    assert world.sent == [(WRITE, 1), (WRITE, 5), (READ, 1)]
    world.channels[0].answer(world.channels[0].pending[0])
    assert world.sent == [(WRITE, 5), (READ, 1), (WRITE, 1)]
    world.channels[0].answer_all()
    assert [each.error for each in (newer, elsewhere, reading)] == [0, 0, 0]
    world.ask(WRITE, 1)
    world.ask(WRITE, 1)
    assert world.sent == [(WRITE, 1)] * 2  # nothing keeps them apart any more


@pytest.mark.parametrize("stale_possible", [True, False])
def test_abandoned_command_is_not_sent_again_and_kept_away_from_if_it_may_be_executed(
    stale_possible: bool,
) -> None:
    world = World()
    abandoned = [world.ask(WRITE, 1), world.ask(READ, 2), world.ask(FLUSH)]
    kept = world.ask(WRITE, 3)
    abandon(world, *abandoned)
    world.down(stale_possible=stale_possible)
    world.up()
    assert world.sent == [(WRITE, 3)]
    world.ask(WRITE, 1)
    assert world.sent == [(WRITE, 3)] + ([] if stale_possible else [(WRITE, 1)])
    world.tick(world.now + GRACE_S)
    assert world.sent == [(WRITE, 3), (WRITE, 1)]
    world.channels[0].answer_all()
    assert kept.error == 0
    assert world.link.in_flight == 0


def test_abandoned_request_that_waits_for_a_connection_is_never_sent() -> None:
    world = World()
    sent = world.ask(WRITE, 1)
    world.down(stale_possible=True)
    waiting = world.ask(WRITE, 2)
    abandon(world, sent, waiting)
    assert world.link.in_flight == 0
    world.up()
    world.ask(WRITE, 1)
    world.ask(WRITE, 2)
    assert world.sent == [(WRITE, 2)]  # the first may still be executed
    world.tick(world.now + GRACE_S)
    assert world.sent == [(WRITE, 2), (WRITE, 1)]


def test_abandoned_request_in_parts_sends_no_more_of_them() -> None:
    world = World(min_block_bytes=512, max_payload_bytes=1024)
    long = world.ask(WRITE, 0, count=20)
    assert len(world.sent) == 4
    abandon(world, long)
    world.channels[0].answer_all()
    assert world.sent == []
    assert world.link.in_flight == 0


def test_abandoned_change_that_waits_for_its_range_lets_the_next_one_go() -> None:
    world = World()
    world.down()
    world.up(count=2)
    first, second, third = (world.ask(WRITE, 1) for _ in range(3))
    abandon(world, second)
    for channel in world.channels:
        channel.answer_all()
    for channel in world.channels:
        channel.answer_all()
    assert (first.error, third.error) == (0, 0)


def abandon_amid_a_turn(world: World, *requests: Request) -> None:
    """After the answers to parts of them, before anybody was told of these."""
    for request in requests:
        request.abandon(lambda request: None, memoryview(bytearray(request.length)))
    world.link.abandon()


def test_abandoned_after_its_ends_were_read_writes_nothing() -> None:
    """Its bytes are gone: what would be written is shorter than its header says."""
    world = World(min_block_bytes=4096)
    write = world.ask(WRITE, 1)
    assert world.sent == [(READ, 0)]
    world.channels[0].reply(world.channels[0].pending[0])
    abandon_amid_a_turn(world, write)
    deliver()
    assert world.sent == []
    assert world.link.in_flight == 0
    world.ask(WRITE, 2)
    assert world.sent == [(READ, 0)]  # Its range is free.


@pytest.mark.parametrize("op", [READ, WRITE, DISCARD])
def test_abandoned_after_a_part_was_answered_sends_no_more_parts(op: int) -> None:
    world = World(max_payload_bytes=1024, size=8 << 30)
    limit_blocks = 2 if op != DISCARD else (1 << 30) // BLOCK
    long = Request(
        *(op, 0, 6 * limit_blocks * BLOCK),
        [memoryview(bytearray(6 * limit_blocks * BLOCK))] if op != DISCARD else [],
        lambda request: None,
    )
    submit(world.link, long)
    assert len(world.sent) == 4
    world.channels[0].reply(world.channels[0].pending[0])
    long.abandon(lambda request: None, memoryview(bytearray(long.length if op == READ else 0)))
    world.link.abandon()
    deliver()
    assert len(world.sent) == 3
    world.channels[0].answer_all()
    assert world.link.in_flight == 0


def test_abandoned_durable_write_answered_in_the_turn_of_a_failed_flush_is_not_sent_again() -> None:
    world = World()
    (channel,) = world.channels
    write, flush = world.ask(WRITE, 3, flags=FUA), world.ask(FLUSH)
    channel.reply(channel.pending[1], errno.EIO)
    channel.reply(channel.pending[0])
    abandon_amid_a_turn(world, write)
    deliver()
    assert (flush.error, world.sent, world.link.in_flight) == (errno.EIO, [], 0)


def test_everything_fails_while_abandoned_commands_wait_for_one_another() -> None:
    """The end of those is told of later in the turn than that of all that is failed."""
    world = on_two_connections()
    first, second = world.ask(WRITE, 1), world.ask(WRITE, 4)
    abandon(world, first, second)
    third, fourth = world.ask(WRITE, 1, count=4), world.ask(WRITE, 1)
    fail_by_pending(world)
    assert (third.error, fourth.error) == (errno.EIO, errno.EIO)
    assert world.link.in_flight == 0
    world.up()
    world.tick(world.now + GRACE_S)
    assert world.ask(WRITE, 1).error == -1
    assert world.sent == [(WRITE, 1)]


def test_write_over_one_that_was_abandoned_on_trial_goes_after_the_connection_is_lost() -> None:
    world = World()
    world.ask(READ, 5)
    old = world.ask(WRITE, 1)
    for _ in range(3):
        world.down(hung_up=True)
        world.up()
    world.channels[0].answer_present()  # the probe
    world.channels[0].answer_present()
    assert world.sent == [(WRITE, 1)]
    abandon(world, old)
    abandon(world)  # Something else of the guest's.
    world.down()
    world.up()
    assert world.sent == []
    newer = world.ask(WRITE, 1)
    world.channels[0].answer_all()
    assert newer.error == 0


def test_what_was_abandoned_before_its_trial_is_kept_away_from_for_the_grace_time_only() -> None:
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    world.ask(READ, 5)
    old = world.ask(WRITE, 1)
    for _ in range(3):
        world.down(hung_up=True, stale_possible=True)
        world.up()
    abandon(world, old)
    world.channels[0].answer_all()
    world.ask(WRITE, 1)
    assert world.sent == []
    assert world.link.next_deadline_s() == world.now + GRACE_S
    world.tick(world.now + GRACE_S)
    assert world.sent == [(WRITE, 1)]


def on_two_connections(options: ClientOptions | None = None) -> World:
    """A link that keeps overlapping changes apart."""
    world = World(options)
    world.down()
    world.up(count=2)
    return world


@pytest.mark.parametrize("again", [WRITE, DISCARD, WRITE_ZEROES])
def test_fail_pending_fails_the_changes_that_wait_for_one_in_flight(again: int) -> None:
    """Their memory is the guest's again, too: nothing of them may be sent later."""
    world = on_two_connections()
    requests = [world.ask(WRITE, 1, count=2), world.ask(again, 1), world.ask(WRITE, 2)]
    requests += [world.ask(again, 1, count=2), world.ask(WRITE, 1)]
    assert world.sent == [(WRITE, 1)]
    world.fail_pending(0.0, world.pending, errno.ENODEV)
    assert [request.error for request in requests] == [errno.ENODEV] * 5
    assert world.link.in_flight == 0
    world.up()
    assert world.sent == []
    assert len(world.log) == 5


def test_fail_pending_while_down_fails_the_changes_that_wait_for_one_in_flight() -> None:
    world = on_two_connections()
    requests = [world.ask(WRITE, 1) for _ in range(3)]
    world.down()
    requests.append(world.ask(WRITE, 1))
    world.fail_pending(0.0, [], errno.ENODEV)
    assert [request.error for request in requests] == [errno.ENODEV] * 4
    world.up()
    assert world.sent == []


@pytest.mark.parametrize("grace_s", [0, GRACE_S])
def test_closed_link_fails_the_changes_that_wait_for_one_in_flight(grace_s: float) -> None:
    """Also those that a stale write would have kept waiting for the grace time."""
    world = on_two_connections(ClientOptions(stale_write_grace_s=grace_s))
    requests = [world.ask(WRITE, 1) for _ in range(3)]
    world.closed(world.pending)
    assert [request.error for request in requests] == [errno.EIO] * 3
    assert world.link.in_flight == 0


@pytest.mark.parametrize("give_up", [False, True])
def test_nothing_waits_for_a_grace_that_begins_with_its_own_failing(give_up: bool) -> None:
    world = on_two_connections(ClientOptions(stale_write_grace_s=GRACE_S, reconnect_timeout_s=2))
    requests = [world.ask(WRITE, 1) for _ in range(3)]
    world.down(stale_possible=True)
    if give_up:
        world.tick(2)
    else:
        world.fail_pending(0.0, [], errno.EIO)
    assert [request.error for request in requests] == [errno.EIO] * 3
    assert world.link.in_flight == 0


def on_trial(*asked: tuple[int, int]) -> tuple[World, list[Request]]:
    """Commands that are on trial on the present connection: the first one is being tried."""
    world = World(ClientOptions(stale_write_grace_s=GRACE_S))
    requests = [world.ask(op, block) for op, block in asked]
    for _ in range(3):
        world.channels[0].answered = True  # something: the server is proven to answer
        world.down(hung_up=True, stale_possible=True)
        world.up()
    assert world.sent == [asked[0]]
    return world, requests


def test_abandoned_change_on_trial_whose_connection_is_lost_holds_up_no_later_change() -> None:
    world, (old, _) = on_trial((WRITE, 1), (READ, 5))
    abandon(world, old)
    world.down()
    world.up()
    world.channels[0].answer_all()
    world.now += 2 * GRACE_S
    world.tick(world.now)
    newer = world.ask(WRITE, 1)
    assert world.sent == [(WRITE, 1)]
    world.channels[0].answer_all()
    assert newer.error == 0


def test_change_abandoned_before_its_turn_on_trial_is_kept_away_from_for_the_grace_time() -> None:
    """It was sent on the connection that is lost, and is never sent on this one."""
    world, (_, old) = on_trial((READ, 5), (WRITE, 1))
    abandon(world, old)
    newer = world.ask(WRITE, 1)
    world.channels[0].answer_all()
    assert newer.error == -1
    world.now += GRACE_S
    world.tick(world.now)
    world.channels[0].answer_all()
    assert newer.error == 0


@pytest.mark.parametrize("times", [2, 3000])
def test_guest_may_pause_again_and_again_while_a_request_is_on_trial(times: int) -> None:
    world, (old, _) = on_trial((WRITE, 1), (READ, 5))
    abandon(world, old)
    for _ in range(times):
        world.link.abandon()
    newer = world.ask(WRITE, 1)
    world.tick(world.now + GRACE_S)
    world.channels[0].answer_all()
    assert newer.error == 0


def test_abandoned_change_is_not_sent_again_when_an_epoch_ends() -> None:
    """Its bytes are gone: the frame would take those of the next one for its payload."""
    world = World()
    old = world.ask(WRITE, 1)
    abandon(world, old)
    world.ask(FLUSH)
    channel = world.channels[0]
    channel.answer(channel.pending[1], errno.EIO)
    channel.answer(channel.pending[0])
    assert world.sent == []


def test_abandoned_change_that_was_to_be_sent_again_is_not() -> None:
    world = World()
    old = world.ask(WRITE, 1)
    world.ask(FLUSH)
    channel = world.channels[0]
    channel.answer(channel.pending[1], errno.EIO)
    abandon(world, old)
    channel.answer(channel.pending[0])
    assert world.sent == []


def test_abandoned_discard_that_was_too_long_is_not_tried_again_smaller() -> None:
    world = World(size=1 << 30)
    old = world.ask(DISCARD, 0, 1 << 20)
    assert world.sent == [(DISCARD, 0)]
    abandon(world, old)
    world.channels[0].answer(world.channels[0].pending[0], errno.EINVAL)
    assert world.sent == []


def test_abandoned_durable_write_that_is_answered_ends_no_epoch() -> None:
    world = World()
    other = world.ask(WRITE, 5)
    old = world.ask(WRITE, 1, flags=FUA)
    world.channels[0].answer(world.channels[0].pending[0])
    abandon(world, old)
    world.channels[0].answer_all()
    flush = world.ask(FLUSH)
    world.channels[0].answer_all()
    assert (other.error, flush.error) == (0, 0)


@pytest.mark.parametrize("times", [1, 2])
def test_closed_link_ends_with_abandoned_changes_in_flight(times: int) -> None:
    world = on_two_connections()
    old = world.ask(WRITE, 1)
    newer = world.ask(WRITE, 1)
    abandon(world, old)
    for _ in range(times):
        world.link.abandon()
    world.leaving()
    world.closed(world.pending)
    assert newer.error == errno.EIO
    assert world.link.in_flight == 0


def test_flush_command_no_longer_waited_for_is_not_sent_beside_another() -> None:
    """One is in flight at a time, also if it waited for the end of a trial that was cut short."""
    world, (_, _) = on_trial((WRITE, 3), (READ, 5))
    world.channels[0].answer_present()
    refused = world.ask(FLUSH)
    world.down()
    world.up()
    assert refused.error == errno.EIO
    flush = world.ask(FLUSH)
    assert [op for op, _ in world.sent].count(FLUSH) == 1
    world.channels[0].answer_all()
    assert flush.error == 0


# The simulation.


class History:
    """The writes of one block: which values may it hold?"""

    def __init__(self) -> None:
        self.writes: list[list[float]] = [[0.0, 0.0, 0.0, True]]
        """[value, submitted, completed, done]; completed is infinite while in flight. A write that
        failed or was abandoned is over then, but perhaps not done."""

    def allowed(self, started: float, ended: float) -> set[float]:
        """What a read between two times may return (a regular register)."""
        found = set()
        for value, submitted, completed, _ in self.writes:
            if submitted > ended:
                continue
            if not any(s > completed and c < started and d for _, s, c, d in self.writes):
                found.add(value)
        return found


def values_of(op: int, length: int, data: bytes) -> list[float]:
    """What a write puts into each block."""
    if op == WRITE_ZEROES:
        return [0.0] * (length // BLOCK)
    return [float(int.from_bytes(data[i : i + 8])) for i in range(0, len(data), BLOCK)]


class Simulation:
    """One link against one server; everything drawn from one seed."""

    def __init__(
        self,
        seed: int,
        *,
        volatile: bool,
        flushes_fail: bool = False,
        hangs_up: bool = False,
        long_turns: bool = False,
        pauses: bool = False,
        gives_up: bool = False,
    ) -> None:
        self.random = Random(seed)
        self.long_turns = long_turns
        """Several things happen in one turn, before anybody is told of any of them."""
        self.seed = seed
        self.volatile = volatile
        self.flushes_fail = flushes_fail
        """A flush or FUA may fail; then the server drops what was not stable, as Linux does."""
        self.hangs_up = hangs_up
        """Connections end as if for a command; some commands fail for it, innocent ones, too."""
        self.failed_for_it = 0
        self.pauses = pauses
        """The guest abandons what it has in flight, and goes on; long requests have a lane."""
        self.gives_up = gives_up
        """What waits is failed now and then, or has waited for too long."""
        self.open: dict[Request, tuple[list[list[float]], Job | None, bytearray]] = {}
        self.ended: set[Request] = set()
        self.left_alone: list[tuple[Request, bytearray, bytes]] = []
        """What was abandoned, its buffer, and what was in that."""
        self.blocks = 6
        self.time = 0.0
        self.connections = self.random.choice([1, 1, 3])
        self.flags = DEFAULT_FLAGS
        for flag in (TransmissionFlags.SEND_FUA, TransmissionFlags.SEND_WRITE_ZEROES):
            if not self.random.randrange(3):
                self.flags &= ~flag
        self.min_block_bytes = self.random.choice([1, 512, 1024])
        self.max_payload_bytes = self.random.choice([1024, 32 << 20])
        self.options = ClientOptions(
            stale_write_grace_s=GRACE_S, reconnect_timeout_s=1.0 if gives_up else 0
        )
        self.turn = forget()
        self.link = Link(self.options, self.turn, random=Random(seed))
        self.turn.add_stage(self.link)
        self.link.keeps_unflushed = False
        self.lane = Lane(self.link.submit, self.turn)
        self.memory = [0.0] * self.blocks
        self.stable = [0.0] * self.blocks
        self.history = [History() for _ in range(self.blocks)]
        self.values = 0
        self.open_requests = 0
        self.channels: list[FakeChannel] = []
        self.executed: set[int] = set()
        self.left_behind: list[tuple[float, Request, list[float]]] = []
        self.instance = 0
        self.proves = bool(self.random.randrange(2))
        """The server says which instance it is."""
        self.flush_failed_at = -1.0
        self.crashes: list[float] = []
        self.up()

    def end_turn(self) -> None:
        if not self.long_turns or not self.random.randrange(3):
            self.turn.end()

    # The server.

    def up(self) -> None:
        description = f"instance={self.instance}" if self.proves else ""
        self.channels = [FakeChannel(self.link) for _ in range(self.connections)]
        self.link.established(
            self.time,
            export(
                self.blocks * BLOCK,
                description=description,
                flags=self.flags,
                min_block_bytes=self.min_block_bytes,
                max_payload_bytes=self.max_payload_bytes,
            ),
            self.channels,
        )
        self.end_turn()

    def execute(self, request: Request, channel: FakeChannel) -> None:
        if id(request) in self.executed:
            return
        self.executed.add(id(request))
        first = request.offset // BLOCK
        if request.op == WRITE:
            payload = channel.payloads[request]
            for i, value in enumerate(values_of(WRITE, request.length, payload)):
                self.memory[first + i] = value
        elif request.op == READ:
            for i in range(request.length // BLOCK):
                value = int(self.memory[first + i]).to_bytes(8)
                scatter(request.buffers, i * BLOCK, memoryview(value))
        elif request.op == WRITE_ZEROES:
            for i in range(request.length // BLOCK):
                self.memory[first + i] = 0.0
        else:
            assert request.op == FLUSH
            self.stable = list(self.memory)
        if request.flags & FUA:
            for i in range(request.length // BLOCK):
                self.stable[first + i] = self.memory[first + i]

    def answer_one(self) -> None:
        busy = [channel for channel in self.channels if channel.pending]
        if not busy:
            return
        channel = self.random.choice(busy)
        request = self.random.choice(channel.pending)
        synced = request.op == FLUSH or request.flags & FUA
        if synced and self.flushes_fail and not self.random.randrange(4):
            self.memory = list(self.stable)
            self.executed.discard(id(request))
            channel.reply(request, errno.EIO)
            self.end_turn()
            return
        self.execute(request, channel)
        if self.random.randrange(3):
            self.executed.discard(id(request))
            channel.reply(request)
            self.end_turn()

    def lose(self) -> None:
        self.link.leaving()
        unanswered: list[Request] = []
        crash = self.volatile and self.random.randrange(2)
        stale = not crash and self.random.randrange(2)
        for channel in self.channels:
            for request in channel.pending:
                change = request.op in (WRITE, WRITE_ZEROES)
                if stale and change and id(request) not in self.executed:
                    late = self.time + self.random.uniform(0, GRACE_S * 0.9)
                    payload = channel.payloads.get(request, b"")
                    values = values_of(request.op, request.length, payload)
                    self.left_behind.append((late, request, values))
                unanswered.append(request)
        unanswered.sort(key=lambda request: request.cookie)
        self.executed.clear()
        if crash:
            self.memory = list(self.stable)
            self.crashes.append(self.time)
            self.left_behind.clear()
            self.instance += 1
        channels, self.channels = self.channels, []
        answered = any(channel.answered for channel in channels)
        if self.gives_up and not self.random.randrange(4):
            self.link.fail_pending(self.time, unanswered, errno.EIO)
            deliver()
            return
        blamed = unanswered[0] if self.hangs_up and unanswered else None
        self.link.lost(
            self.time,
            unanswered,
            stale_possible=bool(stale or self.left_behind),
            answered=answered,
            blamed=blamed,
        )
        self.end_turn()

    def stale_writes(self) -> None:
        due = [item for item in self.left_behind if item[0] <= self.time]
        self.left_behind = [item for item in self.left_behind if item[0] > self.time]
        for _, request, values in due:
            for i, value in enumerate(values):
                self.memory[request.offset // BLOCK + i] = value

    # The guest.

    def change(self, op: int, first: int, data: bytearray) -> list[list[float]]:
        """The records of a change from the block `first` on; `data` is filled if it is a write."""
        records: list[list[float]] = []
        for i in range(len(data) // BLOCK):
            if op == WRITE:
                self.values += 1
                data[i * BLOCK : i * BLOCK + 8] = self.values.to_bytes(8)
            value = int.from_bytes(data[i * BLOCK : i * BLOCK + 8])
            record = [float(value), self.time, float("inf"), False]
            self.history[first + i].writes.append(record)
            records.append(record)
        return records

    def submit(self) -> None:
        op = self.random.choice([READ, WRITE, WRITE, FLUSH, WRITE_ZEROES])
        long = self.pauses and op != FLUSH and not self.random.randrange(3)
        first = self.random.randrange(self.blocks)
        n_blocks = self.random.randrange(1, min(3, self.blocks - first) + 1)
        started = self.time
        self.open_requests += 1
        if op == FLUSH:
            flush = Request(FLUSH, 0, 0, [], lambda r: self.flushed(r, started))
            self.open[flush] = [], None, bytearray()
            self.link.submit(flush)
            self.end_turn()
            return
        data = bytearray(n_blocks * BLOCK)
        records = self.change(op, first, data) if op != READ else []
        flags = FUA if op != READ and not self.random.randrange(6) else 0

        def done(request: Request) -> None:
            self.has_ended(request)
            for record in records:
                # With an error it may have been executed, or may still be if that was not told by
                # the server; but whatever comes from now on comes after it.
                record[2] = self.time
                record[3] = not request.error
            if flags & FUA and self.flushes_fail and request.error:
                return
            if (self.hangs_up or self.gives_up) and request.error == errno.EIO:
                self.failed_for_it += 1
                return
            assert request.error == 0, f"seed {self.seed}: {request}"
            for i in range(n_blocks if flags & FUA else 0):
                found = self.stable[first + i]
                allowed = self.history[first + i].allowed(started, self.time)
                assert found in allowed, f"seed {self.seed}: FUA, block {first + i} holds {found}"
            if op == READ and not (self.crashes or self.flushes_fail):
                for i in range(n_blocks):
                    value = float(int.from_bytes(data[i * BLOCK : i * BLOCK + 8]))
                    allowed = self.history[first + i].allowed(started, self.time)
                    assert value in allowed, f"seed {self.seed}: block {first + i} read {value}"

        buffers = [memoryview(data)] if op != WRITE_ZEROES else []
        request = Request(op, first * BLOCK, len(data), buffers, done, flags)
        self.open[request] = records, None, data
        if long:
            epoch = (lambda: self.link.durability.epoch) if op != READ else None
            job = Job(self.lane, request, self.pieces(request), epoch)
            self.open[request] = records, job, data
            self.lane.enter(job)
        else:
            self.link.submit(request)
        self.end_turn()

    def pieces(self, request: Request) -> Iterator[tuple[int, Request]]:
        """Of one block each, as `virtio.blk` makes them; two of them in a turn."""
        for at in range(0, request.length, BLOCK):
            buffers = [request.buffers[0][at : at + BLOCK]] if request.buffers else []
            piece = Request(request.op, request.offset + at, BLOCK, buffers, finish, request.flags)
            yield TURN_BYTES // 2, piece

    def has_ended(self, request: Request) -> None:
        assert request not in self.ended, f"seed {self.seed}: {request} ended twice"
        self.ended.add(request)
        self.open_requests -= 1
        del self.open[request]

    def pause(self) -> None:
        """A ring stops: what is in flight is abandoned, as the engine does it."""
        chosen = [request for request in self.open if self.random.randrange(2)]
        scratch = memoryview(bytearray(4 * BLOCK))
        for request in chosen:
            records, job, data = self.open.pop(request)
            self.open_requests -= 1
            self.left_alone.append((request, data, bytes(data)))
            for record in records:
                record[2] = self.time
            request.abandon(self.abandoned_ended, scratch)
            if job is not None:
                job.abandon(scratch)
        self.link.abandon()
        deliver()

    def abandoned_ended(self, request: Request) -> None:
        assert request not in self.ended, f"seed {self.seed}: {request} ended twice"
        self.ended.add(request)

    def flushed(self, request: Request, started: float) -> None:
        self.has_ended(request)
        if request.error:
            # The guest knows now: what was completed before is no longer promised.
            blamed = self.crashes or self.flushes_fail or self.hangs_up or not self.proves
            blamed = blamed or self.gives_up
            assert blamed, f"seed {self.seed}: flush failed, no crash"
            self.flush_failed_at = max(self.flush_failed_at, started)
            return
        for block, history in enumerate(self.history):
            last = max((c for _, _, c, d in history.writes if c < started and d), default=0.0)
            if last <= self.flush_failed_at and self.flush_failed_at >= 0:
                continue
            allowed = history.allowed(started, self.time)
            # A crash that was told of may have brought an older value back under a newer one.
            assert self.stable[block] in allowed, (
                f"seed {self.seed}: flush said yes, block {block} holds {self.stable[block]}, "
                f"allowed {allowed}"
            )

    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.time += self.random.uniform(0.001, 0.2)
            self.stale_writes()
            self.link.tick(self.time)
            self.end_turn()
            if self.pauses and not self.random.randrange(25):
                self.pause()
            what = self.random.randrange(100)
            if what < 35 and self.open_requests < 12:
                self.submit()
            elif what < 94:
                self.answer_one()
            elif self.channels:
                self.lose()
            elif not self.channels:
                self.up()
        deliver()
        self.long_turns = False
        if self.pauses and not self.random.randrange(4):
            self.stop()
            return
        if not self.channels:
            self.up()
        for _ in range(2000):
            self.time += 0.05
            self.stale_writes()
            self.link.tick(self.time)
            self.end_turn()
            self.answer_one()
            if not (self.link.in_flight or self.open_requests):
                break
        assert not self.open_requests, f"seed {self.seed}: {self.open_requests} never finished"
        self.check_end()

    def stop(self) -> None:
        """The process stops, whatever is under way."""
        self.gives_up = True
        self.link.leaving()
        unanswered = [request for channel in self.channels for request in channel.pending]
        self.link.closed(sorted(unanswered, key=lambda request: request.cookie))
        deliver()
        assert not self.open_requests, f"seed {self.seed}: {self.open_requests} never finished"
        self.check_end()

    def check_end(self) -> None:
        assert self.link.in_flight == 0
        assert self.lane.in_flight_bytes == 0
        assert not self.link._changes._outlived
        assert not self.link._changes._overlaps.waiting_count
        for request, data, before in self.left_alone:
            assert request in self.ended, f"seed {self.seed}: abandoned {request} never ended"
            assert data == before, f"seed {self.seed}: {request} after it was abandoned"


class PausedGuest(Simulation):
    """The same with a guest whose ring stops now and then with requests in flight, which are left
    in an in-flight region and executed again, oldest first, when it runs on."""

    def __init__(self, seed: int, *, volatile: bool, **more: bool) -> None:
        super().__init__(seed, volatile=volatile, **more)
        self.running: dict[Request, Callable[[Request], None]] = {}
        self.left: list[tuple[Request, bytearray, bytes]] = []
        self.submitting = self.link.submit
        self.link.submit = self.start  # type: ignore[method-assign]

    def start(self, request: Request) -> None:
        done = request.done

        def finished(request: Request) -> None:
            del self.running[request]
            done(request)

        request.done = finished
        self.running[request] = done
        self.submitting(request)

    def pause(self) -> None:
        deliver()
        scratch = memoryview(bytearray(3 * BLOCK))
        for old, done in self.running.items():
            data = old.buffers[0].obj if old.buffers else bytearray()
            assert isinstance(data, bytearray)
            flags = old.flags | (REPEATED if old.op == FLUSH else 0)
            again = Request(old.op, old.offset, old.length, list(old.buffers), done, flags)
            self.open[again] = self.open.pop(old)
            self.left.append((again, data, bytes(data)))
            old.abandon(lambda request: None, scratch)
        self.running.clear()
        self.link.abandon()
        self.end_turn()

    def resume(self) -> None:
        left, self.left = self.left, []
        for request, data, before in left:
            assert data == before, f"seed {self.seed}: the guest's memory was written"
            self.start(request)

    def answer_one(self) -> None:
        if self.left:
            if not self.random.randrange(8):
                self.resume()
        elif not self.random.randrange(40):
            self.pause()
        super().answer_one()

    def submit(self) -> None:
        if not self.left:
            super().submit()


@pytest.mark.slow
@pytest.mark.parametrize("volatile", [False, True], ids=["keeps", "loses"])
@pytest.mark.parametrize("batch", range(2))
def test_simulated_guest_that_is_paused_at_any_moment_every_value_is_explained(
    batch: int, volatile: bool
) -> None:
    for seed in range(batch * 100, batch * 100 + 60):
        PausedGuest(seed, volatile=volatile).run(400)
        PausedGuest(seed, volatile=volatile, long_turns=True).run(400)
    for seed in range(3000 + batch * 200, 3100 + batch * 200):
        PausedGuest(seed, volatile=volatile, long_turns=True, flushes_fail=True).run(200)
        PausedGuest(seed, volatile=volatile, long_turns=True, hangs_up=True).run(400)


@pytest.mark.parametrize("volatile", [False, True], ids=["keeps", "loses"])
@pytest.mark.parametrize("batch", range(4))
def test_simulated_server_dying_at_any_moment_every_value_is_explained(
    batch: int, volatile: bool
) -> None:
    for seed in range(batch * 100, batch * 100 + 60):
        Simulation(seed, volatile=volatile).run(400)
        Simulation(seed, volatile=volatile, long_turns=True).run(400)


@pytest.mark.parametrize("volatile", [False, True], ids=["keeps", "loses"])
@pytest.mark.parametrize("batch", range(4))
def test_simulated_server_that_fails_to_flush_every_flush_is_true(
    batch: int, volatile: bool
) -> None:
    for seed in range(batch * 100, batch * 100 + 60):
        Simulation(seed, volatile=volatile, flushes_fail=True).run(400)
        Simulation(seed, volatile=volatile, flushes_fail=True, long_turns=True).run(400)


@pytest.mark.parametrize("volatile", [False, True], ids=["keeps", "loses"])
def test_simulated_server_that_hangs_up_every_value_is_explained(volatile: bool) -> None:
    failed = 0
    for seed in range(1000, 1150):
        simulation = Simulation(seed, volatile=volatile, hangs_up=True)
        simulation.run(400)
        failed += simulation.failed_for_it
    assert failed > 20  # Trials were held, and verdicts given.


@pytest.mark.parametrize("volatile", [False, True], ids=["keeps", "loses"])
@pytest.mark.parametrize("batch", range(2))
def test_simulated_guest_that_pauses_while_everything_else_fails_too(
    batch: int, volatile: bool
) -> None:
    """Requests are abandoned on trial, between epochs, in their lanes, with no connection."""
    for seed in range(batch * 100, batch * 100 + 60):
        options = Random(seed)
        Simulation(
            seed,
            volatile=volatile,
            pauses=True,
            flushes_fail=bool(options.randrange(2)),
            hangs_up=bool(options.randrange(2)),
            gives_up=not options.randrange(3),
        ).run(400)


def test_connections_may_be_replaced_only_if_nothing_acknowledged_can_be_lost() -> None:
    world = World()
    assert world.link.can_be_moved
    # In flight, and then answered, but not flushed.
    world.ask(WRITE)
    assert not world.link.can_be_moved
    world.channels[0].answer_all()
    assert not world.link.can_be_moved
    world.ask(FLUSH)
    world.channels[0].answer_all()
    assert world.link.can_be_moved
    # A read harms nothing: it is sent again.
    world.ask(READ)
    assert world.link.can_be_moved


def test_connections_to_a_server_that_says_who_it_is_may_be_replaced_at_any_time() -> None:
    world = World(description="instance=one")
    world.ask(WRITE)
    assert world.link.can_be_moved

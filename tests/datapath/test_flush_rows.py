"""A guest's flush that is a row: what it vouches for, and when it is one no more."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from errno import EIO

import pytest

from bridge.datapath.cells import CAN_FLUSH, FLUSH_ROW
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.server.flushes import Flushes
from bridge.spec import nbd as p
from bridge.spec.virtio_blk import S_IOERR, S_OK, T_FLUSH, T_OUT
from tests.datapath.engines import engine
from tests.datapath.socket_twins import (
    AVAIL,
    HEADERS,
    HIGH,
    ROOM_BYTES,
    SIZE,
    STATUSES,
    STRIDE,
    TABLES,
    Twin,
)

UNWRITTEN = 0xEE


class Guest:
    """A guest of a disk without a cache, and a server that answers when it is told to."""

    def __init__(self, name: str, *, turns: bool, usual: bool = True) -> None:
        self.twin = Twin(
            usual=usual,
            slots=0,
            tracked=True,
            structured=True,
            event_idx=True,
            engine=engine(name),
            turns=turns,
        )
        self.server = self.twin.server

    def send(self, slot: int, type_: int) -> None:
        """A write of 4 KiB or a flush."""
        low = self.twin.low
        low[HEADERS + 16 * slot : HEADERS + 16 * slot + 16] = struct.pack(
            "<IIQ", type_, 0, 8 * slot
        )
        low[STATUSES + slot] = UNWRITTEN
        links = [(HEADERS + 16 * slot, 16, 1), (STATUSES + slot, 1, 2)]
        if type_ == T_OUT:
            links.insert(1, (HIGH + ROOM_BYTES * slot, 4096, 1))
        table = b"".join(struct.pack("=QIHH", *link, index + 1) for index, link in enumerate(links))
        at, head = TABLES + 0x100 * slot, STRIDE * slot
        low[at : at + len(table)] = table
        low[16 * head : 16 * head + 16] = struct.pack("=QIHH", at, len(table), 4, 0)
        halves = low[AVAIL : AVAIL + 6 + 2 * SIZE].cast("H")
        halves[2 + halves[1] % SIZE] = head
        halves[1] += 1

    def turn(self) -> list[int]:
        """Two turns, and what the server gets meanwhile: the kinds of commands without answers."""
        self.twin.turn()
        self.server.receive()
        return [kind for kind, *_ in self.server.commands]

    def answer(self, kind: int, how: str = "whole") -> None:
        """Answer the oldest command of that kind, and look what comes of it."""
        kinds = [each for each, *_ in self.server.commands]
        self.server.answer(kinds.index(kind), how)
        self.server.send(1 << 20)
        self.turn()

    def write(self, slot: int) -> None:
        """A write, from beginning to end."""
        self.send(slot, T_OUT)
        self.turn()
        self.answer(p.CMD_WRITE)
        assert self.status(slot) == S_OK

    def flush(self, slot: int) -> int:
        """A flush, from beginning to end: its status."""
        self.send(slot, T_FLUSH)
        if p.CMD_FLUSH in self.turn():
            self.answer(p.CMD_FLUSH)
        return self.status(slot)

    def status(self, slot: int) -> int:
        return self.twin.low[STATUSES + slot]

    def write_through(self) -> None:
        """The guest turns its write cache off."""
        self.twin.config.write(32, b"\0")
        self.twin.engine.writeback_changed()

    @property
    def has_row(self) -> bool:
        return self.twin.connection.transmission.cells[FLUSH_ROW] != 0

    @property
    def unflushed(self) -> bool:
        session = self.twin.session
        return session.durability.unflushed(session._channels.answered)

    @property
    def punted(self) -> int:
        """Flushes that went the general way."""
        assert self.twin.ring is not None
        return self.twin.ring.general["flush"]


@pytest.fixture(params=["pure", "compiled", "compiled turns"])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    is_pure = request.param == "pure"
    guest = Guest(PURE if is_pure else COMPILED, turns=request.param == "compiled turns")
    yield guest
    guest.twin.close()


def test_flush_completes_when_the_server_has_answered_and_everything_is_durable_then(
    guest: Guest,
) -> None:
    guest.write(0)
    assert guest.unflushed
    guest.send(1, T_FLUSH)
    assert guest.turn() == [p.CMD_FLUSH]
    assert guest.has_row
    assert guest.status(1) == UNWRITTEN
    assert guest.unflushed
    assert not guest.twin.disk.is_durable
    guest.answer(p.CMD_FLUSH)
    assert guest.twin.used() == [(0, 1), (STRIDE, 1)]
    assert guest.status(1) == S_OK
    assert not guest.unflushed
    assert guest.twin.disk.is_durable
    assert guest.twin.disk.flush_deadline_s is None
    assert guest.twin.disk.flush_times.count == 1
    assert guest.punted == 0
    assert not guest.twin.rows.adopted_total


def test_write_that_was_in_flight_with_a_flush_is_not_covered_by_it(guest: Guest) -> None:
    guest.write(0)
    guest.send(1, T_OUT)
    guest.send(2, T_FLUSH)
    assert sorted(guest.turn()) == [p.CMD_WRITE, p.CMD_FLUSH]
    guest.answer(p.CMD_FLUSH)
    assert guest.status(2) == S_OK
    assert not guest.twin.disk.is_durable
    assert guest.twin.disk.flush_deadline_s is not None
    guest.answer(p.CMD_WRITE)
    assert guest.unflushed


def a_later_write_is_lost(guest: Guest) -> None:
    """It was answered between a flush and the answer to that."""
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.send(2, T_OUT)
    guest.turn()
    guest.answer(p.CMD_WRITE)
    guest.answer(p.CMD_FLUSH)
    assert guest.status(1) == S_OK
    guest.twin.lose()
    guest.twin.settle_loss()
    assert guest.flush(3) == S_IOERR
    assert guest.flush(4) == S_OK


def test_write_that_was_answered_before_the_flush_but_after_it_was_sent_is_not_covered(
    guest: Guest,
) -> None:
    a_later_write_is_lost(guest)


def test_flush_that_the_server_fails_is_told_of_and_the_next_one_is_true(guest: Guest) -> None:
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.answer(p.CMD_FLUSH, "error")
    assert guest.status(1) == S_IOERR
    assert not guest.twin.session.durability.unreported
    assert guest.flush(2) == S_OK


def a_durable_write_fails(guest: Guest) -> None:
    """Which was sent after a flush, and answered after it; the server may have executed it before,
    and dropped what it had."""
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.write_through()
    guest.send(2, T_OUT)
    guest.turn()
    guest.answer(p.CMD_FLUSH)
    assert guest.status(1) == UNWRITTEN
    guest.answer(p.CMD_WRITE, "error")
    assert guest.status(1) == S_IOERR
    assert guest.status(2) == S_IOERR


def test_flush_is_not_believed_before_the_durable_writes_of_its_time_are_answered(
    guest: Guest,
) -> None:
    a_durable_write_fails(guest)
    assert guest.twin.rows.adopted_total == 1


def a_durable_write_is_in_flight(guest: Guest) -> None:
    guest.write(0)
    guest.write_through()
    guest.send(1, T_OUT)
    guest.turn()
    guest.send(2, T_FLUSH)
    guest.turn()
    assert not guest.has_row
    guest.answer(p.CMD_FLUSH)
    assert guest.status(2) == UNWRITTEN
    guest.answer(p.CMD_WRITE)
    assert guest.status(2) == S_OK


def test_no_flush_is_a_row_while_a_durable_write_is_in_flight(guest: Guest) -> None:
    a_durable_write_is_in_flight(guest)


@pytest.mark.parametrize("usual", [False, True])
def test_flush_does_not_wait_for_a_durable_write_that_was_sent_after_its_answer_had_come(
    usual: bool,
) -> None:
    guest = Guest(PURE, turns=False, usual=usual)
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.write_through()
    guest.send(2, T_OUT)
    guest.answer(p.CMD_FLUSH)  # It is read before the ring is looked at.
    assert (guest.status(1), guest.status(2)) == (S_OK, UNWRITTEN)
    guest.twin.close()


def a_loss_is_to_be_told(guest: Guest) -> None:
    guest.write(0)
    guest.twin.lose()
    guest.twin.settle_loss()
    assert guest.flush(1) == S_IOERR
    assert guest.flush(2) == S_OK


def test_loss_is_told_by_the_next_flush_once(guest: Guest) -> None:
    a_loss_is_to_be_told(guest)
    assert guest.punted == 1


def test_flush_that_is_in_flight_when_the_server_loses_what_it_covers_fails(guest: Guest) -> None:
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    assert guest.has_row
    guest.twin.lose()
    guest.twin.settle_loss()
    guest.turn()
    assert guest.status(1) == S_IOERR
    assert guest.flush(2) == S_OK


def test_flush_that_is_in_flight_when_the_disk_hears_of_a_loss_fails(guest: Guest) -> None:
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.twin.disk.tell(EIO)
    guest.answer(p.CMD_FLUSH)
    assert guest.status(1) == S_IOERR
    assert guest.flush(2) == S_OK


def test_flush_does_not_cover_what_is_heard_of_only_after_it_was_sent(guest: Guest) -> None:
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.twin.session.expect_unflushed()
    guest.answer(p.CMD_FLUSH)
    assert guest.status(1) == S_OK
    assert guest.unflushed


def test_flush_waits_for_the_one_before_it(guest: Guest) -> None:
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.write(0)
    guest.send(2, T_FLUSH)
    assert guest.turn() == [p.CMD_FLUSH]
    guest.answer(p.CMD_FLUSH)
    assert (guest.status(1), guest.status(2)) == (S_OK, UNWRITTEN)
    assert guest.unflushed
    assert guest.turn() == [p.CMD_FLUSH]
    guest.answer(p.CMD_FLUSH)
    assert guest.status(2) == S_OK
    assert not guest.unflushed


def test_flushes_of_one_turn_share_a_command(guest: Guest) -> None:
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.send(2, T_FLUSH)
    assert guest.turn() == [p.CMD_FLUSH]
    guest.answer(p.CMD_FLUSH)
    assert (guest.status(1), guest.status(2)) == (S_OK, S_OK)
    assert guest.turn() == []
    assert guest.twin.disk.is_durable


def test_flush_of_the_timer_waits_for_a_row_and_the_next_guests_flush_for_both(
    guest: Guest,
) -> None:
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.write(0)
    guest.twin.disk.flush_now()
    assert guest.turn() == [p.CMD_FLUSH]
    guest.answer(p.CMD_FLUSH)
    assert guest.turn() == [p.CMD_FLUSH]
    guest.send(2, T_FLUSH)
    guest.turn()
    assert not guest.has_row
    guest.answer(p.CMD_FLUSH)
    guest.answer(p.CMD_FLUSH)
    assert guest.status(2) == S_OK


def test_flush_that_was_left_in_its_ring_is_no_row(guest: Guest) -> None:
    """What its guest had seen is not known."""
    ring = guest.twin.ring
    assert ring is not None
    ring.pause()
    guest.send(1, T_FLUSH)
    guest.turn()
    ring.unpause()
    guest.turn()
    assert not guest.has_row
    guest.answer(p.CMD_FLUSH)
    assert (guest.status(1), guest.punted) == (S_OK, 1)


def test_flush_of_a_ring_that_stops_is_executed_when_it_goes_on(guest: Guest) -> None:
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    guest.twin.stop()
    guest.answer(p.CMD_FLUSH)
    assert guest.status(1) == UNWRITTEN
    guest.twin.start()
    assert guest.turn() == [p.CMD_FLUSH]
    guest.answer(p.CMD_FLUSH)
    assert guest.status(1) == S_OK


def test_disk_that_cannot_flush_leaves_it_to_the_general_path(guest: Guest) -> None:
    guest.twin.engine.limits[CAN_FLUSH] = 0
    guest.send(1, T_FLUSH)
    guest.turn()
    assert guest.punted == 1


# Bugs, put in on purpose: each costs a guest what it had flushed, or a word about that.


def covers_everything(patch: pytest.MonkeyPatch) -> None:
    """A flush makes durable what was answered when it is answered."""

    def row_succeeded(self: Flushes, covers: int) -> None:
        self.durability.flushed(self._channels.answered, self._flushing_epoch)
        self._turn.want()

    patch.setattr(Flushes, "row_succeeded", row_succeeded)


def durable_changes_pass(patch: pytest.MonkeyPatch) -> None:
    """A row stays one when a durable change is sent."""
    patch.setattr(Flushes, "durable_change_begins", lambda self: None)
    patch.setattr(Flushes, "durable_change_ends", lambda self: None)


def losses_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    """A flush may be a row whatever is unreported."""

    def may_be_row(self: Flushes) -> bool:
        self._flushing_epoch = self.durability.epoch
        return True

    patch.setattr(Flushes, "may_be_row", may_be_row)


@pytest.mark.parametrize(
    ("bug", "scenario"),
    [
        (covers_everything, a_later_write_is_lost),
        (durable_changes_pass, a_durable_write_fails),
        (durable_changes_pass, a_durable_write_is_in_flight),
        (losses_are_forgotten, a_loss_is_to_be_told),
    ],
)
def test_bug_that_was_put_in_is_found(
    bug: Callable[[pytest.MonkeyPatch], None],
    scenario: Callable[[Guest], None],
    guest: Guest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        scenario(guest)


def test_server_that_says_nothing_is_seen_though_all_that_it_owes_are_rows(guest: Guest) -> None:
    stalled = guest.twin.connection.stalled
    guest.write(0)
    guest.send(1, T_OUT)
    guest.turn()
    assert not stalled(0.0, 60.0)
    assert not stalled(60.0, 60.0)
    assert stalled(61.0, 60.0)
    assert guest.twin.rows.adopted_total == 0


def test_flush_that_is_a_row_may_take_as_long_as_any_other(guest: Guest) -> None:
    stalled = guest.twin.connection.stalled
    guest.write(0)
    guest.send(1, T_FLUSH)
    guest.turn()
    assert guest.has_row
    assert not stalled(0.0, 60.0)
    assert not stalled(61.0, 60.0)
    assert guest.has_row
    assert guest.turn() == [p.CMD_FLUSH, p.CMD_READ]
    guest.answer(p.CMD_READ)
    assert not stalled(70.0, 60.0)
    assert not stalled(159.0, 60.0)
    assert stalled(161.0, 60.0)


def test_flush_on_which_the_server_hangs_up_is_not_taken_for_an_answered_one(guest: Guest) -> None:
    """It has two numbers, if it waited for the end of its turn. A server that answers nothing is
    down, and no command is to be blamed for that."""
    twin = guest.twin
    guest.send(0, T_FLUSH)
    assert guest.turn() == [p.CMD_FLUSH]
    unanswered = twin.connection.transmission.unanswered()
    assert len(unanswered) == 1
    assert not twin.rows.some_answered(twin.commands_before, unanswered)
    assert twin.rows.some_answered(twin.commands_before, [])

"""Adjacent requests that are one command: what is merged, and what becomes of each member."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from itertools import pairwise

import pytest

from bridge.datapath.cells import (
    ALONE,
    FLUSH_ROW,
    MERGED_BYTES,
    ROWS,
    WHOLE_READ_BYTES,
    WHOLE_WRITE_BYTES,
)
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.datapath.merged import FIRST_PAUSE, LAST_PAUSE, Merged
from bridge.datapath.request import READ, WRITE
from bridge.server.transmission import STAGING_BYTES
from bridge.spec import nbd as p
from bridge.spec.virtio_blk import S_IOERR, S_OK, T_FLUSH, T_IN, T_OUT
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
BLOCK = 4096
EIO = 5


class Guest:
    """A guest of a disk without a cache, and a server that answers when it is told to. What is in
    slot n is written to or read from room n."""

    def __init__(self, name: str, *, turns: bool, structured: bool, tracked: bool = True) -> None:
        self.twin = Twin(
            usual=True,
            slots=0,
            tracked=tracked,
            structured=structured,
            event_idx=True,
            engine=engine(name),
            turns=turns,
        )
        self.server = self.twin.server
        self.server.expands = False

    def put(
        self, slot: int, type_: int, block: int, n_bytes: int = BLOCK, cuts: tuple[int, ...] = ()
    ) -> None:
        """Make a request for `n_bytes` from a block on available. Its data is cut there."""
        low = self.twin.low
        header = struct.pack("<IIQ", type_, 0, 8 * block)
        low[HEADERS + 16 * slot : HEADERS + 16 * slot + 16] = header
        low[STATUSES + slot] = UNWRITTEN
        links = [(HEADERS + 16 * slot, 16, 1)]
        if type_ != T_FLUSH:
            ends = (0, *cuts, n_bytes)
            room = HIGH + ROOM_BYTES * slot
            # (Where it goes on is not where it has ended.)
            links += [
                (room + start + 512 * at, end - start, 1 if type_ == T_OUT else 3)
                for at, (start, end) in enumerate(pairwise(ends))
            ]
        links.append((STATUSES + slot, 1, 2))
        table = b"".join(struct.pack("=QIHH", *link, index + 1) for index, link in enumerate(links))
        at, head = TABLES + 0x100 * slot, STRIDE * slot
        low[at : at + len(table)] = table
        low[16 * head : 16 * head + 16] = struct.pack("=QIHH", at, len(table), 4, 0)
        halves = low[AVAIL : AVAIL + 6 + 2 * SIZE].cast("H")
        halves[2 + halves[1] % SIZE] = head
        halves[1] += 1

    def data(self, slot: int, n_bytes: int = BLOCK, cuts: tuple[int, ...] = ()) -> bytes:
        room, ends = ROOM_BYTES * slot, (0, *cuts, n_bytes)
        return b"".join(
            bytes(self.twin.high[room + start + 512 * at : room + end + 512 * at])
            for at, (start, end) in enumerate(pairwise(ends))
        )

    def turn(self) -> list[tuple[int, int, int]]:
        """Two turns, and what the server gets meanwhile: type, block and length in blocks of the
        commands without an answer."""
        self.twin.turn()
        self.server.receive()
        return [
            (kind, offset // BLOCK, length // BLOCK)
            for kind, _, _, offset, length, _ in self.server.commands
        ]

    def answer(self, index: int = 0, how: str = "whole") -> list[tuple[int, int, int]]:
        """Answer a command, and look what comes of it."""
        self.server.answer(index, how)
        self.server.send(1 << 20)
        return self.turn()

    def statuses(self, count: int) -> list[int]:
        return [self.twin.low[STATUSES + slot] for slot in range(count)]

    def image(self, block: int, count: int = 1) -> bytes:
        return bytes(self.server.image[BLOCK * block : BLOCK * (block + count)])

    def put_row(self, type_: int, count: int = 4, block: int = 10) -> None:
        """Adjacent requests, in slots from 0 on."""
        for slot in range(count):
            self.put(slot, type_, block + slot)

    def cookie(self, index: int = 0) -> int:
        return self.server.commands[index][2]

    @property
    def merged(self) -> int:
        return self.twin.rows.merged_total

    def tracked(self, slot: int) -> int:
        """Whether the in-flight region says that the chain of a slot is in flight."""
        return self.twin.region[16 + 16 * STRIDE * slot]

    def lose(self) -> None:
        """The connection is lost, and there is a new one."""
        self.twin.lose()
        self.twin.settle_loss()


WAYS = ("pure", "compiled", "compiled turns")


def make(way: str, *, structured: bool = False, tracked: bool = True) -> Guest:
    name = PURE if way == "pure" else COMPILED
    return Guest(name, turns=way == "compiled turns", structured=structured, tracked=tracked)


@pytest.fixture(params=[(way, structured) for way in WAYS for structured in (False, True)])
def guest(request: pytest.FixtureRequest) -> Iterator[Guest]:
    way, structured = request.param
    guest = make(way, structured=structured)
    yield guest
    guest.twin.close()


def test_adjacent_reads_are_one_command_and_each_gets_its_own_data(guest: Guest) -> None:
    guest.put_row(T_IN)
    assert guest.turn() == [(p.CMD_READ, 10, 4)]
    assert guest.merged == 3
    assert [guest.tracked(slot) for slot in range(4)] == [1] * 4
    assert guest.answer() == []
    assert guest.statuses(4) == [S_OK] * 4
    assert [guest.data(slot) for slot in range(4)] == [guest.image(10 + n) for n in range(4)]
    assert guest.twin.used() == [(STRIDE * slot, BLOCK + 1) for slot in range(4)]
    assert [guest.tracked(slot) for slot in range(4)] == [0] * 4
    assert not guest.twin.rows.adopted_total


def test_adjacent_writes_are_one_command_with_the_data_in_order(guest: Guest) -> None:
    guest.put_row(T_OUT)
    assert guest.turn() == [(p.CMD_WRITE, 10, 4)]
    assert guest.image(10, 4) == b"".join(map(guest.data, range(4)))
    assert guest.statuses(4) == [UNWRITTEN] * 4
    assert guest.answer() == []
    assert guest.statuses(4) == [S_OK] * 4
    assert guest.twin.used() == [(STRIDE * slot, 1) for slot in range(4)]
    assert guest.twin.connection.unflushed == 4
    assert not guest.twin.rows.adopted_total


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_members_may_have_their_data_in_several_segments(guest: Guest, type_: int) -> None:
    cuts: list[tuple[int, ...]] = [(100, 101), (), (2048,)]
    for slot, cut in enumerate(cuts):
        guest.put(slot, type_, 10 + slot, cuts=cut)
    assert [length for _, _, length in guest.turn()] == [3]
    guest.answer()
    assert guest.statuses(3) == [S_OK] * 3
    found = b"".join(guest.data(slot, cuts=cut) for slot, cut in enumerate(cuts))
    assert found == guest.image(10, 3)
    assert not guest.twin.connection.transmission.cells[ROWS]


def test_members_answer_in_the_order_of_the_ring_whatever_their_heads_are(guest: Guest) -> None:
    for block, slot in enumerate((3, 0, 2, 1)):
        guest.put(slot, T_IN, 20 + block)
    assert guest.turn() == [(p.CMD_READ, 20, 4)]
    guest.answer()
    for block, slot in enumerate((3, 0, 2, 1)):
        assert guest.data(slot) == guest.image(20 + block)


@pytest.mark.parametrize(
    ("requests", "sent"),
    [
        pytest.param([(T_IN, 1), (T_IN, 3)], [(0, 1, 1), (0, 3, 1)], id="a gap"),
        pytest.param([(T_IN, 2), (T_IN, 1)], [(0, 2, 1), (0, 1, 1)], id="backwards"),
        pytest.param([(T_IN, 2), (T_IN, 2)], [(0, 2, 1), (0, 2, 1)], id="the same block"),
        pytest.param([(T_IN, 1), (T_OUT, 2)], [(0, 1, 1), (1, 2, 1)], id="another kind"),
        pytest.param(
            [(T_OUT, 1), (T_OUT, 2), (T_IN, 3), (T_IN, 4)], [(1, 1, 2), (0, 3, 2)], id="two pairs"
        ),
    ],
)
def test_only_what_goes_on_where_the_last_one_ended_is_merged(
    guest: Guest, requests: list[tuple[int, int]], sent: list[tuple[int, int, int]]
) -> None:
    for slot, (type_, block) in enumerate(requests):
        guest.put(slot, type_, block)
    assert guest.turn() == sent
    while guest.server.commands:
        guest.answer()
    assert guest.statuses(len(requests)) == [S_OK] * len(requests)


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_a_large_request_is_sent_by_itself(guest: Guest, type_: int) -> None:
    guest.put(0, type_, 1)
    guest.put(1, type_, 2, 9 * BLOCK)
    guest.put(2, type_, 11)
    assert guest.turn() == [(type_, 1, 1), (type_, 2, 9), (type_, 11, 1)]
    assert not guest.merged


@pytest.mark.parametrize(("type_", "cell"), [(T_IN, WHOLE_READ_BYTES), (T_OUT, WHOLE_WRITE_BYTES)])
def test_no_command_is_longer_than_the_server_takes(guest: Guest, type_: int, cell: int) -> None:
    guest.twin.session.route.cells[cell] = 3 * BLOCK
    guest.put_row(type_, 8)
    assert guest.turn() == [(type_, 10, 3), (type_, 13, 3), (type_, 16, 2)]


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_no_command_is_longer_than_the_bound(guest: Guest, type_: int) -> None:
    for slot in range(5):
        guest.put(slot, type_, 7 * slot, 7 * BLOCK)
    assert MERGED_BYTES == 32 * BLOCK
    assert guest.turn() == [(type_, 0, 28), (type_, 28, 7)]
    while guest.server.commands:
        guest.answer()
    assert guest.statuses(5) == [S_OK] * 5
    assert guest.data(4, 7 * BLOCK) == guest.image(28, 7)


def test_a_merged_reply_fits_into_the_staging_buffer() -> None:
    assert MERGED_BYTES + 64 <= STAGING_BYTES


def test_a_flush_in_between_ends_a_command_and_vouches_for_nothing_unanswered(
    guest: Guest,
) -> None:
    guest.put(0, T_OUT, 1)
    guest.put(1, T_OUT, 2)
    guest.put(2, T_FLUSH, 0)
    guest.put(3, T_OUT, 3)
    sent = guest.turn()
    assert sorted(sent) == [(p.CMD_WRITE, 1, 2), (p.CMD_WRITE, 3, 1), (p.CMD_FLUSH, 0, 0)]
    guest.answer(sent.index((p.CMD_FLUSH, 0, 0)))
    while guest.server.commands:
        guest.answer()
    assert guest.statuses(4) == [S_OK] * 4
    assert not guest.twin.disk.is_durable
    assert guest.twin.disk.flush_deadline_s is not None
    guest.put(4, T_FLUSH, 0)
    guest.turn()
    guest.answer()
    assert guest.twin.disk.is_durable
    assert not guest.twin.session.durability.unflushed(guest.twin.connection.unflushed)


def test_durable_writes_are_not_merged(guest: Guest) -> None:
    guest.twin.config.write(32, b"\0")
    guest.twin.engine.writeback_changed()
    guest.put_row(T_OUT, 3)
    assert guest.turn() == [(p.CMD_WRITE, 10 + n, 1) for n in range(3)]
    assert not guest.merged


# Errors.


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_an_error_fails_the_guilty_member_alone(guest: Guest, type_: int) -> None:
    guest.put_row(type_)
    guest.turn()
    sent = guest.answer(how="error")
    assert sent == [(type_, 10 + n, 1) for n in range(4)]
    assert guest.statuses(4) == [UNWRITTEN] * 4
    assert [guest.tracked(slot) for slot in range(4)] == [1] * 4
    guest.answer(2, how="error")
    for _ in range(3):
        guest.answer()
    assert guest.statuses(4) == [S_OK, S_OK, S_IOERR, S_OK]
    assert guest.twin.engine.errors == {(READ if type_ == T_IN else WRITE, EIO): 1}
    good = BLOCK + 1 if type_ == T_IN else 1
    bad = 0 if type_ == T_IN else 1
    used = [(STRIDE * slot, bad if slot == 2 else good) for slot in range(4)]
    assert guest.twin.used() == used
    if type_ == T_IN:
        for slot in (0, 1, 3):
            assert guest.data(slot) == guest.image(10 + slot)
    assert guest.twin.connection.unflushed == (0 if type_ == T_IN else 3)


def test_members_of_a_failed_write_are_not_sent_before_it_is_answered(guest: Guest) -> None:
    guest.put_row(T_OUT)
    assert guest.turn() == [(p.CMD_WRITE, 10, 4)]
    guest.twin.rows.adopt_all()
    assert guest.turn() == [(p.CMD_WRITE, 10, 4)]
    assert len(guest.answer(how="error")) == 4


def test_after_an_error_no_flush_calls_the_members_durable(guest: Guest) -> None:
    """The flush is in the turn that brings the error; the members go to the server after it."""
    guest.put_row(T_OUT)
    guest.turn()
    guest.server.answer(0, "error")
    guest.server.send(1 << 20)
    guest.put(5, T_FLUSH, 0)
    guest.turn()
    while guest.server.commands:
        guest.answer()
    assert guest.statuses(4) == [S_OK] * 4
    assert not guest.twin.disk.is_durable
    assert guest.twin.disk.flush_deadline_s is not None
    assert guest.twin.session.durability.unflushed(guest.twin.connection.unflushed)


# What is not usual while they are in flight.


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_adopted_members_are_one_pending_command_which_completes_each(
    guest: Guest, type_: int
) -> None:
    guest.put_row(type_)
    guest.put(4, type_, 30)
    guest.turn()
    before = guest.twin.connection.in_flight
    guest.twin.rows.adopt_all()
    pending = [*guest.twin.connection.transmission.pending.values()]
    assert [type(each) is Merged for each in pending] == [True, False]
    assert guest.twin.connection.in_flight == before == 5
    guest.answer()
    assert guest.statuses(5) == [S_OK] * 4 + [UNWRITTEN]
    guest.answer()
    assert guest.data(4) == guest.image(30)
    assert [guest.data(slot) for slot in range(4)] == [guest.image(10 + n) for n in range(4)]
    assert guest.twin.connection.unflushed == (0 if type_ == T_IN else 5)
    assert guest.twin.connection.in_flight == 0
    assert guest.twin.connection.transmission.long_reads == 0
    assert guest.twin.rows.cells[ALONE] == 0


@pytest.mark.parametrize("adopts", [False, True])
@pytest.mark.parametrize("first_bytes", [1, 16, 27, 28, 29, 5000, 8192, 8220, 20_000, 40_000])
def test_a_reply_may_come_in_any_pieces(guest: Guest, first_bytes: int, adopts: bool) -> None:
    for slot in range(5):
        guest.put(slot, T_IN, 2 * slot, 2 * BLOCK)
    guest.turn()
    guest.server.answer(0, "whole")
    guest.server.send(first_bytes)
    guest.turn()
    assert guest.statuses(5) == [UNWRITTEN] * 5
    if adopts:
        guest.twin.rows.adopt_all()
    guest.server.send(1 << 20)
    guest.turn()
    assert guest.statuses(5) == [S_OK] * 5
    assert b"".join(guest.data(slot, 2 * BLOCK) for slot in range(5)) == guest.image(0, 10)
    assert guest.twin.connection.transmission.long_reads == 0


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_a_lost_connection_leaves_each_member_to_the_next_one(guest: Guest, type_: int) -> None:
    guest.put(5, type_, 40)
    guest.put_row(type_)
    assert guest.turn() == [(type_, 40, 1), (type_, 10, 4)]
    guest.lose()
    assert guest.turn() == [(type_, 40, 1), *((type_, 10 + n, 1) for n in range(4))]
    guest.answer(2, how="error")
    for _ in range(4):
        guest.answer()
    assert guest.statuses(4) == [S_OK, S_IOERR, S_OK, S_OK]
    if type_ == T_IN:
        assert guest.data(3) == guest.image(13)


def test_a_connection_that_answered_nothing_has_not_answered(guest: Guest) -> None:
    """Else the time after which requests fail would begin anew with each."""
    guest.put_row(T_IN)
    guest.turn()
    transmission = guest.twin.connection.transmission
    guest.twin.lose()
    unanswered = transmission.unanswered()
    assert len(unanswered) == guest.twin.rows.commands - guest.twin.commands_before
    assert [each.offset // BLOCK for each in unanswered] == [10, 11, 12, 13]


def test_requests_that_the_server_refuses_when_it_shuts_down_go_to_the_next_one(
    guest: Guest,
) -> None:
    guest.put_row(T_OUT)
    guest.turn()
    guest.answer(how="shutdown")
    assert guest.statuses(4) == [UNWRITTEN] * 4
    guest.twin.settle_loss()
    assert guest.turn() == [(p.CMD_WRITE, 10 + n, 1) for n in range(4)]


def test_a_failed_flush_has_members_sent_once_more_when_they_are_answered(guest: Guest) -> None:
    guest.put(0, T_OUT, 1)
    guest.turn()
    guest.answer()
    guest.put_row(T_OUT)
    guest.put(5, T_FLUSH, 0)
    kinds = [kind for kind, _, _ in guest.turn()]
    sent = guest.answer(kinds.index(p.CMD_FLUSH), how="error")
    assert sent == [(p.CMD_WRITE, 10, 4)]
    assert guest.answer() == [(p.CMD_WRITE, 10 + n, 1) for n in range(4)]
    assert guest.statuses(4) == [UNWRITTEN] * 4
    for _ in range(4):
        guest.answer()
    assert guest.statuses(4) == [S_OK] * 4


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_a_stopped_ring_keeps_members_for_later(guest: Guest, type_: int) -> None:
    guest.put_row(type_)
    guest.turn()
    before = bytes(guest.twin.high)
    guest.twin.stop()
    guest.answer()
    assert guest.statuses(4) == [UNWRITTEN] * 4
    assert bytes(guest.twin.high) == before
    assert [guest.tracked(slot) for slot in range(4)] == [1] * 4
    guest.twin.start()
    assert guest.turn() == [(type_, 10 + n, 1) for n in range(4)]
    for _ in range(4):
        guest.answer()
    assert guest.statuses(4) == [S_OK] * 4
    assert guest.data(2) == guest.image(12)


@pytest.mark.parametrize("how", ["whole", "error"])
def test_members_of_a_stopped_ring_are_not_sent_again(guest: Guest, how: str) -> None:
    """Their buffers are not the bridge's any more; and what waits for the command goes on."""
    guest.put_row(T_OUT)
    guest.turn()
    guest.twin.stop()
    assert guest.twin.session._changes.must_enter
    assert guest.answer(how=how) == []
    assert not guest.twin.session._changes.must_enter


def test_a_lost_connection_forgets_members_of_a_stopped_ring(guest: Guest) -> None:
    guest.put_row(T_OUT)
    guest.turn()
    guest.twin.stop()
    guest.lose()
    assert guest.turn() == []
    assert not guest.twin.session._changes._outlived


@pytest.mark.parametrize("way", WAYS)
def test_without_a_region_members_of_a_stopped_ring_fail(way: str) -> None:
    guest = make(way, tracked=False)
    guest.put_row(T_OUT)
    guest.turn()
    guest.twin.stop()
    assert guest.statuses(4) == [S_IOERR] * 4
    guest.answer()
    assert guest.statuses(4) == [S_IOERR] * 4
    guest.twin.close()


def test_memory_that_goes_away_and_comes_back_takes_members_along(guest: Guest) -> None:
    guest.put_row(T_IN)
    guest.turn()
    ring = guest.twin.ring
    assert ring is not None
    assert ring.uses([each for each in guest.twin.memory.regions if each.guest_address == HIGH])
    ring.move(guest.twin.memory, guest.twin.areas)
    guest.answer()
    assert guest.statuses(4) == [S_OK] * 4


def test_what_members_write_is_marked_in_the_dirty_log(guest: Guest) -> None:
    guest.put_row(T_IN)
    guest.turn()
    guest.twin.log(True)
    guest.answer()
    assert guest.statuses(4) == [S_OK] * 4
    for slot in range(4):
        page = HIGH + ROOM_BYTES * slot >> 12
        assert guest.twin.log_bytes[page >> 3] >> (page & 7) & 1


# What a server says of them.


def test_a_reply_with_the_cookie_of_a_member_is_a_lie(guest: Guest) -> None:
    guest.put_row(T_OUT)
    guest.turn()
    rows = guest.twin.queue.cookies
    members = [cookie for cookie in rows if cookie and cookie != guest.cookie()]
    assert len(members) == 3
    guest.server.outgoing += p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, members[0])
    guest.server.send(1 << 20)
    guest.turn()
    assert [str(each) for each in guest.twin.lost] == [
        f"reply to cookie {members[0]}, which no command in flight has"
    ]
    assert guest.statuses(4) == [UNWRITTEN] * 4


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("more_bytes", "offset"), [(-BLOCK, 0), (BLOCK, 0), (0, BLOCK)])
def test_a_chunk_of_other_bytes_is_a_lie(way: str, more_bytes: int, offset: int) -> None:
    guest = make(way, structured=True)
    guest.put_row(T_IN)
    guest.turn()
    length = 4 * BLOCK + more_bytes
    header = p.STRUCTURED_REPLY_MAGIC, 1, p.REPLY_TYPE_OFFSET_DATA, guest.cookie(), length + 8
    guest.server.outgoing += p.CHUNK.pack(*header) + p.U64.pack(10 * BLOCK + offset)
    guest.server.outgoing += bytes(length)
    guest.server.send(1 << 20)
    guest.turn()
    assert len(guest.twin.lost) == 1
    assert guest.statuses(4) == [UNWRITTEN] * 4
    guest.twin.close()


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_answers_in_pieces_has_nothing_merged_for_a_while(way: str) -> None:
    guest = make(way, structured=True)
    guest.put_row(T_IN)
    guest.turn()
    guest.answer(how="chunks")
    assert guest.statuses(4) == [S_OK] * 4
    assert [guest.data(slot) for slot in range(4)] == [guest.image(10 + n) for n in range(4)]
    assert guest.twin.rows.cells[ALONE] == FIRST_PAUSE
    guest.put_row(T_IN)
    assert len(guest.turn()) == 4
    assert guest.twin.rows.cells[ALONE] == FIRST_PAUSE - 4
    while guest.server.commands:
        guest.answer()
    guest.twin.rows.cells[ALONE] = 2
    guest.put_row(T_IN)
    assert [length for _, _, length in guest.turn()] == [1, 1, 2]
    guest.answer(2, how="chunks")
    assert guest.twin.rows.cells[ALONE] == 2 * FIRST_PAUSE
    for _ in range(20):
        guest.twin.rows.merging_did_not_pay()
    assert guest.twin.rows.cells[ALONE] == LAST_PAUSE
    guest.twin.close()


def test_a_server_that_hangs_up_on_a_merged_command_gets_its_members_alone(guest: Guest) -> None:
    guest.put_row(T_OUT)
    guest.turn()
    assert guest.server.end is not None
    guest.server.end.close()
    guest.twin.turn()
    first = guest.twin.connection.blamed
    assert first is not None
    assert (first.offset, first.length) == (10 * BLOCK, BLOCK)
    assert guest.twin.rows.cells[ALONE] == FIRST_PAUSE
    guest.twin.settle_loss()
    assert guest.turn() == [(p.CMD_WRITE, 10 + n, 1) for n in range(4)]
    assert not guest.twin.connection.transmission.cells[FLUSH_ROW]

"""The usual case over several connections to one server, in either engine."""

from __future__ import annotations

import random
import socket
import struct
from itertools import pairwise

import pytest

from bridge.datapath.cells import MAX_SPANS, ROWS
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.datapath.loop import EPOLLIN, EPOLLOUT
from bridge.datapath.request import WRITE_ZEROES as ZEROES
from bridge.datapath.request import Request
from bridge.datapath.rows import in_order
from bridge.server.channels import Phase
from bridge.spec.nbd import CMD_FLUSH, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES
from tests.datapath.engines import engine
from tests.datapath.socket_twins import (
    HEADERS,
    ROOM_BYTES,
    STATUSES,
    STRIDE,
    TABLES,
    Server,
    Twin,
)
from tests.datapath.test_compiled import add, data

CONNECTIONS = 3
SLOTS = 16
LENGTH = 4096
READ, WRITE, FLUSH, WRITE_ZEROES = 0, 1, 4, 13
AREA = 0x10000
"""Of the disk: each slot has its own."""
SHARED = 0x8000
"""Where all slots write."""


class Several(Twin):
    """A data path with so many connections, each of which has a server for one image."""

    def connect(self) -> None:
        if not hasattr(self, "servers"):
            self.servers = [
                self.server,
                *(Server(self.server.structured) for _ in range(CONNECTIONS - 1)),
            ]
            for server in self.servers:
                server.image = self.server.image
                server.expands = False
        self.roomy = True
        self.lost: list[str] = []
        self.connections = [self.connection_to(server)[0] for server in self.servers]
        self.connection = self.connections[0]
        self.session.established(self.now, self.export, self.connections)
        self.loop.turn.end()

    def settle_loss(self) -> None:
        unanswered = []
        for connection in self.connections:
            connection.close()
            unanswered += connection.transmission.unanswered()
        if self.session.phase in (Phase.UP, Phase.LEAVING):
            self.session.lost(self.now, in_order(unanswered), stale_possible=False, answered=True)
        self.loop.turn.end()
        for server in self.servers:
            assert server.end is not None
            server.end.close()
        self.connect()

    def _look_at_socket(self) -> None:
        for fd, (callback, events) in list(self.loop.callbacks.items()):
            if fd in self.loop.callbacks:
                callback(events & EPOLLOUT | EPOLLIN)

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        for server in self.servers:
            assert server.end is not None
            server.end.close()
        self.loop.epoll.close()

    def rows_of(self) -> list[int]:
        """How many are in flight on each connection."""
        return [connection.transmission.cells[ROWS] for connection in self.connections]


def several(engine_name: str, *, structured: bool = True) -> Several:
    twin = Several(
        usual=True,
        slots=0,
        tracked=True,
        structured=structured,
        event_idx=True,
        engine=engine(engine_name),
        turns=engine_name == COMPILED,
    )
    twin.config.write(32, bytes([1]))
    twin.engine.writeback_changed()
    return twin


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
def test_requests_are_spread_over_the_connections(engine_name: str) -> None:
    twin = several(engine_name)
    for slot in range(SLOTS - 1):
        add(twin, slot, 0, LENGTH)
        if engine_name == PURE or slot == 7:
            twin.turn()  # One look at a ring is for one connection there.
    twin.turn()
    assert twin.rows_of() == ([5, 5, 5] if engine_name == PURE else [8, 7, 0])
    for server in twin.servers:
        server.receive()
        while server.commands:
            server.answer(0, "whole")
        server.send(1 << 30)
    twin.turn()
    assert [head for head, _ in twin.used()] == [STRIDE * slot for slot in range(SLOTS - 1)]
    assert twin.rows_of() == [0, 0, 0]
    for slot in range(SLOTS - 1):
        assert data(twin, slot, LENGTH) == twin.server.image[LENGTH * slot : LENGTH * (slot + 1)]
    assert not twin.rows.adopted_total
    twin.close()


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
def test_writes_stay_usual_while_a_watchdog_looks_at_the_connections(engine_name: str) -> None:
    """A look at what is unanswered would make requests of them, but not this one."""
    twin = several(engine_name)
    for slot in range(SLOTS - 1):
        add(twin, slot, 1, LENGTH)
        twin.turn()
        for server, connection in zip(twin.servers, twin.connections, strict=True):
            assert not connection.stalled(float(slot), 60.0)
            server.receive()
            if len(server.commands) > 1:
                server.answer(0, "whole")
                server.send(1 << 30)
    assert sum(twin.rows_of()) > 1
    assert not twin.rows.adopted_total
    assert twin.ring is not None
    assert not twin.ring.general
    twin.close()


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
def test_writes_that_overlap_do_not_pass_each_other(engine_name: str) -> None:
    """Rows, and a row and another request, whichever comes first."""
    twin = several(engine_name)
    twin.disk._arm_timer()  # Writes are usual in compiled turns.
    first, second, zeroes, third = b"1" * LENGTH, b"2" * 512, bytes(1024), b"3" * LENGTH

    _make_available(twin, 0, WRITE, SHARED, first)
    _make_available(twin, 1, WRITE, AREA, first)
    twin.turn()
    assert sorted(twin.rows_of()) in ([0, 0, 2], [0, 1, 1])
    _make_available(twin, 2, WRITE, SHARED + 512, second)
    twin.turn()
    # The two rows became requests, which hold their ranges; the third waits for one of them.
    assert twin.rows_of() == [0, 0, 0]
    assert _commands(twin) == [(SHARED, LENGTH), (AREA, LENGTH)]
    _make_available(twin, 3, WRITE_ZEROES, SHARED, zeroes)
    _make_available(twin, 4, WRITE, SHARED + 1024, third)
    for expected in ([(SHARED + 512, 512), (SHARED + 1024, LENGTH)], [(SHARED, 1024)], []):
        _serve(twin, random.Random(1), whole=True)
        twin.turn()
        assert sorted(_commands(twin)) == expected
    assert len(twin.used()) == 5
    assert twin.server.image[SHARED : SHARED + 1024 + LENGTH] == zeroes + third
    assert twin.session.route.spans[0] == 0
    # And all is as before.
    _make_available(twin, 5, WRITE, SHARED, first)
    twin.turn()
    assert sorted(twin.rows_of()) == [0, 0, 1]
    twin.close()


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
@pytest.mark.parametrize("is_first", [True, False])
def test_writes_stay_usual_beside_changes_that_they_do_not_overlap(
    engine_name: str, is_first: bool
) -> None:
    """Zeroes that the server has, and a write that waits for them; before rows or after some."""
    twin = several(engine_name)
    twin.disk._arm_timer()  # Writes are usual in compiled turns.
    zeroes, data, short = bytes(1024), b"1" * LENGTH, b"2" * 512
    if not is_first:
        _make_available(twin, 9, WRITE, AREA * 9, data)
    _make_available(twin, 0, WRITE_ZEROES, SHARED, zeroes)
    twin.turn()
    _make_available(twin, 1, WRITE, SHARED + 512, data)  # Waits for the zeroes.
    twin.turn()
    before = sum(twin.rows_of())
    assert before == (not is_first)
    for slot, offset in (2, AREA), (3, SHARED - 512), (4, SHARED + 512 + LENGTH):
        _make_available(twin, slot, WRITE, offset, short)
        twin.turn()
    assert sum(twin.rows_of()) == before + 3
    # That one would pass the write that waits: it waits, too.
    _make_available(twin, 5, WRITE, SHARED + LENGTH, short)
    twin.turn()
    assert sum(twin.rows_of()) == before + 3
    assert not twin.rows.adopted_total
    assert (SHARED + LENGTH, 512) not in _commands(twin)
    for expected in ([(SHARED + 512, LENGTH)], [(SHARED + LENGTH, 512)], []):
        _serve(twin, random.Random(1), whole=True)
        twin.turn()
        assert _commands(twin) == expected
    assert len(twin.used()) == 6 + before
    assert twin.server.image[SHARED + LENGTH : SHARED + LENGTH + 512] == short
    assert twin.session.route.spans[0] == 0
    twin.close()


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
def test_no_write_is_a_row_while_the_table_lacks_a_change(engine_name: str) -> None:
    twin = several(engine_name)
    twin.disk._arm_timer()
    ended: list[Request] = []
    for slot in range(3):
        _make_available(twin, slot, WRITE, AREA * slot, b"0" * 512)
        twin.turn()
    assert twin.rows_of() == [1, 1, 1]
    for number in range(MAX_SPANS):
        offset = 3 * AREA + 512 * number
        twin.session.submit(Request(ZEROES, offset, 512, [], ended.append))
    twin.turn()
    assert twin.rows_of() == [1, 1, 1]
    for server in twin.servers:  # The rows make room, of which nobody hears.
        server.receive()
        server.answer(0, "whole")
        server.send(1 << 30)
    twin.turn()
    last = 3 * AREA + 512 * (MAX_SPANS - 1)
    for slot, offset in (3, last), (4, 2 * AREA):
        _make_available(twin, slot, WRITE, offset, b"1" * 512)
        twin.turn()
        assert twin.rows_of() == [0, 0, 0]
    assert _commands(twin).count((last, 512)) == 1
    for server in twin.servers:
        server.answer(0, "whole")
        server.send(1 << 30)
    twin.turn()
    _make_available(twin, 5, WRITE, AREA, b"1" * 512)
    twin.turn()
    assert sorted(twin.rows_of()) == [0, 0, 1]
    _answer_all(twin)
    assert len(ended) == MAX_SPANS
    assert len(twin.used()) == 6
    assert twin.server.image[last : last + 512] == b"1" * 512
    assert twin.session.route.spans[0] == 0
    twin.close()


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
def test_flush_is_in_doubt_while_a_durable_write_is_in_flight_on_another_connection(
    engine_name: str,
) -> None:
    """The server failed to make the write durable, dropped what it had, and then had nothing to
    flush. From the connection of the write nothing came since it was sent."""
    twin = several(engine_name)
    _make_available(twin, 0, WRITE, 0, b"0" * LENGTH)
    _answer_all(twin)
    twin.config.write(32, bytes([0]))  # Writes are durable from here on.
    twin.engine.writeback_changed()
    _answer_all(twin)
    assert len(twin.used()) == 1
    for slot in range(1, 3):
        _make_available(twin, slot, WRITE, AREA * slot, b"1" * LENGTH)
    _make_available(twin, 3, FLUSH, 0, b"")
    twin.turn()
    for server in twin.servers:
        server.receive()
    (flushing,) = [
        server for server in twin.servers if any(each[0] == CMD_FLUSH for each in server.commands)
    ]
    while flushing.commands:
        flushing.answer(0, "whole")
    flushing.send(1 << 30)
    twin.turn()
    assert all(head != 3 * STRIDE for head, _ in twin.used())
    for server in twin.servers:
        while server.commands:
            server.answer(0, "error")
        server.send(1 << 30)
    twin.turn()
    _answer_all(twin)
    assert twin.low[STATUSES + 3] == 1
    twin.close()


def _answer_all(twin: Several) -> None:
    for _ in range(6):
        twin.turn()
        _serve(twin, random.Random(1), whole=True)
    twin.turn()


def _commands(twin: Several) -> list[tuple[int, int]]:
    """What the servers have, and did not answer: offsets and lengths."""
    for server in twin.servers:
        server.receive()
    return [(each[3], each[4]) for server in twin.servers for each in server.commands]


@pytest.mark.parametrize("structured", [True, False])
@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
@pytest.mark.parametrize("seed", range(6))
def test_every_request_is_answered_once_and_rightly(
    seed: int, engine_name: str, structured: bool
) -> None:
    """In any order, in any pieces, and when the connections are lost amid all of that. What
    overlaps, of rows and others, is done in the order in which it came."""
    twin = several(engine_name, structured=structured)
    rng = random.Random(seed)
    calm = seed % 3 == 0
    model = bytearray(twin.server.image)
    free = set(range(SLOTS))
    under_way: dict[int, tuple[int, int]] = {}
    """Slot → type and length."""
    taken = 0
    for _ in range(300):
        for slot in rng.sample(sorted(free), min(len(free), rng.choice([0, 1, 5, 16]))):
            # (Zeroes that are in flight when the connections are lost may be written once more.)
            weights = 50, 50, 2, 2 if calm else 0
            (type_,) = rng.choices((READ, WRITE, FLUSH, WRITE_ZEROES), weights)
            length = rng.choice([512, LENGTH, LENGTH, 0x7000])
            offset = AREA * slot
            if type_ == WRITE_ZEROES or (type_ == WRITE and rng.random() < 0.1):
                offset, length = SHARED + 512 * rng.randrange(8), rng.choice([512, LENGTH])
            sent = bytes(length) if type_ == WRITE_ZEROES else rng.randbytes(length)
            if type_ in (WRITE, WRITE_ZEROES):
                model[offset : offset + length] = sent
            _make_available(twin, slot, type_, offset, sent)
            free.remove(slot)
            under_way[slot] = type_, length
            taken += 1
        twin.turn()
        _assert_changes_are_apart(twin)
        if not calm and rng.random() < 0.05:
            server = rng.choice(twin.servers)
            assert server.end is not None
            server.end.shutdown(socket.SHUT_RDWR)
        _serve(twin, rng)
        twin.turn()
        for head, used_bytes in twin.used():
            slot = head // STRIDE
            type_, length = under_way.pop(slot)
            # After a loss a flush has to fail: the server may have lost what was not flushed.
            assert twin.low[STATUSES + slot] == 0 or (type_ == FLUSH and not calm)
            assert used_bytes == (1 if type_ != READ else length + 1)
            if type_ == READ:
                assert data(twin, slot, length) == model[AREA * slot : AREA * slot + length]
            free.add(slot)
        if not all(connection.alive for connection in twin.connections):
            twin.settle_loss()
    for _ in range(50):
        _serve(twin, rng, whole=True)
        twin.turn()
    assert len(twin.used()) == len(under_way)
    assert twin.server.image == model
    assert not any(twin.rows_of())
    usual = twin.disk.usual
    assert usual is not None
    if calm:
        assert usual.served > taken / 2
    twin.close()


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
@pytest.mark.parametrize("seed", range(4))
def test_changes_stay_apart_whatever_fails(seed: int, engine_name: str) -> None:
    """Writes that are merged, writes and zeroes that overlap, zeroes that are not the guest's;
    errors and lost connections amid all of that."""
    twin = several(engine_name)
    rng = random.Random(seed)
    free = set(range(SLOTS))
    for _ in range(150):
        at = SHARED + 512 * rng.randrange(64)
        for slot in sorted(rng.sample(sorted(free), min(len(free), rng.choice([0, 1, 5, 16])))):
            (type_,) = rng.choices((READ, WRITE, FLUSH, WRITE_ZEROES), (20, 60, 2, 4))
            length = rng.choice([512, LENGTH, LENGTH, 2 * LENGTH])
            goes_on = rng.random() < 0.6
            offset = at if goes_on else SHARED + 512 * rng.randrange(200)
            at += length if goes_on else 0
            sent = bytes(length) if type_ == WRITE_ZEROES else rng.randbytes(length)
            _make_available(twin, slot, type_, offset, sent)
            free.remove(slot)
        if rng.random() < 0.02:
            offset = 512 * rng.randrange(300)
            twin.session.submit(Request(ZEROES, offset, LENGTH, [], _ignore))
        twin.turn()
        _assert_changes_are_apart(twin)
        if rng.random() < 0.03:
            server = rng.choice(twin.servers)
            assert server.end is not None
            server.end.shutdown(socket.SHUT_RDWR)
        _serve(twin, rng, errors=0.05)
        twin.turn()
        _assert_changes_are_apart(twin)
        free |= {head // STRIDE for head, _ in twin.used()}
        if not all(connection.alive for connection in twin.connections):
            twin.settle_loss()
    for _ in range(50):
        _serve(twin, rng, whole=True)
        twin.turn()
        if not all(connection.alive for connection in twin.connections):
            twin.settle_loss()
    assert free | {head // STRIDE for head, _ in twin.used()} == set(range(SLOTS))
    assert not any(twin.rows_of())
    assert twin.session.in_flight == 0
    assert twin.session.route.spans[0] == 0
    usual = twin.disk.usual
    assert usual is not None
    assert usual.served > twin.rows.adopted_total > 0
    assert twin.rows.merged_total > 0
    twin.close()


def _ignore(request: Request) -> None: ...


@pytest.mark.parametrize("engine_name", [PURE, COMPILED])
def test_members_of_a_failed_write_give_up_their_ranges_and_are_done_one_by_one(
    engine_name: str,
) -> None:
    twin = several(engine_name)
    for slot in range(4):
        add(twin, slot, 1, LENGTH)
    twin.turn()
    merged = [server for server in twin.servers if (server.receive(), server.commands)[1]]
    assert [each[4] for each in merged[0].commands] == [4 * LENGTH]
    add(twin, 5, 1, LENGTH)
    at = HEADERS + 16 * 5 + 8
    twin.low[at : at + 8] = struct.pack("<Q", 2 * LENGTH // 512)  # Over one of them.
    merged[0].answer(0, "error")
    merged[0].send(1 << 30)
    twin.turn()
    for _ in range(6):
        for server in twin.servers:
            server.receive()
            for index, (_, _, _, offset, _, _) in reversed([*enumerate(server.commands)]):
                server.answer(index, "error" if offset == LENGTH else "whole")
            server.send(1 << 30)
        twin.turn()
    assert [head for head, _ in twin.used()] == [STRIDE * slot for slot in (0, 1, 2, 3, 5)]
    assert [twin.low[STATUSES + slot] for slot in (0, 1, 2, 3, 5)] == [0, 1, 0, 0, 0]
    assert twin.session._changes._overlaps.is_empty
    assert not any(twin.rows_of())
    twin.close()


def _make_available(twin: Several, slot: int, type_: int, offset: int, content: bytes) -> None:
    room = ROOM_BYTES * slot
    twin.high[room : room + len(content)] = content
    add(twin, slot, type_, 16 if type_ == WRITE_ZEROES else len(content))
    at = HEADERS + 16 * slot + 8
    twin.low[at : at + 8] = struct.pack("<Q", offset // 512)
    if type_ == WRITE_ZEROES:
        span = struct.pack("<QII", offset // 512, len(content) // 512, 0)
        twin.high[room : room + 16] = span
    elif type_ == FLUSH:
        at = TABLES + 0x100 * slot
        twin.low[at + 16 : at + 32] = struct.pack("=QIHH", STATUSES + slot, 1, 2, 0)
        twin.low[16 * STRIDE * slot + 8 : 16 * STRIDE * slot + 12] = struct.pack("=I", 32)


def _assert_changes_are_apart(twin: Several) -> None:
    """Of the changes that the servers have got and not answered no two overlap."""
    changes: list[tuple[int, int]] = []
    for server in twin.servers:
        server.receive()
        changes += [
            (offset, offset + length)
            for kind, _, _, offset, length, _ in server.commands
            if kind in (CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM)
        ]
    changes.sort()
    assert all(before[1] <= after[0] for before, after in pairwise(changes)), changes


def _serve(twin: Several, rng: random.Random, *, whole: bool = False, errors: float = 0) -> None:
    for server in rng.sample(twin.servers, len(twin.servers)):
        server.receive()
        while server.commands and (whole or rng.random() < 0.8):
            how = "error" if errors and rng.random() < errors else "whole"
            server.answer(rng.randrange(len(server.commands)), how)
        server.send(1 << 30 if whole else rng.choice([100, 5000, 40_000, 1 << 30, 1 << 30]))

"""Rows: which replies they take, and what becomes of them when something is not usual."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from bridge.datapath.cells import (
    CAPACITY_BYTES,
    DISK_CELLS,
    IN_FLIGHT,
    MAX_HEADS,
    MAX_QUEUES,
    MAY_WRITE,
    NUMBER,
    ROWS,
    SEQUENCE_MASK,
    STOPPED,
    Queue,
    cells,
    row_cookie,
    sequence_of,
)
from bridge.datapath.request import FLUSH, READ, WRITE, Request
from bridge.datapath.rows import Rows, sent_at
from bridge.datapath.turn import Turn
from bridge.errors import ProtocolError
from bridge.guest.virtio.split_queue import SplitQueue
from bridge.server.export import Export
from bridge.server.transmission import Transmission
from bridge.spec import nbd as p
from tests.datapath.loopback import Loopback
from tests.guest.virtio.mock import DEVICE_WRITES, UNWRITTEN, QueueRig

DISK_BYTES = 1 << 20


class Owner:
    """A ring: it makes the plainest request of a row."""

    def __init__(self) -> None:
        self.publications = 0

    def adopt(self, head: int, cookie: int, row: tuple[int, ...]) -> Request:
        return Request(row[8], row[0], row[3], [memoryview(bytearray(row[3]))], lambda _: None)

    def publish_later(self) -> None:
        self.publications += 1

    def finish(self, request: Request, error: int) -> None: ...

    def submit_alone(self, request: Request) -> None: ...


class World:
    """A ring, and a server that answers by hand."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.server = Loopback(self.turn, bytearray(DISK_BYTES))
        self.rows = self.server.rows
        self.transmission = self.server.transmission
        self.guest = QueueRig()
        queue = self.guest.queue
        assert isinstance(queue, SplitQueue)
        self.queue = queue
        self.owner = Owner()
        assert self.rows.enter(queue, self.owner)
        self.disk = cells(DISK_CELLS)
        self.disk[CAPACITY_BYTES], self.disk[MAY_WRITE] = DISK_BYTES, 1
        self.usual = self.server.usual

    def take(self, type_: int, sector: int = 0) -> tuple[int, int]:
        """One chain goes the usual way: its cookie, and where its status will be."""
        guest = self.guest
        header = guest.alloc(struct.pack("<IIQ", type_, 0, sector))
        data, status = guest.alloc(512), guest.alloc(1)
        way = 0 if type_ else DEVICE_WRITES
        guest.put((header, 16, 0), (data, 512, way), (status, 1, DEVICE_WRITES))
        self.transmission.output.clear()
        assert self.usual.take(self.queue, self.disk) == 1
        cookie: int = p.REQUEST.unpack(self.transmission.output[0])[3]
        return cookie, status

    def status(self, at: int) -> int:
        return self.guest.read(at, 1)[0]


def done(cookie: int, error: int = 0) -> bytes:
    return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, error, cookie)


def test_reply_to_a_row_writes_status_and_used_element_and_asks_for_one_publication() -> None:
    world = World()
    first, second = world.take(1), world.take(1, 8)
    world.server.receive(done(second[0]) + done(first[0]))
    assert [world.status(at) for _, at in (first, second)] == [0, 0]
    assert world.owner.publications == 1
    assert (world.queue.in_flight, world.transmission.in_flight) == (0, 0)
    assert world.transmission.unflushed == 2
    assert world.guest.driver.poll() == []
    assert world.queue.publish()
    assert world.guest.driver.poll() == [(2, 1), (1, 1)]


@pytest.mark.parametrize(
    "other",
    [
        pytest.param(lambda cookie: cookie + 1, id="a head that is not in flight"),
        pytest.param(lambda cookie: cookie + (1 << 18), id="a later command"),
        pytest.param(lambda cookie: cookie + (1 << 10), id="a queue that there is not"),
        pytest.param(lambda cookie: cookie + 1000, id="a head that there is not"),
        pytest.param(sequence_of, id="the same number, of no row"),
    ],
)
def test_cookie_that_names_no_row_in_flight_is_a_protocol_error(
    other: Callable[[int], int],
) -> None:
    world = World()
    cookie, status = world.take(1)
    with pytest.raises(ProtocolError, match="no command in flight has"):
        world.server.receive(done(other(cookie)))
    assert world.status(status) == UNWRITTEN
    assert [each.cookie for each in world.transmission.unanswered()] == [cookie]


def test_second_reply_to_a_row_is_a_protocol_error() -> None:
    world = World()
    cookie, _ = world.take(1)
    with pytest.raises(ProtocolError, match="no command in flight has"):
        world.server.receive(done(cookie) * 2)
    assert world.transmission.unflushed == 1
    assert world.queue.in_flight == 0


def test_cookie_of_the_same_head_before_is_a_protocol_error() -> None:
    world = World()
    old, _ = world.take(1)
    world.server.receive(done(old))
    world.queue.publish()
    world.guest.driver.poll()
    for _ in range(4):
        new, status = world.take(1)
        if (new ^ old) & MAX_HEADS - 1 == 0:
            break
        world.server.receive(done(new))
        world.queue.publish()
        world.guest.driver.poll()
    assert new != old
    with pytest.raises(ProtocolError, match="no command in flight has"):
        world.server.receive(done(old))
    assert world.status(status) == UNWRITTEN


def test_reply_on_another_connection_is_a_protocol_error() -> None:
    world = World()
    cookie, _ = world.take(1)
    other = Transmission(Export("", DISK_BYTES), world.turn, rows=world.rows)
    buffer = other.next_buffer()
    buffer[:16] = done(cookie)
    with pytest.raises(ProtocolError, match="no command in flight has"):
        other.bytes_received(16)
    assert len(world.transmission.pending) == 1


def test_rows_become_requests_among_the_others_in_the_order_of_sending() -> None:
    world = World()
    sent = [world.take(0)[0]]
    flush = Request(FLUSH, 0, 0, [], lambda _: None)
    world.transmission.start(flush)
    sent += [flush.cookie, world.take(1)[0], world.take(0, 16)[0]]
    assert world.transmission.in_flight == 4
    world.rows.adopt_all()
    assert list(world.transmission.pending) == sent
    assert [each.op for each in world.transmission.pending.values()] == [READ, FLUSH, WRITE, READ]
    assert world.transmission.cells[ROWS] == 0
    assert (world.transmission.in_flight, world.queue.cells[IN_FLIGHT]) == (4, 3)
    found = world.transmission.unanswered()
    assert sorted(found, key=sent_at) == found


def test_error_makes_requests_of_all_and_the_rest_goes_on() -> None:
    world = World()
    first, second, third = world.take(1), world.take(1, 8), world.take(1, 16)
    world.server.receive(done(first[0]) + done(second[0], 5) + done(third[0]))
    assert world.status(first[1]) == 0
    errors = [each.error for each in world.turn.finished]
    assert errors == [5, 0]
    assert world.rows.adopted_total == 2
    assert world.transmission.unflushed == 2


def test_reply_in_pieces_is_waited_for_as_a_row() -> None:
    world = World()
    cookie, status = world.take(0)
    reply = p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, 1, 1, cookie, 520) + p.U64.pack(0) + bytes(512)
    for at in range(0, len(reply), 7):
        assert world.status(status) == UNWRITTEN
        world.server.receive(reply[at : at + 7])
    assert world.status(status) == 0
    assert world.rows.adopted_total == 0


@pytest.mark.parametrize(
    ("offset", "length", "text"),
    [(512, 512, "at 512"), (0, 511, "less than"), (0, 513, "sent 513 bytes"), (1, 511, "less")],
)
def test_chunk_of_other_bytes_than_were_asked_is_not_an_answer(
    offset: int, length: int, text: str
) -> None:
    world = World()
    cookie, status = world.take(0)
    reply = p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8)
    with pytest.raises(ProtocolError, match=text):
        world.server.receive(reply + p.U64.pack(offset) + bytes(length))
    assert world.status(status) == UNWRITTEN
    assert len(world.transmission.pending) == 1


def test_whole_chunk_that_is_not_the_last_does_not_answer_yet() -> None:
    world = World()
    cookie, status = world.take(0)
    data = p.U64.pack(0) + bytes(512)
    world.server.receive(p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, 0, 1, cookie, 520) + data)
    assert world.status(status) == UNWRITTEN
    assert len(world.transmission.pending) == 1
    world.server.receive(p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, 1, 0, cookie, 0))
    assert [each.error for each in world.turn.finished] == [0]


def test_numbers_that_no_longer_fit_a_cookie_go_the_general_way() -> None:
    world = World()
    world.rows.cells[0] = SEQUENCE_MASK
    guest = world.guest
    header = guest.alloc(struct.pack("<IIQ", 1, 0, 0))
    guest.put((header, 16, 0), (guest.alloc(512), 512, 0), (guest.alloc(1), 1, DEVICE_WRITES))
    assert world.usual.take(world.queue, world.disk) == 0
    assert world.queue.cells[STOPPED]
    assert sequence_of(row_cookie(SEQUENCE_MASK, MAX_QUEUES - 1, MAX_HEADS - 1)) == SEQUENCE_MASK
    assert row_cookie(SEQUENCE_MASK, MAX_QUEUES - 1, MAX_HEADS - 1) == (1 << 64) - 1


def test_queue_that_has_no_name_in_a_cookie_takes_no_part() -> None:
    rows = Rows()
    assert not rows.enter(Queue(2 * MAX_HEADS), Owner())
    queues = [Queue(1) for _ in range(MAX_QUEUES)]
    assert all(rows.enter(queue, Owner()) for queue in queues)
    late = Queue(1)
    assert not rows.enter(late, Owner())
    rows.leave(queues[7])
    assert rows.enter(late, Owner())
    assert late.cells[NUMBER] == 7

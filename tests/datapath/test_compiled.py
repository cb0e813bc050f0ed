"""Compiled turns where something is not usual: sockets that are full, payloads in pieces, ends."""

from __future__ import annotations

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from importlib import import_module

import pytest

from bridge.datapath.cells import (
    BLOCK_MASK,
    CAPACITY_BYTES,
    DIRECT_LEFT,
    INDIRECT,
    LARGE_BYTES,
    LONG_READS,
    ROWS,
    WHOLE_WRITE_BYTES,
)
from bridge.datapath.cells import SIZE as SIZE_OF_RING
from bridge.datapath.engine_names import COMPILED
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
from tests.datapath.worlds import DISK_BYTES, GRANULE_SHIFT, GUEST, STUFF_AT, World

LENGTH = 0x10000
LARGE = 0x11000


@pytest.fixture(params=["simple", "structured"])
def twin(request: pytest.FixtureRequest) -> Iterator[Twin]:
    twin = Twin(
        usual=True,
        slots=0,
        tracked=True,
        structured=request.param == "structured",
        event_idx=True,
        engine=engine(COMPILED),
        turns=True,
    )
    yield twin
    twin.close()


def add(twin: Twin, slot: int, type_: int, length: int = LENGTH) -> None:
    """A chain of so many bytes, at as many bytes times `slot` of the disk."""
    halves = twin.low[AVAIL : AVAIL + 6 + 2 * SIZE].cast("H")
    sector = slot * length // 512
    twin.low[HEADERS + 16 * slot : HEADERS + 16 * slot + 16] = struct.pack("<IIQ", type_, 0, sector)
    twin.low[STATUSES + slot] = 0xEE
    way = 1 if type_ else 3
    table = struct.pack("=QIHH", HEADERS + 16 * slot, 16, 1, 1)
    table += struct.pack("=QIHH", HIGH + ROOM_BYTES * slot, length, way, 2)
    table += struct.pack("=QIHH", STATUSES + slot, 1, 2, 0)
    at = TABLES + 0x100 * slot
    twin.low[at : at + 48] = table
    twin.low[16 * STRIDE * slot : 16 * STRIDE * slot + 16] = struct.pack("=QIHH", at, 48, 4, 0)
    halves[2 + halves[1] % SIZE] = STRIDE * slot
    halves[1] += 1


def data(twin: Twin, slot: int, length: int = LENGTH) -> bytes:
    return bytes(twin.high[ROOM_BYTES * slot : ROOM_BYTES * slot + length])


def serve(twin: Twin) -> None:
    """The server answers all it has got."""
    twin.server.receive()
    while twin.server.commands:
        twin.server.answer(0, "whole")
    twin.server.send(1 << 30)


def answer_too_early(twin: Twin) -> None:
    """The server answers the first command, of which it has not taken more than the header."""
    end = twin.server.end
    assert end is not None
    cookie = struct.unpack_from(">Q", end.recv(28, socket.MSG_PEEK), 8)[0]
    end.send(struct.pack(">IIQ", 0x67446698, 0, cookie))


def lose_connection(twin: Twin) -> None:
    """With nothing answered; and there is a new one."""
    assert twin.server.end is not None
    twin.server.end.shutdown(socket.SHUT_RDWR)
    twin.turn()
    assert not twin.connection.alive
    assert twin.used() == []
    twin.settle_loss()


def make_volatile(twin: Twin) -> None:
    """From here on it is known that something is not durable: writes are usual."""
    add(twin, 0, 1)
    for _ in range(50):
        twin.turn()
        serve(twin)
    assert twin.used() == [(0, 1)]


def test_what_a_full_socket_does_not_take_is_sent_later_and_whole(twin: Twin) -> None:
    twin.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    make_volatile(twin)
    for slot in range(1, 8):
        add(twin, slot, 1)
    twin.turn()
    assert twin.connection.has_unsent
    for _ in range(500):
        twin.turn()
        serve(twin)
    assert twin.used() == [(STRIDE * slot, 1) for slot in range(1, 8)]
    for slot in range(8):
        assert twin.server.image[LENGTH * slot : LENGTH * (slot + 1)] == data(twin, slot)


def test_a_large_write_is_usual_and_counts_as_large_until_it_is_answered(twin: Twin) -> None:
    cells = twin.connection.transmission.cells
    make_volatile(twin)
    for slot in range(1, 4):
        add(twin, slot, 1, LARGE)
    twin.turn()
    assert cells[ROWS] == 3
    assert (cells[LARGE_BYTES], cells[LONG_READS]) == (3 * LARGE, 0)
    for _ in range(50):
        twin.turn()
        serve(twin)
    assert not twin.rows.adopted_total
    assert (cells[LARGE_BYTES], cells[LONG_READS]) == (0, 0)
    assert twin.used() == [(STRIDE * slot, 1) for slot in range(1, 4)]
    for slot in range(1, 4):
        assert twin.server.image[slot * LARGE : (slot + 1) * LARGE] == data(twin, slot, LARGE)


def test_a_large_write_whose_connection_is_lost_while_it_is_sent_is_sent_again(twin: Twin) -> None:
    make_volatile(twin)
    twin.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    add(twin, 1, 1, LARGE)
    twin.turn()
    assert twin.connection.has_unsent
    lose_connection(twin)
    for _ in range(50):
        twin.turn()
        serve(twin)
    assert twin.used() == [(STRIDE, 1)]
    assert twin.server.image[LARGE : 2 * LARGE] == data(twin, 1, LARGE)
    assert twin.connection.transmission.cells[LARGE_BYTES] == 0


def test_the_first_write_since_all_was_durable_is_usual_however_large_it_is(twin: Twin) -> None:
    """It is known that something is not durable before the server can have it."""
    known: list[bool] = []
    usual = twin.disk.usual
    assert usual is not None
    wrote = usual.wrote

    def note() -> None:
        twin.server.receive()
        known.append(not twin.server.commands and twin.disk.is_durable)
        wrote()

    usual.wrote = note
    add(twin, 1, 1, LARGE)
    add(twin, 2, 1, LARGE)
    twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    assert twin.connection.transmission.cells[ROWS] == 2
    assert (known, twin.disk.is_durable) == ([True], False)


@pytest.mark.parametrize("length", [LARGE, LENGTH])
def test_a_write_beyond_the_disk_makes_nothing_volatile(twin: Twin, length: int) -> None:
    add(twin, 8, 1, length)
    twin.low[HEADERS + 16 * 8 + 8 : HEADERS + 16 * 8 + 16] = struct.pack("<Q", 1 << 40)
    twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    assert twin.disk.is_durable
    assert twin.disk.flush_deadline_s is None


def test_a_write_is_not_taken_if_it_cannot_be_noted_that_there_is_one(twin: Twin) -> None:
    usual = twin.disk.usual
    assert usual is not None

    def fail() -> None:
        raise RuntimeError("as the test has it")

    usual.wrote = fail
    add(twin, 1, 1)
    with pytest.raises(RuntimeError, match="as the test has it"):
        twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    assert twin.connection.transmission.cells[ROWS] == 0
    twin.server.receive()
    assert twin.server.commands == []


@pytest.mark.parametrize(("least", "usual"), [(LARGE, True), (LARGE - 512, False)])
def test_a_write_that_is_longer_than_the_server_takes_is_not_usual(
    twin: Twin, least: int, usual: bool
) -> None:
    make_volatile(twin)
    twin.session.route.cells[WHOLE_WRITE_BYTES] = least
    add(twin, 1, 1, LARGE)
    twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    assert twin.connection.transmission.cells[ROWS] == usual


def test_a_long_payload_in_pieces_is_received_where_it_belongs(twin: Twin) -> None:
    for slot in range(4):
        add(twin, slot, 0)
    twin.turn()
    twin.server.receive()
    while twin.server.commands:
        twin.server.answer(-1, "whole")
    direct = 0
    while twin.server.outgoing:
        twin.server.send(9000)
        twin.turn()
        direct += twin.connection.transmission.cells[DIRECT_LEFT] > 0
    assert direct > 10
    assert not twin.rows.adopted_total
    assert twin.used() == [(STRIDE * slot, LENGTH + 1) for slot in range(4)]
    for slot in range(4):
        assert data(twin, slot) == twin.server.image[LENGTH * slot : LENGTH * (slot + 1)]
    cells = twin.connection.transmission.cells
    assert (cells[DIRECT_LEFT], cells[LARGE_BYTES], cells[LONG_READS]) == (0, 0, 0)


def test_a_long_payload_is_taken_over_amid_by_who_needs_the_requests(twin: Twin) -> None:
    add(twin, 0, 0)
    add(twin, 1, 0)
    twin.turn()
    twin.server.receive()
    twin.server.answer(0, "whole")
    twin.server.answer(0, "whole")
    twin.server.send(30_000)
    twin.turn()
    assert twin.connection.transmission.cells[DIRECT_LEFT]
    assert not twin.connection.changes()  # As after a flush that failed: it looks at all requests.
    assert not twin.connection.transmission.cells[DIRECT_LEFT]
    while twin.server.outgoing:
        twin.server.send(9000)
        twin.turn()
    assert twin.used() == [(0, LENGTH + 1), (STRIDE, LENGTH + 1)]
    for slot in range(2):
        assert data(twin, slot) == twin.server.image[LENGTH * slot : LENGTH * (slot + 1)]


def test_a_connection_that_is_lost_amid_a_long_payload_has_it_read_again(twin: Twin) -> None:
    add(twin, 0, 0)
    twin.turn()
    twin.server.receive()
    twin.server.answer(0, "whole")
    twin.server.send(30_000)
    twin.turn()
    lose_connection(twin)
    for _ in range(3):
        twin.turn()
        serve(twin)
    twin.turn()
    assert twin.used() == [(0, LENGTH + 1)]
    assert data(twin, 0) == twin.server.image[:LENGTH]


def test_a_ring_that_is_closed_amid_a_long_payload_leaves_its_memory_alone(twin: Twin) -> None:
    add(twin, 0, 0)
    twin.turn()
    twin.server.receive()
    twin.server.answer(0, "whole")
    twin.server.send(30_000)
    twin.turn()
    twin.stop()
    before = bytes(twin.high)
    for _ in range(20):
        twin.server.send(9000)
        twin.turn()
    assert bytes(twin.high) == before
    assert twin.connection.alive


def test_what_the_server_answered_before_it_closed_is_heard_before_anything_is_sent(
    twin: Twin,
) -> None:
    add(twin, 0, 0)
    twin.turn()
    serve(twin)
    assert twin.server.end is not None
    twin.server.end.close()
    add(twin, 1, 0)
    twin.turn()
    assert twin.used() == [(0, LENGTH + 1)]
    assert data(twin, 0) == twin.server.image[:LENGTH]
    assert not twin.connection.alive


def test_a_write_answered_before_all_of_it_is_sent_waits_until_it_is(twin: Twin) -> None:
    twin.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    make_volatile(twin)
    add(twin, 1, 1)
    twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    assert twin.connection.has_unsent
    answer_too_early(twin)
    twin._turn()
    assert twin.connection.has_unsent
    assert twin.used() == []
    for _ in range(50):
        twin.turn()
        twin.server.receive()
    assert not twin.connection.has_unsent
    assert twin.used() == [(STRIDE, 1)]


def test_an_answer_counts_as_shown_when_the_ring_was_looked_at_after_its_publication(
    twin: Twin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guest may have put something into the ring between the look and the publication."""
    native = import_module("bridge.datapath._native")
    turns, found = native.turns, list[tuple[int, ...]]()

    def run(*args: object) -> object:
        found.append(turns(*args))
        return found[-1]

    monkeypatch.setattr(native, "turns", run)

    def looked_and_shown() -> tuple[int, int]:
        twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
        return found[-1][7], found[-1][8]

    add(twin, 0, 1)
    for _ in range(50):
        twin.turn()
        serve(twin)
    assert twin.used() == [(0, 1)]
    add(twin, 1, 1)
    before = looked_and_shown()[1]
    while not twin.used():
        assert looked_and_shown() == (1, before)
        serve(twin)
    assert looked_and_shown() == (1, before + 1)


def test_flush_that_is_found_when_the_server_has_hung_up_tells_of_nothing_just_published(
    twin: Twin,
) -> None:
    """The hang-up ends the turns before they look at the ring: what a flush there knew is open. It
    counted as one that tells of all losses, and the next one succeeded."""
    make_volatile(twin)
    assert not twin.session.durability.unreported
    add(twin, 1, 1)
    assert twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    serve(twin)
    twin._turn()  # The answer is received in Python, and published.
    add_flush(twin, 2)
    assert twin.server.end is not None
    twin.server.end.close()
    assert twin.compiled.run(twin.loop.epoll.fileno(), [twin.ring], 0.0, worked=True)
    twin._turn()
    assert not twin.connection.alive
    twin.settle_loss()
    assert twin.used() == [(STRIDE, 1), (STRIDE * 2, 1)]
    assert twin.low[STATUSES + 2] == 1
    add_flush(twin, 3)
    for _ in range(50):
        twin.turn()
        serve(twin)
    assert twin.used() == [(STRIDE * 3, 1)]
    assert twin.low[STATUSES + 3] == 1


def add_flush(twin: Twin, slot: int) -> None:
    """The same for a flush."""
    add(twin, slot, 4)
    at = TABLES + 0x100 * slot
    twin.low[at + 16 : at + 32] = struct.pack("=QIHH", STATUSES + slot, 1, 2, 0)
    twin.low[16 * STRIDE * slot : 16 * STRIDE * slot + 16] = struct.pack("=QIHH", at, 32, 4, 0)


# Several rings of a cached disk.


def hit(world: World, number: int) -> None:
    """A ring with one chain: a read that the cache can serve."""
    world.disk[CAPACITY_BYTES], world.disk[BLOCK_MASK] = DISK_BYTES, 511
    world.cache.ready[1] = 0xFFFF
    granule = world.cache.granule_of[1]
    world.cache.head[granule & world.cache.bucket_mask] = 1
    at = STUFF_AT + 0x100 * number
    table = struct.pack("=QIHHQIHH", GUEST + at, 16, 1, 1, GUEST + at + 0x1000, 512, 3, 2)
    table += struct.pack("=QIHH", GUEST + at + 16, 1, 2, 0)
    world.main[at : at + 16] = struct.pack("<IIQ", 0, 0, granule << GRANULE_SHIFT - 9)
    world.main[at + 0x20 : at + 0x50] = table
    queue = world.queues[number]
    queue.cells[INDIRECT] = 1
    queue.descriptors[:16] = struct.pack("=QIHH", GUEST + at + 0x20, 48, 4, 0)
    queue.avail[2 + (queue.avail[1] & queue.cells[SIZE_OF_RING] - 1)] = 0
    queue.avail[1] = queue.avail[1] + 1 & 0xFFFF


def taken_by(world: World, until_ns: int, call: Callable[[], None]) -> tuple[int, ...]:
    """How many chains of each ring one call takes."""
    native = import_module("bridge.datapath._native")
    state = vars(world).setdefault("state", native.new_turns(0))
    rings = tuple((queue, -1, call) for queue in world.queues)
    with select.epoll() as epoll:
        arguments = state, epoll.fileno(), rings, world.disk, None, (world.cache,), until_ns
        found: tuple[int, ...] = native.turns(*arguments, False, False)[1]
    return found


def nothing() -> None: ...


def test_a_turn_that_takes_long_does_not_go_on_with_all_other_rings() -> None:
    world = World(engine(COMPILED), 1)
    hit(world, 0)
    hit(world, 1)
    late = taken_by(world, 0, nothing)
    assert sorted(late) == [0, 1]
    hit(world, late.index(1))  # It has more; it is the other one's turn.
    assert taken_by(world, 0, nothing) == (late[1], late[0])


def test_turns_that_are_in_time_take_what_all_rings_have() -> None:
    world = World(engine(COMPILED), 1)
    hit(world, 0)
    hit(world, 1)
    assert taken_by(world, time.monotonic_ns() + 10**11, nothing) == (1, 1)


def test_nothing_is_called_after_a_call_that_failed() -> None:
    world = World(engine(COMPILED), 1)
    hit(world, 0)
    hit(world, 1)
    calls: list[int] = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("as the test has it")

    with pytest.raises(RuntimeError, match="as the test has it"):
        taken_by(world, time.monotonic_ns() + 10**11, fail)
    assert calls == [1]


def test_what_was_pushed_before_a_queue_that_cannot_be_had_is_published() -> None:
    compiled = engine(COMPILED)
    world = World(compiled, 1)
    channel, rows = world.channel, world.rows
    channel.structured = False
    replies = b""
    for number, queue in enumerate(world.queues):
        hit(world, number)
        taken = compiled.take_commands(queue, world.disk, world.route, channel, rows)
        assert taken == (1, 0)
        command = channel.output.pop()
        replies += struct.pack(">II", 0x67446698, 0) + command[8:16] + bytes(512)
    channel.staging[: len(replies)] = replies
    gone = memoryview(bytearray(1))
    gone.release()
    world.queues[1].views = [gone] * 3
    world.queues[1].native = None
    with pytest.raises(ValueError, match="released"):
        compiled.answers(channel, rows, 0, len(replies))
    assert rows.touched == [world.queues[0]]


class Crowd:
    """See `crowding.Crowding`."""

    def __init__(self, *, is_there: bool) -> None:
        self._is_there = is_there

    def look(self, now_s: float) -> bool:
        return self._is_there


@pytest.mark.parametrize(
    ("length", "crowded", "polls"),
    [(LENGTH, True, True), (0x50000, False, True), (0x50000, True, False)],
)
def test_nobody_polls_for_the_answer_to_a_long_write_while_others_want_the_processor(
    twin: Twin, length: int, crowded: bool, polls: bool
) -> None:
    make_volatile(twin)
    module = import_module("bridge.datapath.compiled")
    crowd = Crowd(is_there=crowded)
    turns = module.CompiledTurns(twin.loop.turn, poll_max_s=1000.0, crowding=crowd)
    add(twin, 0, 1, length)
    found = turns.run(
        twin.loop.epoll.fileno(), [twin.ring], time.perf_counter() + 0.05, worked=True
    )
    assert twin.connection.transmission.cells[ROWS] == 1
    assert (found.used_up, found.naps) == ((True, 0) if polls else (False, 1))
    for _ in range(50):
        twin.turn()
        serve(twin)
    assert len(twin.used()) == 1

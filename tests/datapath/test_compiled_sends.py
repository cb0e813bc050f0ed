"""Compiled turns whose socket takes what they send in parts: they go on by themselves, and at any
moment the general path finds what it would have left."""

from __future__ import annotations

import random
import socket
from collections.abc import Callable, Iterator
from time import perf_counter

import pytest

from bridge.datapath.cells import ROWS
from bridge.datapath.engine_names import COMPILED
from bridge.datapath.loop import EPOLLIN, EPOLLOUT
from tests.datapath.engines import engine
from tests.datapath.socket_twins import (
    ROOM_BYTES,
    STATUSES,
    STRIDE,
    Twin,
    _move,
    _pause,
    look,
)
from tests.datapath.test_compiled import (
    LENGTH,
    add,
    answer_too_early,
    data,
    lose_connection,
    make_volatile,
    serve,
)

_SLOTS = 8
_SEEDS = 60
_STEPS = 80


def _twin(*, structured: bool) -> Twin:
    return Twin(
        usual=True,
        slots=0,
        tracked=True,
        structured=structured,
        event_idx=True,
        engine=engine(COMPILED),
        turns=True,
    )


@pytest.fixture(params=[False, True], ids=["simple", "structured"])
def twin(request: pytest.FixtureRequest) -> Iterator[Twin]:
    twin = _twin(structured=request.param)
    make_volatile(twin)
    narrow(twin, 4608)
    yield twin
    twin.close()


def narrow(twin: Twin, n_bytes: int) -> None:
    """Have our socket take little at once."""
    twin.connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, n_bytes)


def run(twin: Twin, *, for_s: float = 0.0) -> bool:
    """One call of the compiled turns, of one turn by default; False: not now."""
    until_s = perf_counter() + for_s if for_s else 0.0
    fd = twin.loop.epoll.fileno()
    return twin.compiled.run(fd, [twin.ring], until_s, worked=True) is not None


def image(twin: Twin, slot: int) -> bytes:
    return bytes(twin.server.image[LENGTH * slot : LENGTH * (slot + 1)])


def data_at(slot: int) -> int:
    return ROOM_BYTES * slot


def leave_unsent(twin: Twin, *slots: int) -> None:
    for slot in slots:
        add(twin, slot, 1)
    assert run(twin)
    assert twin.connection.has_unsent
    assert twin.connection.transmission.sending
    assert twin.loop.callbacks[twin.fd][1] == EPOLLIN | EPOLLOUT


def drain(twin: Twin) -> None:
    """Compiled turns alone send the rest."""
    while twin.connection.has_unsent:
        twin.server.receive()
        assert run(twin)
    assert not twin.connection.transmission.sending
    assert twin.loop.callbacks[twin.fd][1] == EPOLLIN


def finish(twin: Twin) -> list[tuple[int, int]]:
    for _ in range(200):
        twin.turn()
        serve(twin)
    return twin.used()


def test_compiled_turns_send_by_themselves_what_a_full_socket_has_left(twin: Twin) -> None:
    leave_unsent(twin, 1, 2, 3)
    drain(twin)
    serve(twin)
    assert run(twin)
    assert twin.used() == [(STRIDE * slot, 1) for slot in (1, 2, 3)]
    assert not twin.rows.adopted_total
    assert [image(twin, slot) for slot in (1, 2, 3)] == [data(twin, slot) for slot in (1, 2, 3)]


def test_chains_wait_in_their_ring_while_the_socket_is_full(twin: Twin) -> None:
    leave_unsent(twin, 1)
    add(twin, 2, 0)
    assert run(twin)
    assert twin.connection.transmission.cells[ROWS] == 1
    drain(twin)
    assert run(twin)
    assert twin.connection.transmission.cells[ROWS] == 2
    assert finish(twin) == [(STRIDE, 1), (STRIDE * 2, LENGTH + 1)]


def test_a_command_that_is_sent_is_answered_while_the_next_is_not(twin: Twin) -> None:
    leave_unsent(twin, 1, 2)
    while not twin.server.commands:
        twin.server.receive()
        assert run(twin)
    assert twin.connection.has_unsent
    serve(twin)
    assert run(twin)
    assert twin.used() == [(STRIDE, 1)]
    assert twin.connection.has_unsent
    drain(twin)
    assert not twin.rows.adopted_total
    assert finish(twin) == [(STRIDE * 2, 1)]


def test_a_write_answered_too_early_waits_until_it_is_sent(twin: Twin) -> None:
    leave_unsent(twin, 1)
    answer_too_early(twin)
    assert run(twin)
    assert not run(twin)  # The general path has it now.
    twin._turn()
    assert twin.used() == []
    assert twin.low[STATUSES + 1] == 0xEE
    for _ in range(50):
        twin.turn()
        twin.server.receive()
    assert twin.used() == [(STRIDE, 1)]


def test_requests_that_are_one_command_are_sent_in_parts_like_any_other(twin: Twin) -> None:
    slots = range(1, 9)
    for slot in slots:
        add(twin, slot, 1, 4096)
    assert run(twin)
    assert twin.connection.has_unsent
    drain(twin)
    twin.server.receive()
    assert len(twin.server.commands) == 1
    serve(twin)
    assert run(twin)
    assert twin.used() == [(STRIDE * slot, 1) for slot in slots]
    for slot in slots:
        assert twin.server.image[4096 * slot : 4096 * (slot + 1)] == data(twin, slot, 4096)
    assert not twin.rows.adopted_total


def test_requests_that_are_one_command_wait_when_it_is_answered_too_early(twin: Twin) -> None:
    slots = range(1, 9)
    for slot in slots:
        add(twin, slot, 1, 4096)
    assert run(twin)
    assert twin.connection.has_unsent
    answer_too_early(twin)
    twin.turn()
    assert twin.used() == []
    for _ in range(50):
        twin.turn()
        twin.server.receive()
    assert twin.used() == [(STRIDE * slot, 1) for slot in slots]


def test_a_server_that_does_not_read_leaves_the_rings_to_the_general_path(twin: Twin) -> None:
    leave_unsent(twin, 1)
    add(twin, 2, 1)
    assert run(twin, for_s=10)  # It comes back all the same.
    assert not run(twin)
    twin._turn()
    assert twin.connection.in_flight == 2
    assert finish(twin) == [(STRIDE, 1), (STRIDE * 2, 1)]
    assert [image(twin, slot) for slot in (1, 2)] == [data(twin, slot) for slot in (1, 2)]


def test_turns_go_on_after_all_requests_were_looked_at(twin: Twin) -> None:
    leave_unsent(twin, 1, 2)
    look(twin)
    assert twin.rows.adopted_total == 2
    drain(twin)
    assert finish(twin) == [(STRIDE, 1), (STRIDE * 2, 1)]
    assert [image(twin, slot) for slot in (1, 2)] == [data(twin, slot) for slot in (1, 2)]


def test_what_else_is_sent_follows_what_is_unsent(twin: Twin) -> None:
    leave_unsent(twin, 1)
    assert twin.ring is not None
    add(twin, 2, 1)
    twin._turn()  # The general path takes it, and has one list for both.
    assert not run(twin)
    assert finish(twin) == [(STRIDE, 1), (STRIDE * 2, 1)]
    assert [image(twin, slot) for slot in (1, 2)] == [data(twin, slot) for slot in (1, 2)]


def test_a_lost_connection_has_what_was_sent_in_part_sent_again(twin: Twin) -> None:
    leave_unsent(twin, 1, 2)
    twin.server.receive()
    assert run(twin)
    lose_connection(twin)
    assert not twin.connection.has_unsent
    assert finish(twin) == [(STRIDE, 1), (STRIDE * 2, 1)]
    assert [image(twin, slot) for slot in (1, 2)] == [data(twin, slot) for slot in (1, 2)]


def test_a_ring_that_is_closed_has_its_frames_sent_as_they_were(twin: Twin) -> None:
    before = random.Random(5).randbytes(LENGTH)
    twin.high[:] = bytes(len(twin.high))
    leave_unsent(twin, 0)
    twin.stop()
    twin.high[:] = (before * (len(twin.high) // LENGTH + 1))[: len(twin.high)]
    for _ in range(50):
        twin.turn()
        twin.server.receive()
    assert not twin.connection.has_unsent
    assert image(twin, 0) == bytes(LENGTH)
    assert len(twin.server.unparsed) == 0


def test_what_does_not_belong_together_is_not_gone_on_with(twin: Twin) -> None:
    leave_unsent(twin, 1)
    connection = twin.connection
    pieces, commands = connection._unsent, connection._resumable
    for other in (pieces[:-1], [], [*pieces, b"more"]):
        connection._unsent = other
        assert not run(twin)
    connection._unsent = pieces
    for tokens in (commands[:-1], commands * 2, commands * 600, bytes(len(commands))):
        connection._resumable = tokens
        assert not run(twin)
    connection._resumable = commands
    drain(twin)
    assert finish(twin) == [(STRIDE, 1)]


class _Guest:
    """A guest whose writes and reads are checked, on a server and a host that do what they may."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.twin = _twin(structured=self.rng.random() < 0.5)
        make_volatile(self.twin)
        self.writes: dict[int, bytes] = {}
        self.reads: set[int] = set()
        self.narrow()

    def narrow(self) -> None:
        narrow(self.twin, self.rng.choice([4608, 4608, 20_000, 70_000, 200_000]))

    def begin(self) -> None:
        rng, twin = self.rng, self.twin
        idle = [
            slot for slot in range(_SLOTS) if slot not in self.writes and slot not in self.reads
        ]
        if not idle or twin.ring is None:
            return
        slot = rng.choice(idle)
        where = data_at(slot)
        if rng.random() < 0.7:
            self.writes[slot] = rng.randbytes(LENGTH)
            twin.high[where : where + LENGTH] = self.writes[slot]
            add(twin, slot, 1)
        else:
            self.reads.add(slot)
            add(twin, slot, 0)

    def serve(self) -> None:
        rng, twin = self.rng, self.twin
        if rng.random() < 0.8:
            twin.server.receive()
        else:
            self.receive(rng.choice([100, 5000, 40_000]))
        while twin.server.commands and rng.random() < 0.6:
            twin.server.answer(rng.randrange(len(twin.server.commands)), "whole")
        twin.server.send(rng.choice([10, 5000, 1 << 30]))

    def receive(self, n_bytes: int) -> None:
        """No more than that."""
        server = self.twin.server
        assert server.end is not None
        try:
            server.unparsed += server.end.recv(n_bytes)
        except BlockingIOError:
            return

    def control(self) -> None:
        twin = self.twin
        steps: list[Callable[[], object]] = [
            lambda: look(twin),
            lambda: _move(twin) if twin.ring is not None else None,
            self.stop,
            self.lose,
            self.narrow,
            twin._turn,
            lambda: run(twin, for_s=0.002) if twin.ring is not None else None,
            lambda: _pause(twin, True) if twin.ring is not None else None,
        ]
        self.rng.choice(steps)()

    def lose(self) -> None:
        self.twin.lose()
        self.twin.settle_loss()
        self.narrow()

    def stop(self) -> None:
        if self.twin.ring is not None:
            self.twin.stop()
            self.twin.start()

    def step(self) -> None:
        for _ in range(self.rng.choice([0, 1, 3])):
            self.begin()
        self.serve()
        if self.rng.random() < 0.1:
            self.control()
        if self.twin.ring is not None and self.rng.random() < 0.2:
            _pause(self.twin, False)
        self.twin.turn()
        self.look()

    def look(self) -> None:
        """What is answered is done."""
        twin = self.twin
        for head, _ in twin.used():
            slot = head // STRIDE
            assert twin.low[STATUSES + slot] == 0
            if slot in self.writes:
                assert image(twin, slot) == self.writes.pop(slot)
                # The guest has other uses for its memory now.
                at = data_at(slot)
                twin.high[at : at + LENGTH] = bytes(LENGTH)
            else:
                self.reads.remove(slot)
                assert data(twin, slot) == image(twin, slot)

    def end(self) -> None:
        assert self.twin.ring is not None
        _pause(self.twin, False)
        for _ in range(300):
            self.twin.server.receive()
            serve(self.twin)
            self.twin.turn()
            self.look()
        assert not self.writes
        assert not self.reads
        assert not self.twin.connection.has_unsent


@pytest.mark.parametrize("first", range(0, _SEEDS, 10))
def test_whatever_happens_meanwhile_all_is_sent_whole_and_once(first: int) -> None:
    went_on = 0
    for seed in range(first, first + 10):
        guest = _Guest(seed)
        try:
            for _ in range(_STEPS):
                guest.step()
                went_on += bool(guest.twin.connection._resumable)
            guest.end()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        finally:
            guest.twin.close()
    assert went_on > 10

"""A server that takes long for a flush is not a server that hangs."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from bridge.datapath.request import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.connection import Connection
from bridge.server.export import Export
from bridge.spec import nbd as p
from tests.turns import deliver, turn

TIMEOUT_S = 60.0


class Link:
    """A connection, the server's end of it, and a clock that only this test moves."""

    def __init__(self) -> None:
        ours, self.server = socket.socketpair()
        ours.setblocking(False)
        self.server.setblocking(False)
        self.sock = ours
        self.export = Export("", 1 << 20, DEFAULT_FLAGS)
        self.handshake = self
        self.turn = turn()
        self.connection = Connection(self, self, lost=self._lost)  # type: ignore[arg-type]
        self.connection.transmission.generation = 1
        self.now = 0.0
        self.stalled_at: float | None = None
        self.received: list[tuple[int, int]] = []

    # What the connection needs of a loop, and of a handshake.

    def add(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        self.on_event = callback

    def remove(self, fd: int) -> None:
        """Nothing."""

    def trailing_data(self) -> bytes:
        return b""

    def _lost(self, connection: Connection, error: Exception) -> None:
        raise AssertionError(error)

    # The test.

    def ask(self, op: int, flags: int = 0) -> None:
        length = 0 if op == FLUSH else 512
        buffers = [memoryview(bytearray(length))] if op in (READ, WRITE) else []
        self.connection.send(Request(op, 0, length, buffers, _ignore, flags))
        self._turn()

    def _turn(self) -> None:
        deliver()
        try:
            data = self.server.recv(1 << 20)
        except BlockingIOError:
            return
        while data:
            _, _, command, cookie, _, length = p.REQUEST.unpack_from(data)
            self.received.append((command, cookie))
            data = data[p.REQUEST.size + (length if command == p.CMD_WRITE else 0) :]

    def answer(self, command: int) -> None:
        """The oldest command of this kind is done."""
        found = next(each for each in self.received if each[0] == command)
        self.received.remove(found)
        data = bytes(512) if command == p.CMD_READ else b""
        self.server.send(p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, found[1]) + data)
        self.on_event(1)
        deliver()

    def wait(self, seconds: float, *, answers_reads: bool = False) -> None:
        """Time passes; the client looks at the connection now and then."""
        for _ in range(int(seconds)):
            self.now += 1
            if self.connection.stalled(self.now, TIMEOUT_S):
                self.stalled_at = self.stalled_at or self.now
            self._turn()
            if answers_reads and self.reads:
                self.answer(p.CMD_READ)

    @property
    def reads(self) -> int:
        return sum(command == p.CMD_READ for command, _ in self.received)


def _ignore(request: Request) -> None:
    """No caller waits."""


@pytest.fixture
def link() -> Iterator[Link]:
    made = Link()
    yield made
    made.connection.close()
    made.server.close()


SLOW = pytest.mark.parametrize(
    ("op", "flags"), [(FLUSH, 0), (WRITE, FUA), (DISCARD, 0), (WRITE_ZEROES, 0)]
)


@SLOW
def test_slow_command_is_waited_for_while_the_server_answers_others(
    link: Link, op: int, flags: int
) -> None:
    link.ask(op, flags)
    link.wait(100 * TIMEOUT_S, answers_reads=True)
    assert link.stalled_at is None


@SLOW
def test_slow_command_of_a_server_that_does_one_at_a_time_is_waited_for_longer(
    link: Link, op: int, flags: int
) -> None:
    link.ask(op, flags)
    link.wait(9 * TIMEOUT_S)
    assert link.stalled_at is None
    assert link.reads == 1  # Asked once, not again and again.


def test_others_behind_a_slow_command_are_waited_for_with_it(link: Link) -> None:
    link.ask(FLUSH)
    link.ask(READ)
    link.wait(9 * TIMEOUT_S)
    assert link.stalled_at is None


def test_server_that_is_dead_during_a_slow_command_is_noticed_in_the_end(link: Link) -> None:
    link.ask(FLUSH)
    link.wait(11 * TIMEOUT_S)
    assert link.stalled_at is not None


def test_server_known_to_answer_beside_a_slow_command_is_noticed_soon_when_it_dies(
    link: Link,
) -> None:
    link.ask(FLUSH)
    link.wait(5 * TIMEOUT_S, answers_reads=True)
    died_at = link.now
    link.wait(2 * TIMEOUT_S)
    assert link.stalled_at is not None
    assert link.stalled_at - died_at <= 1.6 * TIMEOUT_S


def test_answers_to_older_commands_do_not_show_that_a_server_answers_beside(link: Link) -> None:
    link.ask(READ)
    link.wait(2)
    link.ask(FLUSH)
    link.answer(p.CMD_READ)
    link.wait(9 * TIMEOUT_S)
    assert link.stalled_at is None


@pytest.mark.parametrize("op", [READ, WRITE])
def test_server_that_hangs_without_a_slow_command_is_noticed_as_before(link: Link, op: int) -> None:
    link.ask(op)
    link.wait(TIMEOUT_S + 2)
    assert link.stalled_at is not None


def test_idle_connection_is_neither_asked_nor_given_up(link: Link) -> None:
    link.ask(READ)
    link.answer(p.CMD_READ)
    link.wait(5 * TIMEOUT_S)
    assert (link.stalled_at, link.received) == (None, [])

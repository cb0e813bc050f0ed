"""A network of byte streams on virtual time: delays, halves of frames, cuts, refusals, silence.

`SimSocket` is what the bridge's NBD client takes for its non-blocking socket. The other end is a
`Peer` of the server's. Each direction keeps its order; connections overtake one another.
"""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable
from random import Random
from typing import Any, Protocol

import trio

from bridge.errors import ConnectionLost
from tests.sim.oracle import Violation
from tests.sim.timeline import Bell, Timeline

_FIRST_FD = 1 << 20
"""Above every real descriptor."""
_MOST_CONNECTS = 300
"""In a second: a server that hangs up is connected to at once for a while, to find out why."""


class Peer(Protocol):
    """The server's end of a connection."""

    def receive(self, data: bytes) -> None:
        """Bytes have come."""

    def hung_up(self) -> None:
        """None will come any more."""

    def given_up(self) -> None:
        """The client has left a silent line, of which the server hears later."""


class Line:
    """How the lines behave: the faults that the world sets."""

    def __init__(self, rng: Random) -> None:
        self.least_s = rng.choice((0.0, 0.0001, 0.001, 0.02))
        self.most_s = self.least_s + rng.choice((0.0, 0.0005, 0.01, 0.2))
        self.window_bytes = rng.choice((600, 4096, 65536, 1 << 20))
        self.pieces = rng.choice((1, 1, 2, 4))
        """Of one delivery, at most."""
        self.refuses = False
        self.hangs = False
        """Connects are not answered."""


class SimSocket:
    """The client's end."""

    family = 0

    def __init__(self, network: Network, fd: int, owner: object) -> None:
        self._network = network
        self._fd = fd
        self.owner = owner
        """The process that has it."""
        self.peer: Peer | None = None
        self.inbox = bytearray()
        self.ended = False
        self.errno = 0
        self.closed = False
        self.silent = False
        """Nothing arrives at either end any more."""
        self.notify: Callable[[], None] | None = None
        self.in_transit_bytes = 0
        self._changed = Bell()
        self._last_out_s = self._last_in_s = 0.0

    # As the product uses it.

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._network.sockets.pop(self._fd, None)
        if self.silent and self.peer is not None:
            self.peer.given_up()
        self._later(self._hang_up)

    def _hang_up(self) -> None:
        if self.peer is not None and not self.silent:
            self._disconnect_peer()

    def _disconnect_peer(self) -> None:
        peer, self.peer = self.peer, None
        if peer is not None:
            peer.hung_up()

    def send(self, data: Any) -> int:
        if self.errno or self.closed:
            raise OSError(self.errno or errno.EBADF, os.strerror(self.errno or errno.EBADF))
        room = self._network.line.window_bytes - self.in_transit_bytes
        if room <= 0:
            raise BlockingIOError
        taken = bytes(memoryview(data).cast("B")[:room])
        self.in_transit_bytes += len(taken)
        self._later(lambda: self._arrive(taken))
        return len(taken)

    def sendmsg(self, pieces: list[Any]) -> int:
        return self.send(b"".join(pieces))

    def _arrive(self, data: bytes) -> None:
        self.in_transit_bytes -= len(data)
        if self.peer is not None and not self.silent:
            self.peer.receive(data)
        self._wake()

    def _later(self, call: Callable[[], None]) -> None:
        network = self._network
        when = max(self._last_out_s, trio.current_time() + network.delay_s())
        self._last_out_s = network.timeline.at(when, call)

    def recv_into(self, buffer: Any) -> int:
        return self.recvmsg_into([buffer])[0]

    def recvmsg_into(self, buffers: list[Any]) -> tuple[int, list[Any], int, None]:
        if not self.inbox:
            if self.errno:
                raise OSError(self.errno, os.strerror(self.errno))
            if self.ended:
                return 0, [], 0, None
            raise BlockingIOError
        done = 0
        for buffer in buffers:
            view = memoryview(buffer).cast("B")
            piece = self.inbox[: len(view)]
            view[: len(piece)] = piece
            del self.inbox[: len(piece)]
            done += len(piece)
        return done, [], 0, None

    # What tasks wait for, during the handshake.

    async def receive(self) -> bytes:
        """As `connecting._receive`."""
        while not self.readable:
            self._changed.silence()
            await self._changed.wait()
        if not self.inbox and self.errno:
            raise OSError(self.errno, os.strerror(self.errno))
        data = bytes(self.inbox)
        self.inbox.clear()
        return data

    async def send_all(self, data: bytes) -> None:
        """As `connecting._send_all`."""
        while data:
            try:
                data = data[self.send(data) :]
            except BlockingIOError:
                self._changed.silence()
                await self._changed.wait()

    # Readiness.

    @property
    def readable(self) -> bool:
        return bool(self.inbox or self.ended or self.errno)

    @property
    def writable(self) -> bool:
        return bool(self.errno) or self._network.line.window_bytes > self.in_transit_bytes

    def _wake(self) -> None:
        self._changed.ring()
        if self.notify is not None:
            self.notify()

    # The server's side of it.

    def deliver(self, data: bytes) -> None:
        """The server sends."""
        network = self._network
        rng = network.rng
        while data:
            size = len(data)
            if network.line.pieces > 1 and size > 1 and rng.randrange(4) == 0:
                size = rng.randrange(1, size)
            piece, data = data[:size], data[size:]
            when = max(self._last_in_s, trio.current_time() + network.delay_s())
            self._last_in_s = network.timeline.at(when, lambda piece=piece: self._come(piece))

    def _come(self, piece: bytes) -> None:
        if not (self.closed or self.silent or self.errno or self.ended):
            self.inbox += piece
            self._wake()

    def end(self) -> None:
        """The server closes its end, after what it has sent."""
        self.peer = None

        def ended() -> None:
            if not self.silent:
                self.ended = True
                self._wake()

        self._last_in_s = self._network.timeline.at(
            max(self._last_in_s, trio.current_time() + self._network.delay_s()), ended
        )

    def reset(self) -> None:
        """The connection breaks: what is under way is lost."""
        self.errno = errno.ECONNRESET
        self._wake()
        self._disconnect_peer()

    def fall_silent(self, until_s: float) -> None:
        """A line that swallows everything; the server notices by itself after `until_s`."""
        self.silent = True
        self._network.timeline.after(until_s, self._disconnect_peer)


def _spins() -> None:
    raise Violation(f"more than {_MOST_CONNECTS} connections are asked for in a second")


class Network:
    """Between the processes of the hosts and one server."""

    def __init__(self, timeline: Timeline, rng: Random) -> None:
        self.timeline = timeline
        self.rng = rng
        self.line = Line(rng)
        self.accept: Callable[[SimSocket], Peer | None] | None = None
        """The server, if it listens. None instead of a peer: it refuses."""
        self.sockets: dict[int, SimSocket] = {}
        """Those that a process has open."""
        self._lines: list[SimSocket] = []
        self._next_fd = _FIRST_FD
        self._connects: deque[float] = deque()
        """When the last ones were asked for."""

    def delay_s(self) -> float:
        """Of one message, one way."""
        line = self.line
        if line.most_s == line.least_s:
            return line.least_s
        return self.rng.uniform(line.least_s, line.most_s)

    def new_fd(self) -> int:
        """A number that stands for a descriptor."""
        self._next_fd += 1
        return self._next_fd

    async def connect(self, owner: object) -> SimSocket:
        """As `connecting._connect`. Raises ConnectionLost."""
        self._count_connect()
        await self.timeline.sleep(2 * self.delay_s())
        if self.line.hangs:
            await trio.sleep_forever()
        if self.accept is None or self.line.refuses:
            raise ConnectionLost("cannot connect: connection refused")
        sock = SimSocket(self, self.new_fd(), owner)
        peer = self.accept(sock)
        if peer is None:
            raise ConnectionLost("cannot connect: connection refused")
        sock.peer = peer
        self.sockets[sock.fileno()] = sock
        self._lines = [*self.open_sockets(), sock]
        return sock

    def _count_connect(self) -> None:
        """Its own errors a client survives: this one is raised elsewhere."""
        now = self.timeline.clock.current_time()
        self._connects.append(now)
        if len(self._connects) > _MOST_CONNECTS and now - self._connects.popleft() < 1:
            self.timeline.after(0, _spins)

    def process_died(self, owner: object) -> None:
        """Its kernel closes what it had open; what it had sent still arrives."""
        for sock in list(self.sockets.values()):
            if sock.owner is owner:
                sock.close()
                sock.errno = errno.EBADF

    def open_sockets(self) -> list[SimSocket]:
        """Those that the server has open, also of processes that are gone."""
        return [sock for sock in self._lines if sock.peer is not None]

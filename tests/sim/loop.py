"""The data path's loop over simulated descriptors, on virtual time: its turns are the product's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import trio

from bridge.datapath.engine import Engine
from bridge.datapath.loop import EPOLLIN, EPOLLOUT, Loop
from bridge.datapath.turn import Turn
from tests.sim.network import Network, SimSocket
from tests.sim.timeline import Bell

_TURNS_PER_MOMENT = 3000
"""Without time passing: more means that something spins."""
_AN_INSTANT_S = 1e-6
"""The time for turns, of which none passes: one turn."""


class Spins(AssertionError):
    """Turn after turn, and time stands still."""


class _Epoll:
    """select.epoll, for simulated sockets (by level) and eventfds (by edge)."""

    def __init__(self, network: Network, ready: Callable[[], None]) -> None:
        self._network = network
        self._notify = ready
        self._wanted: dict[int, int] = {}
        self._sockets: dict[int, SimSocket] = {}
        """Those of them that are sockets."""
        self._edges: list[int] = []

    def register(self, fd: int, events: int) -> None:
        self._wanted[fd] = events
        sock = self._network.sockets.get(fd)
        if sock is not None:
            self._sockets[fd] = sock
            sock.notify = lambda: self._changed(fd)
            self._changed(fd)

    def modify(self, fd: int, events: int) -> None:
        self._wanted[fd] = events
        self._changed(fd)

    def unregister(self, fd: int) -> None:
        del self._wanted[fd]
        sock = self._sockets.pop(fd, None)
        if sock is not None:
            sock.notify = None

    def _changed(self, fd: int) -> None:
        """A socket may be ready: the loop is woken for what is asked of it only."""
        if self._events_of(fd, self._sockets.get(fd)):
            self._notify()

    def signal(self, fd: int) -> None:
        if fd in self._wanted:
            self._edges.append(fd)
            self._notify()

    def _events_of(self, fd: int, sock: SimSocket | None) -> int:
        if sock is None or sock.closed:
            return 0
        events = EPOLLIN if sock.inbox or sock.ended or sock.errno else 0
        if self._wanted[fd] & EPOLLOUT and sock.writable:
            events |= EPOLLOUT
        return events

    def _ready(self) -> list[tuple[int, int]]:
        ready = []
        for fd, sock in self._sockets.items():
            if events := self._events_of(fd, sock):
                ready.append((fd, events))
        return ready

    def is_ready(self) -> bool:
        """`poll` would find something."""
        return bool(self._edges or self._ready())

    def poll(self, timeout: float = 0, most: int = -1) -> list[tuple[int, int]]:
        ready = self._ready()
        edges, self._edges = self._edges, []
        return ready + [(fd, EPOLLIN) for fd in edges if fd in self._wanted]


class SimLoop(Loop):
    """See the module's text. Only how it sleeps is not the product's; it polls for no longer than
    it must, and compiled turns, which wait in a real epoll, are not taken."""

    def __init__(self, network: Network, engine: Engine) -> None:
        self.engine = engine
        self._epoll: Any = _Epoll(network, self.notify)
        self._callbacks = {}
        self.turn = Turn(self.wake)
        self._pollers = []
        self.poll_max_s = self._poll_s = self._long_poll_s = 0.0
        self._lingering = self._lingered = self._worked = False
        self._compiled = None
        self.naps_total = self.sleeps_total = 0
        self.now = trio.current_time()
        self._awake = Bell()
        self.before_arming: Callable[[], None] = lambda: None
        """What happens between the last look at the rings and the wish to be kicked."""

    def wake(self) -> None:
        if self.turn.asleep:
            self.turn.asleep = False
            self._awake.ring()

    def notify(self) -> None:
        """A simulated descriptor may be ready: epoll would return."""
        self._awake.ring()

    def kick(self, fd: int) -> None:
        """An eventfd was written to."""
        self._epoll.signal(fd)

    def close(self) -> None:
        """Nothing is to be given back."""

    async def run(self) -> None:
        """Turns until cancelled."""
        moment, turns = -1.0, 0
        while True:
            self._awake.silence()
            more = True
            while more:
                now = trio.current_time()
                moment, turns = now, turns + 1 if now == moment else 0
                if turns > _TURNS_PER_MOMENT:
                    raise Spins(f"{turns} turns without time passing")
                self._turns([], now + _AN_INSTANT_S, polling=False)
                self.before_arming()
                self._worked = False
                more = self._arm()
                if not more and self._epoll.is_ready():
                    more = True
                    self._wake_up()
            self.sleeps_total += 1
            await self._awake.wait()
            self._wake_up()

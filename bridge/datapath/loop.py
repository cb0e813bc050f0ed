"""The data path's event loop: one trio task, one epoll of its own.

A trio task per file descriptor would cost a wake-up (13 µs) per kick and per reply, and a task
that polls would leave the others with stale wake-ups. So the descriptors of the data path (kick
eventfds, NBD sockets) are gathered in one epoll, and one trio task waits for that epoll to
become readable. A turn is:

1. every ready descriptor's callback runs, and every poller's `poll()`;
2. the turn is ended (see `turn`): what has finished is told of, stages decide what follows, and
   what was put off runs once (one `sendmsg` per connection, one used-ring publication and at most
   one call per queue, however many requests the turn brought);
3. while work keeps coming, go on (adaptive polling: `poll_us` without success, more while that
   pays, less while it does not);
4. then tell the pollers to `arm()` their notifications, and wait: shortly in the epoll itself,
   where an answer is most likely to be seen soonest, then in trio.

Callbacks are plain functions; nothing here awaits between reading and writing shared state. A
callback must not raise: an exception that escapes one is a bug of ours and ends the process. Where
there is something smaller to end, its callbacks catch it: an NBD connection ends itself.
"""

from __future__ import annotations

import contextlib
import os
import select
from collections.abc import Callable
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

import trio

from bridge.datapath.crowding import Crowding
from bridge.datapath.engine import Engine, choose
from bridge.datapath.turn import Turn

if TYPE_CHECKING:
    from bridge.datapath.compiled import CompiledTurns, Turns

EPOLLIN = select.EPOLLIN
EPOLLOUT = select.EPOLLOUT
EPOLLET = select.EPOLLET

_YIELD_EVERY_S = 0.0005
"""A busy loop lets the other trio tasks run this often: a checkpoint costs 6 µs, about 1 %."""

_LONG_TURN_S = 0.005
"""A turn that has taken this much longer than that ends before every poller was looked at."""

_NAP_S = 0.001
"""Before the loop waits in trio it waits this long in its own epoll, with all of trio standing
still: an answer that comes meanwhile (a server on this machine takes 30 to 200 µs) saves trio's
wake-up of 13 µs and, unlike polling, leaves the processor to the server. 1 ms is the shortest that
epoll_wait knows; without work between two waits there is no nap."""

_POLL_GROWTH = 4
"""The polling window grows up to this many times `poll_us` while polling longer would have paid,
and shrinks to nothing while it would not. For the pieces of a long payload (200 KiB, 50 µs each)
there is one of its own, which is open that far from the start."""

_GENERAL_TURNS = 32
"""When compiled turns found nothing that is usual, so often the loop does without them: where each
write into a cache is flushed, or requests are longer than 2 MiB, the next will not be for them
either."""

_EVENTS_PER_POLL = 64


class Poller(Protocol):
    """Something in memory that has no descriptor to wait for while it is being polled."""

    def poll(self) -> bool:
        """Do what there is to do; say whether there was anything."""

    def arm(self) -> bool:
        """Ask for notifications before the loop sleeps; True if work arrived meanwhile."""

    def disarm(self) -> None:
        """The loop is awake again: notifications are not needed."""


def _compiled_turns(loop: Loop) -> CompiledTurns | None:
    if not loop.engine.has_turns:
        return None
    from bridge.datapath.compiled import CompiledTurns  # Not in every installation.

    return CompiledTurns(loop.turn, poll_max_s=loop.poll_max_s, crowding=loop.crowding)


class Loop:
    """Callbacks on file descriptors, batched by turns. See the module's text."""

    def __init__(self, *, poll_us: float = 32, engine: Engine | None = None) -> None:
        self.engine = engine if engine is not None else choose()
        """What does the usual case of the turns."""
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self.turn = Turn(self.wake)
        """What this loop's turns carry; everything of the data path shares it."""
        self._pollers: list[Poller] = []
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        # Edge-triggered: the counter never has to be read back. No callback: a wake-up alone
        # is no work.
        self._epoll.register(self._wake_fd, EPOLLIN | EPOLLET)
        self.poll_max_s = poll_us / 1e6 * _POLL_GROWTH
        self._poll_s = poll_us / 1e6
        self._long_poll_s = self.poll_max_s
        self._lingering = False
        self._lingered = False
        """The polling window that was open last was one for long payloads."""
        self._worked = False
        self.crowding = Crowding() if self.engine.has_turns else None
        """Whether others want the processor; None: there are no compiled turns, which ask."""
        self._compiled = _compiled_turns(self)
        self._general_left = 0
        self._idle_until_s = 0.0
        """Where the polling window ends that was open when other tasks were let run."""
        self.naps_total = 0
        self.sleeps_total = 0
        """How often polling saw nothing, so that the loop waited in its epoll, or in trio."""
        self.now = perf_counter()
        """The time of the current turn, in seconds of the monotonic clock."""

    def add(self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN) -> None:
        """Call `callback(events)` whenever `fd` is ready.

        Raises OSError (EPERM) for a file that cannot be waited for.
        """
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Wait for `events` on `fd` from now on."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`, which should still be open. Its callback is not called again."""
        if self._callbacks.pop(fd, None) is not None:
            # Closed before it was removed: the system has forgotten it, or does soon.
            with contextlib.suppress(OSError):
                self._epoll.unregister(fd)

    def add_poller(self, poller: Poller) -> None:
        """Look at `poller` in every turn, until `remove_poller`."""
        self._pollers = [*self._pollers, poller]
        self.wake()

    def remove_poller(self, poller: Poller) -> None:
        """Stop looking at `poller`."""
        self._pollers = [each for each in self._pollers if each is not poller]

    def linger(self) -> None:
        """More of what this turn dealt with is about to come: poll longer than usual for it."""
        self._lingering = True

    @property
    def naps_first(self) -> bool:
        """Falling asleep now means a nap (see `_NAP_S`), and again if that was all."""
        return self._worked

    def wake(self) -> None:
        """Look at every poller soon; may be called from any task."""
        if self.turn.asleep:
            self.turn.asleep = False
            os.eventfd_write(self._wake_fd, 1)

    def close(self) -> None:
        """Give the loop's own descriptors back; the registered ones stay open."""
        self._epoll.close()
        os.close(self._wake_fd)
        if self.crowding is not None:
            self.crowding.close()

    async def run(self) -> None:
        """Run turns until cancelled."""
        epoll_fd = self._epoll.fileno()
        polling = False
        ready: list[tuple[int, int]] = []
        until_s = perf_counter() + _YIELD_EVERY_S
        while True:
            compiled = self._compiled_turns(epoll_fd, until_s) if not ready else None
            if compiled is not None:
                polling = False
                ready = compiled.ready
                if compiled.went_to_sleep:
                    if not self._arm():
                        self.sleeps_total += 1
                        await trio.lowlevel.wait_readable(epoll_fd)
                        self._wake_up()
                        until_s = perf_counter() + _YIELD_EVERY_S
                    continue
                if not compiled.used_up:
                    # What they left, in one turn.
                    self._turns(ready, self.now, polling=False)
                    ready = []
                if perf_counter() >= until_s:
                    await trio.lowlevel.checkpoint()
                    until_s = perf_counter() + _YIELD_EVERY_S
                continue
            more = self._turns(ready, until_s, polling=polling)
            ready = []
            if not more and self._arm():
                # Work arrived while falling asleep; until_s still bounds the turns.
                polling = True
                continue
            polling = more
            if more:
                await trio.lowlevel.checkpoint()
            elif self._worked:
                # There was work since the last nap: an answer to it may be near.
                self._worked = False
                ready = self._nap()
                if perf_counter() < until_s:
                    continue
                await trio.lowlevel.checkpoint()
            else:
                assert not self.turn.finished
                self.sleeps_total += 1
                await trio.lowlevel.wait_readable(epoll_fd)
                self._wake_up()
            until_s = perf_counter() + _YIELD_EVERY_S

    def _compiled_turns(self, epoll_fd: int, until_s: float) -> Turns | None:
        """Have turns by compiled code; None: not now."""
        if self._compiled is None or self.turn.pending:
            return None
        if self._general_left:
            self._general_left -= 1
            return None
        pollers = self._pollers
        found = self._compiled.run(epoll_fd, pollers, until_s, worked=self._worked)
        if found is None:
            return None
        self.now = perf_counter()
        self._worked = found.worked
        if not (found.was_usual or found.went_to_sleep or found.used_up):
            self._general_left = _GENERAL_TURNS
        self.naps_total += found.naps
        for poller in pollers:  # Those that were there: the end of a turn may have brought others.
            if poller.usual_ring() == ():  # type: ignore[attr-defined]
                poller.poll()
        return found

    def _wake_up(self) -> None:
        # Not inside `run`: its frame would keep the last poller, and the guest memory behind
        # it, for as long as the loop sleeps.
        self.turn.asleep = False
        for poller in self._pollers:
            poller.disarm()

    def _turns(self, ready: list[tuple[int, int]], until_s: float, *, polling: bool) -> bool:
        """Have turns until nothing came for the polling window (False) or `until_s` (True).

        `ready` are events that were found already. With `polling` the window is the one that was
        open, otherwise it opens with the first work.
        """
        poll = self._epoll.poll
        callbacks = self._callbacks
        turn = self.turn
        now = perf_counter()
        idle_until_s = self._idle_until_s if polling else 0.0
        while True:
            self.now = now
            worked = False
            for fd, events in ready or poll(0, _EVENTS_PER_POLL):
                callback = callbacks.get(fd)
                if callback is not None:
                    callback(events)
                    worked = True
            ready = []
            pollers = self._pollers
            for poller in pollers:
                if poller.poll():
                    worked = True
                    if perf_counter() > until_s + _LONG_TURN_S and self._pollers is pollers:
                        # Long batches: those that come after this one are the first next time.
                        at = pollers.index(poller) + 1
                        self._pollers = pollers[at:] + pollers[:at]
                        break
            else:
                turn.looked()
            if worked or turn.pending:
                worked = True
                turn.end()
            now = perf_counter()
            if worked:
                self._worked = True
                self._lingered, self._lingering = self._lingering, False
                window_s = self._long_poll_s if self._lingered else self._poll_s
                if not window_s and now >= idle_until_s:
                    # The nap that follows sees at once what is there already.
                    return now >= until_s
                idle_until_s = max(idle_until_s, now + window_s)
            elif now >= idle_until_s:
                return False
            if now >= until_s:
                self._idle_until_s = idle_until_s
                return True

    def _nap(self) -> list[tuple[int, int]]:
        """Wait in our own epoll; see `_NAP_S`. How long that took decides how long to poll."""
        self.naps_total += 1
        began_s = perf_counter()
        ready = self._epoll.poll(_NAP_S, _EVENTS_PER_POLL)
        took_s = perf_counter() - began_s
        self._wake_up()
        if self._lingered:
            self._long_poll_s = self._next_window_s(self._long_poll_s, took_s)
        else:
            self._poll_s = self._next_window_s(self._poll_s, took_s)
        return ready

    def _next_window_s(self, window_s: float, nap_s: float) -> float:
        least_s = self.poll_max_s / 32
        if nap_s < self.poll_max_s:
            # Polling would have seen it.
            return min(self.poll_max_s, window_s * 2 + least_s)
        return window_s / 2 if window_s > least_s else 0.0

    def _arm(self) -> bool:
        """Ask every poller for notifications; True when there is work after all."""
        turn = self.turn
        turn.asleep = True
        more = False
        for poller in self._pollers:
            if poller.arm():
                more = True
        if more or turn.pending:
            self._wake_up()
            return True
        turn.looked()
        return False

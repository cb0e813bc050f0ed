"""How long to wait for rings that stop: one limit for a series of stops.

QEMU's main loop waits for the answer to a stop without a limit of its own, and stops the rings of a
device one after the other. So a series of stops has one limit, not each of them. What comes right
after a limit that has passed still gets a short time of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection
from math import inf

import trio

from bridge.guest.ring import RunningRing

_SHORT_DRAIN_S = 1.0
"""For what comes after a limit that has passed: a ring that stops right after one that had to be
given up, the flush after that."""

_SERIES_GAP_S = 1.0
"""Stops that follow one another this closely are one stop of a device with several rings."""


class Drain:
    """The limit of a device's stops, on trio's clock. One wait at a time."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._series_began_s = self._series_ended_s = -inf
        self._waiting: trio.CancelScope | None = None

    def hurry(self, limit_s: float) -> None:
        """The process stops: from here on, and for what waits now, drains take at most that."""
        self.timeout_s = min(self.timeout_s, limit_s)
        if self._waiting is not None:
            until_s = trio.current_time() + limit_s
            self._waiting.deadline = min(self._waiting.deadline, until_s)

    def deadline_s(self) -> float:
        """Until when rings that have to stop now may be waited for."""
        now = trio.current_time()
        if now - self._series_ended_s > _SERIES_GAP_S:
            self._series_began_s = now
        return max(self._series_began_s + self.timeout_s, now + self._least_s)

    @property
    def _least_s(self) -> float:
        return min(_SHORT_DRAIN_S, self.timeout_s)

    async def rings(self, rings: Collection[RunningRing], deadline_s: float) -> bool:
        """Pause `rings`; whether everything they popped was answered in time.

        Cancellation has to wait for that: what is in flight writes to the guest's memory.
        """
        for ring in rings:
            ring.pause()
        with trio.CancelScope(shield=True, deadline=deadline_s) as scope:
            self._waiting = scope
            for ring in rings:
                await ring.drained()
        self._waiting = None
        self._series_ended_s = trio.current_time()
        return not scope.cancelled_caught

    async def last(self, bring: Callable[[], Awaitable[None]], deadline_s: float) -> bool:
        """The work after the last ring has stopped; whether it ended in time, and was not
        cancelled. Raises what `bring` does."""
        deadline_s = max(deadline_s, trio.current_time() + self._least_s)
        with trio.CancelScope(deadline=deadline_s) as scope:
            self._waiting = scope
            try:
                await bring()
            finally:
                self._waiting = None
        self._series_ended_s = trio.current_time()
        return not scope.cancelled_caught

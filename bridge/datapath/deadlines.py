"""When something without a task of its own has to be called next.

What the cache is to do at which time follows from what its requests did. No call reports that:
before the loop sleeps, and now and then while it is busy, the deadline is looked at once more, and
a task that waits for a later one is woken. The task is one of trio, so that a test with a clock of
its own needs nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Final

import trio

from bridge.datapath.loop import Loop

_LOOK_EVERY_S: Final = 0.005
"""How late a deadline may be seen by a loop that does not sleep."""


class Deadlines:
    """Calls `tick(now)` when `next_deadline()` has come. Both are in seconds of trio's clock; None:
    there is nothing to wait for. A `Poller` of `loop`, from `run` until its end."""

    def __init__(
        self,
        loop: Loop,
        next_deadline: Callable[[], float | None],
        tick: Callable[[float], None],
    ) -> None:
        self._loop = loop
        self._next_deadline = next_deadline
        self._tick = tick
        self._look_at = 0.0
        self._awaited_s = inf
        """What the task waits for."""
        self._earlier = trio.Event()

    def poll(self) -> bool:
        """See `Poller`; no work is done here."""
        now = self._loop.now
        if now >= self._look_at:
            self._look_at = now + _LOOK_EVERY_S
            self._look()
        return False

    def usual_ring(self) -> tuple[()]:
        """See rows.MaybeUsual: a look now and then is enough."""
        return ()

    def arm(self) -> bool:
        """The loop is about to sleep; after a nap it asks again."""
        if not self._loop.naps_first:
            self._look()
        return False

    def disarm(self) -> None:
        """Nothing to undo."""

    def _look(self) -> None:
        deadline_s = self._next_deadline()
        if deadline_s is not None and deadline_s < self._awaited_s:
            self._awaited_s = deadline_s
            self._earlier.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        self._loop.add_poller(self)
        try:
            while True:
                self._earlier = trio.Event()
                deadline_s = self._next_deadline()
                self._awaited_s = inf if deadline_s is None else deadline_s
                with trio.move_on_at(self._awaited_s):
                    await self._earlier.wait()
                    continue
                now = trio.current_time()
                due_s = self._next_deadline()
                if due_s is not None and due_s <= now:
                    self._tick(now)
                    self._loop.turn.end()
        finally:
            self._loop.remove_poller(self)

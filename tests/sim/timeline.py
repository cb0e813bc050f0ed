"""What happens when, on virtual time.

Time stands still while any task can run. When none can, it jumps to what is due next: a deadline of
trio's, or a call of the `Timeline`. Those calls are made between two steps of trio's scheduler: a
task for each would cost more than everything else in a program.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from itertools import count
from math import inf

import trio
import trio._core._run as trio_run
from trio.testing import MockClock


class Stuck(AssertionError):
    """Nothing will ever happen again. Raised out of trio's scheduler, as there is no other way."""


class Timeline:
    """Calls that are due at some time. Those of one moment are made in the order of asking."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._failure: BaseException | None = None
        self._failed = trio.Event()
        self.clock = MockClock(autojump_threshold=0)
        """For `trio.run`."""
        # Asked for several times in each turn, and it has no rate.
        self.clock.current_time = lambda: self.clock._virtual_base  # type: ignore[method-assign]
        self.clock._autojump = self._jump  # type: ignore[method-assign]

    def after(self, delay_s: float, call: Callable[[], None]) -> float:
        """Make `call()` after `delay_s`; the time at which that will be."""
        return self.at(self.clock._virtual_base + delay_s, call)

    def at(self, when_s: float, call: Callable[[], None]) -> float:
        """Make `call()` at `when_s`; the same time."""
        heapq.heappush(self._due, (when_s, next(self._numbers), call))
        return when_s

    async def run(self) -> None:
        """Raises what a call has raised."""
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    def _jump(self) -> None:
        """No task can run: go on to what is due next."""
        due, clock = self._due, self.clock
        runner = trio_run.GLOBAL_RUN_CONTEXT.runner
        while not runner.runq:
            deadline_s = runner.deadlines.next_deadline()
            if not due or deadline_s < due[0][0]:
                if deadline_s == inf:
                    raise Stuck("every task waits for another, and for no time")
                clock._virtual_base = max(clock._virtual_base, deadline_s)
                return
            when_s, _, call = heapq.heappop(due)
            clock._virtual_base = max(clock._virtual_base, when_s)
            try:
                call()
            except BaseException as error:
                self._failure = error
                self._failed.set()
                return

"""What happens when, on virtual time.

Time stands still while any task can run. When none can, it jumps to what is due next: a deadline of
trio's, or a call of the `Timeline`. Those calls are made between two steps of trio's scheduler: a
task for each would cost more than everything else in a program.
"""

from __future__ import annotations

import heapq
import types
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from itertools import count
from math import inf
from typing import Any, Final

import trio
import trio._core._run as trio_run


class Stuck(AssertionError):
    """Nothing will ever happen again. Raised out of trio's scheduler, as there is no other way."""


class _Time:
    """Of the program that runs: there is one at a time."""

    def __init__(self) -> None:
        self.now_s = 0.0


_TIME = _Time()
now: Final[Callable[[], float]] = partial(getattr, _TIME, "now_s")
"""`trio.current_time`, which is asked for in each turn several times."""


_checkpoint: Final = trio.lowlevel.checkpoint


class _Done:
    """The outcome of a wait that ends, for all of them: as `outcome.Value(None)`."""

    @staticmethod
    def unwrap() -> None:
        return None


_DONE: Final[Any] = _Done()


def reschedule(task: trio.lowlevel.Task, next_send: Any = _DONE) -> None:
    """`trio.lowlevel.reschedule`, without what no program has: instruments, and a host loop."""
    task._next_send_fn = task.coro.send
    task._next_send = next_send
    task._abort_func = None
    task.custom_sleep_data = None
    task._runner.runq.append(task)


@types.coroutine
def _until(trap: Any) -> Generator[Any, Any, None]:
    """`trio.lowlevel.wait_task_rescheduled(trap.abort_func)`, in one frame for three."""
    (yield trap).unwrap()


class _WaitsForEvent:
    """What `wait_for_event` waits with."""

    __slots__ = ("_task", "_tasks")

    def __init__(self, task: trio.lowlevel.Task, tasks: set[trio.lowlevel.Task]) -> None:
        self._task = task
        self._tasks = tasks

    def abort_func(self, _: object) -> trio.lowlevel.Abort:
        """For the scheduler: the task is cancelled."""
        self._tasks.remove(self._task)
        return trio.lowlevel.Abort.SUCCEEDED


async def wait_for_event(event: trio.Event) -> None:
    """`trio.Event.wait`."""
    if event._flag:
        await _checkpoint()
    else:
        task = trio.lowlevel.current_task()
        event._tasks.add(task)
        await _until(_WaitsForEvent(task, event._tasks))


class Bell:
    """What one task waits for, again and again; an event that is cheap."""

    __slots__ = ("_has_rung", "_task")

    def __init__(self) -> None:
        self._task: trio.lowlevel.Task | None = None
        self._has_rung = False

    def ring(self) -> None:
        """The task goes on, or will not wait the next time."""
        task, self._task = self._task, None
        if task is None:
            self._has_rung = True
        else:
            reschedule(task)

    def silence(self) -> None:
        """Whatever rang until now is over."""
        self._has_rung = False

    def wait(self) -> Awaitable[None]:
        """Until it rings, or has rung since the last wait. To be awaited at once."""
        if self._has_rung:
            self._has_rung = False
            return _checkpoint()
        self._task = trio.lowlevel.current_task()
        return _until(self)

    def abort_func(self, _: object) -> trio.lowlevel.Abort:
        """For the scheduler: the task is cancelled."""
        self._task = None
        return trio.lowlevel.Abort.SUCCEEDED


class Clock(trio.abc.Clock):
    """Virtual time, for `tests.sim.scheduler`."""

    def __init__(self, due: list[tuple[float, int, Callable[[], None]]]) -> None:
        """`due`: calls to be made, by time."""
        self._due = due
        self.failure: BaseException | None = None
        self.failed = trio.Event()
        _TIME.now_s = 0.0

    def start_clock(self) -> None:
        """It begins with the program."""

    def current_time(self) -> float:
        return _TIME.now_s

    def deadline_to_sleep_time(self, deadline: float) -> float:
        return 0.0

    def jump(self, runner: trio_run.Runner) -> bool:
        """No task can run: go on to what is due next. False if nothing is."""
        due, deadlines = self._due, runner.deadlines
        while not runner.runq:
            deadline_s = deadlines.next_deadline()
            if due and due[0][0] <= deadline_s:
                when_s, _, call = heapq.heappop(due)
                if when_s > _TIME.now_s:
                    _TIME.now_s = when_s
                try:
                    call()
                except BaseException as error:
                    self.failure = error
                    self.failed.set()
                    break
            elif deadline_s == inf:
                return False
            else:
                if deadline_s > _TIME.now_s:
                    _TIME.now_s = deadline_s
                deadlines.expire(_TIME.now_s)
        return True


class Timeline:
    """Calls that are due at some time. Those of one moment are made in the order of asking."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self.clock = Clock(self._due)
        """For `trio.run`."""

    def after(self, delay_s: float, call: Callable[[], None]) -> float:
        """Make `call()` after `delay_s`; the time at which that will be."""
        return self.at(_TIME.now_s + delay_s, call)

    def at(self, when_s: float, call: Callable[[], None]) -> float:
        """Make `call()` at `when_s`; the same time."""
        heapq.heappush(self._due, (when_s, next(self._numbers), call))
        return when_s

    async def sleep(self, delay_s: float) -> None:
        """As `trio.sleep`, for less: no scope is made and cancelled."""
        if not delay_s:
            await trio.lowlevel.checkpoint()
            return
        bell = Bell()
        self.after(delay_s, bell.ring)
        await bell.wait()

    async def run(self) -> None:
        """Raises what a call has raised."""
        await self.clock.failed.wait()
        assert self.clock.failure is not None
        raise self.clock.failure

"""trio's scheduler for simulated programs: the same steps, without what no program has.

There are no descriptors to wait for, no instruments and no host loop, and time jumps when no task
can run: what is left of `trio._core._run.unrolled_run` takes half the time, a tenth of a program's.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Generator
from math import inf
from types import TracebackType
from typing import Any, NoReturn

import trio
import trio._core._run as trio_run
from outcome import Error, Value
from trio import TrioInternalError
from trio._core._ki import enable_ki_protection

from tests.sim.timeline import Clock, Stuck, now, reschedule

_LOOK_EVERY = 256
"""Steps between two looks at real descriptors: an interrupt from the keyboard comes by one."""
_CONTEXT = trio_run.GLOBAL_RUN_CONTEXT


@enable_ki_protection
def steps(
    runner: trio_run.Runner,
    async_fn: Callable[..., Awaitable[object]],
    args: tuple[Any, ...],
    host_uses_signal_set_wakeup_fd: bool = False,
) -> Generator[float, Any, None]:
    """`unrolled_run`, which see for the reasons of all this."""
    clock = runner.clock
    assert isinstance(clock, Clock)
    left = _LOOK_EVERY
    try:
        runner.entry_queue.wakeup.wakeup_on_signals()
        runner.init_task = runner.spawn_impl(
            runner.init, (async_fn, args), None, "<init>", system_task=True
        )
        runq = runner.runq
        while runner.tasks:
            left -= 1
            is_idle = not runq and not clock.jump(runner)
            if is_idle or not left:
                # At the end of a run trio calls itself, by a descriptor as well.
                left = _LOOK_EVERY
                runner.io_manager.process_events((yield 0))
                if not runq:
                    raise Stuck("every task waits for another, and for no time")
            if len(runq) == 1:
                _step(runner, runq.popleft())
                continue
            batch = list(runq)
            runq.clear()
            batch.sort(key=_age)
            trio_run._r.shuffle(batch)
            while batch:
                _step(runner, batch.pop())
    except TrioInternalError:
        raise
    except BaseException as error:
        raise TrioInternalError("the simulation's scheduler has failed") from error
    finally:
        runner.close()
        _CONTEXT.__dict__.clear()
        if runner.ki_pending:
            runner.main_task_outcome = Error(KeyboardInterrupt())


def _age(task: trio_run.Task) -> int:
    return task._counter


@enable_ki_protection
def _step(runner: trio_run.Runner, task: trio_run.Task) -> None:
    """One task, until it waits or ends."""
    _CONTEXT.task = task
    go_on, what = task._next_send_fn, task._next_send
    task._next_send_fn = task._next_send = None
    assert go_on is not None
    outcome: Any = None
    try:
        message = task.context.run(go_on, what)
    except StopIteration as end:
        outcome = Value(end.value)
    except BaseException as error:
        outcome = Error(error.with_traceback(_without_ours(error.__traceback__)))
    if outcome is not None:
        runner.task_exited(task, outcome)
    else:
        if message is trio_run.CancelShieldedCheckpoint:
            reschedule(task)
        else:  # It waits: a `WaitTaskRescheduled` of trio's, or a `Bell`.
            task._abort_func = message.abort_func
            if runner.ki_pending and task is runner.main_task:
                task._attempt_delivery_of_pending_ki()
            if task._cancel_status.effectively_cancelled:
                task._attempt_delivery_of_any_pending_cancel()
    del _CONTEXT.task


def _without_ours(traceback: TracebackType | None) -> TracebackType | None:
    return None if traceback is None else traceback.tb_next


@enable_ki_protection
def enter(scope: trio_run.CancelScope) -> trio_run.CancelScope:
    """`CancelScope.__enter__`, of which a program has hundreds."""
    task = _CONTEXT.task
    if scope._has_been_entered:
        raise RuntimeError("each CancelScope may only be used for a single 'with' block")
    scope._has_been_entered = True
    if scope._relative_deadline != inf:
        scope._deadline = now() + scope._relative_deadline
        scope._relative_deadline = inf
    if now() >= scope._deadline:
        scope._cancel(trio_run.CancelReason(source="deadline"))
    parent = task._cancel_status
    status = scope._cancel_status = trio_run.CancelStatus(scope=scope, parent=None)
    if parent is not None:
        status._parent = parent
        parent._children.add(status)
    if scope._cancel_called or (parent is not None and parent.effectively_cancelled):
        status.recalculate()
    task._activate_cancel_status(status)
    _register(scope)
    return scope


_close_any = trio_run.CancelScope._close


@enable_ki_protection
def close(scope: trio_run.CancelScope, error: BaseException | None) -> BaseException | None:
    """`CancelScope._close`: here the usual cases, of a scope that nothing has left."""
    status, task = scope._cancel_status, _CONTEXT.task
    if (
        status is None
        or task._cancel_status is not status
        or isinstance(error, BaseExceptionGroup)
        or len(status._tasks) > 1
        or status._children
    ):
        return _close_any(scope, error)
    parent = status._parent
    task._activate_cancel_status(parent)
    if (
        isinstance(error, trio.Cancelled)
        and status.effectively_cancelled
        and not status.parent_cancellation_is_visible_to_us
    ):
        scope.cancelled_caught = True
        error = None
    if parent is not None:
        parent._children.remove(status)
        status._parent = None
    scope._cancel_status = None
    _register(scope)
    return error


class _Cancels:
    """The outcome of a wait that is cancelled: as `outcome.Error`."""

    __slots__ = ("_error",)

    def __init__(self, error: BaseException) -> None:
        self._error = error

    def unwrap(self) -> None:
        error = self._error
        try:
            raise error
        finally:
            del error, self  # As outcome does, so that there is no cycle.


def deliver_cancel(task: trio_run.Task) -> None:
    """`Task._attempt_delivery_of_any_pending_cancel`; the error is not raised twice."""
    abort, status = task._abort_func, task._cancel_status
    if abort is None or not status.effectively_cancelled:
        return
    reason = status._scope._cancel_reason

    def error() -> BaseException:
        if reason is None:
            return trio.Cancelled._create(source="unknown", reason="misnesting")
        return trio.Cancelled._create(
            source=reason.source, reason=reason.reason, source_task=reason.source_task
        )

    def raise_cancel() -> NoReturn:
        raise error()

    task._abort_func = None
    if abort(raise_cancel) is trio.lowlevel.Abort.SUCCEEDED:
        reschedule(task, _Cancels(error()))


def registering(scope: trio_run.CancelScope) -> _Registering:
    """`CancelScope._might_change_registered_deadline`, without a generator each time."""
    return _Registering(scope)


class _Registering:
    __slots__ = ("_scope",)

    def __init__(self, scope: trio_run.CancelScope) -> None:
        self._scope = scope

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        _register(self._scope)


@enable_ki_protection
def _register(scope: trio_run.CancelScope) -> None:
    """The deadline of `scope` may have changed, or that it has one."""
    old = scope._registered_deadline
    is_over = scope._cancel_status is None or scope._cancel_called
    new = inf if is_over else scope._deadline
    if old != new:
        scope._registered_deadline = new
        deadlines = _CONTEXT.runner.deadlines
        if old != inf:
            deadlines.remove(old, scope)
        if new != inf:
            deadlines.add(new, scope)

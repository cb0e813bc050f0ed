"""A time limit for calls that have none: librbd waits without a limit for a lost cluster."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from nbd_plugin.errors import PluginError

_T = TypeVar("_T")


_threads: set[threading.Thread] = set()


def in_background(what: str, function: Callable[[], object]) -> None:
    """Call `function` on a thread of its own; what it returns or raises is dropped."""

    def run() -> None:
        with contextlib.suppress(Exception):
            function()
        _threads.discard(threading.current_thread())

    thread = threading.Thread(target=run, name=f"nbd_plugin: {what}", daemon=True)
    _threads.add(thread)
    thread.start()


def wait_for_background(timeout_s: float) -> bool:
    """Wait for all calls that still run, abandoned ones too; False if some do afterwards."""
    deadline = time.monotonic() + timeout_s
    for thread in list(_threads):
        thread.join(max(0.0, deadline - time.monotonic()))
    return not _threads


class _Call(Generic[_T]):
    """One call on a thread of its own, and whether its caller still waits."""

    def __init__(self, function: Callable[[], _T], too_late: Callable[[_T], object] | None) -> None:
        self._function = function
        self._too_late = too_late
        self._lock = threading.Lock()
        self._abandoned = False
        self.done = threading.Event()
        self.result: _T | None = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            result = self._function()
        except BaseException as error:
            self.error = error
        else:
            with self._lock:
                self.result = result
                if not self._abandoned:
                    self.done.set()
                    return
            if self._too_late is not None:
                self._too_late(result)
        self.done.set()

    def abandon(self) -> bool:
        """The caller waits no longer. False if the outcome arrived at the last moment."""
        with self._lock:
            if self.done.is_set():
                return False
            self._abandoned = True
            return True


def call_within(
    timeout_s: float,
    what: str,
    function: Callable[[], _T],
    *,
    too_late: Callable[[_T], object] | None = None,
) -> _T:
    """Return what `function` returns, or raise what it raises.

    After `timeout_s` raises PluginError (ETIMEDOUT) naming `what`; the call goes on by itself
    (it cannot be cancelled), and `too_late` gets what it returns in the end.
    """
    call = _Call(function, too_late)
    in_background(what, call.run)
    if not call.done.wait(timeout_s) and call.abandon():
        raise PluginError(f"{what}: no answer in {timeout_s:g} s", errno.ETIMEDOUT)
    if call.error is not None:
        raise call.error
    return call.result  # type: ignore[return-value]

"""Runs the container's program and starts it again when it cannot begin its work yet.

Docker's own restarts are not enough: a container that is restarted over and over never becomes
unhealthy, and Docker waits up to a minute between its attempts. So this starts a program again that
exits (its server is not reachable yet, a certificate is wrong). A program that was killed ends the
container: then Docker's restart policy decides.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from environment import SettingError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 8.0
_LONG_RUN_S = 60.0
"""After a run of this length the next pause is the shortest one again."""


def supervise(command: Sequence[str]) -> NoReturn:
    """Run `command` until it ends for good, then exit with its status (128 + a signal's number).

    Passes on SIGTERM and SIGINT. Raises SettingError when the program cannot be started.
    """
    process: subprocess.Popen[bytes] | None = None
    stopping = False

    def stop(number: int, _frame: FrameType | None) -> None:
        nonlocal stopping
        stopping = True
        if process is None or process.returncode is not None:
            sys.exit(0)
        process.send_signal(number)

    for number in _SIGNALS:
        signal.signal(number, stop)
    pause_s = _FIRST_PAUSE_S
    while True:
        began_s = time.monotonic()
        # A signal that comes meanwhile is delivered once there is a process to pass it on to.
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process = subprocess.Popen(command, preexec_fn=_unblock)
        except OSError as error:
            raise SettingError(f"cannot run {command[0]}: {error.strerror}") from None
        finally:
            _unblock()
        status = process.wait()
        if stopping or status <= 0:
            sys.exit(status if status >= 0 else 128 - status)
        if time.monotonic() - began_s > _LONG_RUN_S:
            pause_s = _FIRST_PAUSE_S
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)


def _unblock() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

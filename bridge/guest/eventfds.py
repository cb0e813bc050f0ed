"""Writing to an eventfd that a front-end shares, and may make blocking.

O_NONBLOCK is of the open file, which the front-end has as well: it can clear the flag, fill the
counter, and the next write would stop the whole process. Asking before each write (fcntl, poll)
would cost as much as the write, and the front-end could act in between; a write that cannot block
(RWF_NOWAIT) the system does not have for eventfds. So a thread looks every now and then whether a
write is still the one that it was the last time. If so, and if it would block, it takes the
counter's value away, which lets the write end. While nothing is written the thread sleeps.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
import time
from typing import Final

_LOOK_S: Final = 0.25
_QUIET_LOOKS: Final = 8
"""After so many looks without a write between them the thread waits to be woken."""


class EventfdWriter:
    """Writes to eventfds from one thread, the loop's."""

    def __init__(self, *, look_s: float = _LOOK_S) -> None:
        self._look_s = look_s
        self._fd: int | None = None
        """What is being written to at this moment."""
        self._writes = 0
        self._rescued = -1
        """The number of the last write that had to be helped."""
        self._watched = False
        self._wanted = threading.Event()
        self._thread: threading.Thread | None = None

    def signal(self, fd: int) -> bool:
        """Add 1 to the counter of `fd`; False if that blocked: do not do it again.

        A full one (EAGAIN) is readable already; one that cannot be written to is its own loss.
        """
        # The number and the descriptor before the question: see `_watch`.
        self._writes += 1
        self._fd = fd
        if not self._watched:
            self._wake()
        try:  # noqa: SIM105 (contextlib.suppress costs as much as the system call)
            os.eventfd_write(fd, 1)
        except OSError:
            pass
        self._fd = None
        return self._rescued != self._writes

    def _wake(self) -> None:
        self._watched = True
        if self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="eventfds", daemon=True)
            self._thread.start()
        self._wanted.set()

    def _watch(self) -> None:
        seen = -1
        quiet = 0
        while True:
            time.sleep(self._look_s)
            fd, writes = self._fd, self._writes
            if writes != seen:
                seen, quiet = writes, 0
                continue
            if fd is not None and _would_block(fd):
                self._rescued = writes
                with contextlib.suppress(OSError):
                    os.set_blocking(fd, False)
                    os.eventfd_read(fd)
                continue
            if fd is not None:
                continue  # This thread ran, and that one did not: a busy machine.
            quiet += 1
            if quiet >= _QUIET_LOOKS:
                self._wanted.clear()
                self._watched = False
                if self._fd is None and self._writes == seen:
                    self._wanted.wait()
                self._watched = True
                quiet = 0


def _would_block(fd: int) -> bool:
    """A write of 1 to `fd` would wait: it is full, and blocking."""
    try:
        if not os.get_blocking(fd):
            return False
    except OSError:
        return False
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return not poll.poll(0)


writer = EventfdWriter()
"""The process's: one loop, one thread that looks after it."""

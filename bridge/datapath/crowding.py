"""Whether others want the processor on which the data path runs.

The system tells for how long a thread has run, and for how long it could have but waited for a
processor (`/proc/PID/schedstat`). Where both are little apart, others get as much of it as we do,
and time spent polling is taken from them: from the guest and the server perhaps. Where there is
a processor for everyone we hardly wait, however long we poll.
"""

from __future__ import annotations

import os
from typing import Final

_LOOK_EVERY_S: Final = 0.05
_PAUSE_S: Final = 1.0
"""So long it is believed. Then we poll again, for one look: without polling one cannot tell, as who
sleeps all the time waits for a processor at each awakening."""
_LEAST_WAITED: Final = 0.1
"""Of the time between two looks."""
_LEAST_SHARE: Final = 0.5
"""Waited, of what it has run. Measured while polling, 1 MiB writes on two cores: 0.00 to 0.33 where
nothing else ran, 0.6 to 2.0 beside two endless loops."""


class Crowding:
    """See the module's text. `path`: of the thread that has the turns, the process's first."""

    def __init__(self, path: str = "/proc/self/schedstat") -> None:
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._fd = -1  # A system that does not count this: then we never wait.
        self._is_crowded = False
        self._looked_s = 0.0
        self._next_s = 0.0
        self._ran_s = self._waited_s = 0.0

    def close(self) -> None:
        """Give the descriptor back."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def look(self, now_s: float) -> bool:
        """Others want the processor, as far as is known at `now_s`, of a monotonic clock. It is
        meant to be asked in every turn."""
        if now_s < self._next_s or self._fd < 0:
            return self._is_crowded
        try:
            ran_s, waited_s = self._times_s()
        except (OSError, ValueError):
            self.close()  # Something else than what Linux says there.
            self._is_crowded = False
            return False
        ran, waited = ran_s - self._ran_s, waited_s - self._waited_s
        elapsed_s = now_s - self._looked_s
        # (What was long ago, as before an idle time, is no look.)
        is_recent = elapsed_s < 2 * _LOOK_EVERY_S
        self._is_crowded = is_recent and waited > max(_LEAST_SHARE * ran, _LEAST_WAITED * elapsed_s)
        self._ran_s, self._waited_s, self._looked_s = ran_s, waited_s, now_s
        self._next_s = now_s + (_PAUSE_S if self._is_crowded else _LOOK_EVERY_S)
        return self._is_crowded

    def _times_s(self) -> tuple[float, float]:
        ran, waited, *_ = os.pread(self._fd, 100, 0).split()
        return int(ran) / 1e9, int(waited) / 1e9

"""The one memory barrier that a ring needs and that Python has no name for.

x86 lets a load pass an earlier store. A device that stores `avail_event` and then loads
`avail.idx` (or stores `used.idx` and then loads `used_event`) without a full barrier in between
can miss a kick (or a call), and both sides wait. An uncontended lock's acquire and release are
locked instructions, which are full barriers on x86 and acquire/release on ARM.
"""

from __future__ import annotations

import platform
from threading import Lock
from typing import Final

WEAK_ORDER: Final = platform.machine() not in ("x86_64", "i686", "i386")
"""Whether loads can pass loads, or stores stores: there a ring needs fences that x86 does not."""

_lock = Lock()
_acquire = _lock.acquire
_release = _lock.release


def fence() -> None:
    """Order every earlier store before every later load (60 ns)."""
    _acquire()
    _release()

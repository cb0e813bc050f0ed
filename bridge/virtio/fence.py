"""The one memory barrier that a ring needs and that Python has no name for.

x86 lets a load pass an earlier store. A device that stores `avail_event` and then loads
`avail.idx` (or stores `used.idx` and then loads `used_event`) without a full barrier in between
can miss a kick (or a call) for ever. An uncontended lock's acquire and release are locked
instructions, which are full barriers on x86 and acquire/release on ARM.
"""

from __future__ import annotations

from threading import Lock

_lock = Lock()
_acquire = _lock.acquire
_release = _lock.release


def fence() -> None:
    """Order every earlier store before every later load (60 ns)."""
    _acquire()
    _release()

"""Keeps the Python thread state of nbdkit's threads between callbacks.

nbdkit calls into Python with PyGILState_Ensure and PyGILState_Release. On a thread that Python
did not start, that pair builds a thread state and tears it down again, for every request: half of
the cost of a small read. One more Ensure keeps the state until a matching Release.

nbdkit runs `open` and `close` of a connection on one thread, and its requests as well unless they
are parallel; parallel ones run on other threads, which gain nothing and lose nothing.
"""

from __future__ import annotations

import ctypes

_ensure = ctypes.pythonapi.PyGILState_Ensure
_ensure.argtypes = ()
_ensure.restype = ctypes.c_int
_release = ctypes.pythonapi.PyGILState_Release
_release.argtypes = (ctypes.c_int,)
_release.restype = None

_LOCKED = 0
"""PyGILState_LOCKED: this thread held the interpreter lock before, and keeps it."""


def keep() -> None:
    """Keep the calling thread's state until it calls `let_go`. The calls nest."""
    _ensure()


def let_go() -> None:
    """Undo one `keep` of the calling thread."""
    _release(_LOCKED)

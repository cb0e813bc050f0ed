"""Keeps the Python thread state of nbdkit's threads between callbacks.

nbdkit calls into Python with PyGILState_Ensure and PyGILState_Release. On a thread that Python
did not start, that pair builds a thread state and tears it down again, for every request: half of
the cost of a small read, and more where several threads do it at once. One more Ensure keeps the
state until a matching Release.

nbdkit runs `open` and `close` of a connection on one thread: they keep that thread's state and
let it go. Parallel requests run on worker threads, which end with the connection; they let go when
the C library runs their thread-local destructors (`__cxa_thread_atexit_impl`, glibc). nbdkit joins
its workers before it closes the connection, so that happens while the interpreter still lives.
"""

from __future__ import annotations

import ctypes
import threading

_ensure = ctypes.pythonapi.PyGILState_Ensure
_ensure.argtypes = ()
_ensure.restype = ctypes.c_int
_release = ctypes.pythonapi.PyGILState_Release
_release.argtypes = (ctypes.c_int,)
_release.restype = None

_LOCKED = 0
"""PyGILState_LOCKED: this thread held the interpreter lock before, and keeps it."""

kept: set[int] = set()
"""The threads (`threading.get_ident()`) that need nothing more: look here before `keep_worker`."""


def keep() -> None:
    """Keep the calling thread's state until it calls `let_go`."""
    _ensure()
    kept.add(threading.get_ident())


def let_go() -> None:
    """Undo the calling thread's `keep`."""
    kept.discard(threading.get_ident())
    _release(_LOCKED)


def keep_worker() -> None:
    """Keep the calling thread's state until the thread ends, where the C library can tell."""
    if _at_thread_exit is None:
        kept.add(threading.get_ident())
    elif _at_thread_exit(_let_go_at_exit, None, _THIS_LIBRARY) == 0:
        keep()


def _let_go_in_callback(_argument: int | None) -> None:
    # ctypes has its own Ensure and Release around this: the state goes with that Release.
    let_go()


_let_go_at_exit = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_let_go_in_callback)

_THIS_LIBRARY = ctypes.cast(_ensure, ctypes.c_void_p)
"""An address in the library that must stay until then. glibc (2.36) crashes on NULL."""


def _find_at_thread_exit() -> ctypes._NamedFuncPointer | None:
    try:
        function = ctypes.CDLL(None).__getattr__("__cxa_thread_atexit_impl")
    except AttributeError:
        return None
    function.argtypes = (type(_let_go_at_exit), ctypes.c_void_p, ctypes.c_void_p)
    function.restype = ctypes.c_int
    return function


_at_thread_exit = _find_at_thread_exit()

"""nbdkit's entry: `nbdkit python nbd_plugin/plugin.py PARAMETER=VALUE…`

nbdkit calls the functions below by name, from many threads, and runs them in its own Python
interpreter (the system's). They only translate; `service` and the stores do the work. Those that
get a `handle` run in many threads at once. An exception fails the call: nbdkit logs it as one line
and sends the client its errno.

Source: nbdkit-python-plugin(3) and nbdkit-plugin(3), which say when each is called.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable
from threading import get_ident
from typing import NoReturn, TypeVar

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import nbdkit

from nbd_plugin import connections, filters, keepalive, thread_state
from nbd_plugin.errors import PluginError, nbd_errno, one_line
from nbd_plugin.service import Service
from nbd_plugin.session import Handle
from nbd_plugin.settings import Settings
from nbd_plugin.store import Extents
from nbd_plugin.thread_state import keep_worker, kept

# It may be the folder of a virtual environment's packages, which are not for nbdkit's interpreter.
# The modules of `nbd_plugin` that are imported later are found by its own path.
del sys.path[0]

API_VERSION = 2

_T = TypeVar("_T")

_MAY_TRIM: int = nbdkit.FLAG_MAY_TRIM
_FUA: int = nbdkit.FLAG_FUA
_REQ_ONE: int = nbdkit.FLAG_REQ_ONE
_FAST_ZERO: int = nbdkit.FLAG_FAST_ZERO

_settings = Settings()
_service: Service
_connections = connections.Connections()


def _log_line(_type: object, error: BaseException, *_rest: object) -> list[str]:
    """What nbdkit logs for an exception, and from 1.42 on also tells the client: one line.

    nbdkit asks `traceback.format_exception` for it, which would give a traceback.
    """
    return [one_line(error)]


traceback.format_exception = _log_line  # type: ignore[assignment]


def _fail(error: BaseException) -> NoReturn:
    """Record the errno for the client; nbdkit logs the exception."""
    nbdkit.set_error(nbd_errno(error))
    raise error


# --- the server's life -----------------------------------------------------------------------


def thread_model() -> int:
    """How many threads serve a connection: nbdkit's constant."""
    # SERIALIZE_REQUESTS: one request at a time per connection, on the connection's own thread.
    if _settings.is_parallel:
        return nbdkit.THREAD_MODEL_PARALLEL
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def config(key: str, value: str) -> None:
    """Take one parameter of the command line. Raises PluginError for an unknown one."""
    _settings.set(key, value)


def config_complete() -> None:
    """Check all parameters together. Raises PluginError, naming what is wrong."""
    _settings.check()


def get_ready() -> None:
    """Find out what can be found out before the fork. Raises PluginError."""
    global _service
    _service = Service(_settings, is_filtered=filters.may_hold_data())
    _service.prepare()


def after_fork() -> None:
    """Connect to the store, in the process that serves. Raises PluginError."""
    # Here and not in get_ready: threads (librados has some) do not survive nbdkit's fork.
    _service.start()
    _connections.start()


def cleanup() -> None:
    """All connections have ended: disconnect from the store."""
    _connections.stop()
    _service.stop()


# --- exports and connections -----------------------------------------------------------------


def list_exports(readonly: bool, is_tls: bool) -> list[tuple[str, str]]:
    """(name, description) of every volume."""
    return _service.list_exports()


def default_export(readonly: bool, is_tls: bool) -> str:
    """What an export without a name stands for; "" for nothing."""
    return _service.default_export()


def preconnect(readonly: bool) -> None:
    """A client has connected, and has opened no export yet."""
    _connections.is_silent(connections.peer_address())


def open(readonly: bool) -> Handle:
    """Admit a client that has chosen an export. An error reaches the client as its errno."""
    peer = connections.peer_address()
    _connections.is_heard(peer)
    try:
        handle = _service.open(nbdkit.export_name(), read_only=readonly)
    except Exception as error:
        _connections.is_silent(peer)
        _fail(error)
    handle.peer = peer
    keepalive.enable()
    thread_state.keep()
    return handle


def close(handle: Handle) -> None:
    """A client has gone; no request of it is running."""
    thread_state.let_go()
    # It may open another export, or be at its end; nbdkit logs an error if asked then.
    _connections.is_silent(handle.peer)
    _service.close(handle)


def export_description(handle: Handle) -> str:
    """What a client is told of the volume, for people and for the bridge."""
    return _service.describe(handle)


def get_size(handle: Handle) -> int:
    """The size in bytes."""
    return handle.disk.size_bytes


def block_size(handle: Handle) -> tuple[int, int, int]:
    """Minimum, preferred and maximum, in bytes (NBD_INFO_BLOCK_SIZE)."""
    return handle.disk.block_sizes


def can_write(handle: Handle) -> bool:
    """Whether the client may write."""
    return not handle.read_only


def can_multi_conn(handle: Handle) -> bool:
    """Whether a flush on one connection covers the writes of all (NBD_FLAG_CAN_MULTI_CONN)."""
    return handle.multi_conn


def can_flush(handle: Handle) -> bool:
    """Every store can."""
    return True


def can_fua(handle: Handle) -> int:
    """`pwrite`, `trim` and `zero` look at the flag themselves."""
    return nbdkit.FUA_NATIVE


def can_trim(handle: Handle) -> bool:
    """Whether the client may discard."""
    return not handle.read_only


def can_zero(handle: Handle) -> bool:
    """Whether the client may zero."""
    return not handle.read_only


def can_fast_zero(handle: Handle) -> bool:
    """Whether `zero` can say that it would not be faster than writing."""
    return not handle.read_only


def can_extents(handle: Handle) -> bool:
    """Every store can."""
    return True


def can_cache(handle: Handle) -> int:
    """`cache` does it itself."""
    return nbdkit.CACHE_NATIVE


# --- requests --------------------------------------------------------------------------------
#
# `busy` and `revoked`: see session.Handle. The two frequent ones are written out, a helper would
# cost a call each.


def pread(handle: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Fill `buf` from byte `offset` on."""
    if get_ident() not in kept:
        keep_worker()
    busy = handle.busy
    busy.append(None)
    try:
        if handle.revoked:
            handle.check_alive()
        handle.disk.pread(buf, offset)
    except Exception as error:
        _fail(error)
    finally:
        busy.pop()


def pwrite(handle: Handle, buf: memoryview, offset: int, flags: int) -> None:
    """Write `buf` at byte `offset`; durable on return if `flags` has FLAG_FUA."""
    if get_ident() not in kept:
        keep_worker()
    busy = handle.busy
    busy.append(None)
    try:
        _check_write(handle)
        handle.disk.pwrite(buf, offset, flags & _FUA != 0)
    except Exception as error:
        _fail(error)
    finally:
        busy.pop()


def flush(handle: Handle, flags: int) -> None:
    """Everything that was written before is durable on return."""
    _run(handle, handle.disk.flush)


def trim(handle: Handle, count: int, offset: int, flags: int) -> None:
    """Give back the space of `count` bytes at `offset`; `flags`: FLAG_FUA."""

    def do() -> None:
        _check_write(handle)
        handle.disk.trim(offset, count, flags & _FUA != 0)

    _run(handle, do)


def zero(handle: Handle, count: int, offset: int, flags: int) -> None:
    """Zero `count` bytes at `offset`; `flags`: FLAG_FUA, FLAG_MAY_TRIM, FLAG_FAST_ZERO."""

    def do() -> None:
        _check_write(handle)
        handle.disk.zero(
            offset,
            count,
            may_trim=flags & _MAY_TRIM != 0,
            fua=flags & _FUA != 0,
            fast=flags & _FAST_ZERO != 0,
        )

    _run(handle, do)


def extents(handle: Handle, count: int, offset: int, flags: int) -> Extents:
    """What is allocated of `count` bytes at `offset`; `flags`: FLAG_REQ_ONE."""
    return _run(handle, lambda: handle.disk.extents(offset, count, flags & _REQ_ONE != 0))


def cache(handle: Handle, count: int, offset: int, flags: int) -> None:
    """Begin to read `count` bytes at `offset` into memory."""
    _run(handle, lambda: handle.disk.cache(offset, count))


def _run(handle: Handle, do: Callable[[], _T]) -> _T:
    handle.busy.append(None)
    try:
        handle.check_alive()
        return do()
    except Exception as error:
        _fail(error)
    finally:
        handle.busy.pop()


def _check_write(handle: Handle) -> None:
    if handle.revoked:
        handle.check_alive()
    session = handle.session
    if session is None:
        raise PluginError("this export is read-only", errno.EROFS)
    if session.writer != handle.client:
        session.note_write(handle)

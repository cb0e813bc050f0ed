"""Lets the kernel notice clients that vanished without a word.

A client whose host lost power or network closes nothing. nbdkit would wait for its next request
for ever (1.32 has no keep-alive option), and the volume would stay open for writing with it. So
every TCP connection that this process accepted gets TCP keep-alives: a dead one ends after about
half a minute.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat

_IDLE_S = 15
_INTERVAL_S = 5
_PROBES = 3
_UNACKNOWLEDGED_MS = 30_000


def enable() -> None:
    """Set the options on all accepted TCP connections of this process. Never raises.

    A plugin is not told which socket a connection has, and setting them twice does no harm. What
    was not accepted (librados' own connections) is left alone.
    """
    found = [sock for fd in _open_sockets() if (sock := _duplicate(fd)) is not None]
    try:
        ports = {_local_port(sock) for sock in found if _is_listening(sock)}
        for sock in found:
            if not _is_listening(sock) and _local_port(sock) in ports:
                _set_options(sock)
    finally:
        for sock in found:
            sock.close()


def _open_sockets() -> list[int]:
    fds = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                fds.append(int(name))
    return fds


def _duplicate(fd: int) -> socket.socket | None:
    """A second descriptor of a TCP socket; it may be closed without harm to the first."""
    sock = None
    with contextlib.suppress(OSError):
        sock = socket.socket(fileno=os.dup(fd))
        if sock.family in (socket.AF_INET, socket.AF_INET6) and sock.type == socket.SOCK_STREAM:
            return sock
    if sock is not None:
        sock.close()
    return None


def _is_listening(sock: socket.socket) -> bool:
    return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))


def _local_port(sock: socket.socket) -> int:
    with contextlib.suppress(OSError):
        port: int = sock.getsockname()[1]
        return port
    return -1


def _set_options(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)

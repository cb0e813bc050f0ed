"""Lets the kernel notice clients that vanished without a word.

A client whose host lost power or network closes nothing. nbdkit would wait for its next request
without a limit (1.32 has no keep-alive option), and the volume would stay open for writing with it.
So every TCP connection that this process accepted gets TCP keep-alives: a dead one ends after about
half a minute.
"""

from __future__ import annotations

import contextlib
import socket

from nbd_plugin.connections import accepted

_IDLE_S = 15
_INTERVAL_S = 5
_PROBES = 3
_UNACKNOWLEDGED_MS = 30_000


def enable() -> None:
    """Set the options on all accepted TCP connections of this process. Never raises.

    A plugin is not told which socket a connection has, and setting them twice does no harm.
    """
    for sock in accepted():
        if sock.family in (socket.AF_INET, socket.AF_INET6):
            _set_options(sock)


def _set_options(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)

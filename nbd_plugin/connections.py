"""Ends connections that would never end: silent ones, and idle ones when nbdkit is to stop.

nbdkit (1.32 to 1.42) reads from each connection on a thread of its own and waits without a limit.
So a client that connects and says nothing costs a thread for as long as it likes, before TLS has
asked it for a certificate. And at SIGTERM nbdkit answers further requests with ESHUTDOWN, but an
idle client sends none: nbdkit waits for it, until something kills it. A plugin has no means of
closing a connection; but it may shut the socket down, and nbdkit's thread reads the end of it.

- A connection from the network has `HANDSHAKE_S` seconds to open an export, and of more than
  `MAX_SILENT` that have none, the oldest are ended. An honest client needs some milliseconds.
  nbdkit tells the plugin of a new connection (`preconnect`), and its peer's address, by which its
  socket is found. Clients of a unix socket have none; the file's mode says which users may connect.
- At SIGTERM all connections that have nothing to say are shut down for reading: what the client has
  sent is still answered. After `_LAST_WORDS_S` all others are, in both directions.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator

HANDSHAKE_S = 30.0
MAX_SILENT = 64

_PAUSE_S = 0.1
_LAST_WORDS_S = 3.0
_VERY_LONG_S = 1 << 30

_library = ctypes.CDLL(None, use_errno=True)


class Connections:
    """The connections of this nbdkit that have not opened an export."""

    def __init__(
        self,
        *,
        now: Callable[[], float] = time.monotonic,
        end: Callable[[set[bytes]], None] | None = None,
    ) -> None:
        self._now = now
        self._end = end or end_connections
        self._silent: dict[bytes, float] = {}
        """Peer's address → since when. In the order of time."""
        self._changed = threading.Condition()
        self._stopped = False
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """In the process that serves: threads do not survive nbdkit's fork."""
        for what, run in (("handshakes", self._watch), ("stop", self._end_all_at_stop)):
            thread = threading.Thread(target=run, name=f"nbd_plugin: {what}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def stop(self) -> None:
        """All connections have ended."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(1)

    # Called on the connection's thread.

    def is_silent(self, peer: bytes) -> None:
        """The connection has just begun, or no longer has an export."""
        if not peer:
            return
        with self._changed:
            self._silent.pop(peer, None)
            self._silent[peer] = self._now()
            if len(self._silent) == 1 or len(self._silent) > MAX_SILENT:
                self._changed.notify_all()

    def is_heard(self, peer: bytes) -> None:
        """The connection opens an export."""
        with self._changed:
            self._silent.pop(peer, None)

    # Threads.

    def _watch(self) -> None:
        while not self._stopped:
            with self._changed:
                self._changed.wait(self.due_in_s())
            self.end_silent()
            if self._silent:
                time.sleep(_PAUSE_S)  # ends many at once

    def due_in_s(self) -> float | None:
        """When `end_silent` has something to do; None: not before something new comes."""
        for since in self._silent.values():
            return 0 if len(self._silent) > MAX_SILENT else since + HANDSHAKE_S - self._now()
        return None

    def end_silent(self) -> None:
        """End the connections that have been silent for too long, or are too many."""
        with self._changed:
            too_many = len(self._silent) - MAX_SILENT
            began_before = self._now() - HANDSHAKE_S
            due = {
                peer
                for number, (peer, since) in enumerate(self._silent.items())
                if number < too_many or since <= began_before
            }
            for peer in due:
                del self._silent[peer]
        if due:
            self._end(due)

    def _end_all_at_stop(self) -> None:
        wait_for_stop()
        deadline = time.monotonic() + _LAST_WORDS_S
        quiet: set[int] = set()
        while not self._stopped:
            quiet = end_idle(quiet, all_of_them=time.monotonic() > deadline)
            time.sleep(_PAUSE_S)


def peer_address() -> bytes:
    """The address of the client whose connection's callback this is, as the kernel has it; empty
    if it has none that tells it from others."""
    buffer = ctypes.create_string_buffer(128)
    size = ctypes.c_uint32(len(buffer))
    if _library.nbdkit_peer_name(buffer, ctypes.byref(size)) != 0:
        return b""
    return _usable(buffer.raw[: size.value])


def wait_for_stop() -> None:
    """Return when nbdkit has been told to stop. It has no callback for that, but ends all sleep."""
    while _library.nbdkit_nanosleep(_VERY_LONG_S, 0) == 0 or ctypes.get_errno() == errno.EINTR:
        pass


def end_connections(peers: set[bytes]) -> None:
    """Shut down this process's connections with these peers. Never raises."""
    for sock in accepted():
        if _usable(_peer_of(sock)) in peers:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


def end_idle(quiet: set[int], *, all_of_them: bool) -> set[int]:
    """Shut down connections that have nothing to say now, and had nothing when `quiet` was
    returned; or all, in both directions. Never raises."""
    found = set()
    for sock in accepted():
        with contextlib.suppress(OSError):
            waiting = array.array("i", [0])
            fcntl.ioctl(sock.fileno(), termios.FIONREAD, waiting)
            inode = os.fstat(sock.fileno()).st_ino
            if all_of_them:
                sock.shutdown(socket.SHUT_RDWR)
            elif not waiting[0]:
                found.add(inode)
                if inode in quiet:
                    sock.shutdown(socket.SHUT_RD)
    return found


def accepted() -> Iterator[socket.socket]:
    """Every connection that this process accepted, as a second descriptor that is closed
    afterwards. What it made itself (librados does) has another local address than its listeners."""
    with contextlib.ExitStack() as stack:
        found = []
        for fd in _sockets():
            with contextlib.suppress(OSError):
                found.append(stack.enter_context(socket.socket(fileno=os.dup(fd))))
        listening = {_local(sock) for sock in found if _is_listening(sock)} - {None}
        for sock in found:
            if not _is_listening(sock) and _local(sock) in listening:
                yield sock


def _sockets() -> Iterator[int]:
    names: list[str] = []
    with contextlib.suppress(OSError):
        names = os.listdir("/proc/self/fd")
    for name in names:
        with contextlib.suppress(OSError):
            if stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                yield int(name)


def _is_listening(sock: socket.socket) -> bool:
    with contextlib.suppress(OSError):
        return bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN))
    return False


def _local(sock: socket.socket) -> object:
    """What a listener and what it accepted have in common: the port, or the path; else None."""
    with contextlib.suppress(OSError):
        name = sock.getsockname()
        return (sock.family, name[1] if isinstance(name, tuple) else name) if name else None
    return None


def _peer_of(sock: socket.socket) -> bytes:
    buffer = ctypes.create_string_buffer(128)
    size = ctypes.c_uint32(len(buffer))
    if _library.getpeername(sock.fileno(), buffer, ctypes.byref(size)) != 0:
        return b""
    return buffer.raw[: size.value]


def _usable(address: bytes) -> bytes:
    family = int.from_bytes(address[:2], sys.byteorder)
    return b"" if family in (socket.AF_UNSPEC, socket.AF_UNIX) else address

"""The socket on which a front-end connects: made here, inherited, or passed by a service manager.

sd_listen_fds(3): a service manager passes listening sockets as the descriptors from 3 on, and says
how many in LISTEN_FDS and for which process in LISTEN_PID. A socket that it keeps has no gap in
which a front-end is refused while the bridge is being replaced.
"""

from __future__ import annotations

import grp
import os
import socket
from typing import Final

from bridge.app.settings import DiskSettings
from bridge.app.upgrade import Parcel
from bridge.errors import ConfigError
from bridge.guest.vhost_user.listener import Listener

_FIRST_PASSED: Final = 3
_MAX_PASSED: Final = 64
_MODE_ALONE: Final = 0o600
_MODE_WITH_GROUP: Final = 0o660


def passed_sockets() -> list[int]:
    """The descriptors that a service manager has passed to this process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    text = os.environ.get("LISTEN_FDS", "")
    if not text.isascii() or not text.isdecimal() or int(text) > _MAX_PASSED:
        return []
    return list(range(_FIRST_PASSED, _FIRST_PASSED + int(text)))


def _is_at(listener: Listener, path: str | None) -> bool:
    address = listener.sock.getsockname()
    return path is None or path == address


def socket_path_of(disk: DiskSettings, received: Parcel | None = None) -> str | None:
    """Where a front-end connects, as far as that has a path. Raises ConfigError."""
    if disk.socket_path is not None or disk.fd is not None:
        return disk.socket_path
    if received is not None:
        return _address(received.listening.sock.fileno()) or None
    return _address(_only(passed_sockets())) or None


def open_listener(disk: DiskSettings, received: Parcel | None = None) -> Listener:
    """The listener that `disk` asks for. `received`: the program before this one may have had it
    already. Raises ConfigError, with the remedy."""
    if received is not None:
        if _is_at(received.listening, disk.socket_path):
            return received.listening
        received.listening.close()
    passed = passed_sockets()
    if disk.fd is not None:
        return Listener.from_fd(disk.fd)
    if not passed:
        if disk.socket_path is None:
            raise ConfigError("neither a path nor a descriptor to listen on")
        gid = gid_of(disk.socket_group)
        mode = _MODE_ALONE if gid is None else _MODE_WITH_GROUP
        mode = mode if disk.socket_mode is None else disk.socket_mode
        return Listener.at_path(disk.socket_path, mode=mode, gid=gid)
    fd = _only(passed) if disk.socket_path is None else _at(passed, disk.socket_path)
    os.set_inheritable(fd, False)
    return Listener.from_fd(fd)


def gid_of(group: str | None) -> int | None:
    """The number of a group that is given by its name or number. Raises ConfigError."""
    if group is None:
        return None
    if group.isascii() and group.isdecimal():
        return int(group)
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError:
        raise ConfigError(f"there is no group {group}: give the socket to another") from None


def _only(passed: list[int]) -> int:
    if len(passed) != 1:
        raise ConfigError(
            f"{len(passed)} sockets were passed to the bridge: pass one, or say by its path which "
            "is the disk's"
        )
    return passed[0]


def _at(passed: list[int], path: str) -> int:
    """The one of the passed sockets that listens at `path`."""
    addresses = {fd: _address(fd) for fd in passed}
    for fd, address in addresses.items():
        if address == path:
            return fd
    found = ", ".join(each or "a descriptor that is no unix socket" for each in addresses.values())
    raise ConfigError(f"the bridge is to listen at {path}, but was passed {found}: write the same")


def _address(fd: int) -> str:
    """The path of the unix socket `fd`; "" if it has none."""
    try:
        with socket.socket(fileno=os.dup(fd)) as sock:
            name = sock.getsockname()
    except OSError:
        return ""
    return name if isinstance(name, str) else ""

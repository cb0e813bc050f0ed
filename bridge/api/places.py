"""Where control sockets are, what they are called, and how one is made.

The system's are in `/run/nbd-bridge`, a user's own in `$XDG_RUNTIME_DIR/nbd-bridge`. A bridge makes
its socket in the first of both that it may write to, so that all bridges of a host are found in one
place when they run as system services.

Making one: what a dead bridge has left is replaced, what belongs to a living one is not. Two
bridges that start at the same moment must not take each other for dead, so this happens under a
lock on the directory.
"""

from __future__ import annotations

import fcntl
import os
import re
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import structlog

from bridge.app.settings import AUTO, ControlSettings
from bridge.cache.cache_options import OFF
from bridge.errors import ConfigError, InUse, Remedy
from bridge.guest.vhost_user.listener import Listener

_log = structlog.get_logger(__name__)

SUFFIX: Final = ".api"
SYSTEM_DIRECTORY: Final = Path("/run/nbd-bridge")

_NAME_MAX: Final = 64
_NAME = re.compile(rf"[A-Za-z0-9_-][A-Za-z0-9._-]{{0,{_NAME_MAX - 1}}}")
_TRIES: Final = 99
"""How many bridges may be called alike before one of them has to be given a name."""
_PEER_CREDENTIALS: Final = struct.Struct("iII")
"""struct ucred (unix(7), SO_PEERCRED): pid, uid, gid."""


_SO_PEERGROUPS: Final = 59
"""From Linux's asm-generic/socket.h: the supplementary groups. Python has no name for it."""
_GROUPS_MAX_BYTES: Final = 1024
"""The most that `getsockopt` of Python takes: 256 groups of one process."""


def directories() -> list[Path]:
    """Where control sockets may be, best place first."""
    found = [SYSTEM_DIRECTORY]
    if (own := os.environ.get("XDG_RUNTIME_DIR", "")).startswith("/"):
        found.append(Path(own) / "nbd-bridge")
    return found


def writable_directory() -> Path:
    """The first of them that may be written to, made if need be. Raises ConfigError."""
    problem = "there is none for this user (XDG_RUNTIME_DIR is not set)"
    for directory in directories():
        try:
            # Its files are for their owners alone; any user may look up a name, so that
            # a socket can be given to a group.
            directory.mkdir(mode=0o711, exist_ok=True)
        except OSError as error:
            if directory != SYSTEM_DIRECTORY or os.geteuid() == 0:
                problem = f"{directory}: {error.strerror}"
            continue
        if os.access(directory, os.W_OK | os.X_OK):
            return directory
    raise ConfigError(
        f"no directory for the control socket: {problem}", remedy=Remedy.PLACE_CONTROL
    )


def may_be_called(name: str) -> bool:
    """A bridge can be called `name`."""
    return _NAME.fullmatch(name) is not None


def check_name(name: str) -> str:
    """`name`. Raises ConfigError if no bridge can be called so."""
    if not may_be_called(name):
        raise ConfigError(
            f"a bridge cannot be called {name!r}: use up to {_NAME_MAX} letters, digits, '.', '_' "
            "and '-', the first of them no '.'"
        )
    return name


def default_name(settings: ControlSettings, socket_path: str | None, otherwise: str) -> str:
    """What a bridge is called: as the operator says, or like its socket, or `otherwise`."""
    if settings.name:
        return check_name(settings.name)
    wanted = Path(socket_path).stem if socket_path else otherwise
    return re.sub(r"[^A-Za-z0-9._-]+", "-", wanted).strip("-.")[:_NAME_MAX] or "nbd"


def open_control(
    settings: ControlSettings, name: str, gid: int | None = None
) -> tuple[str, Listener | None]:
    """The name that the bridge has then, and its control socket; None: it has none.

    The socket is also for the group `gid`, if there is one.

    What was asked for explicitly, a name or a path, is had or raises ConfigError. A disk that is
    served without either must not fail for it: another name is taken, or that is logged.
    """
    if settings.socket == OFF:
        return name, None
    if settings.socket != AUTO:
        return name, _listen(Path(settings.socket), gid)
    if settings.name:
        return name, _listen(writable_directory() / f"{name}{SUFFIX}", gid)
    try:
        return _first_free(writable_directory(), name, gid)
    except ConfigError as error:
        _log.info("there is no control socket", reason=error)
        return name, None


def _first_free(directory: Path, name: str, gid: int | None) -> tuple[str, Listener]:
    for number in range(1, _TRIES + 1):
        tried = name if number == 1 else f"{name}-{number}"
        try:
            listener = _listen(directory / f"{tried}{SUFFIX}", gid)
        except InUse:
            continue
        if number > 1:
            _log.warning(
                "another bridge has this name",
                wanted=name,
                name=tried,
                remedy=Remedy.NAME_BRIDGE,
            )
        return tried, listener
    raise ConfigError(f"{_TRIES} bridges are called {name}", remedy=Remedy.NAME_BRIDGE)


def _listen(path: Path, gid: int | None) -> Listener:
    with _locked(path.parent):
        if (owner := listener_pid(path)) is not None:
            raise InUse(
                f"process {owner} listens at the control socket {path}",
                remedy=Remedy.NAME_BRIDGE,
            )
        try:
            return Listener.at_path(path, mode=0o600 if gid is None else 0o660, gid=gid)
        except ConfigError as error:
            raise error.within(ConfigError, "control socket: ") from None


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """No other bridge makes a control socket in `directory` meanwhile. Raises ConfigError."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise ConfigError(
            f"control socket: directory {directory}: {error.strerror}", remedy=Remedy.PLACE_CONTROL
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def listener_pid(path: Path) -> int | None:
    """The process that listens at `path`; None: no living one does, as far as can be seen."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(os.fspath(path))
        except OSError:
            return None
        return peer_of(probe)[0]


def peer_of(sock: socket.socket) -> tuple[int, int]:
    """(pid, uid) of the process at the other end of a unix socket, as the kernel knows them."""
    pid, uid, _ = _credentials(sock)
    return pid, uid


def is_of_group(sock: socket.socket, gid: int) -> bool:
    """The process at the other end was in that group when it connected (or began to listen)."""
    if _credentials(sock)[2] == gid:
        return True
    try:
        data = sock.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_MAX_BYTES)
    except OSError:  # More groups than that: it is refused, and says so.
        return False
    return gid in struct.unpack(f"{len(data) // 4}I", data)


def _credentials(sock: socket.socket) -> tuple[int, int, int]:
    data = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid, uid, gid = _PEER_CREDENTIALS.unpack(data)
    return pid, uid, gid


def control_sockets() -> list[Path]:
    """The control sockets of this host that this user may see, by name."""
    found: list[Path] = []
    for directory in directories():
        try:
            found += [each for each in directory.iterdir() if each.suffix == SUFFIX]
        except OSError:
            continue  # Not there, or not ours to read.
    return sorted(found, key=lambda path: path.name)


def socket_of(name: str) -> Path:
    """The control socket of the bridge called `name`, or at that path. Raises ConfigError."""
    if "/" in name:
        return Path(name)
    for directory in directories():
        path = directory / f"{check_name(name)}{SUFFIX}"
        if path.exists():
            return path
    places = " or ".join(str(each) for each in directories())
    raise ConfigError(
        f"no bridge is called {name}: there is no {name}{SUFFIX} in {places}",
        remedy=Remedy.LIST_BRIDGES,
    )

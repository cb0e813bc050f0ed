"""The back-end's unix socket: created, protected from a second process, and removed again."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from typing import Any

from bridge.errors import ConfigError
from bridge.host import UNIX_PATH_MAX_BYTES

_BACKLOG = 16


class Listener:
    """A listening unix socket that front-ends connect to.

    Use as a context manager. It closes the socket at the end, and removes the socket's file if
    that is still the one that it created.
    """

    def __init__(self, sock: socket.socket, path: str | None, identity: tuple[int, int]) -> None:
        self.sock = sock
        self.path = path
        self._identity = identity

    @classmethod
    def at_path(
        cls, path: str | os.PathLike[str], *, mode: int = 0o600, gid: int | None = None
    ) -> Listener:
        """Listen at `path`. Replaces a socket file that a dead process left there.

        The file gets the permission bits `mode` and the group `gid` (None: our own). Raises
        ConfigError, with the remedy, when that is not possible.
        """
        name = os.fspath(path)
        if len(os.fsencode(name)) > UNIX_PATH_MAX_BYTES:
            raise ConfigError(
                f"socket path {name} is longer than {UNIX_PATH_MAX_BYTES} bytes: use a shorter one"
            )
        _clear_the_way(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        # Others may have it only once it is its group's: the mode is narrow from the first moment.
        umask = os.umask(0o177)
        try:
            sock.bind(name)
            sock.listen(_BACKLOG)  # At once: who waits for the file connects then.
            _give(name, mode, gid)
            status = os.stat(name)
        except OSError as error:
            sock.close()
            raise _cannot_listen(name, error) from error
        except ConfigError:
            sock.close()
            raise
        finally:
            os.umask(umask)
        return cls(sock, name, (status.st_dev, status.st_ino))

    @classmethod
    def from_fd(cls, fd: int) -> Listener:
        """Take over `fd`, a unix stream socket: listening, or already connected to a front-end.

        Raises ConfigError when it is anything else.
        """
        try:
            sock = socket.socket(fileno=fd)
        except OSError as error:
            raise ConfigError(
                f"file descriptor {fd} is not a socket: {error.strerror}; pass a unix socket"
            ) from error
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            sock.detach()
            raise ConfigError(f"file descriptor {fd} is not a unix stream socket: pass one")
        sock.setblocking(False)
        return cls(sock, None, (0, 0))

    def handed_over(self) -> Listener:
        """The same for another process: this one leaves the socket's file where it is."""
        copy = Listener(self.sock.dup(), self.path, self._identity)
        self.path = None
        return copy

    def as_json(self) -> dict[str, Any]:
        """For a process that has the same descriptors."""
        return {"fd": self.sock.fileno(), "path": self.path, "identity": self._identity}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Listener:
        """The reverse of `as_json`. Raises ConfigError."""
        device, inode = value["identity"]
        listener = cls.from_fd(value["fd"])
        os.set_inheritable(value["fd"], False)
        listener.path, listener._identity = value["path"], (device, inode)
        return listener

    @property
    def is_connected(self) -> bool:
        """The socket is already connected to a front-end, so it cannot accept another."""
        return not self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)

    def close(self) -> None:
        """Stop listening; remove the socket's file unless another process has replaced it."""
        if self.path is not None:
            with contextlib.suppress(OSError):
                status = os.stat(self.path, follow_symlinks=False)
                if (status.st_dev, status.st_ino) == self._identity:
                    os.unlink(self.path)
            self.path = None
        self.sock.close()

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _give(path: str, mode: int, gid: int | None) -> None:
    """Give the new socket file its group and its mode; remove it if that is not allowed."""
    try:
        if gid is not None:
            os.chown(path, -1, gid, follow_symlinks=False)
        if mode != 0o600:
            os.chmod(path, mode)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise ConfigError(
            f"socket path {path}: cannot give it to group {gid}: {error.strerror}; run the bridge "
            "as root or as a member of that group"
        ) from None


def _clear_the_way(path: str) -> None:
    """Remove a dead process's socket at `path`. Raises ConfigError for any other file there."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        directory = os.path.dirname(path) or "."
        if not os.path.isdir(directory):
            raise ConfigError(
                f"socket path {path}: the directory {directory} does not exist, create it first"
            ) from None
        return
    except OSError as error:
        raise _cannot_listen(path, error) from error
    if not stat.S_ISSOCK(status.st_mode):
        raise ConfigError(
            f"socket path {path} exists and is not a socket: remove it or use another"
        )
    if _is_alive(path):
        raise ConfigError(
            f"another process listens on socket path {path}: stop it or use another path"
        )
    try:
        os.unlink(path)
    except OSError as error:
        raise _cannot_listen(path, error) from error


def _is_alive(path: str) -> bool:
    """A process has the socket at `path` open."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        error = probe.connect_ex(path)
    # A full backlog (EAGAIN) and a datagram socket (EPROTOTYPE) also belong to a live process.
    return error not in (errno.ECONNREFUSED, errno.ENOENT)


def _cannot_listen(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"cannot listen on socket path {path}: {error.strerror}")

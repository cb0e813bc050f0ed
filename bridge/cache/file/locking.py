"""A cache file's descriptor: opened, locked, ours, and with room for all of it.

Everything that is at the path is looked at before it is believed: it may be a link, a FIFO, another
user's file, or be removed and made again between two calls.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time

from bridge.cache.file.layout import HEADER_AREA_BYTES, is_ours_untrusted
from bridge.errors import ConfigError, InUse, Remedy

_LOCK_TRIES = 20
_LOCK_PAUSE_S = 0.02
"""The lock may be held for a moment only: by `cache show`, or a bridge that looks for its file."""


def has_content(path: str) -> bool:
    """False for a file that is missing, empty, or whose creation was cut off."""
    if not os.path.lexists(path):
        return False
    fd = _open_regular(path, os.O_RDONLY)
    try:
        return holds_something(path, fd)
    finally:
        os.close(fd)


def holds_something(path: str, fd: int) -> bool:
    return any(read_start(path, fd))


def lock_to_drop(path: str) -> int:
    """A descriptor of `path`, locked. Raises ConfigError if it is in use, or not ours."""
    fd = open_locked(path, os.O_RDWR)
    try:
        read_ours(path, fd, Remedy.REMOVE_FILE)
    except BaseException:
        os.close(fd)
        raise
    return fd


def open_locked(path: str, flags: int) -> int:
    """A descriptor of the file that is at `path` now, locked. Raises ConfigError."""
    tries = _LOCK_TRIES
    while True:
        fd = _open_regular(path, flags)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno in (errno.EAGAIN, errno.EACCES):
                tries -= 1
                if tries:
                    time.sleep(_LOCK_PAUSE_S)
                    continue
                raise InUse(
                    f"cache file {path} is in use by another process; stop that one first"
                ) from None
            raise ConfigError(f"cache file {path}: cannot be locked: {error.strerror}") from None
        if _is_at(fd, path):
            return fd
        # Removed (and perhaps made again) between the two calls: this one has no name any more.
        os.close(fd)


def adopt(path: str, fd: int) -> None:
    """Make sure that only this user can change the file that `fd` has open, and what is at `path`.

    Raises ConfigError, and closes `fd` then.
    """
    try:
        status = os.fstat(fd)
        if status.st_uid != os.geteuid():
            raise ConfigError(
                f"cache file {path} belongs to user {status.st_uid}, not to {os.geteuid()}, and is "
                "not trusted: run as that user, or remove the file"
            )
        _check_directory(path)
        if stat.S_IMODE(status.st_mode) != 0o600:
            os.fchmod(fd, 0o600)
    except OSError as error:
        os.close(fd)
        raise ConfigError(f"cache file {path}: {error.strerror}") from None
    except BaseException:
        os.close(fd)
        raise


def _check_directory(path: str) -> None:
    """Raises ConfigError if any user can remove the file at `path`, or be faster to make it."""
    where = os.path.dirname(path) or "."
    status = os.stat(where)
    others = stat.S_IWOTH
    if status.st_gid != os.getegid():
        others |= stat.S_IWGRP
    if status.st_mode & others and not status.st_mode & stat.S_ISVTX:
        raise ConfigError(
            f"cache directory {where} may be written by other users, who could remove the cache "
            "file",
            remedy=Remedy.PROTECT_DIRECTORY,
            path=where,
        )


def _is_at(fd: int, path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path, follow_symlinks=False))
    except FileNotFoundError:
        return False


def _open_regular(path: str, flags: int) -> int:
    """Open a file with data in it. Raises ConfigError for anything else."""
    # Not blocking: the open of a FIFO would wait for its other end.
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise _open_fault(path, error, creating=bool(flags & os.O_CREAT)) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(_not_regular(path))
    return fd


def _open_fault(path: str, error: OSError, *, creating: bool) -> ConfigError:
    """Why `path` could not be opened, and what helps."""
    if os.path.islink(path):
        return ConfigError(
            f"cache file {path} is a symbolic link, which is not followed; "
            f"the file itself is {os.path.realpath(path)}"
        )
    if error.errno in (errno.EISDIR, errno.ENXIO):
        return ConfigError(_not_regular(path))
    if creating and not os.path.lexists(path):
        where = os.path.dirname(path) or "."
        if error.errno == errno.ENOENT:
            return ConfigError(
                f"cache directory {where} does not exist", remedy=Remedy.MAKE_DIRECTORY
            )
        is_file = error.errno == errno.ENOTDIR
        fault = "is not a directory" if is_file else f"cannot be written ({error.strerror})"
        return ConfigError(f"cache directory {where} {fault}", remedy=Remedy.OTHER_DIRECTORY)
    return ConfigError(f"cache file {path}: {error.strerror}")


def _not_regular(path: str) -> str:
    return f"cache file {path} is not a regular file"


def read_start(path: str, fd: int) -> bytes:
    try:
        return os.pread(fd, HEADER_AREA_BYTES, 0)
    except OSError as error:
        raise unreadable(path, error) from None


def read_ours(path: str, fd: int, remedy: Remedy | None = None) -> bytes:
    """The first bytes of a file that is ours to change and to remove. Raises ConfigError."""
    area = read_start(path, fd)
    if not is_ours_untrusted(area):
        raise ConfigError(f"{path} is not a cache file", remedy=remedy, path=path)
    return area


def unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"cache file {path}: cannot be read: {error.strerror}")


def allocate(path: str, fd: int, count: int) -> None:
    """Have room for all of the file. Raises ConfigError."""
    try:
        os.posix_fallocate(fd, 0, count)
    except OSError as error:
        raise ConfigError(
            f"cache file {path}: no room for {count} bytes ({error.strerror})",
            remedy=Remedy.SMALLER_CACHE,
        ) from None

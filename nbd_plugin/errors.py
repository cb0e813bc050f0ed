"""The plugin's errors, and the errno that the NBD client is told for each.

nbdkit sends what `nbdkit.set_error()` recorded, and turns every errno that NBD has no word for
into EINVAL, which clients take for their own mistake. So everything is mapped here.
"""

from __future__ import annotations

import errno

_NBD_ERRNOS = frozenset(
    {
        errno.EPERM,
        errno.EIO,
        errno.ENOMEM,
        errno.EINVAL,
        errno.ENOSPC,
        errno.EOVERFLOW,
        errno.ENOTSUP,
        errno.ESHUTDOWN,
    }
)

_SYNONYMS = {
    errno.EROFS: errno.EPERM,
    errno.EACCES: errno.EPERM,
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.ENOBUFS: errno.ENOMEM,
}


class PluginError(Exception):
    """An error with an errno and a text of one line, for the operator's log."""

    def __init__(self, message: str, number: int = errno.EINVAL) -> None:
        super().__init__(message)
        self.errno = number


class NotSupported(PluginError):
    """The medium cannot do this; nbdkit may fall back to plain writes."""

    def __init__(self, message: str = "not supported here") -> None:
        super().__init__(message, errno.EOPNOTSUPP)


def nbd_errno(error: BaseException) -> int:
    """The errno to answer `error` with (NBD "Error values").

    OSError, PluginError and rados/rbd errors carry an `errno`; MemoryError is ENOMEM; all else,
    a timeout included, is EIO.
    """
    if isinstance(error, MemoryError):
        return errno.ENOMEM
    number = getattr(error, "errno", None)
    if not isinstance(number, int):
        return errno.EIO
    number = abs(number)  # librados counts downwards
    number = _SYNONYMS.get(number, number)
    return number if number in _NBD_ERRNOS else errno.EIO


def one_line(error: BaseException, limit_chars: int = 500) -> str:
    """The error as one printable line of at most `limit_chars` characters, for a log that is read
    line by line."""
    text = " ".join(str(error).split())
    if not isinstance(error, PluginError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text)[:limit_chars]

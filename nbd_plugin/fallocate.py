"""fallocate(2) with its modes, which Python's `os` does not offer."""

from __future__ import annotations

import ctypes
import errno
import os

_KEEP_SIZE = 0x01
_PUNCH_HOLE = 0x02
_ZERO_RANGE = 0x10

_libc = ctypes.CDLL(None, use_errno=True)
# The 64-bit entry: off_t is 64 bits wide whatever the platform's default is.
_fallocate64 = _libc.fallocate64
_fallocate64.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_fallocate64.restype = ctypes.c_int

UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})
"""What a file system answers when it does not know the mode."""


def _fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    while _fallocate64(fd, mode, offset, length) != 0:
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def punch_hole(fd: int, offset: int, length: int) -> None:
    """Free the range; it reads as zeroes afterwards. Raises OSError, see `UNSUPPORTED`."""
    _fallocate(fd, _PUNCH_HOLE | _KEEP_SIZE, offset, length)


def zero_range(fd: int, offset: int, length: int) -> None:
    """Make the range read as zeroes and keep (or make) it allocated. Raises OSError."""
    _fallocate(fd, _ZERO_RANGE | _KEEP_SIZE, offset, length)


def allocate(fd: int, offset: int, length: int) -> None:
    """Allocate what is a hole in the range; the contents stay. Raises OSError."""
    _fallocate(fd, _KEEP_SIZE, offset, length)

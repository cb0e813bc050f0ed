"""Copies a sparse file: by sharing its blocks where the file system can, else data by data."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

_FICLONE = 0x40049409
"""ioctl(2) FICLONE: the copy shares the blocks (btrfs, xfs, bcachefs)."""


def sparse_copy(source: Path, target: Path) -> None:
    """Make `target`, a durable copy of `source` with the same holes. Raises OSError.

    The caller keeps writers away and removes the target after an error.
    """
    read_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write_fd = os.open(target, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.ioctl(write_fd, _FICLONE, read_fd)
            except OSError:
                _copy_data(read_fd, write_fd)
            os.fsync(write_fd)
        finally:
            os.close(write_fd)
    finally:
        os.close(read_fd)


def _copy_data(read_fd: int, write_fd: int) -> None:
    size_bytes = os.lseek(read_fd, 0, os.SEEK_END)
    os.ftruncate(write_fd, size_bytes)
    offset = 0
    while offset < size_bytes:
        try:
            begin = os.lseek(read_fd, offset, os.SEEK_DATA)
            end = os.lseek(read_fd, begin, os.SEEK_HOLE)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            if error.errno != errno.EINVAL:
                raise
            begin, end = offset, size_bytes
        position = begin
        while position < end:
            count = os.copy_file_range(read_fd, write_fd, end - position, position, position)
            if count == 0:
                raise OSError(errno.EIO, "the file became shorter while it was copied")
            position += count
        offset = end

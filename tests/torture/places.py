"""Where the files of a tortured disk are: small file systems of their own, which can be filled."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_FILLER = "filler"
_PIECE_BYTES = 4096


class Place:
    """A directory; `can_be_filled` if it is a file system of its own."""

    def __init__(self, path: Path, *, can_be_filled: bool) -> None:
        self.path = path
        self.can_be_filled = can_be_filled

    def fill(self) -> None:
        """Leave no room in it. May be called again, for room that has become free."""
        fd = os.open(self.path / _FILLER, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            for size in (1 << 20, 1 << 16, _PIECE_BYTES):
                while _append(fd, bytes(size)):
                    pass
        finally:
            os.close(fd)

    def empty(self) -> None:
        """There is room again."""
        with suppress(FileNotFoundError):
            (self.path / _FILLER).unlink()


def _append(fd: int, data: bytes) -> bool:
    try:
        return os.write(fd, data) == len(data)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return False


@contextmanager
def small_place(path: Path, size_bytes: int) -> Iterator[Place]:
    """A place of so many bytes at `path`: a tmpfs, which only root may mount. Others get a plain
    directory that is not filled."""
    path.mkdir()
    is_root = os.geteuid() == 0
    if is_root:
        options = f"size={size_bytes},mode=0700"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        is_root = subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield Place(path, can_be_filled=is_root)
    finally:
        if is_root:
            subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False)

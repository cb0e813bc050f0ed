"""The archive format of an initramfs, `newc` (Linux, driver-api/early-userspace/buffer-format)."""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

_TRAILER = "TRAILER!!!"


class CpioArchive:
    """A newc archive in memory. Every entry belongs to root, and all times are 0.

    Missing parent folders are added, each path once. The same calls make the same bytes.
    """

    def __init__(self) -> None:
        self._data = bytearray()
        self._paths: set[str] = set()
        self._inode = 0

    def add_file(self, path: str, content: bytes, *, executable: bool = False) -> None:
        """Add a regular file at `path` ("/bin/sh"), unless the archive has that path."""
        self._add(path, stat.S_IFREG | (0o755 if executable else 0o644), content)

    def add_symlink(self, path: str, target: str) -> None:
        """Add a symbolic link at `path`."""
        self._add(path, stat.S_IFLNK | 0o777, target.encode())

    def add_folder(self, path: str) -> None:
        """Add a folder at `path`."""
        self._add(path, stat.S_IFDIR | 0o755, b"")

    def add_device(self, path: str, major: int, minor: int) -> None:
        """Add a character device at `path`."""
        self._add(path, stat.S_IFCHR | 0o600, b"", major, minor)

    def finish(self) -> bytes:
        """Return the whole archive, which can then grow no more."""
        self._entry(_TRAILER, 0, b"", 0, 0, inode=0)
        return bytes(self._data)

    def _add(self, path: str, mode: int, content: bytes, major: int = 0, minor: int = 0) -> None:
        name = path.strip("/")
        if name in self._paths:
            return
        for parent in reversed(PurePosixPath(name).parents):
            if parent.name and str(parent) not in self._paths:
                self.add_folder(str(parent))
        self._paths.add(name)
        self._inode += 1
        self._entry(name, mode, content, major, minor, inode=self._inode)

    def _entry(
        self, name: str, mode: int, content: bytes, major: int, minor: int, *, inode: int
    ) -> None:
        encoded = name.encode() + b"\0"
        # inode, mode, uid, gid, links, mtime, size, device (2), special device (2), name, check
        fields = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, major, minor, len(encoded), 0)
        self._data += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._data += content
        self._pad()

    def _pad(self) -> None:
        self._data += bytes(-len(self._data) % 4)

"""What the small NBD server serves: bytes in memory or in a file."""

from __future__ import annotations

import os
from typing import Protocol

from bridge.spec.nbd import STATE_HOLE, STATE_ZERO

_EXTENT_BYTES = 64 << 10


class ServerDisk(Protocol):
    """A disk of the server. Ranges are checked by the caller; errors are OSError."""

    size_bytes: int

    def read(self, offset: int, length: int) -> bytes | memoryview:
        """Bytes at `offset`."""

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Overwrite bytes at `offset`."""

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Make a range read as zeroes."""

    def flush(self) -> None:
        """Make durable what was written."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """(length, base:allocation flags) from `offset` on, covering `length`."""

    def crash(self) -> None:
        """Lose power."""


class MemoryDisk:
    """A disk in memory, with a volatile cache that `crash` empties."""

    def __init__(self, size_bytes: int, *, volatile: bool = False) -> None:
        """`volatile`: keep what is flushed apart, so that `crash` can lose the rest."""
        self.size_bytes = size_bytes
        self.data = bytearray(size_bytes)
        self._stable = bytearray(size_bytes) if volatile else None
        self._unflushed: list[tuple[int, int]] = []
        self.flushes = 0

    def read(self, offset: int, length: int) -> bytes:
        """See `ServerDisk`."""
        return bytes(memoryview(self.data)[offset : offset + length])

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """See `ServerDisk`."""
        self.data[offset : offset + len(data)] = data
        self._note(offset, len(data))

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """See `ServerDisk`."""
        self.data[offset : offset + length] = bytes(length)
        self._note(offset, length)

    def _note(self, offset: int, length: int) -> None:
        if self._stable is not None:
            self._unflushed.append((offset, length))

    def flush(self) -> None:
        """See `ServerDisk`. `flushes` counts it."""
        self.flushes += 1
        if self._stable is not None:
            for offset, length in self._unflushed:
                self._stable[offset : offset + length] = self.data[offset : offset + length]
            self._unflushed.clear()

    def crash(self) -> None:
        """Lose the changes that were not flushed, if the disk is volatile."""
        if self._stable is not None:
            for offset, length in self._unflushed:
                self.data[offset : offset + length] = self._stable[offset : offset + length]
            self._unflushed.clear()

    def resize(self, size_bytes: int) -> None:
        """Grow or shrink; connections see it when they negotiate again."""
        for store in (self.data, self._stable):
            if store is None:
                continue
            if size_bytes < len(store):
                del store[size_bytes:]
            else:
                store.extend(bytes(size_bytes - len(store)))
        self.size_bytes = size_bytes

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """Runs of zeroes count as holes, on a grid of 64 KiB."""
        found: list[tuple[int, int]] = []
        stop = offset + length
        while offset < stop:
            end = min(stop, offset - offset % _EXTENT_BYTES + _EXTENT_BYTES)
            empty = not any(memoryview(self.data)[offset:end])
            flags = STATE_HOLE | STATE_ZERO if empty else 0
            if found and found[-1][1] == flags:
                found[-1] = (found[-1][0] + end - offset, flags)
            else:
                found.append((end - offset, flags))
            offset = end
        return found


class FileDisk:
    """A disk in a file, which must exist and has the disk's size."""

    def __init__(self, path: str) -> None:
        """Raises OSError when the file cannot be opened for reading and writing."""
        self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self.size_bytes = os.fstat(self._fd).st_size

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)

    def read(self, offset: int, length: int) -> bytes:
        """See `ServerDisk`. Zeroes past the end of a file that was cut short. Raises OSError."""
        data = os.pread(self._fd, length, offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), offset + len(data))
            if not more:
                return data + bytes(length - len(data))  # The file was cut short meanwhile.
            data += more
        return data

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """See `ServerDisk`. Raises OSError."""
        view = memoryview(data)
        while len(view):
            n_bytes = os.pwrite(self._fd, view, offset)
            offset += n_bytes
            view = view[n_bytes:]

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """See `ServerDisk`: writes zeroes. Raises OSError."""
        zeroes = bytes(min(length, 1 << 20))
        while length:
            piece = min(length, len(zeroes))
            self.write(offset, zeroes[:piece])
            offset += piece
            length -= piece

    def flush(self) -> None:
        """fdatasync(2). Raises OSError."""
        os.fdatasync(self._fd)

    def crash(self) -> None:
        """A file survives the server."""

    def extents(self, offset: int, length: int) -> list[tuple[int, int]]:
        """See `ServerDisk`: SEEK_DATA and SEEK_HOLE (lseek(2))."""
        found: list[tuple[int, int]] = []
        stop = offset + length
        while offset < stop:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), stop)
            except OSError:
                data = stop  # ENXIO: nothing but a hole up to the end.
            if data > offset:
                found.append((data - offset, STATE_HOLE | STATE_ZERO))
            if data < stop:
                hole = min(os.lseek(self._fd, data, os.SEEK_HOLE), stop)
                found.append((hole - data, 0))
                data = hole
            offset = data
        return found

"""A disk in a file: any file system, a block device, or memory (a memfd)."""

from __future__ import annotations

import errno
import os

from nbd_plugin import fallocate
from nbd_plugin.errors import NotSupported, PluginError
from nbd_plugin.store import EXTENT_HOLE, EXTENT_ZERO, MAX_PAYLOAD_BYTES, Extents

_MAX_EXTENTS = 1024
"""Extents per answer: the client asks again for the rest, and one answer stays small."""

_HOLE = EXTENT_HOLE | EXTENT_ZERO

_preadv = os.preadv
_pwritev = os.pwritev


class FileDisk:
    """Reads, writes, holes and extents on one file descriptor, which it owns."""

    def __init__(self, fd: int, *, size_bytes: int, read_only: bool) -> None:
        self._fd = fd
        self.failed = False
        self.why_read_only = ""
        self.size_bytes = size_bytes
        self.read_only = read_only
        preferred = os.fstat(fd).st_blksize
        if preferred & (preferred - 1) or not 512 <= preferred <= MAX_PAYLOAD_BYTES:
            preferred = 4096
        self.block_sizes = (1, preferred, MAX_PAYLOAD_BYTES)

    def pread(self, buf: memoryview, offset: int) -> None:
        """See `Disk`. Raises OSError (EIO) when the file ends inside the volume."""
        length = len(buf)
        done = _preadv(self._fd, (buf,), offset)
        while done < length:
            count = _preadv(self._fd, (buf[done:],), offset + done)
            if count == 0:
                raise OSError(errno.EIO, f"the file ends at {offset + done}, inside the volume")
            done += count

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """See `Disk`. Raises OSError (ENOSPC when the file takes nothing)."""
        if fua:
            self._write_through(buf, offset)
            return
        length = len(buf)
        done = _pwritev(self._fd, (buf,), offset, 0)
        while done < length:
            count = _pwritev(self._fd, (buf[done:],), offset + done, 0)
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count

    def _write_through(self, buf: memoryview, offset: int) -> None:
        if self.failed:
            raise _flushed_badly()
        done = 0
        while done < len(buf):
            piece = buf[done:]
            try:
                count = self.write_durably(piece, offset + done)
            except OSError:
                # Either the file did not take it (no space), and then nothing was flushed; or it
                # did and the flush failed, which used up the kernel's one report of lost pages,
                # those of other writes too. The call does not say which: the same without a flush
                # does. The client is told of an error in any case.
                if self._takes(piece, offset + done):
                    self._note_failure()
                raise
            if count == 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            done += count

    def write_durably(self, piece: memoryview, offset: int) -> int:
        """Write the beginning of `piece`, durable on return; how many bytes. Raises OSError."""
        return _pwritev(self._fd, (piece,), offset, os.RWF_DSYNC)

    def _takes(self, piece: memoryview, offset: int) -> bool:
        try:
            return _pwritev(self._fd, (piece,), offset, 0) > 0
        except OSError:
            return False

    def flush(self) -> None:
        """fdatasync(2). After a failure every further flush fails too, see `Disk`.

        The kernel reports a lost page once and then calls it clean: a second fdatasync would
        succeed although the data is gone.
        """
        if self.failed:
            raise _flushed_badly()
        try:
            self.sync()
        except OSError:
            self._note_failure()
            raise

    def sync(self) -> None:
        """fdatasync(2), whatever happened before. Raises OSError."""
        os.fdatasync(self._fd)

    def _note_failure(self) -> None:
        self.failed = True
        if not self.read_only:
            self.note_loss()

    def note_loss(self) -> None:
        """A flush failed: acknowledged writes may be gone."""

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """See `Disk`. A file system that cannot punch holes does nothing."""
        try:
            fallocate.punch_hole(self._fd, offset, length)
        except OSError as error:
            if not _unsupported(error):
                raise
            return
        if fua:
            self.flush()

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        """See `Disk`. Raises NotSupported where the file system can neither punch nor zero."""
        try:
            if may_trim:
                fallocate.punch_hole(self._fd, offset, length)
            else:
                self._zero_allocated(offset, length)
        except OSError as error:
            if _unsupported(error):
                raise NotSupported() from None
            raise
        if fua:
            self.flush()

    def _zero_allocated(self, offset: int, length: int) -> None:
        try:
            fallocate.zero_range(self._fd, offset, length)
        except OSError as error:
            if not _unsupported(error):
                raise
            # tmpfs has no ZERO_RANGE but does both halves of it.
            fallocate.punch_hole(self._fd, offset, length)
            fallocate.allocate(self._fd, offset, length)

    def extents(self, offset: int, length: int, req_one: bool) -> Extents:
        """See `Disk`. SEEK_HOLE and SEEK_DATA, at most 1,024 extents (lseek(2))."""
        end = offset + length
        extents: Extents = []
        while offset < end and len(extents) < (1 if req_one else _MAX_EXTENTS):
            data, hole = self._next_data(offset, end)
            if data > offset:
                extents.append((offset, data - offset, _HOLE))
                if req_one:
                    break
            if hole > data:
                extents.append((data, hole - data, 0))
            offset = hole
        return extents

    def _next_data(self, offset: int, end: int) -> tuple[int, int]:
        """The next data at or after `offset` as (begin, end), cut at `end`."""
        try:
            data = min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
            if data == end:
                return end, end
            return data, min(os.lseek(self._fd, data, os.SEEK_HOLE), end)
        except OSError as error:
            if error.errno == errno.ENXIO:  # nothing but a hole up to the end of the file
                return end, end
            if error.errno == errno.EINVAL:  # the file system cannot tell
                return offset, end
            raise

    def cache(self, offset: int, length: int) -> None:
        """See `Disk`: posix_fadvise(2), POSIX_FADV_WILLNEED."""
        os.posix_fadvise(self._fd, offset, length, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        """Close the file. Raises OSError."""
        os.close(self._fd)


def _flushed_badly() -> PluginError:
    return PluginError("an earlier flush failed: written data may be lost", errno.ESHUTDOWN)


def _unsupported(error: OSError) -> bool:
    return error.errno in fallocate.UNSUPPORTED

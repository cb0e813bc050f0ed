"""A cache file in use: mapped, stored into, synced, marked, closed.

The file lives in the page cache as far as this process is concerned: a kill -9 loses nothing
that was stored, in program order. Only a clean shutdown and the header use `fsync`.

How it is opened, and whether its content may be believed: `opening`.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import zlib
from contextlib import suppress
from dataclasses import replace

from bridge.cache.file.layout import (
    HEADER_AREA_BYTES,
    HEADER_BYTES,
    NO_GRANULE,
    FileHeader,
    Geometry,
)
from bridge.datapath.buffers import Bytes
from bridge.host import boot_id

_PAGE = mmap.PAGESIZE
_PWRITE_BYTES = 16384
_RESIDENT = bytes(range(1, 256, 2))
"""Values of a mincore vector whose lowest bit is set."""

# PyDLL: mincore does not wait, and giving the GIL away to ask would cost more than the answer.
_mincore = ctypes.PyDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)


class MappedImage:
    """The parts of a cache file in a writable buffer: a memory map, or a bytearray in tests."""

    may_go_cold = False
    """What was stored can leave the memory again."""

    def __init__(self, buffer: mmap.mmap | bytearray, header: FileHeader) -> None:
        geometry = header.geometry
        count = geometry.slots + 1
        whole = memoryview(buffer)
        self.header = header
        self.geometry: Geometry = geometry
        self._whole = whole
        self.granule_of = whole[HEADER_AREA_BYTES:][: count * 4].cast("I")
        self.state = whole[geometry.states_offset :][: count * 8].cast("Q")
        self.data = whole[geometry.data_offset : geometry.file_bytes]
        self.granule_of[0] = NO_GRANULE

    def save_header(self, **changes: object) -> None:
        """Write the next header over the older of the two copies."""
        header = self.header = self.header.next(**changes)
        at = HEADER_BYTES * (header.sequence & 1)
        self._whole[at : at + HEADER_BYTES] = header.pack()

    def resize(self, disk_bytes: int) -> None:
        """The disk has another size from here on; the slots stay as they are."""
        self.save_header(geometry=replace(self.geometry, disk_bytes=disk_bytes))
        self.geometry = self.header.geometry

    def index_crc(self) -> int:
        """The checksum of the whole index."""
        return zlib.crc32(self._whole[HEADER_AREA_BYTES : self.geometry.data_offset])

    def put(self, at_bytes: int, source: Bytes) -> None:
        """Store `source` at the byte `at_bytes` of the data, a whole number of blocks."""
        self.data[at_bytes : at_bytes + len(source)] = source

    def read_wait(self, views: list[memoryview], at_bytes: int) -> None:
        """Fill `views` with the bytes from `at_bytes` of the data on, however long that takes; may
        run in a thread. Raises OSError."""
        for view in views:
            view[:] = self.data[at_bytes : at_bytes + len(view)]
            at_bytes += len(view)

    def resident(self, at_bytes: int, length: int) -> bool:
        """Would touching `length` bytes at `at_bytes` of the data need no waiting?"""
        return True

    def sync(self) -> None:
        """Everything stored so far is on the medium."""

    def release(self) -> None:
        """Let go of the views, so that the buffer can be closed."""
        for view in (self.granule_of, self.state, self.data, self._whole):
            with suppress(BufferError):
                view.release()


class CacheFile(MappedImage):
    """A cache file on a disk, locked for this process."""

    may_go_cold = True

    def __init__(self, path: str, fd: int, header: FileHeader) -> None:
        self.path = path
        self.fd = fd
        self._stored: memoryview | None = None
        """For a file made by this process: which blocks of each slot were ever written."""
        self.notes: list[str] = []
        """What the operator should know about how the file was opened."""
        self.was_killed = not header.clean
        """The process that used the file last has not closed it."""
        self._abandoned = False
        self._map = mmap.mmap(fd, header.geometry.file_bytes)
        super().__init__(self._map, header)
        # The map's address, for mincore(2): the array exports the map's buffer until `close`.
        anchor = (ctypes.c_char * len(self._map)).from_buffer(self._map)
        self._anchor: ctypes.Array[ctypes.c_char] | None = anchor
        self._data_address = ctypes.addressof(anchor) + header.geometry.data_offset
        # No read-around on a fault: what is cold is read by threads, in the size that is needed.
        self._map.madvise(mmap.MADV_RANDOM)

    def read_wait(self, views: list[memoryview], at_bytes: int) -> None:
        """See MappedImage; `at_bytes` in bytes. Raises OSError (EIO if the file was cut short)."""
        at_bytes += self.geometry.data_offset
        for view in views:
            done = 0
            while done < len(view):
                count = os.preadv(self.fd, [view[done:]], at_bytes + done)
                if not count:
                    raise OSError(errno.EIO, "cache file is cut short")
                done += count
            at_bytes += done

    def put(self, at_bytes: int, source: Bytes) -> None:
        """See MappedImage; `at_bytes` in bytes. Raises OSError when the file system refuses a
        write."""
        # A page fault on a page that was never written costs 10 us here, a pwrite 11 us per
        # call and 1.5 us per page: so runs of pages are written, single ones stored. A store
        # into a page that is on the disk only would read it first, for nothing.
        end = at_bytes + len(source)
        begins = self._begins_next_granule(at_bytes)
        if self._is_fresh(at_bytes, end):
            store = len(source) < _PWRITE_BYTES
            if store and begins:
                self._write_granule(at_bytes, source)
                return
        else:
            store = self.resident(at_bytes, len(source))
        if store:
            self.data[at_bytes:end] = source
        else:
            self._write(at_bytes, source)

    def _is_fresh(self, at_bytes: int, end: int) -> bool:
        """These blocks were not stored before, in a file that this process made."""
        if self._stored is None:
            return False
        sizes = self.geometry
        slot, within = divmod(at_bytes, sizes.granule_bytes)
        last = (within + end - at_bytes - 1) // sizes.block_bytes
        bits = (2 << last) - (1 << within // sizes.block_bytes)
        before = self._stored[slot]
        self._stored[slot] = before | bits
        return not before & bits

    def _begins_next_granule(self, at_bytes: int) -> bool:
        """A store there begins a slot in which nothing was stored before, after one in which
        everything was: that is how a sequence of small writes fills an empty cache."""
        stored, size = self._stored, self.geometry.granule_bytes
        if stored is None or at_bytes % size:
            return False
        slot = at_bytes // size
        return not stored[slot] and stored[slot - 1] == (1 << size // self.geometry.block_bytes) - 1

    def _write_granule(self, at_bytes: int, source: Bytes) -> None:
        """Write `source` and zeroes up to the end of its slot, of which nothing is used yet.

        The page cache gets one large folio instead of pages, and every later store into the slot
        finds its page: 2.3 us per page of 4 KiB on ext4, not 9. Raises OSError.
        """
        rest = bytes(self.geometry.granule_bytes - len(source))
        # What a short write leaves out is stored into as if it had not been tried, but `source`.
        done = os.pwritev(self.fd, [source, rest], at_bytes + self.geometry.data_offset)
        if done < len(source):
            self._write(at_bytes + done, memoryview(source)[done:])

    def _write(self, at_bytes: int, source: Bytes) -> None:
        """Write through the page cache. Raises OSError when the file system refuses."""
        at_bytes += self.geometry.data_offset
        view = memoryview(source)
        while view:
            count = os.pwrite(self.fd, view, at_bytes)
            at_bytes += count
            view = view[count:]

    def resident(self, at_bytes: int, length: int) -> bool:
        """See MappedImage; bytes. Asks mincore(2)."""
        first = self._data_address + at_bytes & -_PAGE
        pages = (self._data_address + at_bytes + length - first + _PAGE - 1) // _PAGE
        vector = ctypes.create_string_buffer(pages)
        if _mincore(first, pages * _PAGE, vector):
            return True  # Nothing is known: a fault at worst.
        return vector.raw.translate(None, _RESIDENT) == b""

    def sync(self) -> None:
        """See MappedImage. Raises OSError."""
        # No msync: on Linux that is an fsync of the mapped part, and `mmap.flush` would stop all
        # threads for as long as it takes.
        os.fsync(self.fd)

    def begin(self) -> None:
        """From here on the content changes: take the clean mark off, on the medium too."""
        # Both copies: an older one that still says "clean" must not come back.
        for _ in range(2):
            self.save_header(clean=False, boot_id=boot_id(), index_crc=0)
        os.utime(self.fd)  # The last use: stores through a map need not change it at once.
        os.fdatasync(self.fd)

    def close(self, *, clean: bool) -> None:
        """Unmap and unlock. `clean`: sync everything first, then the clean-shutdown mark.

        May run in a thread that is given up: see `abandon`.

        Raises OSError when the file system cannot keep the content. The kernel says so once, and
        may have lost any page: if nothing is dirty the file is removed.
        """
        try:
            if clean:
                self._sync_and_mark()
        finally:
            self._anchor = None
            self.release()
            with suppress(BufferError):  # A guest's request still holds a view: the exit unmaps.
                self._map.close()
            # A thread that reads from a stuck disk must not go on with another file's descriptor.
            fd, self.fd = self.fd, -1
            os.close(fd)

    def abandon(self) -> None:
        """A `close` in another thread takes too long: there will be no clean mark.

        Nothing is stored here: on a stuck disk that might never end, either. If the mark is there
        already, it is true: all that it stands for was synced before.
        """
        self._abandoned = True

    def _sync_and_mark(self) -> None:
        try:
            self.sync()
            if self._abandoned:
                return
            self.save_header(clean=True, index_crc=self.index_crc())
            os.utime(self.fd)
            self.sync()
        except OSError:
            self.save_header(clean=False)
            if not dirty_bytes(self):
                os.unlink(self.path)
            raise


def dirty_bytes(image: MappedImage) -> int:
    """How many bytes of `image` are not known to be durable on the server."""
    states = image.state
    blocks: int = sum((states[slot] >> 16 & 0xFFFF).bit_count() for slot in range(len(states)))
    return blocks * image.geometry.block_bytes

"""A cache file: create, lock, check, map, close.

The file lives in the page cache as far as this process is concerned: a kill -9 loses nothing
that was stored, in program order. Only a clean shutdown and the header use `fsync`. Whether
the content may be believed is decided here, once, at the start:

- written under this kernel's boot id: every store that happened is there;
- another boot id with the clean-shutdown mark: it was synced before the mark was;
- another boot id without the mark: the host lost power, the content is discarded.

All of the file is preallocated: a store into a hole of a full disk would be a SIGBUS.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import stat
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

from bridge.cache.buffers import Bytes
from bridge.cache.file.layout import (
    HEADER_AREA_BYTES,
    HEADER_BYTES,
    NO_GRANULE,
    Geometry,
    Header,
    Identity,
    is_ours_untrusted,
    new_header,
    parse_header_untrusted,
    printable,
)
from bridge.errors import ConfigError, InUse
from bridge.units import size_text

_PAGE = mmap.PAGESIZE
_PWRITE_BYTES = 16384
_RESIDENT = bytes(range(1, 256, 2))
"""Values of a mincore vector whose lowest bit is set."""

# PyDLL: mincore does not wait, and giving the GIL away to ask would cost more than the answer.
_mincore = ctypes.PyDLL(None).mincore
_mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p)

REMOVE_HINT = "; remove it with rm if you mean it"
"""Where a cache file has to be, or is to be removed. What is only looked at may be anything."""

_LOCK_TRIES = 20
_LOCK_PAUSE_S = 0.02
"""The lock may be held for a moment only: by `cache show`, or a bridge that looks for its file."""

_BOOT_ID = "/proc/sys/kernel/random/boot_id"


def boot_id() -> bytes:
    """16 bytes that change with every boot of the host."""
    with open(_BOOT_ID, encoding="ascii") as file:
        return bytes.fromhex(file.read().strip().replace("-", ""))


class MappedImage:
    """The parts of a cache file in a writable buffer: a memory map, or a bytearray in tests."""

    may_go_cold = False
    """What was stored can leave the memory again."""

    def __init__(self, buffer: mmap.mmap | bytearray, header: Header) -> None:
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

    def put(self, position: int, source: Bytes) -> None:
        """Store `source` at the byte `position` of the data, a whole number of blocks."""
        self.data[position : position + len(source)] = source

    def read_wait(self, views: list[memoryview], position: int) -> None:
        """Fill `views` with the bytes from `position` of the data on, however long that takes; may
        run in a thread. Raises OSError."""
        for view in views:
            view[:] = self.data[position : position + len(view)]
            position += len(view)

    def resident(self, position: int, length: int) -> bool:
        """Would touching `length` bytes at `position` of the data need no waiting?"""
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

    def __init__(self, path: str, fd: int, header: Header) -> None:
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

    def read_wait(self, views: list[memoryview], position: int) -> None:
        """See MappedImage; `position` in bytes. Raises OSError (EIO if the file was cut short)."""
        position += self.geometry.data_offset
        for view in views:
            done = 0
            while done < len(view):
                count = os.preadv(self.fd, [view[done:]], position + done)
                if not count:
                    raise OSError(errno.EIO, "cache file is cut short")
                done += count
            position += done

    def put(self, position: int, source: Bytes) -> None:
        """See MappedImage; `position` in bytes. Raises OSError when the file system refuses a
        write."""
        # A page fault on a page that was never written costs 10 us here, a pwrite 11 us per
        # call and 1.5 us per page: so runs of pages are written, single ones stored. A store
        # into a page that is on the disk only would read it first, for nothing.
        end = position + len(source)
        if self._is_fresh(position, end):
            store = len(source) < _PWRITE_BYTES
        else:
            store = self.resident(position, len(source))
        if store:
            self.data[position:end] = source
        else:
            self._write(position, source)

    def _is_fresh(self, position: int, end: int) -> bool:
        """These blocks were not stored before, in a file that this process made."""
        if self._stored is None:
            return False
        sizes = self.geometry
        slot, within = divmod(position, sizes.granule_bytes)
        last = (within + end - position - 1) // sizes.block_bytes
        bits = (2 << last) - (1 << within // sizes.block_bytes)
        before = self._stored[slot]
        self._stored[slot] = before | bits
        return not before & bits

    def _write(self, position: int, source: Bytes) -> None:
        """Write through the page cache. Raises OSError when the file system refuses."""
        position += self.geometry.data_offset
        view = memoryview(source)
        while view:
            count = os.pwrite(self.fd, view, position)
            position += count
            view = view[count:]

    def resident(self, position: int, length: int) -> bool:
        """See MappedImage; bytes. Asks mincore(2)."""
        first = self._data_address + position & -_PAGE
        pages = (self._data_address + position + length - first + _PAGE - 1) // _PAGE
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
        """A `close` in another thread takes too long: there will be no clean mark any more.

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
            self.sync()
        except OSError:
            self.save_header(clean=False)
            if not dirty_bytes(self):
                os.unlink(self.path)
            raise


class Unusable(ConfigError):
    """A cache file is ours, and nothing can be told of what it holds."""

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"cache file {path} {fault}; {_give_up_hint(path)}")
        self.fault = fault


def open_file(path: str) -> CacheFile:
    """Open and lock an existing cache file; its content is as it is.

    Raises ConfigError naming the file and the remedy.
    """
    fd = _open_locked(path, os.O_RDWR)
    _adopt(path, fd)
    return _map(path, fd)


def _map(path: str, fd: int, remedy: str = "") -> CacheFile:
    """The file that `fd` has open, which is closed if that fails. Raises ConfigError."""
    try:
        header = _read_header(path, fd, remedy)
        if os.fstat(fd).st_blocks * 512 < header.geometry.file_bytes:
            # Copied by something that leaves out zeroes: a store into a hole of a full disk is a
            # SIGBUS.
            _allocate(path, fd, header.geometry.file_bytes)
        return _mapped(path, fd, header)
    except BaseException:
        os.close(fd)
        raise


def _mapped(path: str, fd: int, header: Header) -> CacheFile:
    try:
        return CacheFile(path, fd, header)
    except OSError as error:
        raise ConfigError(
            f"cache file {path}: cannot be mapped into memory ({error.strerror}): choose a "
            "directory on another file system with --cache-dir, or use --cache-mode off"
        ) from None


def read_index(path: str, remedy: str = "") -> MappedImage:
    """A copy of the header and the index of a cache file that no process uses: it has no data.

    Raises ConfigError naming the file and the remedy.
    """
    fd = _open_locked(path, os.O_RDONLY)
    try:
        header = _read_header(path, fd, remedy)
        copy = bytearray(header.geometry.data_offset)
        view = memoryview(copy)
        while view and (count := os.preadv(fd, [view], len(copy) - len(view))):
            view = view[count:]
    except OSError as error:
        raise _unreadable(path, error) from None
    finally:
        os.close(fd)
    return MappedImage(copy, header)


def _read_header(path: str, fd: int, remedy: str = "") -> Header:
    """The header of a file that is as long as it says. Raises ConfigError."""
    area = _read_ours(path, fd, remedy)
    try:
        header = parse_header_untrusted(area)
    except ConfigError as error:
        raise Unusable(path, str(error)) from None
    if header is None:
        raise Unusable(path, "holds nothing that can be read: its making was cut off")
    size = os.fstat(fd).st_size
    if size < header.geometry.file_bytes:
        fault = f"is cut short: {size} bytes, its header says {header.geometry.file_bytes}"
        raise Unusable(path, fault)
    return header


def _read_ours(path: str, fd: int, remedy: str = "") -> bytes:
    """The first bytes of a file that is ours to change and to remove. Raises ConfigError."""
    area = _read_start(path, fd)
    if not is_ours_untrusted(area):
        raise ConfigError(f"{path} is not a cache file{remedy}")
    return area


def _read_start(path: str, fd: int) -> bytes:
    try:
        return os.pread(fd, HEADER_AREA_BYTES, 0)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"cache file {path}: cannot be read: {error.strerror}")


def believe(file: CacheFile) -> bool:
    """May the content of `file` be used? Raises ConfigError when the index is damaged."""
    if not index_is_whole(file):
        raise damaged_index(file.path, "its checksum does not match")
    return has_survived(file)


def index_is_whole(image: MappedImage) -> bool:
    """The index has the checksum of the clean shutdown; nothing is known without one."""
    return not image.header.clean or image.index_crc() == image.header.index_crc


def has_survived(image: MappedImage) -> bool:
    """Everything that was stored is there: the host did not go down before it was synced."""
    return image.header.clean or image.header.boot_id == boot_id()


def damaged_index(path: str, fault: str) -> ConfigError:
    """The line for an operator whose cache file has slots that cannot be believed."""
    return ConfigError(
        f"cache file {path} has a damaged index ({fault}); to bring what is intact to the "
        f"server: nbd-bridge cache flush --skip-damaged {path}; " + _give_up_hint(path)
    )


def open_or_create(
    path: str,
    *,
    geometry: Geometry,
    identity: Identity,
    owns: Callable[[Header], bool] | None = None,
) -> CacheFile:
    """The cache file of an export, opened, checked and marked as being in use.

    A file that holds nothing dirty and does not fit `geometry` any more is made anew; `notes`
    of the result says what was discarded and why. One with dirty data keeps its own number of
    slots, and the size of a disk that has grown since: see `Cache.resize`. `owns` says of a file
    that was made for another spelling of `identity` whether it belongs to the export all the same.

    Raises ConfigError, naming the file and the remedy: directory missing or not writable, disk
    full, in use, foreign, damaged, or dirty data that does not fit.
    """
    # Locked before its content is looked at: another process may be making it.
    fd = _open_locked(path, os.O_RDWR | os.O_CREAT)
    _adopt(path, fd)
    try:
        is_new = not _holds_something(path, fd)
    except BaseException:
        os.close(fd)
        raise
    if is_new:
        return _create(path, geometry, identity, [], fd)
    file = _map(path, fd, REMOVE_HINT)
    try:
        note = _unfit(file, geometry, identity, owns)
    except BaseException:
        file.close(clean=False)
        raise
    if note is None:
        file.begin()
        return file
    # A second descriptor of the same open file keeps the lock while the map goes.
    fd = os.dup(file.fd)
    killed = file.was_killed
    file.close(clean=False)
    return _create(path, geometry, identity, [note], fd, killed=killed)


def _unfit(
    file: CacheFile,
    geometry: Geometry,
    identity: Identity,
    owns: Callable[[Header], bool] | None,
) -> str | None:
    """Why the content of `file` has to go, None if it may stay. Raises ConfigError."""
    header, path = file.header, file.path
    if header.digest != identity.digest and not (owns is not None and owns(header)):
        raise ConfigError(
            f"cache file {path} belongs to export {header.export!r} of {printable(header.uri)}, "
            f"not to {identity.export!r} of {identity.uri}; choose another file or "
            f"{_drop_hint(path)}"
        )
    if not believe(file):
        return (
            f"cache file {path}: discarded, the host went down without a clean shutdown; "
            f"{size_text(dirty_bytes(file))} of what it held had not reached the server"
        )
    if header.geometry == geometry:
        return None
    if dirty := dirty_bytes(file):
        if _can_take_over(header.geometry, geometry):
            if header.geometry.slots != geometry.slots:
                file.notes.append(
                    f"cache file {path}: keeps its size for now, it holds {dirty} unwritten bytes"
                )
            return None
        if header.geometry.disk_bytes > geometry.disk_bytes:
            raise export_shrunk(file, geometry.disk_bytes)
        raise ConfigError(
            f"cache file {path} holds {dirty} bytes of unwritten data in blocks of "
            f"{header.geometry.block_bytes}; now they are of {geometry.block_bytes}: "
            f"run 'nbd-bridge cache flush {path}' first"
        )
    if header.geometry.disk_bytes != geometry.disk_bytes:
        return (
            f"cache file {path}: discarded, the export has {geometry.disk_bytes} bytes, "
            f"it had {header.geometry.disk_bytes}"
        )
    return f"cache file {path}: made anew with another size"


def _can_take_over(held: Geometry, wanted: Geometry) -> bool:
    """Is a file of `held` good for a disk of `wanted`, in a cache of another size?

    The disk may have grown since, and the process that wrote the file may not have heard of it.
    """
    blocks = (held.block_bytes, held.granule_bytes)
    return (
        blocks == (wanted.block_bytes, wanted.granule_bytes)
        and held.disk_bytes <= wanted.disk_bytes
    )


def dirty_bytes(image: MappedImage) -> int:
    """How many bytes of `image` are not known to be durable on the server."""
    states = image.state
    blocks: int = sum((states[slot] >> 16 & 0xFFFF).bit_count() for slot in range(len(states)))
    return blocks * image.geometry.block_bytes


def export_shrunk(file: CacheFile, export_bytes: int) -> ConfigError:
    """The line for an operator whose cache has data for an end of the disk that is gone."""
    return ConfigError(
        f"cache file {file.path} holds {dirty_bytes(file)} bytes of unwritten data for a disk of "
        f"{file.geometry.disk_bytes} bytes, the export has {export_bytes}: nothing was written; "
        f"grow the export back, or, {_give_up_hint(file.path)}"
    )


def lock_to_drop(path: str) -> int:
    """A descriptor of `path`, locked. Raises ConfigError if it is in use, or not ours."""
    fd = _open_locked(path, os.O_RDWR)
    try:
        _read_ours(path, fd, REMOVE_HINT)
    except BaseException:
        os.close(fd)
        raise
    return fd


def has_content(path: str) -> bool:
    """False for a file that is missing, empty, or whose creation was cut off."""
    if not os.path.lexists(path):
        return False
    fd = _open_regular(path, os.O_RDONLY)
    try:
        return _holds_something(path, fd)
    finally:
        os.close(fd)


def _holds_something(path: str, fd: int) -> bool:
    return any(_read_start(path, fd))


def _create(
    path: str,
    geometry: Geometry,
    identity: Identity,
    notes: list[str],
    fd: int,
    *,
    killed: bool = False,
) -> CacheFile:
    """Make `path`, which `fd` has locked, an empty cache: the header comes last, so a cut-off
    creation is seen."""
    try:
        os.ftruncate(fd, 0)
        try:
            _allocate(path, fd, geometry.file_bytes)
        except ConfigError:
            with suppress(OSError):
                os.ftruncate(fd, 0)
                os.unlink(path)
            raise
        header = new_header(geometry, identity, boot_id(), int(time.time()))
        file = _mapped(path, fd, header)
    except BaseException:
        os.close(fd)
        raise
    file.notes = notes
    file.was_killed = killed
    slots = memoryview(mmap.mmap(-1, 2 * (geometry.slots + 1)))
    file._stored = slots.cast("H")
    file.begin()
    return file


def _allocate(path: str, fd: int, count: int) -> None:
    """Have room for all of the file. Raises ConfigError."""
    try:
        os.posix_fallocate(fd, 0, count)
    except OSError as error:
        raise ConfigError(
            f"cache file {path}: no room for {count} bytes ({error.strerror}); make room or choose "
            "a smaller --cache-size"
        ) from None


def _open_locked(path: str, flags: int) -> int:
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


def _adopt(path: str, fd: int) -> None:
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
            f"file: run 'chmod go-w {where}', or choose another with --cache-dir"
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
        raise ConfigError(_open_fault(path, error, creating=bool(flags & os.O_CREAT))) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ConfigError(_not_regular(path))
    return fd


def _open_fault(path: str, error: OSError, *, creating: bool) -> str:
    """Why `path` could not be opened, and what helps."""
    if os.path.islink(path):
        return (
            f"cache file {path} is a symbolic link, which is not followed; "
            f"the file itself is {os.path.realpath(path)}"
        )
    if error.errno in (errno.EISDIR, errno.ENXIO):
        return _not_regular(path)
    if creating and not os.path.lexists(path):
        where = os.path.dirname(path) or "."
        fault = {
            errno.ENOENT: "does not exist; create it or choose another",
            errno.ENOTDIR: "is not a directory; choose another",
        }.get(error.errno or 0, f"cannot be written ({error.strerror}); choose another")
        return f"cache directory {where} {fault} with --cache-dir, or use --cache-mode off"
    return f"cache file {path}: {error.strerror}"


def _not_regular(path: str) -> str:
    return f"cache file {path} is not a regular file"


def _drop_hint(path: str) -> str:
    return f"to start anew: nbd-bridge cache drop {path}"


def _give_up_hint(path: str) -> str:
    return f"to give up what it holds: nbd-bridge cache drop --discard-dirty {path}"

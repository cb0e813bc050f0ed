"""How a cache file is opened: which content may be believed, which is kept, which is made anew.

Whether the content may be believed is decided here, once, at the start:

- written under this kernel's boot id: every store that happened is there;
- another boot id with the clean-shutdown mark: it was synced before the mark was;
- another boot id without the mark: the host lost power, the content is discarded.

All of the file is preallocated: a store into a hole of a full disk would be a SIGBUS.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from contextlib import suppress

from bridge.cache.file.cache_file import CacheFile, MappedImage, dirty_bytes
from bridge.cache.file.layout import (
    FileHeader,
    Geometry,
    Identity,
    new_header,
    parse_header_untrusted,
    printable,
)
from bridge.cache.file.locking import (
    adopt,
    allocate,
    holds_something,
    open_locked,
    read_ours,
    unreadable,
)
from bridge.errors import ConfigError, Remedy
from bridge.host import boot_id
from bridge.units import size_text


class Unusable(ConfigError):
    """A cache file is ours, and nothing can be told of what it holds."""

    def __init__(self, path: str, fault: str) -> None:
        super().__init__(f"cache file {path} {fault}", remedy=Remedy.GIVE_UP, path=path)
        self.fault = fault


def open_file(path: str) -> CacheFile:
    """Open and lock an existing cache file; its content is as it is.

    Raises ConfigError naming the file.
    """
    fd = open_locked(path, os.O_RDWR)
    adopt(path, fd)
    return _map(path, fd)


def _map(path: str, fd: int, remedy: Remedy | None = None) -> CacheFile:
    """The file that `fd` has open, which is closed if that fails. Raises ConfigError."""
    try:
        header = _read_header(path, fd, remedy)
        if os.fstat(fd).st_blocks * 512 < header.geometry.file_bytes:
            # Copied by something that leaves out zeroes: a store into a hole of a full disk is a
            # SIGBUS.
            allocate(path, fd, header.geometry.file_bytes)
        return _mapped(path, fd, header)
    except BaseException:
        os.close(fd)
        raise


def _mapped(path: str, fd: int, header: FileHeader) -> CacheFile:
    try:
        return CacheFile(path, fd, header)
    except OSError as error:
        raise ConfigError(
            f"cache file {path}: cannot be mapped into memory ({error.strerror})",
            remedy=Remedy.OTHER_FILE_SYSTEM,
        ) from None


def read_index(path: str, remedy: Remedy | None = None) -> MappedImage:
    """A copy of the header and the index of a cache file that no process uses: it has no data.

    Raises ConfigError naming the file, with `remedy` if it is not a cache file: where a cache file
    has to be, or is to be removed, the operator has to move the other one away.
    """
    fd = open_locked(path, os.O_RDONLY)
    try:
        return copy_index(path, fd, remedy)
    finally:
        os.close(fd)


def copy_index(path: str, fd: int, remedy: Remedy | None = None) -> MappedImage:
    """The same of a file that the caller has open and locked."""
    header = _read_header(path, fd, remedy)
    copy = bytearray(header.geometry.data_offset)
    view = memoryview(copy)
    position = 0
    try:
        while position < len(copy) and (count := os.preadv(fd, [view[position:]], position)):
            position += count
    except OSError as error:
        raise unreadable(path, error) from None
    return MappedImage(copy, header)


def _read_header(path: str, fd: int, remedy: Remedy | None = None) -> FileHeader:
    """The header of a file that is as long as it says. Raises ConfigError."""
    area = read_ours(path, fd, remedy)
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
        f"cache file {path} has a damaged index ({fault})", remedy=Remedy.BRING_INTACT, path=path
    )


def open_or_create(
    path: str,
    *,
    geometry: Geometry,
    identity: Identity,
    owns: Callable[[FileHeader], bool] | None = None,
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
    fd = open_locked(path, os.O_RDWR | os.O_CREAT)
    adopt(path, fd)
    try:
        is_new = not holds_something(path, fd)
    except BaseException:
        os.close(fd)
        raise
    if is_new:
        return _create(path, geometry, identity, [], fd)
    file = _map(path, fd, Remedy.REMOVE_FILE)
    try:
        note = _unfit(file, geometry, identity, owns)
    except BaseException:
        file.close(clean=False)
        raise
    if note is None:
        file.begin()
        return file
    return _make_anew(file, geometry, identity, note)


def _make_anew(file: CacheFile, geometry: Geometry, identity: Identity, note: str) -> CacheFile:
    # A second descriptor of the same open file keeps the lock while the map goes.
    fd = os.dup(file.fd)
    killed = file.was_killed
    file.close(clean=False)
    return _create(file.path, geometry, identity, [note], fd, killed=killed)


def _unfit(
    file: CacheFile,
    geometry: Geometry,
    identity: Identity,
    owns: Callable[[FileHeader], bool] | None,
) -> str | None:
    """Why the content of `file` has to go, None if it may stay. Raises ConfigError."""
    header, path = file.header, file.path
    if header.digest != identity.digest and not (owns is not None and owns(header)):
        raise ConfigError(
            f"cache file {path} belongs to export {header.export!r} of {printable(header.uri)}, "
            f"not to {identity.export!r} of {identity.uri}",
            remedy=Remedy.OTHER_FILE,
            path=path,
        )
    if not believe(file):
        return (
            f"cache file {path}: discarded, the host went down without a clean shutdown; "
            f"{size_text(dirty_bytes(file))} of what it held had not reached the server"
        )
    if header.geometry == geometry:
        return None
    if dirty := dirty_bytes(file):
        _take_over(file, geometry, dirty)
        return None
    if header.geometry.disk_bytes != geometry.disk_bytes:
        return (
            f"cache file {path}: discarded, the export has {geometry.disk_bytes} bytes, "
            f"it had {header.geometry.disk_bytes}"
        )
    return f"cache file {path}: made anew with another size"


def _take_over(file: CacheFile, geometry: Geometry, dirty: int) -> None:
    """Keep the `dirty` bytes of a file that was made for another geometry. Raises ConfigError if
    that cannot be."""
    held, path = file.header.geometry, file.path
    if _can_take_over(held, geometry):
        if held.slots != geometry.slots:
            file.notes.append(
                f"cache file {path}: keeps its size for now, it holds {dirty} unwritten bytes"
            )
        return
    if held.disk_bytes > geometry.disk_bytes:
        raise export_shrunk(file, geometry.disk_bytes)
    raise ConfigError(
        f"cache file {path} holds {dirty} bytes of unwritten data in blocks of "
        f"{held.block_bytes}; now they are of {geometry.block_bytes}",
        remedy=Remedy.FLUSH_FIRST,
        path=path,
    )


def _can_take_over(held: Geometry, wanted: Geometry) -> bool:
    """Is a file of `held` good for a disk of `wanted`, in a cache of another size?

    The disk may have grown since, and the process that wrote the file may not have heard of it.
    """
    blocks = (held.block_bytes, held.granule_bytes)
    return (
        blocks == (wanted.block_bytes, wanted.granule_bytes)
        and held.disk_bytes <= wanted.disk_bytes
    )


def export_shrunk(file: CacheFile, export_bytes: int) -> ConfigError:
    """The line for an operator whose cache has data for an end of the disk that is gone."""
    return ConfigError(
        f"cache file {file.path} holds {dirty_bytes(file)} bytes of unwritten data for a disk of "
        f"{file.geometry.disk_bytes} bytes, the export has {export_bytes}: nothing was written",
        remedy=Remedy.GROW_BACK,
        path=file.path,
    )


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
            allocate(path, fd, geometry.file_bytes)
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

"""What can be done with a cache file that no process uses: show it, drop it, open it to flush.

To flush it: `open_to_flush()`, a `Cache` over the result and a connected client, one FLUSH
request, and `close(clean=True)`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum, auto

from bridge.cache.file.cache_file import CacheFile, MappedImage, dirty_bytes
from bridge.cache.file.layout import Identity
from bridge.cache.file.locking import lock_to_drop
from bridge.cache.file.opening import (
    Unusable,
    believe,
    copy_index,
    export_shrunk,
    has_survived,
    index_is_whole,
    open_file,
    read_index,
)
from bridge.cache.index import Index
from bridge.errors import ConfigError, Remedy, UsedMeanwhile


class Fault(Enum):
    """Why nothing of a cache file is used by a bridge that finds it."""

    CRASHED = auto()
    """The host went down without a clean shutdown: the content will be discarded."""
    DAMAGED = auto()
    """The index is damaged: what is intact can still be brought to the server."""


@dataclass(frozen=True)
class Summary:
    """What a cache file holds."""

    path: str
    uri: str
    export: str
    digest: str
    """Of the whole server and the whole name of the export: the file has room for 1500 bytes of
    each."""
    disk_bytes: int
    cache_bytes: int
    block_bytes: int
    granule_bytes: int
    granules_used: int
    valid_bytes: int
    dirty_bytes: int
    """Not known to be durable on the server."""
    damaged_slots: int
    """Slots that cannot be believed; what they held counts nowhere else."""
    clean_shutdown: bool
    frozen: bool
    """The guest was stopped before all was at the server, and may have gone on elsewhere."""
    fault: Fault | None
    """Why it is not usable, None if it is."""
    export_generation: int
    created_s: int
    """Seconds of the epoch."""

    @property
    def usable(self) -> bool:
        """A bridge would use what it holds."""
        return self.fault is None

    @property
    def is_cut(self) -> bool:
        """`uri` or `export` are not all of what they were."""
        return Identity(self.uri, self.export).digest.hex() != self.digest


def show(path: str, *, not_ours: Remedy | None = None) -> Summary:
    """Read what `path` holds. Raises ConfigError: in use, damaged, not a cache file, which gets the
    remedy `not_ours`."""
    return _summary(path, read_index(path, not_ours))


def _summary(path: str, image: MappedImage) -> Summary:
    fault = _fault(image)
    header, sizes = image.header, image.geometry
    index = Index(image)
    index.load(skip_damaged=True)  # in the copy
    if index.damaged_slots and not fault:
        fault = Fault.DAMAGED
    return Summary(
        path=path,
        uri=header.uri,
        export=header.export,
        digest=header.digest.hex(),
        disk_bytes=sizes.disk_bytes,
        cache_bytes=sizes.slots * sizes.granule_bytes,
        block_bytes=sizes.block_bytes,
        granule_bytes=sizes.granule_bytes,
        granules_used=index.used,
        valid_bytes=index.valid_blocks * sizes.block_bytes,
        dirty_bytes=index.dirty_blocks * sizes.block_bytes,
        damaged_slots=index.damaged_slots,
        clean_shutdown=header.clean,
        frozen=header.frozen and bool(index.dirty_slots),
        fault=fault,
        export_generation=header.export_generation,
        created_s=header.created_s,
    )


def _fault(image: MappedImage) -> Fault | None:
    """Why a bridge that finds `image` starts with an empty cache, None if it does not."""
    if not has_survived(image):
        return Fault.CRASHED
    return None if index_is_whole(image) else Fault.DAMAGED


def drop(path: str, *, discard_dirty: bool = False, used_ns: int | None = None) -> None:
    """Remove a cache file that no process uses, and that none can begin to use meanwhile.

    Raises ConfigError, unless `discard_dirty`, for a file with data that the server does not have,
    and for one so damaged that this cannot be known; UsedMeanwhile if it was changed at another
    time than `used_ns` (of the epoch). Never removes another kind of file.
    """
    fd = lock_to_drop(path)
    try:
        if used_ns is not None and os.fstat(fd).st_mtime_ns != used_ns:
            raise UsedMeanwhile(f"cache file {path} was used meanwhile")
        if not discard_dirty:
            _refuse_to_lose(path, fd)
        with suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise ConfigError(f"cache file {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def _refuse_to_lose(path: str, fd: int) -> None:
    """Raises ConfigError if `path` holds, or may hold, what the server does not have."""
    try:
        summary = _summary(path, copy_index(path, fd, Remedy.REMOVE_FILE))
    except Unusable as error:
        raise ConfigError(
            f"cache file {path} {error.fault}; whether it holds unwritten data cannot be said",
            remedy=Remedy.DROP_UNSEEN,
        ) from None
    if summary.fault is Fault.DAMAGED:
        raise ConfigError(
            f"cache file {path} has a damaged index and holds {summary.dirty_bytes} bytes that the "
            "server lacks, besides those in damaged blocks",
            remedy=Remedy.BRING_INTACT_OR_DROP,
            path=path,
        )
    if summary.dirty_bytes and summary.usable:
        raise ConfigError(
            f"cache file {path} holds {summary.dirty_bytes} bytes that the server does not have",
            remedy=Remedy.FLUSH_OR_DROP,
            path=path,
        )


def open_to_flush(
    path: str,
    *,
    export_bytes: int,
    skip_damaged: bool = False,
    check: Callable[[CacheFile], None] | None = None,
) -> CacheFile:
    """Open a cache file to bring its dirty data to an export of `export_bytes`.

    `check` may raise ConfigError when it has seen the file, locked and as it was left.

    Raises ConfigError: in use, damaged (unless that is to be skipped), discarded by a crash of
    the host, or the export is smaller than the disk was.
    """
    file = open_file(path)
    try:
        if check is not None:
            check(file)
        if not (has_survived(file) if skip_damaged else believe(file)):
            raise ConfigError(
                f"cache file {path}: the host went down without a clean shutdown, "
                "its content cannot be used",
                remedy=Remedy.START_ANEW,
                path=path,
            )
        if export_bytes < file.geometry.disk_bytes and dirty_bytes(file):
            raise export_shrunk(file, export_bytes)
        file.begin()
    except BaseException:
        file.close(clean=False)
        raise
    return file

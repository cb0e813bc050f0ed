"""What can be done with a cache file that no process uses: show it, drop it, open it to flush.

To flush it: `open_to_flush()`, a `Cache` over the result and a connected client, one FLUSH
request, and `close(clean=True)`.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from bridge.errors import ConfigError

from .file import CacheFile, believe, lock_to_drop, open_file
from .layout import BITS, DIRTY_SHIFT


@dataclass(frozen=True)
class Summary:
    """What a cache file holds."""

    path: str
    uri: str
    export: str
    disk_bytes: int
    cache_bytes: int
    block_bytes: int
    granule_bytes: int
    granules_used: int
    valid_bytes: int
    dirty_bytes: int
    """Not known to be durable on the server."""
    clean_shutdown: bool
    usable: bool
    """False: the host went down without a clean shutdown, the content will be discarded."""
    export_generation: int
    created_s: int
    """Seconds of the epoch."""


def show(path: str) -> Summary:
    """Read what `path` holds. Raises ConfigError: in use, damaged, not a cache file."""
    file = open_file(path)
    try:
        header, states = file.header, file.state
        used = valid = dirty = 0
        for slot in range(1, file.geometry.slots + 1):
            word = states[slot]
            if word:
                used += 1
                valid += (word & BITS).bit_count()
                dirty += (word >> DIRTY_SHIFT & BITS).bit_count()
        sizes = header.geometry
        return Summary(
            path=path,
            uri=header.uri,
            export=header.export,
            disk_bytes=sizes.disk_bytes,
            cache_bytes=sizes.slots * sizes.granule_bytes,
            block_bytes=sizes.block_bytes,
            granule_bytes=sizes.granule_bytes,
            granules_used=used,
            valid_bytes=valid * sizes.block_bytes,
            dirty_bytes=dirty * sizes.block_bytes,
            clean_shutdown=header.clean,
            usable=believe(file),
            export_generation=header.export_generation,
            created_s=header.created_s,
        )
    finally:
        file.close(clean=False)


def drop(path: str, *, discard_dirty: bool = False) -> None:
    """Remove a cache file.

    Raises ConfigError when it is in use; and, unless `discard_dirty`, when it holds data that
    the server does not have, or is so damaged that nobody can say.
    """
    if not discard_dirty:
        try:
            summary = show(path)
        except ConfigError as error:
            if not os.path.exists(path) or "in use" in str(error):
                raise
            raise ConfigError(
                f"{error}; whether it holds unwritten data cannot be said: "
                "add --discard-dirty to drop it all the same"
            ) from None
        if summary.dirty_bytes and summary.usable:
            raise ConfigError(
                f"cache file {path} holds {summary.dirty_bytes} bytes that the server does not "
                f"have: run 'nbd-bridge cache flush {path}' first, or add --discard-dirty"
            )
    fd = lock_to_drop(path)
    try:
        with suppress(FileNotFoundError):
            os.unlink(path)
    except OSError as error:
        raise ConfigError(f"cache file {path}: {error.strerror}") from None
    finally:
        os.close(fd)


def open_to_flush(path: str, *, export_bytes: int) -> CacheFile:
    """Open a cache file to bring its dirty data to an export of `export_bytes`.

    Raises ConfigError: in use, damaged, discarded by a crash of the host, or the export is
    smaller than the disk was.
    """
    file = open_file(path)
    try:
        if not believe(file):
            raise ConfigError(
                f"cache file {path}: the host went down without a clean shutdown, "
                f"its content cannot be used; to start anew: nbd-bridge cache drop {path}"
            )
        if export_bytes < file.geometry.disk_bytes:
            raise ConfigError(
                f"cache file {path} is of a disk of {file.geometry.disk_bytes} bytes, "
                f"the export has {export_bytes}: nothing was written"
            )
        file.begin()
    except BaseException:
        file.close(clean=False)
        raise
    return file

"""Whether what a cache file holds may still be believed, and may still be sent."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable

import structlog
import trio

from bridge.app.answers import ANSWER_LIMIT_S, answer_of
from bridge.app.cache_names import cache_path, find_cache
from bridge.cache.cache import Cache
from bridge.cache.file.cache_file import CacheFile, dirty_bytes
from bridge.cache.file.locking import has_content
from bridge.cache.file.opening import believe, open_file
from bridge.datapath.turn import Turn
from bridge.errors import ConfigError, ConnectionLost, InUse, Remedy
from bridge.server.client import Client
from bridge.server.export import Export
from bridge.server.volume_words import VolumeName

_log = structlog.get_logger(__name__)

COMPARE_LIMIT_S = 30.0
"""How long the comparison with the server may take before dirty data of an earlier run is sent:
without an answer there is no start."""


def unwritten(
    file: CacheFile, reason: str, remedy: Remedy = Remedy.FORCE_OR_GIVE_UP
) -> ConfigError:
    """For the operator: the cache file holds data that the server lacks, which is in the way."""
    return ConfigError(
        f"cache file {file.path} holds {dirty_bytes(file)} bytes that the server lacks, and "
        f"{reason}",
        remedy=remedy,
        path=file.path,
    )


def check_export(cache: Cache, file: CacheFile, export: Export) -> None:
    """What only the cache has must not be written over what another host wrote, or to another
    volume, without being told to. Raises ConfigError."""
    if not cache.index.dirty_slots:
        return
    shared = file.header.shared or is_shared(export.name)
    if file.header.frozen and (export.sessions is None or shared):
        reason = "the guest was stopped and may have written elsewhere since, which cannot be told"
        raise unwritten(file, reason)
    if export.content_sessions is None:
        return
    if reason := cache.foreign.foreign_change(*export.content_sessions, export.identity):
        raise unwritten(file, reason)


def is_shared(export_name: str) -> bool:
    """Others may be in the same session of our plugin: for a migration."""
    return VolumeName(export_name).is_shared


def note_export(cache: Cache, export: Export) -> None:
    """Drop the clean blocks if another host wrote since; before anything is sent."""
    if export.sessions is None:
        return
    reason = cache.foreign.foreign_change(*export.sessions, export.identity)
    grew = reason and not cache.foreign.foreign_change(
        *(export.content_sessions or export.sessions), export.identity
    )
    if grew:
        reason = "the export was made longer"
    elif reason and (dirty := cache.index.dirty_blocks):
        _log.error(f"{reason}: data that only the cache has overwrites it", dirty_blocks=dirty)
    if dropped := cache.foreign.note_export(*export.sessions, export.identity):
        _log.warning(f"{reason}: the clean part of the cache is discarded", blocks=dropped)


async def check_content(
    cache: Cache,
    file: CacheFile,
    turn: Turn,
    *,
    force: bool = False,
    limit_s: float = COMPARE_LIMIT_S,
    lost: trio.Event | None = None,
    hang_up: Callable[[], Awaitable[None]] | None = None,
) -> None:
    """Compare the clean blocks of the cache with the export, before anything is sent: the server
    may not count writers, or another host may have written past the one that does.

    They are dropped if they differ, or cannot be compared. With dirty data that is an error,
    unless `force`: raises ConfigError, or ConnectionLost if the server does not answer. The
    connection is of no use then, and `hang_up` ends what is still asked: a difference counts, also
    if it is found before all is compared. `lost`: see `answer_of`.
    """
    dirty = cache.index.dirty_slots
    check = (
        cache.foreign.check_before_writing if dirty and not force else cache.foreign.check_sample
    )
    limit_s = limit_s if dirty else min(limit_s, ANSWER_LIMIT_S)
    give_up = hang_up if dirty and not force else None
    differing = await answer_of(check, turn, limit_s, lost=lost, hang_up=give_up)
    if differing > 0 and dirty and not force:
        raise unwritten(
            file,
            "the export is not as it was left: another host wrote it, or another image is in its "
            f"place ({differing} blocks that were read or flushed before are different now)",
        )
    if differing > 0:
        note_changed_content(cache, differing)
    elif differing < 0 and dirty and not force:
        raise ConnectionLost(
            f"cache file {file.path} holds data that the server lacks, and the server did not "
            "answer when it was compared with the export: nothing was written",
            remedy=Remedy.FORCE_IF_UNREADABLE,
            path=file.path,
        )
    elif differing < 0:
        _log.warning("the cache could not be compared with the export: its clean part is discarded")
        cache.foreign.drop_clean()


def note_changed_content(cache: Cache, differing: int) -> None:
    """For the operator: the clean part was dropped, since so many blocks of it differ."""
    if dirty := cache.index.dirty_blocks:
        _log.error(
            "the export has changed since, and data that only the cache has overwrites it",
            differing_blocks=differing,
            dirty_blocks=dirty,
        )
    else:
        _log.warning(
            "the export has changed since: the clean part of the cache is discarded",
            differing_blocks=differing,
        )


def expect_stale_writes(client: Client, file: CacheFile, dirty_slots: int) -> None:
    """The process before this one may have left writes at the server: nothing was sent yet, and
    the file is ours, so that one has ended."""
    if file.was_killed or dirty_slots:
        client.expect_stale_writes()


def may_call_clean(client: Client, dirty_slots: int) -> bool:
    """Whether a cache file may say that it was closed in order: not when old writes may come after
    the next process has begun, and nothing dirty would tell it so."""
    return bool(dirty_slots) or not client.may_leave_writes


async def check_unused_cache(client: Client, directory: str | None) -> None:
    """Serving without a cache: what an earlier run left in one must not be passed over.

    The guest would see an old image; what it then writes would be overwritten by the next run
    with the cache, or not be seen by it. Raises ConfigError.
    """
    uri = client.uri
    try:
        own = str(cache_path(uri, directory))
    except ConfigError:
        return  # No directory, no file.
    found = await find_cache(uri, directory, client.export)
    paths = {each.path for each in found if each.owned or each.same_server}
    if own not in paths and has_content(own):
        paths.add(own)  # Nothing can be told of it: that is said below.
    for path in sorted(paths):
        _check_unused_file(path, client)


def _check_unused_file(path: str, client: Client) -> None:
    read_only = client.export.read_only or client.options.read_only
    try:
        file = open_file(path)
    except InUse:
        if read_only:
            return  # The process that has it writes the export, and we only read.
        raise
    try:
        if not believe(file):
            return
        if dirty_bytes(file):
            raise unwritten(file, "the run would ignore it", Remedy.FLUSH_OR_GIVE_UP)
        if not read_only and client.export.sessions is None:
            # The server could not tell the next run that this one wrote.
            os.unlink(path)
            _log.warning("the cache file is removed, the export is written without it", path=path)
        expect_stale_writes(client, file, 0)
    finally:
        file.close(clean=False)

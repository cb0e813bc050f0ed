"""Filling a cache from its server without a guest: what `nbd-bridge cache warm` does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import trio

from bridge.app.answers import finished, to_be_set
from bridge.app.cache_names import cache_path
from bridge.app.settings import CacheSettings
from bridge.app.storage import Storage
from bridge.cache.cache_options import WRITEBACK
from bridge.cache.file.inspect import show
from bridge.cache.file.locking import has_content
from bridge.cache.warm import Warmer, data_ranges
from bridge.datapath.loop import Loop
from bridge.datapath.request import BLOCK_STATUS, Target
from bridge.datapath.turn import Turn
from bridge.errors import BridgeError, ConfigError, ConnectionLost, RangeBeyondDisk
from bridge.server.chunks import StatusRequest
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.uri import NbdUri, parse_uri

_STATUS_BYTES = 1 << 30
"""How much of a disk one BLOCK_STATUS request covers."""

_HANG_UP_S = 2.0
"""How long a `warm` that was interrupted, or failed, waits for the server's remaining replies."""

_PATIENCE = 2
"""How many times the `--timeout` of a `warm` may pass without any progress: once while the server
is unreachable, and once more while it is silent."""


async def warm(
    uri_text: str,
    *,
    cache_bytes: int | None,
    directory: str | None,
    ranges: Sequence[tuple[int, int]],
    timeout_s: float,
    progress: Callable[[int, int], None],
    client: ClientOptions | None = None,
) -> int:
    """Read `ranges` (the whole disk if empty) into its cache; return the length read, in bytes.

    Leaves out the holes that the server reports. `cache_bytes` None: an existing cache keeps its
    size. `timeout_s` bounds the waiting for a lost server, not the whole run. Calls
    `progress(done_bytes, total_bytes)` after each part. Raises ConfigError, ConnectionLost or
    ProtocolError, and BridgeError if a part could not be read.
    """
    uri = parse_uri(uri_text)
    loop = Loop(poll_us=0)
    size_bytes = cache_bytes or _size_to_keep(str(cache_path(uri, directory)))
    settings = CacheSettings(mode=WRITEBACK, size_bytes=size_bytes, directory=directory)
    storage = Storage(uri, loop, _options(client, timeout_s), settings)
    close_s = _HANG_UP_S
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        try:
            export = await _open(storage)
            nursery.start_soon(storage.run)
            wanted = _within(ranges, export.usable_bytes) or [(0, export.usable_bytes)]
            allocated = await _allocated(storage, export, wanted, timeout_s)
            # More than the cache holds would only evict what was read first.
            total = min(sum(length for _, length in allocated), size_bytes)
            await _prefetch(storage, allocated, total, lambda done: progress(done, total))
            close_s = timeout_s  # An existing cache may have dirty data to flush.
        finally:
            with trio.CancelScope(shield=True):
                await storage.close(limit_s=close_s)
        nursery.cancel_scope.cancel()
    loop.close()
    return total


async def _open(storage: Storage) -> Export:
    """Raises ConfigError if there is no cache to warm."""
    export = await storage.open()
    if export.read_only:
        raise ConfigError(
            f"{storage.client.uri.text}: the export is read-only, so it is served without a cache: "
            "there is none to warm"
        )
    return export


def _options(client: ClientOptions | None, timeout_s: float) -> ClientOptions:
    options = client or ClientOptions()
    return replace(
        options,
        request_timeout_s=min(timeout_s, options.request_timeout_s),
        reconnect_timeout_s=timeout_s,
        close_timeout_s=_HANG_UP_S,
    )


async def _allocated(
    storage: Storage, export: Export, ranges: Sequence[tuple[int, int]], timeout_s: float
) -> list[tuple[int, int]]:
    """The parts of `ranges` that the server does not report as holes."""
    found: list[tuple[int, int]] = []
    target, turn = storage.target, storage.turn
    for offset, length in ranges:
        with _patience(storage.client.uri, timeout_s):
            found += await _data(target, turn, offset, length, export.can_block_status)
    return found


@contextmanager
def _patience(uri: NbdUri, timeout_s: float) -> Iterator[Callable[[], None]]:
    """A time limit for a server that accepts connections but never replies.

    Yields a function that starts the time again. Raises ConnectionLost.
    """
    limit_s = _PATIENCE * timeout_s
    scope = trio.CancelScope(deadline=trio.current_time() + limit_s)

    def moved() -> None:
        scope.deadline = trio.current_time() + limit_s

    with scope:
        yield moved
    if scope.cancelled_caught:
        raise ConnectionLost(f"{uri.server}: the server answered nothing for {limit_s:g} s")


def _size_to_keep(path: str) -> int:
    """The size of the cache file at `path`, or the default if there is none. Raises ConfigError."""
    default = CacheSettings().size_bytes
    if not has_content(path):
        return default
    summary = show(path)
    if summary.cache_bytes < summary.disk_bytes:
        return summary.cache_bytes
    # It holds the whole disk: the file does not say how much more the operator asked for.
    return max(default, summary.cache_bytes)


def _within(ranges: Sequence[tuple[int, int]], disk_bytes: int) -> list[tuple[int, int]]:
    """`ranges` up to the end of the disk. Raises ConfigError for one that begins beyond it."""
    for offset, length in ranges:
        if offset >= disk_bytes:
            raise RangeBeyondDisk(offset, length, disk_bytes)
    return [(offset, min(length, disk_bytes - offset)) for offset, length in ranges]


async def _prefetch(
    storage: Storage,
    ranges: list[tuple[int, int]],
    total_bytes: int,
    progress: Callable[[int], None],
) -> None:
    """Read the first `total_bytes` of `ranges` into the cache. Raises ConnectionLost if the server
    is lost, BridgeError if a part cannot be read."""
    ended = trio.Event()
    client = storage.client

    def chunk_ended(done_bytes: int) -> None:
        moved()
        if client.link.given_up:
            warmer.stop()  # All the others would fail, too.
        progress(done_bytes)

    warmer = Warmer(
        storage.target.submit,
        ranges,
        limit_bytes=total_bytes,
        progress=chunk_ended,
        done=lambda failed_bytes: ended.set(),
    )
    with _patience(client.uri, client.options.reconnect_timeout_s) as moved:
        warmer.start()
        storage.turn.end()
        try:
            await ended.wait()
        finally:
            warmer.stop()
    if warmer.failed_bytes and client.link.given_up:
        raise ConnectionLost(
            f"{client.uri.server}: the server was lost and could not be reached again within "
            f"{client.options.reconnect_timeout_s:g} s; "
            f"{warmer.done_bytes - warmer.failed_bytes} bytes are in the cache"
        )
    if warmer.failed_bytes:
        raise BridgeError(f"{client.uri.server}: {warmer.failed_bytes} bytes could not be read")


async def _data(
    target: Target, turn: Turn, offset: int, length: int, can_block_status: bool
) -> list[tuple[int, int]]:
    """The parts of a range that the server does not report as holes."""
    if not can_block_status:
        return [(offset, length)]
    found: list[tuple[int, int]] = []
    end = offset + length
    while offset < end:
        request = StatusRequest(
            BLOCK_STATUS, offset, min(end - offset, _STATUS_BYTES), [], to_be_set
        )
        await finished(target, request, turn)
        if request.error or not request.extents:
            found.append((offset, end - offset))  # no reply: all of it may be data
            break
        found += data_ranges(request.extents, offset)
        offset += sum(length for length, _ in request.extents)
    return found

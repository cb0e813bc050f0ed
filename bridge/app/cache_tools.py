"""The `nbd-bridge cache` commands that need a server: `flush` a cache file to it, `warm` one."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from urllib.parse import quote

import structlog
import trio

from bridge.app.settings import CacheSettings
from bridge.app.storage import (
    GatedBackend,
    Storage,
    cache_identity,
    cache_path,
    check_content,
    check_export,
    close_file,
    expect_stale_writes,
    finished,
    may_call_clean,
    note_changed_content,
    note_export,
    notes_directory,
    to_be_set,
    wanted_cache,
)
from bridge.cache.cache import Cache
from bridge.cache.cache_options import WRITEBACK, Options
from bridge.cache.file.cache_file import CacheFile, dirty_bytes
from bridge.cache.file.inspect import open_to_flush, show
from bridge.cache.file.layout import Header, printable
from bridge.cache.file.location import forget, peek
from bridge.cache.file.locking import has_content
from bridge.cache.warm import Warmer, data_ranges
from bridge.datapath.loop import Loop
from bridge.datapath.request import BLOCK_STATUS, FLUSH, Request, Target
from bridge.datapath.turn import Turn
from bridge.errors import (
    BridgeError,
    ChangedMeanwhile,
    ConfigError,
    ConnectionLost,
    RangeBeyondDisk,
    Remedy,
)
from bridge.server.chunks import StatusRequest
from bridge.server.client import Client, inspect
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.uri import NbdUri, parse_uri

_log = structlog.get_logger(__name__)

_STATUS_BYTES = 1 << 30
"""How much of a disk one BLOCK_STATUS request covers."""

_FILE_LIMIT_S = 60.0
"""How long the cache's disk may take at the end of a flush."""

_HANG_UP_S = 2.0
"""How long a `warm` that was interrupted, or failed, waits for the server's remaining replies."""

_PATIENCE = 2
"""How many times the `--timeout` of a `warm` may pass without any progress: once while the server
is unreachable, and once more while it is silent."""


def uri_of(path: str) -> NbdUri:
    """The URI of a cache file's export, without TLS, as the file has it. Raises ConfigError."""
    summary = show(path)
    if summary.is_cut:
        raise ConfigError(
            f"cache file {path} keeps only the beginning of its export's long name: give the URI "
            "after the file"
        )
    name = quote(summary.export, safe="")
    if summary.uri.startswith("/"):
        return parse_uri(f"nbd+unix:///{name}?socket={quote(summary.uri)}")
    host = quote(summary.uri, safe="[]:")  # an IPv6 address may have a zone, after a %
    return parse_uri(f"nbd://{host}/{name}")


async def flush_file(
    path: str,
    uri_text: str | None,
    *,
    moved: bool,
    timeout_s: float,
    force: bool = False,
    skip_damaged: bool = False,
    client: ClientOptions | None = None,
) -> int:
    """Write the dirty data of the cache file at `path` to its export; return its length in bytes.

    `uri_text` None: use the URI in the file. `moved`: the export may be another than the file's.
    `force`: also overwrite what another host wrote since. `skip_damaged`: lose the data of damaged
    slots.
    Raises ConfigError, ConnectionLost or ProtocolError; after any error the data is still in the
    file.
    """
    summary = show(path)
    uri = uri_of(path) if uri_text is None else parse_uri(uri_text)
    if not moved:
        await _check_spelling(path, uri, client)
    # The file is closed last: the cache may use it until the loop has ended.
    options = replace(client or ClientOptions(), reconnect_timeout_s=timeout_s)
    async with AsyncExitStack() as at_last:
        over = _OverReconnects()
        async with _client(uri, options, over) as (connected, loop):
            if connected.export.read_only:
                why = connected.export.volume.why_read_only
                raise ConfigError(
                    f"{uri.text}: the export is read-only, nothing can be flushed to it"
                    + (f" ({why})" if why else "")
                )

            def check(file: CacheFile) -> None:
                # The summary is older than the lock: it may be that of another file.
                if file.header.digest.hex() != summary.digest:
                    raise ConfigError(
                        f"cache file {path} is another one than a moment ago",
                        remedy=Remedy.LOOK_AGAIN,
                        path=path,
                    )
                if not moved and not wanted_cache(uri, connected.export).owns(file.header):
                    raise _of_another(path, file.header, uri)

            file = open_to_flush(
                path,
                export_bytes=connected.export.usable_bytes,
                skip_damaged=skip_damaged,
                check=check,
            )
            at_last.push_async_callback(_close, file, connected)
            flushed = await _flush_to(
                *(file, connected, loop, over),
                timeout_s=timeout_s,
                force=force,
                skip_damaged=skip_damaged,
            )
    if (notes := notes_directory()) is not None:
        forget(path, notes)
    return flushed


async def _check_spelling(path: str, uri: NbdUri, options: ClientOptions | None) -> None:
    """Check that `uri` is the file's export, before the server opens it for writing.

    It is if the file has the same name. If not, the server is asked for the volume's identity.
    Raises ConfigError.
    """
    header = peek(path)
    if header is None or wanted_cache(uri, None).is_spelled_so(header):
        return
    try:
        export = await inspect(uri, options)
    except BridgeError:
        raise _of_another(path, header, uri) from None
    if not wanted_cache(uri, export).owns(header):
        raise _of_another(path, header, uri)


def _of_another(path: str, header: Header, uri: NbdUri) -> ConfigError:
    """The error for a file that was made for another export, as far as names and identity tell."""
    identity = cache_identity(uri)
    return ConfigError(
        f"cache file {path} belongs to export {header.export!r} of "
        f"{printable(header.uri)}, not to {identity.export!r} of {identity.uri}",
        remedy=Remedy.MOVED,
    )


async def _close(file: CacheFile, client: Client) -> None:
    """Close `file`. Raises BridgeError if its disk is stuck."""
    dirty = bool(dirty_bytes(file))
    clean = may_call_clean(client, dirty)
    with trio.CancelScope(shield=True):
        problem = await close_file(file, clean=clean, dirty=dirty, limit_s=_FILE_LIMIT_S)
    if problem:
        raise BridgeError(problem)


class _OverReconnects:
    """Handles reconnects during the flush of a cache file. The layer above the client, which exists
    before the cache does."""

    def __init__(self) -> None:
        self.changed = ""
        """Why the cache may send nothing more; empty while it may."""
        self._parts: tuple[Client, Cache, GatedBackend] | None = None
        self._force = False

    def begin(self, client: Client, cache: Cache, backend: GatedBackend, *, force: bool) -> None:
        """From here on `cache` sends its dirty data through `backend`."""
        self._parts = client, cache, backend
        self._force = force

    async def examine(self, export: Export, submit: Callable[[Request], None]) -> str:
        """See client.Above. The comparison goes through the gate, in `reconnected`."""
        return ""

    def export_changed(self, export: Export) -> None:
        """See client.Above. What is cached lies before the old end."""

    def reconnected(self) -> None:
        """See client.Above."""
        if self._parts is None:
            return
        client, cache, backend = self._parts
        cache.backend_reconnected()
        export = client.export
        if export.sessions is None:
            backend.hold_changes()  # until the comparison shows whether it is still this export
            cache.check_sample(self._compared)
        elif reason := cache.foreign_change(
            *(export.content_sessions or export.sessions), export.identity
        ):
            self._found_changed(reason)
        note_export(cache, export)

    def _compared(self, differing: int) -> None:
        assert self._parts is not None
        _, cache, backend = self._parts
        if differing > 0:
            note_changed_content(cache, differing)
            self._found_changed("the export was changed meanwhile")
        backend.let_go()

    def _found_changed(self, reason: str) -> None:
        # The link sends again what it has in flight; the cache may send nothing more.
        assert self._parts is not None
        _, cache, backend = self._parts
        if not self._force and cache.index.dirty_slots:
            self.changed = self.changed or reason
            backend.refuse(errno.EIO)


def _cache_over(file: CacheFile, backend: GatedBackend, turn: Turn, *, skip_damaged: bool) -> Cache:
    """The cache in `file`. Raises ConfigError, and leaves the file unmarked, if it is damaged."""
    try:
        cache = Cache(
            file,
            backend,
            Options(flush_interval_s=0),
            clock=trio.current_time,
            turn=turn,
            skip_damaged=skip_damaged,
        )
    except BaseException:
        file.abandon()  # No clean mark for a damaged index.
        raise
    if damaged := cache.index.damaged_slots:
        _log.warning("damaged slots were skipped: their data is lost", slots=damaged)
    return cache


async def _flush_to(
    file: CacheFile,
    client: Client,
    loop: Loop,
    over: _OverReconnects,
    *,
    timeout_s: float,
    force: bool,
    skip_damaged: bool,
) -> int:
    """Write the dirty data of `file` to the server; return its length in bytes.

    Raises ConfigError or ConnectionLost before anything was sent, else BridgeError.
    """
    turn = loop.turn
    deadline_s = trio.current_time() + timeout_s
    backend = GatedBackend(client, turn)
    cache = _cache_over(file, backend, turn, skip_damaged=skip_damaged)
    if not force:
        check_export(cache, file, client.export)
    expect_stale_writes(client, file, cache.index.dirty_slots)
    client.keeps_unflushed = True
    dirty_blocks = cache.index.dirty_blocks
    over.begin(client, cache, backend, force=force)
    turn.add_stage(cache)
    await check_content(cache, file, turn, force=force, limit_s=timeout_s)
    note_export(cache, client.export)
    request = Request(FLUSH, 0, 0, [], to_be_set)
    with trio.move_on_at(deadline_s) as scope:
        await finished(cache, request, turn)
    kept = f"what is missing is still in {file.path}"
    if over.changed:
        raise ChangedMeanwhile(f"{client.uri.text}: {over.changed}", kept)
    if scope.cancelled_caught or request.error:
        raise BridgeError(f"{client.uri.text}: the server did not take everything; {kept}")
    return dirty_blocks * file.geometry.block_bytes


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
    options = client or ClientOptions()
    options = replace(
        options,
        request_timeout_s=min(timeout_s, options.request_timeout_s),
        reconnect_timeout_s=timeout_s,
        close_timeout_s=_HANG_UP_S,
    )
    size_bytes = cache_bytes or _size_to_keep(str(cache_path(uri, directory)))
    settings = CacheSettings(mode=WRITEBACK, size_bytes=size_bytes, directory=directory)
    storage = Storage(uri, loop, options, settings)
    close_s = _HANG_UP_S
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        try:
            export = await storage.open()
            if export.read_only:
                raise ConfigError(
                    f"{uri_text}: the export is read-only, so it is served without a cache: "
                    "there is none to warm"
                )
            nursery.start_soon(storage.run)
            wanted = _within(ranges, export.usable_bytes) or [(0, export.usable_bytes)]
            allocated: list[tuple[int, int]] = []
            for offset, length in wanted:
                with _patience(uri, timeout_s):
                    allocated += await _data(
                        storage.backend, loop.turn, offset, length, export.can_block_status
                    )
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
        storage.backend.submit,
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


@asynccontextmanager
async def _client(
    uri: NbdUri, options: ClientOptions, above: _OverReconnects
) -> AsyncIterator[tuple[Client, Loop]]:
    """A connected client with its loop, for as long as the block lasts."""
    loop = Loop(poll_us=0)
    client = Client(uri, loop, options, above=above)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await client.connect()
        nursery.start_soon(client.run)
        try:
            yield client, loop
        finally:
            with trio.CancelScope(shield=True):
                await client.close()
            nursery.cancel_scope.cancel()
    loop.close()

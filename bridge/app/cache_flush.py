"""The flush of a cache file to its server without a guest: what `nbd-bridge cache flush` does."""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from urllib.parse import quote

import structlog
import trio

from bridge.app.answers import finished, to_be_set
from bridge.app.cache_names import cache_identity, notes_directory, wanted_cache
from bridge.app.cache_ownership import (
    check_content,
    check_export,
    expect_stale_writes,
    may_call_clean,
    note_changed_content,
    note_export,
)
from bridge.app.open_cache import close_file
from bridge.app.targets import GatedUpstream
from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import CacheFile, dirty_bytes
from bridge.cache.file.inspect import open_to_flush, show
from bridge.cache.file.layout import FileHeader, printable
from bridge.cache.file.location import forget, peek
from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, Request
from bridge.datapath.turn import Turn
from bridge.errors import BridgeError, ChangedMeanwhile, ConfigError, Remedy
from bridge.server.client import Client
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.inspection import inspect
from bridge.server.uri import NbdUri, parse_uri

_log = structlog.get_logger(__name__)


_FILE_LIMIT_S = 60.0
"""How long the cache's disk may take at the end of a flush."""


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
            file = _open(path, connected, summary.digest, moved=moved, skip_damaged=skip_damaged)
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


def _open(path: str, client: Client, digest: str, *, moved: bool, skip_damaged: bool) -> CacheFile:
    """Lock the cache file, which has to be that of the export of `client`. Raises ConfigError."""
    uri, export = client.uri, client.export
    if export.read_only:
        why = export.volume.why_read_only
        raise ConfigError(
            f"{uri.text}: the export is read-only, nothing can be flushed to it"
            + (f" ({why})" if why else "")
        )
    check = partial(_check_file, digest=digest, uri=uri, export=None if moved else export)
    return open_to_flush(
        path, export_bytes=export.usable_bytes, skip_damaged=skip_damaged, check=check
    )


def _check_file(file: CacheFile, *, digest: str, uri: NbdUri, export: Export | None) -> None:
    """Check, now that it is locked, that `file` is the one of that digest, and belongs to `export`
    (None: whatever it belongs to). Raises ConfigError."""
    if file.header.digest.hex() != digest:
        raise ConfigError(
            f"cache file {file.path} is another one than a moment ago",
            remedy=Remedy.LOOK_AGAIN,
            path=file.path,
        )
    if export is not None and not wanted_cache(uri, export).owns(file.header):
        raise _of_another(file.path, file.header, uri)


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


def _of_another(path: str, header: FileHeader, uri: NbdUri) -> ConfigError:
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
        self._parts: tuple[Client, Cache, GatedUpstream] | None = None
        self._force = False

    def begin(self, client: Client, cache: Cache, upstream: GatedUpstream, *, force: bool) -> None:
        """From here on `cache` sends its dirty data through `upstream`."""
        self._parts = client, cache, upstream
        self._force = force

    async def examine(self, export: Export, submit: Callable[[Request], None]) -> str:
        """See client.Above. The comparison goes through the gate, in `reconnected`."""
        return ""

    def disconnected(self) -> None:
        """See client.Above. What was not flushed is in the file."""

    def export_changed(self, export: Export) -> None:
        """See client.Above. What is cached lies before the old end."""

    def reconnected(self) -> None:
        """See client.Above."""
        if self._parts is None:
            return
        client, cache, upstream = self._parts
        cache.upstream_reconnected()
        export = client.export
        if export.sessions is None:
            upstream.hold_changes()  # until the comparison shows whether it is still this export
            cache.foreign.check_sample(self._compared)
        elif reason := cache.foreign.foreign_change(
            *(export.content_sessions or export.sessions), export.identity
        ):
            self._found_changed(reason)
        note_export(cache, export)

    def _compared(self, differing: int) -> None:
        assert self._parts is not None
        _, cache, upstream = self._parts
        if differing > 0:
            note_changed_content(cache, differing)
            self._found_changed("the export was changed meanwhile")
        upstream.let_go()

    def _found_changed(self, reason: str) -> None:
        # The link sends again what it has in flight; the cache may send nothing more.
        assert self._parts is not None
        _, cache, upstream = self._parts
        if not self._force and cache.index.dirty_slots:
            self.changed = self.changed or reason
            upstream.refuse(errno.EIO)


def _cache_over(
    file: CacheFile, upstream: GatedUpstream, turn: Turn, *, skip_damaged: bool
) -> Cache:
    """The cache in `file`. Raises ConfigError, and leaves the file unmarked, if it is damaged."""
    try:
        cache = Cache(
            file,
            upstream,
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
    upstream = GatedUpstream(client, turn)
    cache = _cache_over(file, upstream, turn, skip_damaged=skip_damaged)
    if not force:
        check_export(cache, file, client.export)
    expect_stale_writes(client, file, cache.index.dirty_slots)
    client.keeps_unflushed = True
    dirty_blocks = cache.index.dirty_blocks
    over.begin(client, cache, upstream, force=force)
    turn.add_stage(cache)
    await check_content(cache, file, turn, force=force, limit_s=timeout_s)
    note_export(cache, client.export)
    request = Request(FLUSH, 0, 0, [], to_be_set)
    with trio.move_on_at(deadline_s) as scope:
        await finished(cache, request, turn)
    kept = f"the rest is still in {file.path}"
    if over.changed:
        raise ChangedMeanwhile(f"{client.uri.text}: {over.changed}", kept)
    if scope.cancelled_caught or request.error:
        raise BridgeError(f"{client.uri.text}: the server did not take everything; {kept}")
    return dirty_blocks * file.geometry.block_bytes


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

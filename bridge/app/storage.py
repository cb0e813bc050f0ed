"""The storage side of a disk: the NBD client, and the cache over it where there is one.

`Storage` connects the client, opens the cache file, and gives the disk something to submit to.
At the end it brings dirty data to the server within a limit; what cannot be brought there
stays in the cache file, marked and synced, and goes to the server at the next start.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from errno import EIO
from functools import partial
from typing import Protocol

import structlog
import trio

from bridge.app import service_manager
from bridge.app.answers import answer_of, finished, to_be_set
from bridge.app.cache_names import (
    locate_cache,
    make_default_directory,
)
from bridge.app.cache_ownership import (
    COMPARE_LIMIT_S,
    check_content,
    check_export,
    check_unused_cache,
    expect_stale_writes,
    note_changed_content,
    note_export,
    unwritten,
)
from bridge.app.departure import Departure
from bridge.app.first_connection import first_connection
from bridge.app.open_cache import FILE_LIMIT_S, OpenCache
from bridge.app.settings import CacheSettings
from bridge.app.targets import CacheTarget, ServerTarget
from bridge.cache.cache import Cache
from bridge.cache.cache_options import OFF
from bridge.cache.file.cache_file import CacheFile
from bridge.datapath.deadlines import Deadlines
from bridge.datapath.disk import DiskTarget
from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, Request
from bridge.datapath.turn import Outcome
from bridge.errors import BridgeError, ConnectionLost, Remedy
from bridge.server.client import Client
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.uri import NbdUri

_log = structlog.get_logger(__name__)


_OPEN_S = 600.0
"""For a large cache: ten seconds per TiB in use on a quiet machine, and the comparison with what
the server has."""


class Above(Protocol):
    """What serves the disk to guests."""

    def resized(self, size_bytes: int) -> None:
        """The disk has grown, and may be used so far."""

    def reconnected(self) -> None:
        """There is a new connection to the server, and no cache that keeps what the last one had
        not made durable."""

    def disconnected(self) -> None:
        """The connection to the server is lost, and there is no such cache."""


class Storage:
    """One export, with or without a cache. `open`, then `target`, then `close`."""

    def __init__(
        self,
        uri: NbdUri,
        loop: Loop,
        options: ClientOptions,
        cache: CacheSettings,
        *,
        above: Above | None = None,
    ) -> None:
        self._above = above
        self._uri = uri
        self._loop = loop
        self.turn = loop.turn
        """A caller that submits outside of a turn ends it: `turn.end()`."""
        self._read_only = options.read_only
        self._settings = cache
        self._opened = False
        self._begin(Client(uri, loop, options, above=self))
        self._objection = ""
        """Why nothing is sent to the server, which is there again: see `examine`."""
        self._was_compared = False
        """What is cached and clean was, with the present connection."""
        self._no_stale_writes = False

    def _begin(self, client: Client) -> None:
        self.client = client
        self._cached: OpenCache | None = None
        self.departure = Departure(client, self.turn, go_on=self._go_on)
        """For when the guest stops, and perhaps comes back."""
        self._lost = trio.Event()
        """The first connection is lost."""

    @property
    def _cache(self) -> Cache | None:
        return None if self._cached is None else self._cached.cache

    @property
    def _file(self) -> CacheFile | None:
        return None if self._cached is None else self._cached.file

    async def open(self, *, wait: bool = False, no_stale_writes: bool = False) -> Export:
        """Connect, and open the cache. Raises ConfigError, ConnectionLost or ProtocolError.

        `wait`: for a server that cannot be reached, or is lost again before the cache is open.
        `no_stale_writes`: the process before this one has left none there, as it says itself.
        """
        self._no_stale_writes = no_stale_writes
        return await first_connection(self._try_to_open, wait=wait)

    async def _try_to_open(self) -> Export:
        """One attempt; nothing is written to the server in it."""
        if self.client.generation:
            await self._let_go()
        export = await self.client.connect()
        if self._settings.mode == OFF or export.read_only or self._read_only:
            await check_unused_cache(self.client, self._settings.directory)
            return export
        service_manager.still_starting("opening the cache", _OPEN_S)
        if self._settings.directory is None:
            make_default_directory()
        path = await locate_cache(self._uri, self._settings.directory, export)
        cached = self._cached = OpenCache(path, self.client, self._loop, self._settings)
        self.departure.opened = cached
        await self._take_over(cached, export)
        self._opened = True
        return export

    async def _take_over(self, cached: OpenCache, export: Export) -> None:
        """Let the cache go on from where its file was left, as far as that may be believed."""
        cache, file = cached.cache, cached.file
        assert file is not None
        check_export(cache, file, export)
        if not self._no_stale_writes:
            expect_stale_writes(self.client, file, cache.index.dirty_slots)
        cached.start()
        self.client.keeps_unflushed = True
        # While all is there to compare: what the counters say may drop the clean part.
        await check_content(cache, file, self.turn, lost=self._lost, hang_up=self._hang_up)
        if file.header.frozen:
            file.save_header(frozen=False)
        if export.sessions and export.sessions[0] == file.header.export_generation:
            # Another client kept the session of this cache open, and may have written.
            self.departure.may_be_written_elsewhere()
        note_export(cache, export)
        if await cached.resize(export.usable_bytes, lost=self._lost) != 0:
            raise ConnectionLost(
                f"{self._uri.server}: the end of the disk, which has grown, could not be read"
            )

    async def _hang_up(self) -> None:
        """The start fails: what it has asked and the server does not answer soon fails, too."""
        await self.client.leave(self.client.options.close_timeout_s, EIO)
        self._end_turns()

    async def _let_go(self) -> None:
        """Undo an attempt that has failed. The next one is like that of another process, which
        believes nothing of what this one was told. Raises BridgeError."""
        cached = self._cached
        with trio.CancelScope(shield=True):
            await self.client.close()
            self._end_turns()
            problem = "" if cached is None else await cached.leave_as_found()
        self._begin(self.client.anew())
        if problem:
            raise BridgeError(problem)

    async def examine(self, export: Export, submit: Callable[[Request], None]) -> str:
        """See client.Above. Why what only the cache has must not go there; "": it may.

        Until then there is no connection, for all that the guest sees, and every further attempt
        asks again: an operator who started a server on the wrong image can mend that.
        """
        self._was_compared = False
        cache, file = self._cache, self._file
        if cache is None or file is None or self.departure.is_away or not cache.index.dirty_slots:
            self._objection = ""
            return ""
        reason = ""
        if export.content_sessions is not None:
            reason = cache.foreign.foreign_change(*export.content_sessions, export.identity)
        is_counted = export.sessions is not None and export.sessions == export.content_sessions
        # A command of more than the server takes would end the connection.
        can_look = cache.index.block_bytes <= export.max_payload_bytes
        if not reason and not is_counted and can_look:
            differing = await answer_of(
                partial(cache.foreign.check_server, submit), self.turn, COMPARE_LIMIT_S
            )
            if differing < 0:
                return "it did not answer when the export was compared with what is cached"
            self._was_compared = True
            if differing:
                reason = (
                    "the export is not as it was left: another host wrote it, or another image is "
                    "in its place"
                )
        if reason and reason != self._objection:
            _log.error(
                "nothing is sent to the server, and the guest waits, until the export is as it was "
                "or this bridge is stopped",
                problem=unwritten(file, reason),
            )
        self._objection = reason
        return reason

    def reconnected(self) -> None:
        """See client.Above."""
        if self._cache is None:
            if self._above is not None:
                self._above.reconnected()
        elif self.departure.is_away:
            self.departure.judge_return()
        else:
            self._go_on()

    def disconnected(self) -> None:
        """See client.Above."""
        self._lost.set()
        if self._cache is None and self._above is not None:
            self._above.disconnected()

    def export_changed(self, export: Export) -> None:
        """See client.Above. A cache grows first, see `_go_on`."""
        if self._cache is None and self._above is not None:
            self._above.resized(export.usable_bytes)

    def _go_on(self) -> None:
        """Dirty data may be sent on this connection."""
        cache = self._cache
        assert cache is not None
        cache.upstream_reconnected()
        note_export(cache, self.client.export)
        if self.client.export.sessions is None and not self._was_compared:
            cache.foreign.check_sample(self._note_sample)
        if self.client.export.usable_bytes > cache.size_bytes:
            cache.resize(self.client.export.usable_bytes, Outcome(self._grown))

    def _grown(self, outcome: Outcome) -> None:
        """The cache has the size of the disk, which has grown."""
        assert self._cache is not None
        if outcome.error:
            _log.error(
                "the disk has grown, but its cache cannot: the guest keeps the old size until "
                "the next reconnect",
                reason=os.strerror(outcome.error),
            )
        elif self._above is not None:
            self._above.resized(self._cache.size_bytes)

    def _note_sample(self, differing: int) -> None:
        """The sample after a reconnect was compared, or the connection is lost again."""
        if differing > 0:
            assert self._cache is not None
            note_changed_content(self._cache, differing)

    @property
    def loss_unreported(self) -> bool:
        """The server may have lost something, and the guest has not heard of it."""
        link = self.client.link
        return link.durability.unreported

    @property
    def instance_mark(self) -> int:
        """Stands for the server instance that has what is unflushed; 0 if it has no name, or if a
        cache has the same."""
        return 0 if self.has_cache else self.client.link.durability.instance_mark

    @property
    def is_away(self) -> bool:
        """The server is not connected: what becomes of anything unflushed there is open."""
        return not self.client.connected

    def inherit(self, unflushed_on: int) -> bool:
        """A guest comes that ran with another process, which may have left something unflushed on
        the server instance of that mark (0: unknown). True if it may be lost by now."""
        link = self.client.link
        if not self.has_cache and not self._read_only:
            link.expect_unflushed()
        return link.durability.is_lost(unflushed_on)

    def nothing_inherited(self) -> None:
        """A guest comes that has not run before: it has no promise from any other process."""
        self.client.link.durability.nothing_before()

    def epoch(self) -> int:
        """Another number whenever the server may have dropped what it had acknowledged; a cache
        sees to that itself."""
        return 0 if self.has_cache else self.client.link.durability.epoch

    @property
    def has_cache(self) -> bool:
        """There is a cache between the disk and the server."""
        return self._cache is not None

    @property
    def target(self) -> DiskTarget:
        """What the disk submits to. Only after `open`."""
        return (
            ServerTarget(self.client)
            if self._cache is None
            else CacheTarget(self._cache, self._loop.engine)
        )

    async def run(self) -> None:
        """Look after the connection and the cache's deadlines, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.client.run)
            nursery.start_soon(self.departure.watch_refusal)
            if (cached := self._cached) is not None:
                deadlines = Deadlines(self._loop, cached.next_deadline, cached.cache.tick)
                nursery.start_soon(deadlines.run)

    @property
    def has_left(self) -> bool:
        """Nothing is sent: until the guest comes back, or the export is as it was."""
        return self.departure.is_away or bool(self._objection)

    async def close(self, limit_s: float) -> BridgeError | None:
        """Bring dirty data to the server, if that can be done within `limit_s`, and hang up.

        What the cache still reads is waited for: hanging up with requests in flight aborts
        nbdkit 1.32. A quarter of the limit is kept for that, if the client's own is not shorter.

        Returns None, or where what the server did not take is.
        """
        hang_up_s = min(self.client.options.close_timeout_s, limit_s / 4)
        deadline_s = trio.current_time() + limit_s
        dirty_slots = self._cache.index.dirty_slots if self._cache is not None else 0
        if self._cache is not None and self._opened and not self.has_left and dirty_slots:
            with trio.move_on_at(deadline_s - hang_up_s):
                await self._flush_cache(self._cache)
        await self.client.close(max(deadline_s - trio.current_time(), hang_up_s))
        dirty = self._opened and self._cache is not None and self._cache.index.dirty_slots
        path = self._file.path if self._file is not None else ""
        objection = None
        if self._objection and self._file is not None:
            objection = unwritten(self._file, self._objection).within(BridgeError)
        problem = ""
        self._end_turns()
        if self._cached is not None:
            file_limit_s = max(deadline_s - trio.current_time(), FILE_LIMIT_S)
            problem = await self._cached.close(file_limit_s, forget=self._opened)
        if not dirty:
            return BridgeError(problem) if problem else None
        if problem:
            return BridgeError(f"{problem}; it holds what the server did not take in time")
        return objection or self._what_is_missing(path)

    async def hand_over(self, limit_s: float) -> bool:
        """Hang up, and let go of the cache file as it is: another program of this process goes on.

        What is in flight may be answered within `limit_s`. Returns whether something that was sent
        may still be executed later.
        """
        await self.client.close(limit_s)
        stale = self.client.may_leave_writes
        self._end_turns()
        if self._cached is not None:
            await self._cached.close(FILE_LIMIT_S, forget=False, in_order=False)
        return stale

    def _what_is_missing(self, path: str) -> BridgeError:
        if self.departure.is_away:
            return BridgeError(
                f"what the server lacks is kept in {path}",
                remedy=Remedy.FLUSH_BEFORE_ELSEWHERE,
                path=path,
            )
        return BridgeError(
            f"the server did not take everything in time: what is missing is kept in {path} and "
            "goes to the server at the next start"
        )

    def _end_turns(self) -> None:
        self.turn.end()
        while self.turn.pending:
            self.turn.end()

    async def _flush_cache(self, cache: Cache) -> None:
        request = Request(FLUSH, 0, 0, [], to_be_set)
        await finished(cache, request, self.turn)
        if request.error:
            _log.error("the last flush failed", reason=os.strerror(request.error))

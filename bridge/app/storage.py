"""The storage side of a disk: the NBD client, and the cache over it where there is one.

`Storage` connects the client, opens the cache file, and gives the disk something to submit to.
At the end it brings what is dirty to the server within a limit; what cannot be brought there
stays in the cache file, marked and synced, and goes to the server at the next start.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from errno import EIO
from functools import partial
from typing import Protocol

import structlog
import trio

from bridge.app.answers import answer_of, finished, to_be_set
from bridge.app.backends import CachedBackend, GatedBackend, NbdBackend
from bridge.app.cache_names import (
    cache_identity,
    locate_cache,
    make_default_directory,
    notes_directory,
    wanted_cache,
)
from bridge.app.cache_ownership import (
    COMPARE_LIMIT_S,
    check_content,
    check_export,
    check_unused_cache,
    expect_stale_writes,
    is_shared,
    may_call_clean,
    note_changed_content,
    note_export,
    unwritten,
)
from bridge.app.settings import CacheSettings
from bridge.cache.cache import Cache
from bridge.cache.cache_options import OFF, Options
from bridge.cache.cold import ThreadedCold
from bridge.cache.file import location
from bridge.cache.file.cache_file import CacheFile, dirty_bytes
from bridge.cache.file.layout import geometry_for
from bridge.cache.file.opening import open_or_create
from bridge.cache.sample import check_sample
from bridge.datapath.deadlines import Deadlines
from bridge.datapath.disk import Backend
from bridge.datapath.loop import Loop
from bridge.datapath.request import DISCARD, FLUSH, WRITE_ZEROES, Request
from bridge.datapath.turn import Outcome
from bridge.errors import BridgeError, ConfigError, ConnectionLost, LeftBehind, Remedy
from bridge.server.client import Client
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.uri import NbdUri

_log = structlog.get_logger(__name__)


_LEAVE_S = 2.0
"""How long a session that is left may take to answer what is in flight: the limit of the stop has
passed already, and hanging up before aborts nbdkit 1.32."""

_SAMPLE_BLOCKS = 64
"""How many clean blocks are compared when a guest comes back to a server that counts nobody."""


FILE_LIMIT_S = 5.0
"""How long the closing of a cache file may take at least, whatever limit a stop has."""


async def close_file(file: CacheFile, *, clean: bool, dirty: bool, limit_s: float) -> str:
    """Close `file`, in a thread: a stuck disk must not hold a stop for ever.

    Returns "", or that the file could not be closed in time, for the operator. A file system that
    refuses is only logged: unless something is dirty, nothing is missing.
    """
    ended = False

    def close() -> None:
        nonlocal ended
        try:
            file.close(clean=clean)
        finally:
            ended = True

    try:
        with trio.move_on_after(limit_s):
            await trio.to_thread.run_sync(close, abandon_on_cancel=True)
    except OSError as error:
        _log.error(
            "the cache file cannot be kept"
            + (", and it holds what the server has not" if dirty else ", it is removed"),
            path=file.path,
            reason=error.strerror,
        )
    if ended:
        return ""
    file.abandon()
    return (
        f"the disk of cache file {file.path} did not take everything within {limit_s:g} s: the "
        "file is not marked as closed, and is discarded if the host goes down before its next use"
    )


class Above(Protocol):
    """What serves the disk to guests."""

    def resized(self, size_bytes: int) -> None:
        """The disk has grown, and may be used so far."""

    def reconnected(self) -> None:
        """There is a new connection to the server, and no cache that keeps what the last one had
        not made durable."""


class Storage:
    """One export, with or without a cache. `open`, then `backend`, then `close`."""

    def __init__(
        self,
        uri: NbdUri,
        loop: Loop,
        options: ClientOptions,
        cache: CacheSettings,
        *,
        above: Above | None = None,
    ) -> None:
        self.client = Client(uri, loop, options, above=self)
        self._above = above
        self._uri = uri
        self._loop = loop
        self.turn = loop.turn
        """Whoever submits outside of a turn ends it: `turn.end()`."""
        self._read_only = options.read_only
        self._settings = cache
        self._cache: Cache | None = None
        self._under_cache: GatedBackend | None = None
        self._file: CacheFile | None = None
        self._cold: ThreadedCold | None = None
        self._opened = False
        self._closed = False
        self._late: set[Request] = set()
        """Abandoned discards that the cache has not come to the end of."""
        self._away = False
        """Nothing is sent, and the session was left: see `stop_sending`."""
        self._objection = ""
        """Why nothing is sent to the server, which is there again: see `examine`."""
        self._was_compared = False
        """What is cached and clean was, with the present connection."""
        self._go: Callable[[], None] = _go_nowhere
        self._refusal: BridgeError | None = None
        self._refused = trio.Event()

    async def open(self) -> Export:
        """Connect, and open the cache. Raises ConfigError, ConnectionLost or ProtocolError."""
        export = await self.client.connect()
        if self._settings.mode == OFF or export.read_only or self._read_only:
            await check_unused_cache(self.client, self._settings.directory)
            return export
        if self._settings.directory is None:
            make_default_directory()
        path = await locate_cache(self._uri, self._settings.directory, export)
        try:
            cache = self._cache = self._open_cache(path, export)
        except BaseException:
            self._let_go_of_file()
            raise
        assert self._file is not None
        check_export(cache, self._file, export)
        if self._file.header.frozen:
            self._file.save_header(frozen=False)
        expect_stale_writes(self.client, self._file, cache.index.dirty_slots)
        self.turn.add_stage(cache)
        self.client.keeps_unflushed = True
        # While all is there to compare: what the counters say may drop the clean part.
        await check_content(cache, self._file, self.turn)
        if export.sessions and export.sessions[0] == self._file.header.export_generation:
            # Somebody kept the session open that this cache belongs to, and may have written.
            self.may_be_written_elsewhere()
        note_export(cache, export)
        if await self._resize(cache, export.usable_bytes) != 0:
            raise ConnectionLost(
                f"{self._uri.server}: the end of the disk, which has grown, could not be read"
            )
        self._opened = True
        return export

    def _open_cache(self, path: str, export: Export) -> Cache:
        if not export.usable_bytes:
            raise ConfigError(
                f"{self._uri.text}: the export has {export.size_bytes} bytes: "
                "there is no disk to serve"
            )
        geometry = geometry_for(
            disk_bytes=export.usable_bytes,
            cache_bytes=self._settings.size_bytes,
            min_block_bytes=export.min_block_bytes,
        )
        file = self._file = open_or_create(
            path,
            geometry=geometry,
            identity=cache_identity(self._uri),
            owns=wanted_cache(self._uri, export).owns,
        )
        for note in file.notes:
            _log.warning(note)
        if (notes := notes_directory()) is not None:
            location.note(path, notes)
        cold = self._cold = ThreadedCold(self.turn)
        self._loop.add(cold.fd, cold.collect)
        under = self._under_cache = GatedBackend(self.client, self.turn)
        return Cache(
            file,
            under,
            Options(mode=self._settings.mode, flush_interval_s=self._settings.flush_interval_s),
            clock=trio.current_time,
            turn=self.turn,
            cold=cold,
        )

    async def _resize(self, cache: Cache, size_bytes: int) -> int:
        """Give `cache` the size of the export; 0 or an errno, -1 if there was no answer."""

        def start(done: Callable[[int], None]) -> None:
            cache.resize(size_bytes, Outcome(lambda outcome: done(outcome.error)))

        return await answer_of(start, self.turn)

    async def examine(self, export: Export, submit: Callable[[Request], None]) -> str:
        """See client.Above. Why what only the cache has must not go there; "": it may.

        Until then there is no connection, for all that the guest sees, and every further attempt
        asks again: whoever started a server on the wrong image by mistake can mend that.
        """
        self._was_compared = False
        cache, file = self._cache, self._file
        if cache is None or file is None or self._away or not cache.index.dirty_slots:
            self._objection = ""
            return ""
        reason = ""
        if export.content_sessions is not None:
            reason = cache.foreign_change(*export.content_sessions, export.identity)
        is_counted = export.sessions is not None and export.sessions == export.content_sessions
        # A command of more than the server takes would end the connection.
        can_look = cache.index.block_bytes <= export.max_payload_bytes
        if not reason and not is_counted and can_look:
            differing = await answer_of(
                partial(cache.check_server, submit), self.turn, COMPARE_LIMIT_S
            )
            if differing < 0:
                return "it did not answer when the export was compared with what is cached"
            self._was_compared = True
            if differing:
                reason = (
                    "the export is not as it was left: somebody else wrote it, or another image is "
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
        elif self._away:
            self._judge_return()
        else:
            self._go_on()

    def export_changed(self, export: Export) -> None:
        """See client.Above. A cache grows first, see `_go_on`."""
        if self._cache is None and self._above is not None:
            self._above.resized(export.usable_bytes)

    def _go_on(self) -> None:
        """What is dirty may be sent on this connection."""
        cache = self._cache
        assert cache is not None
        cache.backend_reconnected()
        note_export(cache, self.client.export)
        if self.client.export.sessions is None and not self._was_compared:
            cache.check_sample(self._note_sample)
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

    def may_be_written_elsewhere(self) -> None:
        """The guest has left, with everything flushed, and may go on through another bridge.

        A session that is ours alone excludes that. One that is shared for migration does not, and
        has one number for all of it: what is clean here is not to be believed afterwards.
        """
        if self._cache is not None and is_shared(self._uri.export_name):
            self._cache.drop_clean()

    @property
    def loss_untold(self) -> bool:
        """The server may have lost something, and the guest has not heard of it."""
        link = self.client.link
        return link.durability.untold

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
        the server instance of that mark (0: nobody knows). True if it may be lost by now."""
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
    def backend(self) -> Backend:
        """What the disk submits to. Only after `open`."""
        return NbdBackend(self.client) if self._cache is None else CachedBackend(self._cache)

    async def run(self) -> None:
        """Look after the connection and the cache's deadlines, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.client.run)
            nursery.start_soon(self._watch_refusal)
            if self._cache is not None:
                deadlines = Deadlines(self._loop, self._next_deadline, self._cache.tick)
                nursery.start_soon(deadlines.run)

    def _next_deadline(self) -> float | None:
        """Of the cache, until its file is closed."""
        return None if self._closed or self._cache is None else self._cache.next_deadline()

    # The guest stops, and perhaps comes back.

    def abandon(self, requests: Sequence[Request]) -> None:
        """These were abandoned (`Request.abandon`): nothing of them that was not sent is sent."""
        self.client.abandon()
        if self._cache is not None:
            for request in requests:
                # A write is not stored any more; these have no such point. (With an error: it was
                # not begun, and has ended.)
                if request.op in (DISCARD, WRITE_ZEROES) and not request.error:
                    self._late.add(request)
                    request.done = self._late.discard

    async def hand_over(self, flush: Callable[[], Awaitable[int]]) -> None:
        """The guest has stopped: bring what it wrote to the server and `flush` it, so that it may
        go on elsewhere. Raises LeftBehind if that fails; may be cancelled."""
        if self._is_frozen:
            raise self._what_is_left()
        if not self._away and (error := await flush()):
            raise LeftBehind(
                f"the server could not flush ({os.strerror(error)}): what the guest wrote since "
                "its last flush may not be durable"
            )
        if self._late or (self._cache is not None and self._cache.index.dirty_slots):
            if (left_here := await self.stop_sending()) is not None:
                raise left_here
        elif self._cache is None:
            self.client.silence()
        self.may_be_written_elsewhere()

    async def stop_sending(self) -> LeftBehind | None:
        """The guest has stopped and may go on elsewhere before all that it wrote is at the server:
        nothing of it is sent from here any more, until `starting`.

        What is dirty is marked in the cache file as frozen, and the session is left. Returns what
        is left here, None if nothing is.
        """
        cache, file = self._cache, self._file
        if cache is None or file is None:
            self.client.silence()
            return None
        if not cache.index.dirty_slots and not self._late:
            return None
        self._away = True
        # The mark comes first: from here on a death finds it. The gate next: what is not in the
        # client's hands yet never gets there.
        if cache.index.dirty_slots:
            file.save_header(frozen=True, shared=is_shared(self._uri.export_name))
        cache.freeze(True)
        self._refuse(EIO)
        await self.client.leave(min(_LEAVE_S, self.client.options.close_timeout_s), EIO)
        if not cache.index.dirty_slots:
            file.save_header(frozen=False)  # the last answers came after all
        return self._what_is_left() if self._is_frozen else None

    @property
    def has_left(self) -> bool:
        """Nothing is sent: until the guest comes back, or the export is as it was."""
        return self._away or bool(self._objection)

    @property
    def _is_frozen(self) -> bool:
        return self._away and self._file is not None and self._file.header.frozen

    def _what_is_left(self) -> LeftBehind:
        assert self._file is not None
        path, dirty = self._file.path, dirty_bytes(self._file)
        return LeftBehind(
            f"the server did not take everything before the guest stopped: {dirty} bytes are kept "
            f"in {path} and not sent any more",
            remedy=Remedy.GO_ON_HERE_OR_FLUSH,
            path=path,
        )

    def starting(self, go: Callable[[], None]) -> bool:
        """The guest starts a ring. False if it has to wait until `go` is called: the session was
        left, and has to be entered again without that anybody else has written meanwhile."""
        if not self._away:
            return True
        self._go = go
        self.client.come_back()
        return False

    def _judge_return(self) -> None:
        """Connected again for a guest that has come back: may it go on with what was kept?"""
        cache, file, export = self._cache, self._file, self.client.export
        assert cache is not None
        assert file is not None
        if not file.header.frozen:
            self._thaw()
        elif export.sessions is None:
            # Past the gate: only to look.
            check_sample(cache, NbdBackend(self.client), self._judge_sample, _SAMPLE_BLOCKS)
        elif reason := self._written_by_others(cache, export):
            self._refuse_return(reason)
        else:
            self._thaw()

    def _written_by_others(self, cache: Cache, export: Export) -> str:
        """Why what is frozen must not be sent to a server that counts its writers; "": it may."""
        assert export.sessions is not None
        if reason := cache.foreign_change(*export.sessions, export.identity):
            return reason
        if is_shared(self._uri.export_name):
            # One number for all of the session: only who wrote last tells more.
            writer = export.volume.writer
            if writer is None:
                return "others in the same session may have written the export since"
            if writer != self.client.client_id:
                return "somebody else wrote the export since"
        return ""

    def _judge_sample(self, differing: int) -> None:
        """The same where the server counts nobody: what is cached and clean was compared."""
        if not self.client.is_wanted:
            return  # The guest has stopped again meanwhile.
        if differing > 0:
            self._refuse_return("somebody else wrote the export since")
        elif not differing and self._away:
            self._thaw()
        # No answer: the connection is lost again, and the next one is asked.

    def _refuse_return(self, reason: str) -> None:
        assert self._file is not None
        self._refusal = unwritten(self._file, reason).within(BridgeError)  # not asked wrongly
        self._refused.set()

    async def _watch_refusal(self) -> None:
        """The disk cannot be served: whoever decides what counts needs the cache file."""
        await self._refused.wait()
        assert self._refusal is not None
        raise self._refusal

    def _thaw(self) -> None:
        """The guest goes on here, and so does the sending."""
        cache, file = self._cache, self._file
        assert cache is not None
        assert file is not None
        if file.header.frozen:
            _log.info("the guest is back, and nobody else wrote: what was kept is sent")
            file.save_header(frozen=False)
        self._away = False
        self._refuse(0)
        self._go_on()
        cache.freeze(False)
        go, self._go = self._go, _go_nowhere
        # Not before the link is through with what a new connection asks of it.
        self.turn.at_end(go)

    def _refuse(self, errno: int) -> None:
        if self._cache is not None and self._under_cache is not None:
            self._under_cache.refuse(errno)
            self._cache.refuse(errno)

    async def close(self, limit_s: float) -> BridgeError | None:
        """Bring what is dirty to the server, if that can be done within `limit_s`, and hang up.

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
        problem = await self._close_file(max(deadline_s - trio.current_time(), FILE_LIMIT_S))
        if not dirty:
            return BridgeError(problem) if problem else None
        if problem:
            return BridgeError(f"{problem}; it holds what the server did not take in time")
        if objection is not None:
            return objection
        if self._away:
            return BridgeError(
                f"what the server lacks is kept in {path}",
                remedy=Remedy.FLUSH_BEFORE_ELSEWHERE,
                path=path,
            )
        return BridgeError(
            f"the server did not take everything in time: what is missing is kept in {path} and "
            "goes to the server at the next start"
        )

    def _let_go_of_file(self) -> None:
        """Leave the cache file as it is, at a start that fails."""
        self._stop_using_file()
        if self._file is not None:
            file, self._file = self._file, None
            file.close(clean=False)

    def _stop_using_file(self) -> None:
        """From here on nothing touches the file, except a thread that a stuck disk holds."""
        turn = self.turn
        turn.end()
        while turn.pending:
            turn.end()
        self._closed = True
        if self._cache is not None:
            turn.remove_stage(self._cache)
        if self._cold is not None:
            self._loop.remove(self._cold.fd)
            self._cold.close()
            self._cold = None

    async def _close_file(self, limit_s: float) -> str:
        """Let go of the cache file, marked as closed in order if that can be done in `limit_s`.

        Returns "", or what the operator has to know.
        """
        self._stop_using_file()
        if self._file is None:
            return ""
        dirty = self._cache.index.dirty_slots if self._cache is not None else 0
        file, self._file = self._file, None
        problem = await close_file(
            file,
            clean=may_call_clean(self.client, dirty),
            dirty=bool(dirty),
            limit_s=limit_s,
        )
        if not problem and not dirty and self._opened and (notes := notes_directory()) is not None:
            location.forget(file.path, notes)
        return problem

    async def _flush_cache(self, cache: Cache) -> None:
        request = Request(FLUSH, 0, 0, [], to_be_set)
        await finished(cache, request, self.turn)
        if request.error:
            _log.error("the last flush failed", reason=os.strerror(request.error))


def _go_nowhere() -> None:
    """Nobody waits."""

"""The storage side of a disk: the NBD client, and the cache over it where there is one.

`Storage` connects the client, opens the cache file, and gives the disk something to submit to.
At the end it brings what is dirty to the server within a limit; what cannot be brought there
stays in the cache file, marked and synced, and goes to the server at the next start.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Protocol

import structlog
import trio

from bridge.app.settings import CacheSettings
from bridge.cache.cache import Cache
from bridge.cache.cache_options import OFF, Options
from bridge.cache.cold import ThreadedCold
from bridge.cache.file import location
from bridge.cache.file.cache_file import CacheFile, dirty_bytes
from bridge.cache.file.inspect import drop
from bridge.cache.file.layout import Identity, geometry_for
from bridge.cache.file.location import Found, Wanted
from bridge.cache.file.locking import has_content
from bridge.cache.file.opening import believe, open_file, open_or_create
from bridge.cache.sample import check_sample
from bridge.datapath.deadlines import Deadlines
from bridge.datapath.disk import Backend
from bridge.datapath.engine import PURE_ENGINE, Engine
from bridge.datapath.loop import Loop
from bridge.datapath.request import DISCARD, FLUSH, READ, WRITE_ZEROES, Request, Target
from bridge.datapath.rows import FromCache, ToServer, Usual
from bridge.datapath.turn import Outcome, Turn
from bridge.errors import BridgeError, ConfigError, ConnectionLost, InUse, LeftBehind, Remedy
from bridge.server.client import Client
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.uri import NbdUri
from bridge.server.volume_words import VolumeName

_log = structlog.get_logger(__name__)

_ANSWER_LIMIT_S = 10.0
"""How long what the cache asks of the server at the start may take."""

_COMPARE_LIMIT_S = 30.0
"""The same before dirty data of an earlier run is sent: without an answer there is no start."""


_LEAVE_S = 2.0
"""How long a session that is left may take to answer what is in flight: the limit of the stop has
passed already, and hanging up before aborts nbdkit 1.32."""

_SAMPLE_BLOCKS = 64
"""How many clean blocks are compared when a guest comes back to a server that counts nobody."""


def default_directory() -> Path:
    """Where cache files go when nothing else is said: of the system for root, else the user's.

    Raises ConfigError for a user who has no home directory.
    """
    if os.geteuid() == 0:
        return Path("/var/cache/nbd-bridge")
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbd-bridge"
    except RuntimeError:
        raise ConfigError(
            f"user {os.geteuid()} has no home directory for the cache",
            remedy=Remedy.NAME_DIRECTORY,
        ) from None


def cache_path(uri: NbdUri, directory: str | None) -> Path:
    """Where the cache file of the export at `uri` is, if there is one."""
    chosen = default_directory() if directory is None else Path(directory)
    identity = cache_identity(uri)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{identity.uri}-{identity.export}").strip("-.")
    return chosen / f"{readable[-80:]}-{identity.digest.hex()[:12]}.cache"


def make_default_directory() -> None:
    """Raises ConfigError if it cannot be made."""
    chosen = default_directory()
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache directory {chosen} cannot be made ({error.strerror})",
            remedy=Remedy.OTHER_DIRECTORY,
        ) from None


def cache_identity(uri: NbdUri) -> Identity:
    """What a cache file must belong to, to be used for `uri`: the server and the export.

    Our plugin's `@session=…` is no part of that: the next session of a volume finds its cache.
    """
    return Identity(uri=uri.server, export=VolumeName(uri.export_name).without_session)


def wanted_cache(uri: NbdUri, export: Export | None) -> Wanted:
    """What a cache file must be like to belong to `export`; None: as far as the URI tells."""
    identity = cache_identity(uri)
    names = {identity.export}
    if export is None:
        return Wanted(identity, frozenset(names), b"", 0)
    if export.canonical_name:
        names.add(VolumeName(export.canonical_name).without_session)
    return Wanted(identity, frozenset(names), export.identity, export.usable_bytes)


def notes_directory() -> Path | None:
    """Where cache files in other directories are noted; None: there is no such place."""
    try:
        return default_directory()
    except (ConfigError, RuntimeError):  # No home directory.
        return None


def passed_over(uri: NbdUri, found: Found) -> ConfigError:
    """For the operator: another cache file holds what the server has not, of this disk perhaps."""
    which = "belongs to" if found.owned else "may belong to"
    return ConfigError(
        f"cache file {found.path} {which} the export {uri.text} and holds {found.dirty_bytes} "
        "bytes that the server lacks",
        remedy=Remedy.FLUSH_OR_GIVE_UP,
        path=found.path,
    )


def _remove(files: list[Found]) -> None:
    """Remove cache files that hold nothing that the server lacks."""
    for each in files:
        with suppress(ConfigError):
            drop(each.path)
            _log.warning(
                "a cache file of the same export under another spelling is removed", path=each.path
            )


def unwritten(
    file: CacheFile, reason: str, remedy: Remedy = Remedy.FORCE_OR_GIVE_UP
) -> ConfigError:
    """For the operator: the cache file holds what the server has not, and that is in the way."""
    return ConfigError(
        f"cache file {file.path} holds {dirty_bytes(file)} bytes that the server lacks, and "
        f"{reason}",
        remedy=remedy,
        path=file.path,
    )


def check_export(cache: Cache, file: CacheFile, export: Export) -> None:
    """What only the cache has must not be written over what somebody else wrote, or to another
    volume, without being told to. Raises ConfigError."""
    if not cache.index.dirty_slots:
        return
    shared = file.header.shared or is_shared(export.name)
    if file.header.frozen and (export.sessions is None or shared):
        reason = "the guest was stopped and may have written elsewhere since, which cannot be told"
        raise unwritten(file, reason)
    if export.content_sessions is None:
        return
    if reason := cache.foreign_change(*export.content_sessions, export.identity):
        raise unwritten(file, reason)


def is_shared(export_name: str) -> bool:
    """Others may be in the same session of our plugin: for a migration."""
    return VolumeName(export_name).is_shared


def note_export(cache: Cache, export: Export) -> None:
    """Drop what is clean if somebody else wrote since; before anything is sent."""
    if export.sessions is None:
        return
    reason = cache.foreign_change(*export.sessions, export.identity)
    grew = reason and not cache.foreign_change(
        *(export.content_sessions or export.sessions), export.identity
    )
    if grew:
        reason = "the export was made longer"
    elif reason and (dirty := cache.index.dirty_blocks):
        _log.error(f"{reason}: what only the cache has goes over it", dirty_blocks=dirty)
    if dropped := cache.note_export(*export.sessions, export.identity):
        _log.warning(f"{reason}: the clean part of the cache is discarded", blocks=dropped)


async def check_content(
    cache: Cache,
    file: CacheFile,
    turn: Turn,
    *,
    force: bool = False,
    limit_s: float = _COMPARE_LIMIT_S,
) -> None:
    """Compare what is clean in the cache with the export, before anything is sent: nobody may count
    who wrote, or somebody may have written past the one who does.

    What is clean is dropped if it differs, or cannot be compared. With dirty data that is an error,
    unless `force`: raises ConfigError, or ConnectionLost if the server does not answer.
    """
    dirty = cache.index.dirty_slots
    check = cache.check_before_writing if dirty and not force else cache.check_sample
    limit_s = limit_s if dirty else min(limit_s, _ANSWER_LIMIT_S)
    differing = await answer_of(check, turn, limit_s)
    if differing > 0 and dirty and not force:
        raise unwritten(
            file,
            "the export is not as it was left: somebody else wrote it, or another image is in its "
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
        cache.drop_clean()


def note_changed_content(cache: Cache, differing: int) -> None:
    """For the operator: the clean part was dropped, since so many blocks of it differ."""
    if dirty := cache.index.dirty_blocks:
        _log.error(
            "the export has changed since, and what only the cache has goes over it",
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


def may_call_clean(client: Client, dirty_slots: int) -> bool:
    """Whether a cache file may say that it was closed in order: not when old writes may come after
    the next process has begun, and nothing dirty would tell it so."""
    return bool(dirty_slots) or not client.may_leave_writes


class NbdBackend:
    """A connected client, as the disk or the cache above it sees it."""

    hits = None
    holds_writes = False

    def __init__(self, client: Client) -> None:
        self._client = client
        self.submit = client.submit  # bound once: no second call per request
        export = client.export
        self.size_bytes = export.usable_bytes
        self.min_block_bytes = export.min_block_bytes
        self.can_flush = export.can_flush
        self.can_fua = export.can_fua
        self.can_trim = export.can_trim
        self.can_write_zeroes = export.can_write_zeroes

    @property
    def generation(self) -> int:
        """Raised by each reconnect."""
        return self._client.generation

    @property
    def gone(self) -> bool:
        """There was no connection for too long: requests fail."""
        return self._client.link.given_up

    @property
    def in_flight(self) -> int:
        """How many commands are not finished."""
        return self._client.in_flight

    def usual(self, wrote: Callable[[], None]) -> Usual | None:
        """See disk.Backend."""
        return ToServer(self._client.link.route, self._client.rows, wrote)


class GatedBackend(NbdBackend):
    """The same with a gate in it, for the cache: what must not leave this process any more, or not
    yet, is stopped here."""

    def __init__(self, client: Client, turn: Turn) -> None:
        super().__init__(client)
        self.submit = self._submit
        self._turn = turn
        self._errno = 0
        self._holds_changes = False
        self._held: list[Request] = []

    def _submit(self, request: Request) -> None:
        if self._errno:
            self._turn.finish(request, self._errno)
        elif self._holds_changes and request.op != READ:
            self._held.append(request)
        else:
            self._client.submit(request)

    def refuse(self, errno: int) -> None:
        """Whatever is submitted from here on fails with `errno`; 0: no longer."""
        self._errno = errno

    def hold_changes(self) -> None:
        """Let nothing but reads pass until `let_go`."""
        self._holds_changes = True

    def let_go(self) -> None:
        """The end of `hold_changes`."""
        self._holds_changes = False
        held, self._held = self._held, []
        for request in held:
            self._submit(request)


class CachedBackend:
    """The cache, as the disk sees it: it has its own flush timer, and does what a server lacks."""

    can_flush = True
    in_flight = 0

    def __init__(self, cache: Cache, engine: Engine = PURE_ENGINE) -> None:
        self._cache = cache
        self._engine = engine
        self.hits = cache
        self.submit = cache.submit_slowly  # whoever submits has asked for a hit before

    def usual(self, wrote: Callable[[], None]) -> Usual | None:
        """See disk.Backend."""
        return FromCache(self._cache.resident, self._cache.count_hits, wrote, self._engine)

    @property
    def holds_writes(self) -> bool:
        """Blocks are dirty until a flush covers them."""
        return bool(self._cache.index.dirty_slots)


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
            await self._check_unused_cache(export)
            return export
        if self._settings.directory is None:
            make_default_directory()
        path = await self._locate(export)
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

    async def _find(self, export: Export) -> list[Found]:
        """The cache files of this export in its directory. Raises ConfigError if there are others
        that could be its, with dirty data."""
        chosen = cache_path(self._uri, self._settings.directory).parent
        default = notes_directory() or chosen
        here, elsewhere = await trio.to_thread.run_sync(
            location.find,
            wanted_cache(self._uri, export),
            chosen,
            default,
            location.resolve_host,
            abandon_on_cancel=True,
        )
        for found in (*here, *elsewhere):
            if found.dirty_bytes and (not found.owned or found in elsewhere):
                raise passed_over(self._uri, found)
        return here

    async def _locate(self, export: Export) -> str:
        """The path of this export's cache file, which may have been made for another spelling of
        its URI. Raises ConfigError."""
        own = str(cache_path(self._uri, self._settings.directory))
        found = await self._find(export)
        mine = {each.path: each for each in found if each.owned}
        dirty = [each for each in mine.values() if each.dirty_bytes]
        if len(dirty) > 1:
            raise passed_over(self._uri, dirty[1])
        used = [path for path, each in mine.items() if each.in_use]
        for path in (*(each.path for each in dirty), *used, own, *mine):
            if path in mine:
                break
        else:
            path = own
        if export.sessions is None:
            # Nobody would tell whoever uses them next that this one wrote.
            others = [each for each in found if each.path != path and not each.in_use]
            _remove([each for each in others if each.same_server])
        return path

    async def _check_unused_cache(self, export: Export) -> None:
        """Serving without a cache: what an earlier run left in one must not be passed over.

        The guest would see an old image; what it then writes would be overwritten by the next run
        with the cache, or not be seen by it. Raises ConfigError.
        """
        try:
            own = str(cache_path(self._uri, self._settings.directory))
        except ConfigError:
            return  # No directory, no file.
        found = await self._find(export)
        paths = {each.path for each in found if each.owned or each.same_server}
        if own not in paths and has_content(own):
            paths.add(own)  # Nothing can be told of it: that is said below.
        for path in sorted(paths):
            self._check_unused_file(path, export)

    def _check_unused_file(self, path: str, export: Export) -> None:
        read_only = export.read_only or self._read_only
        try:
            file = open_file(path)
        except InUse:
            if read_only:
                return  # whoever has it writes the export, and we only look
            raise
        try:
            if not believe(file):
                return
            if dirty_bytes(file):
                raise unwritten(file, "it would be passed over", Remedy.FLUSH_OR_GIVE_UP)
            if not read_only and export.sessions is None:
                # Nobody would tell the next run that this one wrote.
                os.unlink(path)
                _log.warning(
                    "the cache file is removed, the export is written without it", path=path
                )
            expect_stale_writes(self.client, file, 0)
        finally:
            file.close(clean=False)

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
                partial(cache.check_server, submit), self.turn, _COMPARE_LIMIT_S
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
        if self._cache is None:
            return NbdBackend(self.client)
        return CachedBackend(self._cache, self._loop.engine)

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
            self._cache.let_go_of_file()
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


async def finished(target: Target, request: Request, turn: Turn) -> None:
    """Submit `request`, whose `done` is set here, and wait until it has ended."""
    ended = trio.Event()
    request.done = lambda _: ended.set()
    target.submit(request)
    turn.end()
    await ended.wait()


async def answer_of(
    start: Callable[[Callable[[int], None]], None],
    turn: Turn,
    limit_s: float = _ANSWER_LIMIT_S,
) -> int:
    """What `start` reports, -1 if it does not within a time.

    For the start, when nobody looks after the connection yet: if it is lost, nothing answers.
    """
    answer = -1
    ended = trio.Event()

    def done(value: int) -> None:
        nonlocal answer
        answer = value
        ended.set()

    start(done)
    turn.end()
    with trio.move_on_after(limit_s):
        await ended.wait()
    return answer


def to_be_set(request: Request) -> None:
    """The `done` of a request for `finished`, which replaces it."""


def _go_nowhere() -> None:
    """Nobody waits."""

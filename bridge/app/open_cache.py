"""A cache file in use: the cache in it, the gate to the server below that, and how it is closed."""

from __future__ import annotations

from collections.abc import Callable

import structlog
import trio

from bridge.app.answers import answer_of
from bridge.app.cache_names import cache_identity, notes_directory, wanted_cache
from bridge.app.cache_ownership import may_call_clean
from bridge.app.settings import CacheSettings
from bridge.app.targets import GatedUpstream
from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.cold import ThreadedCold
from bridge.cache.file import location
from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.layout import geometry_for
from bridge.cache.file.opening import open_or_create
from bridge.datapath.loop import Loop
from bridge.datapath.turn import Outcome
from bridge.errors import ConfigError
from bridge.server.client import Client

_log = structlog.get_logger(__name__)

FILE_LIMIT_S = 5.0
"""How long the closing of a cache file may take at least, whatever limit a stop has."""


async def close_file(file: CacheFile, *, clean: bool, dirty: bool, limit_s: float) -> str:
    """Close `file`, in a thread: a stuck disk must not hold up a stop without end.

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
            + (", and it holds data that the server lacks" if dirty else ", it is removed"),
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


class OpenCache:
    """The cache of one export, from the opening of its file to the closing."""

    def __init__(self, path: str, client: Client, loop: Loop, settings: CacheSettings) -> None:
        """`client` is connected. Raises ConfigError, and leaves the file as it was."""
        self._client = client
        self._loop = loop
        file = _open_file(path, client, settings)
        self.file: CacheFile | None = file
        """None: it is closed."""
        self.cold: ThreadedCold | None = None
        self.is_closed = False
        """No code touches the file from here on."""
        try:
            _note(file)
            cold = self.cold = ThreadedCold(loop.turn)
            loop.add(cold.fd, cold.collect)
            self.gate = GatedUpstream(client, loop.turn)
            self.cache = Cache(
                file,
                self.gate,
                Options(mode=settings.mode, flush_interval_s=settings.flush_interval_s),
                clock=trio.current_time,
                turn=loop.turn,
                cold=cold,
            )
        except BaseException:
            self._let_go_of_file()
            raise

    def start(self) -> None:
        """From here on the cache takes part in the turns."""
        self._loop.turn.add_stage(self.cache)

    def next_deadline(self) -> float | None:
        """Of the cache, until its file is closed."""
        return None if self.is_closed else self.cache.next_deadline()

    def refuse(self, errno: int) -> None:
        """Nothing passes the cache or the gate below it: it fails with `errno`; 0: no longer."""
        self.gate.refuse(errno)
        self.cache.refuse(errno)

    async def resize(self, size_bytes: int, *, lost: trio.Event) -> int:
        """Give the cache the size of the export; 0 or an errno, -1 if there was no answer. For the
        start: see `answer_of`."""

        def start(done: Callable[[int], None]) -> None:
            self.cache.resize(size_bytes, Outcome(lambda outcome: done(outcome.error)))

        return await answer_of(start, self._loop.turn, lost=lost)

    async def leave_as_found(self) -> str:
        """Close the file at a start that failed, for the next attempt; "" or a problem.

        Data that would have survived a loss of power goes on doing so. What a killed process has
        left would not have, and may be much to sync.
        """
        in_order = self.file is not None and not self.file.was_killed
        return await self.close(FILE_LIMIT_S, forget=False, in_order=in_order)

    async def close(self, limit_s: float, *, forget: bool, in_order: bool = True) -> str:
        """Let go of the cache file, marked as closed in order if that can be done in `limit_s`.

        `forget`: it need not be noted any longer if nothing in it is dirty. Not `in_order`: nothing
        is synced, which may take long; as if the process had been killed, which loses nothing.
        Returns "", or what the operator has to know.
        """
        self._stop_using_file()
        self.cache.hits.let_go_of_file()
        self._loop.turn.remove_stage(self.cache)
        if self.file is None:
            return ""
        dirty = self.cache.index.dirty_slots
        file, self.file = self.file, None
        problem = await close_file(
            file,
            clean=in_order and may_call_clean(self._client, dirty),
            dirty=bool(dirty),
            limit_s=limit_s,
        )
        if not problem and not dirty and forget and (notes := notes_directory()) is not None:
            location.forget(file.path, notes)
        return problem

    def _let_go_of_file(self) -> None:
        """Leave the cache file as it is, at a start that fails."""
        self._stop_using_file()
        if self.file is not None:
            file, self.file = self.file, None
            file.close(clean=False)

    def _stop_using_file(self) -> None:
        """From here on nothing touches the file, except a thread that a stuck disk holds."""
        turn = self._loop.turn
        turn.end()
        while turn.pending:
            turn.end()
        self.is_closed = True
        if self.cold is not None:
            self._loop.remove(self.cold.fd)
            self.cold.close()
            self.cold = None


def _open_file(path: str, client: Client, settings: CacheSettings) -> CacheFile:
    uri, export = client.uri, client.export
    if not export.usable_bytes:
        raise ConfigError(
            f"{uri.text}: the export has {export.size_bytes} bytes: there is no disk to serve"
        )
    geometry = geometry_for(
        disk_bytes=export.usable_bytes,
        cache_bytes=settings.size_bytes,
        min_block_bytes=export.min_block_bytes,
    )
    return open_or_create(
        path,
        geometry=geometry,
        identity=cache_identity(uri),
        owns=wanted_cache(uri, export).owns,
    )


def _note(file: CacheFile) -> None:
    """Say what its opening brought to light, and where it is."""
    for note in file.notes:
        _log.warning(note)
    if (notes := notes_directory()) is not None:
        location.note(file.path, notes)

"""The guest stops, goes on elsewhere perhaps, or comes back to what was kept for it here."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Sequence
from errno import EIO

import structlog
import trio

from bridge.app.cache_ownership import is_shared, unwritten
from bridge.app.open_cache import OpenCache
from bridge.app.targets import ServerTarget
from bridge.cache.cache import Cache
from bridge.cache.file.cache_file import CacheFile, dirty_bytes
from bridge.cache.sample import check_sample
from bridge.datapath.request import DISCARD, WRITE_ZEROES, Request
from bridge.datapath.turn import Turn
from bridge.errors import BridgeError, LeftBehind, Remedy
from bridge.server.client import Client
from bridge.server.export import Export

_log = structlog.get_logger(__name__)

_LEAVE_S = 2.0
"""How long a session that is left may take to answer what is in flight: the limit of the stop has
passed already, and hanging up before aborts nbdkit 1.32."""

_SAMPLE_BLOCKS = 64
"""How many clean blocks are compared when a guest comes back to a server that counts no writers."""


class Departure:
    """What the guest leaves here when it stops, and whether it may go on with it."""

    def __init__(self, client: Client, turn: Turn, *, go_on: Callable[[], None]) -> None:
        """`go_on`: dirty data may be sent on the present connection."""
        self.opened: OpenCache | None = None
        """The cache, once there is one."""
        self._client = client
        self._turn = turn
        self._go_on = go_on
        self._late: set[Request] = set()
        """Abandoned discards that the cache has not come to the end of."""
        self.is_away = False
        """Nothing is sent, and the session was left: see `stop_sending`."""
        self._was_away = False
        """The guest has left, and may have been elsewhere since."""
        self._go: Callable[[], None] = _go_nowhere
        self._refusal: BridgeError | None = None
        self._refused = trio.Event()

    @property
    def _cache(self) -> Cache | None:
        return None if self.opened is None else self.opened.cache

    @property
    def _file(self) -> CacheFile | None:
        return None if self.opened is None else self.opened.file

    def may_be_written_elsewhere(self) -> None:
        """The guest has left, with everything flushed, and may go on through another bridge.

        A session that is ours alone excludes that. One that is shared for migration does not, and
        has one number for all of it: the clean blocks here must not be believed afterwards.
        """
        self._was_away = True
        self._drop_what_is_not_certain()

    def _drop_what_is_not_certain(self) -> None:
        if self._cache is not None and is_shared(self._client.uri.export_name):
            self._cache.foreign.drop_clean()

    def abandon(self, requests: Sequence[Request]) -> None:
        """These were abandoned (`Request.abandon`): nothing of them that was not sent is sent."""
        self._client.abandon()
        if self._cache is not None:
            for request in requests:
                # A write is no longer stored; these may be at the server. (With an error: it was
                # not begun, or not sent, and has ended.)
                if request.op in (DISCARD, WRITE_ZEROES) and not request.error:
                    self._late.add(request)
                    request.done = self._late.discard

    async def hand_over(self, flush: Callable[[], Awaitable[int]]) -> None:
        """The guest has stopped: bring what it wrote to the server and `flush` it, so that it may
        go on elsewhere. Raises LeftBehind if that fails; may be cancelled."""
        if self._is_frozen:
            raise self._what_is_left()
        if not self.is_away and (error := await flush()):
            raise LeftBehind(
                f"the server could not flush ({os.strerror(error)}): what the guest wrote since "
                "its last flush may not be durable"
            )
        if self._late or (self._cache is not None and self._cache.index.dirty_slots):
            if (left_here := await self.stop_sending()) is not None:
                raise left_here
        elif self._cache is None:
            self._client.silence()
        self.may_be_written_elsewhere()

    async def stop_sending(self) -> LeftBehind | None:
        """The guest has stopped and may go on elsewhere before all that it wrote is at the server:
        nothing of it is sent from here any more, until `starting`.

        Dirty data is marked in the cache file as frozen, and the session is left. Returns what
        is left here, None if nothing is.
        """
        opened, file = self.opened, self._file
        if opened is None or file is None:
            self._client.silence()
            return None
        cache = opened.cache
        if not cache.index.dirty_slots and not self._late:
            self.may_be_written_elsewhere()
            return None
        self.is_away = True
        # The mark comes first: if the process dies from here on, the next one finds it. The gate
        # next: the client gets no more requests.
        if cache.index.dirty_slots:
            file.save_header(frozen=True, shared=is_shared(self._client.uri.export_name))
        cache.freeze(True)
        opened.refuse(EIO)
        await self._client.leave(min(_LEAVE_S, self._client.options.close_timeout_s), EIO)
        if not cache.index.dirty_slots:
            file.save_header(frozen=False)  # the last answers came after all
        if self._is_frozen:
            return self._what_is_left()
        self.may_be_written_elsewhere()
        return None

    @property
    def _is_frozen(self) -> bool:
        return self.is_away and self._file is not None and self._file.header.frozen

    def _what_is_left(self) -> LeftBehind:
        assert self._file is not None
        path, dirty = self._file.path, dirty_bytes(self._file)
        return LeftBehind(
            f"the server did not take everything before the guest stopped: {dirty} bytes are kept "
            f"in {path} and no longer sent",
            remedy=Remedy.GO_ON_HERE_OR_FLUSH,
            path=path,
        )

    def starting(self, go: Callable[[], None]) -> bool:
        """The guest starts a ring. False if it has to wait until `go` is called: the session was
        left and has to be entered again first, and no other host may have written meanwhile."""
        if self._was_away:
            self._was_away = False
            self._drop_what_is_not_certain()  # An operator may have warmed the cache meanwhile.
        if not self.is_away:
            return True
        self._go = go
        self._client.come_back()
        return False

    def judge_return(self) -> None:
        """Connected again for a guest that has come back: may it go on with what was kept?"""
        cache, file, export = self._cache, self._file, self._client.export
        assert cache is not None
        assert file is not None
        if not file.header.frozen:
            self._thaw()
        elif export.sessions is None:
            # Past the gate: only to look.
            check_sample(
                cache.foreign, ServerTarget(self._client), self._judge_sample, _SAMPLE_BLOCKS
            )
        elif reason := self._written_by_others(cache, export):
            self._refuse_return(reason)
        else:
            self._thaw()

    def _written_by_others(self, cache: Cache, export: Export) -> str:
        """Why what is frozen must not be sent to a server that counts its writers; "": it may."""
        assert export.sessions is not None
        if reason := cache.foreign.foreign_change(*export.sessions, export.identity):
            return reason
        if is_shared(self._client.uri.export_name):
            # One number for all of the session: only who wrote last tells more.
            if export.volume.writer is None:
                return "others in the same session may have written the export since"
            if not export.volume.was_written_by(self._client.client_id):
                return "another host wrote the export since"
        return ""

    def _judge_sample(self, differing: int) -> None:
        """The same where the server counts no writers: clean cached blocks were compared."""
        if not self._client.is_wanted:
            return  # The guest has stopped again meanwhile.
        if differing > 0:
            self._refuse_return("another host wrote the export since")
        elif not differing and self.is_away:
            self._thaw()
        # No answer: the connection is lost again, and the next one is asked.

    def _refuse_return(self, reason: str) -> None:
        assert self._file is not None
        self._refusal = unwritten(self._file, reason).within(BridgeError)  # not asked wrongly
        self._refused.set()

    async def watch_refusal(self) -> None:
        """The disk cannot be served: the operator decides what counts, and needs the cache file."""
        await self._refused.wait()
        assert self._refusal is not None
        raise self._refusal

    def _thaw(self) -> None:
        """The guest goes on here, and so does the sending."""
        opened, file = self.opened, self._file
        assert opened is not None
        assert file is not None
        if file.header.frozen:
            _log.info("the guest is back, and no other host wrote: what was kept is sent")
            file.save_header(frozen=False)
        self.is_away = False
        opened.refuse(0)
        self._go_on()
        opened.cache.freeze(False)
        go, self._go = self._go, _go_nowhere
        # Not before the link is through with what a new connection asks of it.
        self._turn.at_end(go)


def _go_nowhere() -> None:
    """For when no reconnect waits."""

"""The client, and the cache over it, as what is above them sees them: something to submit to."""

from __future__ import annotations

from collections.abc import Callable

from bridge.cache.cache import Cache
from bridge.datapath.engine import PURE_ENGINE, Engine
from bridge.datapath.request import READ, Request
from bridge.datapath.rows import FromCache, ToServer, Usual
from bridge.datapath.turn import Turn
from bridge.server.client import Client


class ServerTarget:
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
        """See disk.DiskTarget."""
        return ToServer(self._client.link.route, self._client.rows, wrote)


class GatedUpstream(ServerTarget):
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


class CacheTarget:
    """The cache, as the disk sees it: it has its own flush timer, and does what a server lacks."""

    can_flush = True
    in_flight = 0

    def __init__(self, cache: Cache, engine: Engine = PURE_ENGINE) -> None:
        self._cache = cache
        self._engine = engine
        self.hits = cache.hits
        self.submit = cache.submit_slowly  # The caller has asked for a hit before.

    def usual(self, wrote: Callable[[], None]) -> Usual | None:
        """See disk.DiskTarget."""
        hits = self._cache.hits
        return FromCache(hits.resident, hits.count_hits, wrote, self._engine)

    @property
    def holds_writes(self) -> bool:
        """Blocks are dirty until a flush covers them."""
        return bool(self._cache.index.dirty_slots)

"""The live objects of one running disk, and the only place of the API that looks into them.

The data path has no hooks for this: what is shown is what it keeps for itself, read when a client
asks. Where a part gives no public name to it, the private one is read here and nowhere else.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import trio

from bridge.app.storage import Storage
from bridge.cache.cache import Cache
from bridge.cache.cache_options import WRITEBACK
from bridge.cache.index import Index
from bridge.datapath.cells import READ_BYTES, WRITTEN_BYTES
from bridge.datapath.disk import Disk
from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, READ, WRITE, Request
from bridge.guest.device import BlkDevice
from bridge.guest.ring import RunningRing
from bridge.guest.virtio.blk_request import BlkRequest
from bridge.server.link import Phase
from bridge.units import SECTOR_BYTES


class EndObserver:
    """A `done` that the API puts before that of a guest's request; `then` is called next."""

    __slots__ = ("then",)

    def __init__(self, then: Callable[[Any], None]) -> None:
        self.then = then


@dataclass(frozen=True)
class Facts:
    """What does not change while the bridge runs."""

    uri: str
    socket_path: str | None
    """Where the front-end connects; None: an inherited descriptor."""
    serial: str
    name: str = ""
    """Of the bridge."""
    started_s: float = field(default_factory=time.time)
    """Unix time."""


@dataclass(frozen=True)
class Live:
    """The parts of one served disk."""

    facts: Facts
    loop: Loop
    storage: Storage
    disk: Disk
    device: BlkDevice
    now: Callable[[], float] = trio.current_time

    # The guest.

    @property
    def rings(self) -> Mapping[int, RunningRing]:
        """The virtqueues that run, by index."""
        return self.device._rings

    @property
    def ring_ids(self) -> tuple[int, ...]:
        """Another value whenever a ring was started or stopped."""
        return tuple(map(id, self.device._rings.values()))

    @property
    def requests_total(self) -> int:
        """What the guest has sent since the start, refused requests included."""
        return self.device.requests_total

    @property
    def general_total(self) -> dict[str, int]:
        """How many of them went the general way, by reason (see `guest.general`)."""
        return dict(self.device.general_total)

    @property
    def in_flight(self) -> int:
        """How many requests of the guest are not answered."""
        return sum(ring.in_flight for ring in self.device._rings.values())

    @property
    def general_counts(self) -> tuple[list[int], list[int]]:
        """By operation, the requests that went the general way, and their bytes."""
        engine = self.device._engine
        return engine.requests, engine.request_bytes

    @property
    def usual_counts(self) -> tuple[dict[int, int], dict[int, int]]:
        """By operation, the requests that went the usual way, and their bytes."""
        engine = self.device._engine
        usual = engine.usual
        if usual is None:
            return {}, {}
        reads = usual.served - usual.writes - usual.flushes
        requests = {READ: reads, WRITE: usual.writes, FLUSH: usual.flushes}
        return requests, {READ: engine.limits[READ_BYTES], WRITE: engine.limits[WRITTEN_BYTES]}

    @property
    def errors(self) -> Mapping[tuple[int, int], int]:
        """By operation and errno, how many requests of the guest's failed."""
        return self.device._engine.errors

    def unanswered(self) -> list[BlkRequest]:
        """Those of them that were not served on the spot, oldest first. Not for every turn."""
        engine = self.device._engine
        if engine.usual is not None:
            engine.usual.adopt_all()  # What went the usual way has no object yet.
        return sorted(engine._unanswered, key=engine._unanswered.__getitem__)

    def is_as_it_came(self, request: BlkRequest) -> bool:
        """The engine is told of its end, and at most an `EndObserver` before. Else the client is to
        be told first: the request is sent alone, or once more. An observer in between would be
        taken for what is told after that, and called again and again."""
        engine, done = self.device._engine, request.done
        while isinstance(done, EndObserver):
            done = done.then
        return done in (engine._done, engine._large_done)

    @property
    def has_front_end(self) -> bool:
        """A front-end has shared a guest's memory."""
        return bool(self.device._memory.regions)

    @property
    def capacity_bytes(self) -> int:
        """The size of the disk that the guest sees."""
        return self.device._config.geometry.capacity_sectors * SECTOR_BYTES

    @property
    def read_only(self) -> bool:
        """The guest may not write."""
        return self.device._config.geometry.read_only

    @property
    def loss_unreported(self) -> bool:
        """The server may have lost acknowledged writes, and no flush of the guest's has failed
        yet."""
        return self.disk.unreported or self.storage.loss_unreported

    # The cache.

    def prefetch(self, request: Request) -> None:
        """Start a PREFETCH; the caller then wants a turn."""
        self.storage.target.submit(request)

    @property
    def cache(self) -> Cache | None:
        """None: there is none."""
        return self.storage._cache

    @property
    def cache_path(self) -> str:
        """Its file; "" once that is closed."""
        return self.storage._file.path if self.storage._file is not None else ""

    @property
    def hits(self) -> tuple[int, int]:
        """Reads and writes that the cache served on the spot."""
        cache = self.storage._cache
        return (0, 0) if cache is None else (cache.stats.read_hits, cache.stats.write_hits)

    @property
    def evicted_total(self) -> int:
        """Granules that were forgotten for room."""
        cache = self.storage._cache
        return 0 if cache is None else cache._evictor.evicted

    @property
    def dirty_bytes(self) -> int:
        """What is not durable on the server, as far as the cache knows."""
        index = self._index
        return 0 if index is None else index.dirty_blocks << index.block_shift

    @property
    def valid_bytes(self) -> int:
        """What the cache holds."""
        index = self._index
        return 0 if index is None else index.valid_blocks << index.block_shift

    @property
    def cache_bytes(self) -> int:
        """What the cache has room for."""
        index = self._index
        return 0 if index is None else index.slots << index.granule_shift

    @property
    def oldest_dirty_s(self) -> float | None:
        """How long the oldest dirty block has waited to be sent; None: none waits."""
        cache = self.storage._cache
        if cache is None:
            return None
        oldest_s = cache._writeback.ring.oldest_s
        return None if oldest_s is None else max(0.0, self.now() - oldest_s)

    @property
    def is_write_back(self) -> bool:
        """Writes complete in the cache."""
        cache = self.storage._cache
        return cache is not None and cache.is_write_back

    @property
    def mode(self) -> str:
        """As `--cache-mode` has it."""
        if self.storage._cache is None:
            return "off"
        return WRITEBACK if self.is_write_back else "writethrough"

    # The server.

    @property
    def phase(self) -> Phase:
        """Of the NBD client."""
        return self.storage.client.link.phase

    @property
    def connections(self) -> int:
        """How many there are to the server."""
        client = self.storage.client
        return sum(each.alive for each in client._connections) if client.connected else 0

    @property
    def commands_in_flight(self) -> int:
        """NBD commands that the server has not answered, and those that wait for it."""
        return self.storage.client.in_flight

    def is_at_server(self, request: Request) -> bool:
        """`request`, or a command made for it, was sent and has no answer."""
        pending = [each.transmission.pending for each in self.storage.client._connections]
        return any(commands.get(request.cookie) is request for commands in pending) or any(
            _belongs_to(command, request) for commands in pending for command in commands.values()
        )

    @property
    def waits_for_grace(self) -> bool:
        """Changes are kept back since a lost connection's may still be executed."""
        return bool(self.storage.client.link._changes._grace)

    @property
    def left_reason(self) -> str:
        """Why nothing is sent to the server although it may be there; "": it is sent."""
        if self.storage._objection:
            return self.storage._objection
        return "the guest has left this host" if self.storage.has_left else ""

    @property
    def flush_interval_s(self) -> float:
        """As `--flush-interval` has it."""
        cache = self.storage._cache
        if cache is not None:
            return cache.flush_interval_s
        return self.disk.flush_interval_s

    def set_flush_interval(self, seconds: float) -> None:
        """From now on; what was written before waits no longer than that, too."""
        cache = self.storage._cache
        if cache is not None:
            cache.flush_interval_s = seconds
        else:
            self.disk.flush_interval_s = seconds

    @property
    def drain_timeout_s(self) -> float:
        """As `--drain-timeout` has it."""
        return self.device._drain.timeout_s

    def set_drain_timeout(self, seconds: float) -> None:
        """From the next stop on."""
        self.device._drain.timeout_s = seconds

    @property
    def _index(self) -> Index | None:
        cached = self.storage._cached
        return None if cached is None or cached.is_closed else cached.cache.index


def _belongs_to(command: Request, request: Request) -> bool:
    """`command` is `request`, or was made for it."""
    found: object = command
    while isinstance(found, Request):
        if found is request:
            return True
        found = found.owner[0] if type(found.owner) is tuple else found.owner
    return False

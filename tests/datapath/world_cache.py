"""The cache of a `worlds.World`: a whole one, over a server that answers when it is told to.

What the usual case has of it, `resident`, is its flat state. What everything else does to that
meanwhile, each `disturb` does a piece of: replies, failures, a new connection, flushes, discards,
time, reads and writes that go the general way.
"""

from __future__ import annotations

import random
from typing import Any, NamedTuple

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import Geometry, Identity, new_header
from bridge.datapath.request import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request
from bridge.datapath.turn import Turn
from tests.cache.fakes import execute

GRANULE_SHIFT = 13
DISK_BYTES = 1 << 18
GRANULES = DISK_BYTES >> GRANULE_SHIFT
SECTOR = 512


class Event(NamedTuple):
    """What is done to the caches of both worlds."""

    what: str
    number: int
    offset: int
    length: int
    seconds: float


_EVENTS = {
    "answer": 8,
    "answer all": 8,
    "fail": 1,
    "flush": 4,
    "time": 4,
    "reconnect": 1,
    "read": 8,
    "write": 3,
    "discard": 1,
    "zeroes": 1,
    "cold": 1,
    "mode": 1,
}


def event(rng: random.Random) -> Event:
    """Any of them."""
    what = rng.choices(list(_EVENTS), list(_EVENTS.values()))[0]
    offset = SECTOR * rng.randrange(DISK_BYTES // SECTOR)
    length = min(SECTOR * rng.choice([1, 3, 4, 16, 40, 100]), DISK_BYTES - offset)
    seconds = rng.choice([0.0, 0.2, 0.999, 1.0, 1.5, 5.0, 31.0, 61.0])
    return Event(what, rng.randrange(1 << 16), offset, length, seconds)


class _Server:
    """See `cache.upstream.Upstream`."""

    size_bytes = DISK_BYTES
    min_block_bytes = 1
    can_fua = can_flush = can_trim = can_write_zeroes = True
    gone = False

    def __init__(self, turn: Turn) -> None:
        self.generation = 1
        self.image = bytearray(random.Random(1).randbytes(DISK_BYTES))
        self.pending: list[Request] = []
        self._turn = turn

    def submit(self, request: Request) -> None:
        self.pending.append(request)

    def answer(self, number: int, error: int = 0) -> None:
        if not self.pending:
            return
        request = self.pending.pop(number % len(self.pending))
        if not error:
            execute(request, self.image)
        request.generation = self.generation
        self._turn.finish(request, error)


class WorldCache:
    """See the module's text."""

    def __init__(self, rng: random.Random, file: memoryview, geometry: Geometry) -> None:
        self.now = 100.0
        self.turn = Turn()
        self.server = _Server(self.turn)
        self.errors: list[int] = []
        """How requests have ended."""
        options = Options(
            readahead_bytes=0,
            flush_interval_s=rng.choice([60.0, 60.0, 60.0, 0.0]),
            dirty_background_ratio=rng.choice([0.25, 0.9]),
            roomy_ratios=rng.choice([(1.0, 1.0, 1.0), None]),
        )
        header = new_header(geometry, Identity("nbd://test", "x"), bytes(16), 0)
        buffer: Any = file
        image = MappedImage(buffer, header)
        self.cache = Cache(image, self.server, options, clock=lambda: self.now, turn=self.turn)
        self.turn.add_stage(self.cache)
        self.resident = self.cache.hits.resident
        for granule in rng.sample(range(GRANULES), rng.choice([3, GRANULES])):
            self._start(READ, granule << GRANULE_SHIFT, rng.choice([1 << GRANULE_SHIFT, 4096]))
            self._answer_all()

    def _start(self, op: int, offset: int, length: int, data: bytes = b"", flags: int = 0) -> None:
        buffers = [memoryview(bytearray(data or length))] if op in (READ, WRITE) else []
        request = Request(op, offset, length, buffers, self._ended, flags)
        self.cache.submit(request)
        self.turn.end()

    def _ended(self, request: Request) -> None:
        self.errors.append(request.error)

    def _answer_all(self) -> None:
        for _ in range(1000):
            if not self.server.pending:
                return
            self.server.answer(0)
            self.turn.end()

    def end_turn(self) -> None:
        """Of one that brought hits."""
        self.turn.end()

    def disturb(self, event: Event) -> None:
        """Let it happen."""
        what, number, offset, length, seconds = event
        if what in ("answer", "fail"):
            self.server.answer(number, 5 * (what == "fail"))
        elif what == "answer all":
            self._answer_all()
        elif what == "flush":
            self._start(FLUSH, 0, 0)
        elif what == "time":
            self.now += seconds
            self.cache.tick(self.now)
        elif what == "reconnect":
            self.server.generation += 1
            self.cache.upstream_reconnected()
        elif what == "read":
            self._start(READ, offset, length)
        elif what == "write":
            flags = FUA if number % 8 == 0 else 0
            data = bytes([number & 0xFF]) * length
            self._start(WRITE, offset, length, data, flags)
        elif what in ("discard", "zeroes"):
            self._start(DISCARD if what == "discard" else WRITE_ZEROES, offset, length)
        elif what == "cold":
            self.cache.index.forget_residency()
        else:
            self.cache.set_write_back(number % 4 != 0)
        self.turn.end()

    def state(self) -> list[Any]:
        """All that is not in the file."""
        cache, index = self.cache, self.cache.index
        writeback, flusher = cache._writeback, cache._flusher
        ring = writeback.ring
        found: list[Any] = [
            each.tobytes()
            for each in (
                *(index.ready, index.open, index.sent, index.inflight, index.covered),
                *(index.head, index.chain, ring.slots),
            )
        ]
        found += [index.cells, index.valid_blocks, ring.queued, ring._marks, ring._marked_s]
        found += [self.resident.touched, flusher.due, cache.waiting, vars(cache.stats)]
        found += [self.turn.wanted, self.errors, self.server.generation]
        found += [(each.op, each.offset, each.length, each.flags) for each in self.server.pending]
        return found

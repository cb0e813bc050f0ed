"""The fast path: requests that are served on the spot.

`read_hit` of blocks that are all `ready`, `write_hit` of blocks that are all `open`: both are a
look-up, a bit test and a copy, per granule. Other writes are hits if they need nothing but to be
stored.
"""

from __future__ import annotations

from bridge.cache.dirty_ring import DirtyRing
from bridge.cache.eviction import UP, Evictor
from bridge.cache.index import Index
from bridge.cache.upstream import Stats
from bridge.cache.writes import Writes
from bridge.datapath.buffers import gather, scatter
from bridge.datapath.cells import Resident
from bridge.datapath.request import READ, WRITE
from bridge.datapath.usual import places_of


class CacheHits:
    """See `request.Hits`. What it touches is flat."""

    def __init__(
        self, index: Index, evictor: Evictor, writes: Writes, ring: DirtyRing, stats: Stats
    ) -> None:
        self._stats = stats
        self.resident = _resident(index, evictor, writes, ring)
        """All that a hit touches; the usual case of a turn serves out of it by itself."""

    def read_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """See `request.Hits`: blocks that are all `ready`.

        For what is not usual: packed rings, a dirty log. What is usual `usual.take_hits` serves, in
        the same way.
        """
        places = places_of(self.resident, READ, offset, length)
        data, done_bytes = self.resident.data, 0
        for at, here in places:
            scatter(buffers, done_bytes, data[at : at + here])
            done_bytes += here
        self._stats.read_hits += bool(places)
        return bool(places)

    def write_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """See `request.Hits`: blocks that are all `open`, or can be at once, or a write that can
        be stored at once."""
        flat = self.resident
        places = places_of(flat, WRITE, offset, length)
        data, done_bytes = flat.data, 0
        for at, here in places:
            gather(buffers, done_bytes, data, at, here)
            done_bytes += here
        done = bool(places) or flat.store(offset, length, buffers)
        self._stats.write_hits += done
        return done

    def count_hits(self, reads: int, writes: int) -> None:
        """So many were served out of `resident`."""
        self._stats.read_hits += reads
        self._stats.write_hits += writes

    def let_go_of_file(self) -> None:
        """The cache file is about to be closed: compiled code keeps no view of it, and serves
        nothing out of it any more."""
        self.resident.native = False


def _resident(index: Index, evictor: Evictor, writes: Writes, ring: DirtyRing) -> Resident:
    """The flat state of these parts, for `datapath.usual`."""
    resident = Resident()
    resident.granule_shift = index.granule_shift
    resident.block_shift = index.block_shift
    resident.bucket_mask = index.bucket_mask
    resident.head = index.head
    resident.granule_of = index.granule_of
    resident.ready = index.ready
    resident.open = index.open
    resident.data = index.data
    resident.touched = evictor.touched
    resident.up = UP
    resident.cells = index.cells
    resident.state = index.state
    resident.sent, resident.covered = index.sent, index.covered
    resident.queued, resident.ring = ring.queued, ring.slots
    resident.open_blocks = writes.open_blocks
    resident.may_open = writes.may_open
    resident.store = writes.store_at_once
    resident.native = None
    return resident

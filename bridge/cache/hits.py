"""The fast path: requests that are served on the spot, within one granule.

`read_hit` of blocks that are all `ready`, `write_hit` of blocks that are all `open`. Both are one
look-up, one bit test and one copy.
"""

from __future__ import annotations

from bridge.cache.eviction import UP, Evictor
from bridge.cache.index import Index
from bridge.cache.upstream import Stats
from bridge.cache.writes import Writes
from bridge.datapath.cells import Resident


class CacheHits:
    """See `request.Hits`. What it touches is flat."""

    def __init__(self, index: Index, evictor: Evictor, writes: Writes, stats: Stats) -> None:
        self._stats = stats
        self.resident = _resident(index, evictor, writes)
        """All that a hit touches; the usual case of a turn serves out of it by itself."""

    def read_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """See `request.Hits`: blocks of one granule that are all `ready`.

        For what is not usual: packed rings, buffers in several pieces, requests above 64 KiB. What
        is usual `usual.take_hits` serves, in the same way.
        """
        flat = self.resident
        granule = offset >> flat.granule_shift
        slot = flat.head[granule & flat.bucket_mask]
        if flat.granule_of[slot] != granule:
            return False
        # A range that leaves the granule has bits that no granule has.
        within = offset & (1 << flat.granule_shift) - 1
        shift = flat.block_shift
        up = (1 << shift) - 1
        bits = (1 << (within + length + up >> shift)) - (1 << (within >> shift))
        if bits & ~flat.ready[slot]:
            return False
        at = (slot << flat.granule_shift) + within
        data = flat.data
        if len(buffers) == 1:
            buffers[0][:] = data[at : at + length]
        else:
            for buffer in buffers:
                end = at + len(buffer)
                buffer[:] = data[at:end]
                at = end
        flat.touched[slot] = UP[flat.touched[slot]]
        self._stats.read_hits += 1
        return True

    def write_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """See `request.Hits`: blocks of one granule that are all `open`, or can be at once."""
        # The look-up is that of `read_hit`: a call for it would cost as much as it does.
        flat = self.resident
        granule = offset >> flat.granule_shift
        slot = flat.head[granule & flat.bucket_mask]
        if flat.granule_of[slot] != granule:
            return False
        within = offset & (1 << flat.granule_shift) - 1
        shift = flat.block_shift
        up = (1 << shift) - 1
        bits = (1 << (within + length + up >> shift)) - (1 << (within >> shift))
        if bits & ~flat.open[slot] and not flat.open_blocks(slot, bits):
            return False
        at = (slot << flat.granule_shift) + within
        data = flat.data
        if len(buffers) == 1:
            data[at : at + length] = buffers[0]
        else:
            for buffer in buffers:
                end = at + len(buffer)
                data[at:end] = buffer
                at = end
        flat.touched[slot] = UP[flat.touched[slot]]
        self._stats.write_hits += 1
        return True

    def count_hits(self, reads: int, writes: int) -> None:
        """So many were served out of `resident`."""
        self._stats.read_hits += reads
        self._stats.write_hits += writes

    def let_go_of_file(self) -> None:
        """The cache file is about to be closed: compiled code keeps no view of it, and serves
        nothing out of it any more."""
        self.resident.native = False


def _resident(index: Index, evictor: Evictor, writes: Writes) -> Resident:
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
    resident.open_blocks = writes.open_blocks
    resident.native = None
    return resident

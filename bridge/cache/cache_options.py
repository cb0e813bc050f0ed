"""The limits of a cache, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

OFF = "off"
WRITETHROUGH = "writethrough"
WRITEBACK = "writeback"
"""How a disk is cached: not at all, for reads only, or so that its writes complete in the cache."""


@dataclass(frozen=True)
class DirtyLimits:
    """How many slots may be dirty before something happens (see Options)."""

    background: int
    flush: int
    hard: int


@dataclass(frozen=True)
class Options:
    """How a cache behaves. Ratios are of the number of slots."""

    mode: str = WRITEBACK
    flush_interval_s: float = 60.0
    """Everything is durable this long after the first write that follows a flush; 0: never."""
    writeback_age_s: float = 5.0
    """Write-out of a granule starts this long after it became dirty, so that a flush finds
    little to do."""
    dirty_background_ratio: float = 0.25
    """Above this share of dirty slots write-out starts whatever the age, gently at first."""
    dirty_flush_ratio: float = 0.50
    """Above this share a flush is started: written blocks pin their slots until one."""
    dirty_hard_ratio: float = 0.75
    """At this share writers wait. The rest is left to reads, so that a slot can be had."""
    roomy_ratios: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    """The same three where the cache has a slot for every granule of the disk: a dirty slot is
    not in the way then, a block that is overwritten meanwhile is sent only once, and only its
    age (and the guest's flushes) bound how much is dirty."""
    background_requests: int = 4
    """Write-out in flight while no request waits for it: the guest's own requests come first. More
    as the share of dirty slots nears `dirty_flush_ratio`."""
    writeback_run_bytes: int = 256 * 1024
    """Longest write of coalesced dirty blocks."""
    writeback_requests: int = 256
    """Write-outs in flight. With 32 a server 10 ms away takes 3,200 blocks a second."""
    writeback_bytes: int = 8 << 20
    """What they carry: private copies, so this bounds memory."""
    writeback_turn_requests: int = 32
    """Write-outs begun in one turn: some 0.2 ms. What is left waits for the next one, so that
    guests' requests are looked at in between."""
    writeback_loads: int = 32
    """Dirty granules that are brought back into memory at once: guests wait for the same disk."""
    fua_granules: int = 8
    """A flush with at most this many dirty granules sends them with FUA, all at once. More
    would be slower where FUA is a flush of its own (nbdkit emulates it that way)."""
    fetch_run_bytes: int = 256 * 1024
    """Longest read of merged misses."""
    fetch_bytes: int = 64 << 20
    """Reads in flight: private buffers. Further misses wait in order."""
    cold_bytes: int = 16 << 20
    """Reads of the cache's disk in flight: private buffers, too. Further ones wait in order."""
    readahead_bytes: int = 4 << 20
    """Largest read-ahead window of one stream; 0 turns read-ahead off."""
    bypass_bytes: int = 512 * 1024
    """Reads of at least this size go past the cache when they belong to a sequential stream of
    more than `bypass_after_bytes` and nothing of them is cached: copying them in and out would
    cost more than it could ever save. 0: never."""
    bypass_after_bytes: int = 4 << 20
    retry_s: float = 1.0
    retry_max_s: float = 30.0
    """After the server refused a write-out: wait this long, doubling."""
    residency_s: float = 30.0
    """How long a block that was in the page cache is believed to be there still. Asking again
    costs 2 us per granule."""
    exclusive_run_bytes: int = 1 << 30
    """A discard or write-zeroes is done in pieces of this size (32-bit lengths, short turns)."""
    zero_copy_bytes: int = 256 * 1024
    """Write-zeroes up to this length become zero bytes in the cache: cheaper than a round trip
    and a flush."""

    def dirty_limits(self, *, slots: int, granules: int) -> DirtyLimits:
        """The three ratios in slots, for a cache of `slots` over a disk of `granules`."""
        ratios = (self.dirty_background_ratio, self.dirty_flush_ratio, self.dirty_hard_ratio)
        if slots >= granules and self.roomy_ratios is not None:
            ratios = self.roomy_ratios
        background, flush, hard = (int(slots * ratio) for ratio in ratios)
        return DirtyLimits(background, max(1, flush), max(1, hard))

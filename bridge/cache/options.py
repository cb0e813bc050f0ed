"""The limits of a cache, each with its reason."""

from __future__ import annotations

from dataclasses import dataclass

WRITEBACK = "writeback"
WRITETHROUGH = "writethrough"


@dataclass(frozen=True)
class Options:
    """How a cache behaves. Ratios are of the number of slots."""

    mode: str = WRITEBACK
    flush_interval_s: float = 60.0
    """Everything is durable this long after the first write that follows a flush; 0: never."""
    writeback_age_s: float = 5.0
    """Write-out of a granule starts this long after it became dirty, so that a flush finds
    little to do."""
    dirty_background_ratio: float = 0.10
    """Above this share of dirty slots write-out starts whatever the age."""
    dirty_flush_ratio: float = 0.40
    """Above this share a flush is started: written blocks pin their slots until one."""
    dirty_hard_ratio: float = 0.60
    """At this share writers wait. The rest is left to reads, so that a slot can be had."""
    writeback_run_bytes: int = 256 * 1024
    """Longest write of coalesced dirty blocks."""
    writeback_requests: int = 32
    writeback_bytes: int = 8 << 20
    """Write-out in flight: private copies, so this bounds memory."""
    fua_granules: int = 8
    """A flush with at most this many dirty granules sends them with FUA, all at once. More
    would be slower where FUA is a flush of its own (nbdkit emulates it that way)."""
    fetch_run_bytes: int = 256 * 1024
    """Longest read of merged misses."""
    fetch_bytes: int = 64 << 20
    """Reads in flight: private buffers. Further misses wait in order."""
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

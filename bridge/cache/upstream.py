"""What the cache needs from the target below it, and how it names what it counts."""

from __future__ import annotations

from typing import Protocol

from bridge.datapath.request import Request


class Upstream(Protocol):
    """The NBD client, as the cache sees it.

    `generation` is raised by each reconnect, before `Cache.upstream_reconnected()` is called and
    before any unanswered request is sent again. When a request is finished, its `generation` is
    that of the connection whose reply finished it (see `durability.ReplayingDurability`).
    READ, WRITE, FLUSH, DISCARD (if `can_trim`) and WRITE_ZEROES (if `can_write_zeroes`) are
    submitted, aligned to `min_block_bytes`, the FUA flag only if `can_fua`. A FLUSH covers
    every write that finished before it was submitted.
    """

    size_bytes: int
    min_block_bytes: int
    can_fua: bool
    can_flush: bool
    can_trim: bool
    can_write_zeroes: bool

    @property
    def generation(self) -> int:
        """Raised by each reconnect."""

    @property
    def gone(self) -> bool:
        """There is no connection, and requests no longer wait for one: they fail."""

    def submit(self, request: Request) -> None:
        """Start `request`; it finishes through its `done`. Never raises, never blocks."""


class Stats:
    """Counters since the start; plain integers, so that a hit costs one addition."""

    def __init__(self) -> None:
        self.read_hits = 0
        self.read_misses = 0
        self.read_bypassed = 0
        """Large sequential reads that went past the cache."""
        self.read_cold = 0
        """Reads of cached blocks that had left the page cache."""
        self.write_hits = 0
        """Writes that were stored on the spot."""
        self.writes = 0
        """All other writes."""
        self.writes_waited = 0
        """Writes that met the hard dirty limit."""
        self.fetches = 0
        self.fetched_bytes = 0
        self.readahead_bytes = 0
        self.writebacks = 0
        self.writeback_bytes = 0
        self.writeback_errors = 0
        self.flushes = 0
        self.flush_errors = 0
        self.timed_flushes = 0
        self.fua_flushes = 0
        """Flushes that were writes with FUA and no NBD flush."""
        self.resent_blocks = 0
        """Written blocks that became dirty again because the server was lost."""
        self.file_errors = 0

"""Preloading: prefetch ranges of a disk, a bounded number at a time, with progress."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from bridge.datapath.request import PREFETCH, Request
from bridge.spec.nbd import STATE_HOLE, STATE_ZERO

_CHUNK_BYTES = 1 << 20
_IN_FLIGHT = 8
"""8 MiB in flight: fills a 10 Gbit/s link at 5 ms, and leaves room for the guest's own misses."""


def data_ranges(extents: Iterable[tuple[int, int]], offset: int = 0) -> Iterator[tuple[int, int]]:
    """The (offset, length) that hold data, of extents (length, flags) from `offset` on.

    Holes that read as zeroes are left out; adjacent data is joined.
    """
    start = end = offset
    for length, flags in extents:
        if flags & STATE_HOLE and flags & STATE_ZERO:
            if end > start:
                yield start, end - start
            start = end = end + length
        else:
            end += length
    if end > start:
        yield start, end - start


class Warmer:
    """Prefetches `ranges` through `submit`; stops after `limit_bytes`.

    `progress(done_bytes)` is called as chunks end, `done(failed_bytes)` once, with the bytes of
    the chunks that failed. The caller bounds the ranges to the disk and `limit_bytes` to the size
    of the cache: more would only push out what came first.
    """

    def __init__(
        self,
        submit: Callable[[Request], None],
        ranges: Iterable[tuple[int, int]],
        *,
        limit_bytes: int,
        progress: Callable[[int], None],
        done: Callable[[int], None],
    ) -> None:
        self._submit = submit
        self._chunks = _chunks(ranges, limit_bytes)
        self._progress = progress
        self._done = done
        self._in_flight = 0
        self._exhausted = False
        self.done_bytes = 0
        self.failed_bytes = 0

    def start(self) -> None:
        """Begin."""
        self._pump()

    def stop(self) -> None:
        """Ask for nothing more; `done` follows when what is in flight has ended."""
        self._chunks = iter(())
        if not self._in_flight and not self._exhausted:
            self._pump()

    def _pump(self) -> None:
        while self._in_flight < _IN_FLIGHT and not self._exhausted:
            chunk = next(self._chunks, None)
            if chunk is None:
                self._exhausted = True
                break
            self._in_flight += 1
            self._submit(Request(PREFETCH, chunk[0], chunk[1], [], self._ended))
        if self._exhausted and not self._in_flight:
            self._in_flight = -1  # Once.
            self._done(self.failed_bytes)

    def _ended(self, request: Request) -> None:
        self._in_flight -= 1
        self.done_bytes += request.length
        if request.error:
            self.failed_bytes += request.length
        self._progress(self.done_bytes)
        self._pump()


def _chunks(ranges: Iterable[tuple[int, int]], limit_bytes: int) -> Iterator[tuple[int, int]]:
    left = limit_bytes
    for offset, length in ranges:
        while length > 0 and left > 0:
            # On the chunk's grid, so that a chunk fills whole granules.
            size = min(length, left, _CHUNK_BYTES - offset % _CHUNK_BYTES)
            yield offset, size
            offset += size
            length -= size
            left -= size

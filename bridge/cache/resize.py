"""The disk grows while it is in use.

A larger disk has more granules for the same slots, so nothing in the cache moves. What needs care
is an old end that lies within a block: what follows it in that block was not part of the disk, is
not what the server has there now, and would go to the server with the rest of the block. So the
block is read from the server first, and what it has behind the old end completes a cached one.
Until then the disk keeps its old size, for the guest, too.

What was begun under the old size ends there: writes that were sent and discards carry their
end with them, and fetches of the old last block are overtaken.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace

from bridge.cache.common import Common
from bridge.cache.fetch import Fetcher
from bridge.datapath.request import READ, Request
from bridge.datapath.turn import Outcome


class Resizer:
    """The growing of one cache's disk; `grown()` is called when it has another size."""

    def __init__(self, common: Common, fetcher: Fetcher, grown: Callable[[], None]) -> None:
        self._common = common
        self._index = common.index
        self._fetcher = fetcher
        self._grown = grown

    def resize(self, size_bytes: int, outcome: Outcome) -> None:
        """See `Cache.resize`."""
        index = self._index
        sizes = index.geometry
        if size_bytes <= sizes.disk_bytes:
            self._common.turn.finish(outcome)
        elif replace(sizes, disk_bytes=size_bytes).fault():
            self._common.turn.finish(outcome, errno.EFBIG)
        elif sizes.disk_bytes & index.block_bytes - 1:
            self._read_last_block(size_bytes, outcome)
        else:
            self._grow(size_bytes)
            self._common.turn.finish(outcome)

    def _read_last_block(self, size_bytes: int, outcome: Outcome) -> None:
        old_bytes = self._index.geometry.disk_bytes
        start = old_bytes & -self._index.block_bytes
        length = min(self._index.block_bytes, size_bytes - start)
        block = memoryview(bytearray(length))

        def replied(request: Request) -> None:
            if request.error:
                self._common.turn.finish(outcome, request.error)
            elif self._index.geometry.disk_bytes == old_bytes:
                self._complete_last_block(old_bytes, block[old_bytes - start :])
                self._grow(size_bytes)
                self._common.turn.finish(outcome)
            else:
                self.resize(size_bytes, outcome)  # Two at a time: the other one was faster.

        self._common.upstream.submit(Request(READ, start, length, [block], replied))

    def _complete_last_block(self, old_bytes: int, tail: memoryview) -> None:
        index = self._index
        granule = old_bytes >> index.granule_shift
        within = old_bytes & index.granule_bytes - 1
        bit = 1 << (within >> index.block_shift)
        slot = index.find(granule)
        if slot and index.valid(slot) & bit:
            at = (slot << index.granule_shift) + within
            index.data[at : at + len(tail)] = tail
        self._fetcher.overtaken(granule, bit)

    def _grow(self, size_bytes: int) -> None:
        # The file first: it must not hold a granule outside the disk that it speaks of.
        self._common.image.resize(size_bytes)
        self._index.geometry = self._common.image.geometry
        self._grown()

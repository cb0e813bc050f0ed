"""A bound on the memory that a guest's longest chains take here.

A view of guest memory takes about 200 bytes of ours. 1024 requests in flight with an indirect
table of 1024 entries each would be 200 MB per queue; no driver needs that. So a queue counts the
views of its long chains, and pops no more while there are too many: the rest waits in the ring.
Chains as long as drivers ordinarily send are not counted, they are bounded by the queue's size.
"""

from __future__ import annotations

from typing import Final

LONG_CHAIN_VIEWS: Final = 256
"""Twice what `seg_max` allows: from here on a chain is counted."""
MAX_LONG_VIEWS: Final = 1 << 17
"""About 25 MB; 254 of Windows' requests of 515 entries."""


class LongChains:
    """The long chains in flight of one queue."""

    __slots__ = ("_by_head", "views")

    def __init__(self) -> None:
        self.views = 0
        """0 while there is none: what the data path looks at."""
        self._by_head: dict[int, list[int]] = {}

    @property
    def too_many(self) -> bool:
        """Pop no more for now."""
        return self.views > MAX_LONG_VIEWS

    def popped(self, head: int, n_views: int) -> None:
        """A long chain is in flight. The same head may be so more than once."""
        self._by_head.setdefault(head, []).append(n_views)
        self.views += n_views

    def pushed(self, head: int) -> None:
        """A chain, long or not, is not in flight any more."""
        lengths = self._by_head.get(head)
        if lengths is not None:
            self.views -= lengths.pop()
            if not lengths:
                del self._by_head[head]

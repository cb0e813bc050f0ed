"""A bound on the memory that a guest's long chains take here.

A view of guest memory takes about 200 bytes of ours. 1024 requests in flight with an indirect
table of 1024 entries each would be 200 MB per queue; no driver needs that. So the queues of a disk
count the views of their long chains together, and pop no more while there are too many: the rest
waits in the rings. Short chains are not counted, they are bounded by the queues' sizes.
"""

from __future__ import annotations

from typing import Final

LONG_CHAIN_VIEWS: Final = 32
"""From here on a chain is counted: it takes more memory than everything else of a request."""
MAX_LONG_VIEWS: Final = 1 << 17
"""About 25 MB: 254 of Windows' requests of 515 entries, 1024 of the longest that Linux sends."""


class LongViews:
    """The views of all long chains in flight of one disk."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class LongChains:
    """The long chains in flight of one queue."""

    __slots__ = ("_all", "_by_head", "views")

    def __init__(self) -> None:
        self.views = 0
        """0 while there is none: what the data path looks at."""
        self._by_head: dict[int, list[int]] = {}
        self._all = LongViews()

    def join(self, views: LongViews) -> None:
        """Count together with other queues from now on."""
        views.count += self.views
        self._all = views

    def leave(self) -> None:
        """The queue has ended: the others do not wait for the chains it had in flight."""
        self._all.count -= self.views
        self._all = LongViews()
        self._all.count = self.views

    @property
    def too_many(self) -> bool:
        """Pop no more for now. (A split queue with none in flight pops one all the same: the data
        path looks at `views` first.)"""
        return self._all.count > MAX_LONG_VIEWS

    def popped(self, head: int, n_views: int) -> None:
        """A long chain is in flight. The same head may be so more than once."""
        self._by_head.setdefault(head, []).append(n_views)
        self.views += n_views
        self._all.count += n_views

    def pushed(self, head: int) -> None:
        """A chain, long or not, is no longer in flight."""
        lengths = self._by_head.get(head)
        if lengths is not None:
            n_views = lengths.pop()
            self.views -= n_views
            self._all.count -= n_views
            if not lengths:
                del self._by_head[head]

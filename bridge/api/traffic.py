"""How many requests of each operation, and how many bytes.

What goes the general way is counted request by request. Of what goes the usual way only the number
of reads and of writes is counted, so that it costs nothing per request; their bytes are estimated:
now and then (the sampler says when) the usual requests of one turn are looked at, and those since
the last look are taken to have been as long on average.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from bridge.api.live import Live
from bridge.datapath.request import DISCARD, FLUSH, OP_NAMES, READ, WRITE, WRITE_ZEROES

_GUEST_OPS: Final = (READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES)


@dataclass(frozen=True)
class Count:
    """Of one operation, since the start."""

    requests_total: int
    bytes_total: int
    """Of those of the usual form, estimated."""


class Traffic:
    """See the module's text."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._mean: dict[int, float] = {}
        """Operation → bytes of the usual requests that were looked at last."""
        self._estimated = {READ: 0.0, WRITE: 0.0}
        self._included = {READ: 0, WRITE: 0}
        """So many usual requests are in the estimate."""
        self._since = 0

    def look(self) -> None:
        """A turn has popped requests and has not ended: see how long they are."""
        self._since, sizes = self._live.usual_sizes(self._since)
        for op, lengths in sizes.items():
            if lengths:
                self._mean[op] = sum(lengths) / len(lengths)
        self._estimate()

    def counts(self) -> dict[str, Count]:
        """By operation; "other" are those that are none of the disk's, or were refused."""
        live = self._live
        self._estimate()
        usual = live.usual_counts
        general, general_bytes = live.general_counts
        found = {
            OP_NAMES[op]: Count(
                general[op] + usual.get(op, 0),
                general_bytes[op] + round(self._estimated.get(op, 0)),
            )
            for op in _GUEST_OPS
        }
        known = sum(each.requests_total for each in found.values())
        # A ring that starts again executes some once more, of which this process knows the first.
        found["other"] = Count(max(0, live.requests_total - known), 0)
        return found

    def _estimate(self) -> None:
        for op, count in self._live.usual_counts.items():
            mean = self._mean.get(op)
            if mean is not None:
                self._estimated[op] += mean * (count - self._included[op])
                self._included[op] = count

"""How many requests of each operation, and how many bytes: both are exact.

What goes the general way is counted request by request, what goes the usual way by the engine, with
an addition each.
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


def counts(live: Live) -> dict[str, Count]:
    """By operation; "other" are those that are none of the disk's, or were refused."""
    usual, usual_bytes = live.usual_counts
    general, general_bytes = live.general_counts
    found = {
        OP_NAMES[op]: Count(
            general[op] + usual.get(op, 0), general_bytes[op] + usual_bytes.get(op, 0)
        )
        for op in _GUEST_OPS
    }
    known = sum(each.requests_total for each in found.values())
    # A ring that starts again executes some once more, of which this process knows the first.
    found["other"] = Count(max(0, live.requests_total - known), 0)
    return found

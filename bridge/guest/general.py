"""How many requests went the general way, and why: each costs several times as much as a usual one.

What the usual case stopped at has its reason; what is popped with it was only `behind` it, and
counts as that, unless it is a flush or another request that is never usual.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from bridge.datapath.cells import (
    STOP_FLUSH,
    STOP_FORM,
    STOP_MISS,
    STOP_RANGE,
    STOP_RING,
    STOP_ROOM,
    STOP_ROUTE,
    STOP_WRITE,
)
from bridge.guest.virtio.chain import Chain
from bridge.spec.virtio_blk import T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES

OFF: Final = 0
"""In place of a reason to stop: the usual case was not asked."""
RECOVERED: Final = "recovered"

_WHY: Final = {
    OFF: "off",
    STOP_RING: "ring",
    STOP_FORM: "form",
    STOP_RANGE: "range",
    STOP_MISS: "miss",
    STOP_WRITE: "write",
    STOP_ROOM: "room",
    STOP_ROUTE: "route",
    STOP_FLUSH: "flush",
}
_BEHIND: Final = "behind"
_NEVER_USUAL: Final = {
    T_FLUSH: "flush",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "discard",
}

WHY: Final = (*_WHY.values(), _BEHIND, "discard", "other", RECOVERED)
"""All that a request can be counted as."""


def count(counts: Counter[str], chains: Sequence[Chain], stop: int) -> None:
    """Add `chains`, popped because of `stop`: a value of the cell STOPPED, or OFF."""
    why = _WHY[stop]
    for chain in chains:
        type_ = chain[1]
        if type_ in (T_IN, T_OUT):
            counts[why] += 1
        else:
            counts[_NEVER_USUAL.get(type_, "other")] += 1
        if stop:
            why = _BEHIND

"""Whole turns of the loop by the compiled engine: `_native.turns`, and what it leaves to Python.

One call is as many turns as fit into half a millisecond while everything is usual: it waits, takes
replies, serves chains, sends, publishes and calls. It ends as soon as anything else has to be done,
and this module has that done: what was counted is counted, what the socket did not take is left to
the connection, a reply that is not usual is parsed where every reply can be. A chain that is not
usual is still in its ring; a turn of the loop finds it there.

For everything outside, such a call is a turn in which the same things came, and it ends as turns do
(see `turn`). If the last one was not usual to its end, it is the loop that goes on with it and ends
it: what was answered in it is not published yet. But what guests have seen before it has to be
known before a flush of that turn is heard of (see `durability`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from bridge.datapath import _native
from bridge.datapath.cells import NEXT_USED, PUBLISHED, Unsent
from bridge.datapath.crowding import Crowding
from bridge.datapath.flush_rows import TurnedFlushes
from bridge.datapath.rows import Turned, UsualRing
from bridge.datapath.turn import Turn

# As in `native/turns.h`.
BUDGET: Final = 1
_CHAIN: Final = 4
_REPLY: Final = 8
_UNSENT: Final = 16
_ENDED: Final = 32
_FAILED: Final = 64
_INCOMPLETE: Final = _CHAIN | _REPLY | _UNSENT | _ENDED | _FAILED


class Turns(NamedTuple):
    """What came of some turns."""

    went_to_sleep: bool
    """Nothing came for a while, or nothing at all: the rings are armed."""
    worked: bool
    """There was work since they last waited."""
    used_up: bool
    """There may be more; the time is over."""
    was_usual: bool
    """False: a chain that is not usual was all that came."""
    naps: int
    """How often they waited."""
    ready: list[tuple[int, int]]
    """Events of descriptors that are not of a ring, and not of the connection."""


class CompiledTurns:
    """See the module's text."""

    def __init__(self, turn: Turn, *, poll_max_s: float, crowding: Crowding | None = None) -> None:
        """`crowding`: whether others want the processor; None: they never do."""
        self._turn = turn
        self._crowding = crowding
        self._state = _native.new_turns(round(poll_max_s * 1e9))

    def run(
        self, epoll_fd: int, pollers: Sequence[object], until_s: float, *, worked: bool
    ) -> Turns | None:
        """Have turns until there is something to do that is not usual; None: there is now, or no
        usual ring. Not while the turn is `pending`. `worked`: there was work since the loop last
        waited, so that more may be about to come."""
        rings = _usual_rings(pollers)
        if rings is None:
            return None
        first = rings[0]
        usual = first.usual
        side = usual.side()
        if side is None:
            return None
        crowded = self._crowding is not None and self._crowding.look(until_s)
        found = _native.turns(
            *(self._state, epoll_fd, rings, first.limits),
            *(None if usual.is_armed() else usual.wrote, side, round(until_s * 1e9)),
            *(worked, crowded),
        )
        if found is None:
            return None
        flags, taken, reads, writes, naps, ready, left = found[:7]
        looked, shown, has_worked, flushes, took_ns, durable, is_new = found[7:]
        was_usual = bool(reads or writes or flushes or not flags & _CHAIN)
        if reads or writes or flushes or took_ns:
            for ring, count in zip(rings, taken, strict=True):
                ring.took(count)
            is_new = is_new and flags & _INCOMPLETE
            flushed = TurnedFlushes(flushes, took_ns, bool(durable), bool(is_new))
            usual.took(reads, writes, flushed)
        places = [_turned(*place) for place in left]
        usual.turned(places)
        if any(place.received_bytes for place in places):
            self._turn.wanted = True  # The stages that count answers are to look.
        if looked:
            # For what Python's turns have published; `shown` is for what these have.
            self._turn.looked()
        if not flags & _INCOMPLETE:
            self._turn.end()
            return Turns(not flags, bool(has_worked), flags == BUDGET, was_usual, naps, ready)
        if looked:
            usual.shown(shown)
        for ring in rings:
            if ring.queue.cells[NEXT_USED] != ring.queue.cells[PUBLISHED]:
                ring.publish_later()
        usual.unusual(places)
        return Turns(not flags, bool(has_worked), flags == BUDGET, was_usual, naps, ready)


def _turned(
    start: int,
    end: int,
    received_bytes: int,
    flags: int,
    errno: int,
    unsent: tuple[list[bytes | memoryview], bytes, int],
) -> Turned:
    is_unusual = bool(flags & (_REPLY | _ENDED | _FAILED))
    ended = bool(flags & _ENDED)
    return Turned(start, end, received_bytes, is_unusual, ended, errno, Unsent(*unsent))


def _usual_rings(pollers: Sequence[object]) -> tuple[UsualRing, ...] | None:
    """The rings among `pollers`, all of one disk; None: something else has to be polled."""
    rings: list[UsualRing] = []
    for poller in pollers:
        usual_ring: Callable[[], UsualRing | tuple[()] | None] | None
        usual_ring = getattr(poller, "usual_ring", None)
        ring = usual_ring() if usual_ring is not None else None
        if ring is None:
            return None
        if ring:
            rings.append(ring)
    if not rings:
        return None
    first = rings[0]
    if any(ring.usual is not first.usual or ring.limits is not first.limits for ring in rings):
        return None
    return tuple(rings)

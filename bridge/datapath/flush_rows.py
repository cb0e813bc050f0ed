"""A guest's flushes that are rows: when the next may be one, and who is told what of it.

A flush is a row (see `cells`) only where nothing but its success is to be expected, and that has
only to be noted. Two know whether it is so: the session with the server (`cells.Flushes`), and the
disk. They are asked before each look at a flush; the usual case decides nothing. As long as there
is such a row, both adopt it before anything changes that could make it fail: then there are the
requests that the general path would have made when the flush was taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter_ns
from typing import NamedTuple, Protocol

from bridge.datapath.cells import (
    ARMED,
    COVERED,
    FLUSH_ARMED,
    FLUSH_BEGAN_NS,
    FLUSH_COVERS,
    FLUSH_ROW,
    FLUSH_SEEN,
    FLUSH_TOOK_NS,
    FLUSHED,
    FLUSHES,
    MAY_FLUSH,
    NOT_ROWS,
    ROWS,
    Channel,
    Flushes,
    Route,
)
from bridge.datapath.request import Request


class TurnedFlushes(NamedTuple):
    """The flushes of some compiled turns."""

    taken: int
    took_ns: Sequence[int]
    """Of those that have succeeded in turns that have ended."""
    durable: bool
    """Since the last of these all is durable, unless a flush is in flight that is no row."""
    is_new: bool
    """One was taken in the last turn, which goes on."""


class FlushedDisk(Protocol):
    """A disk whose guest's flushes may be rows."""

    def in_flight_at_server(self) -> int:
        """How many commands are not finished."""

    def may_flush(self, rows: int) -> bool:
        """Nothing is known that a flush has to tell of, and none is unanswered but `rows`."""

    def flush_taken(self, *, armed: bool) -> None:
        """A flush is a row. `armed`: so is the timer, from here on."""

    def flush_answered(self, took_ns: int) -> None:
        """It has succeeded in this turn, after so long."""

    def flushes_turned(self, flushes: TurnedFlushes, *, armed: bool) -> None:
        """Compiled turns had these. `armed`: so is the timer, from here on."""

    def adopt_flush(self, request: Request, began_ns: int, *, armed: bool) -> Request:
        """What `submit` would have made of the flush `request` at that time, when the timer was
        `armed`."""


class FlushRows:
    """See the module's text."""

    def __init__(self, route: Route) -> None:
        self._route = route
        self.disk: FlushedDisk | None = None
        """None: no flush is a row."""
        self.taken = 0
        self._alone = False
        """When the last compiled turns began, no flush was unanswered but a row."""

    def look(self, channel: Channel) -> None:
        """Find out whether a flush may be taken now."""
        flat, disk, flushes = channel.cells, self.disk, self._route.flushes
        flat[MAY_FLUSH] = 0
        if disk is None or flushes is None:
            return
        if disk.may_flush(1 if flat[FLUSH_ROW] else 0) and flushes.may_be_row():
            flat[MAY_FLUSH] = 1
            flat[NOT_ROWS] = disk.in_flight_at_server() > flat[ROWS]

    def took(self, channel: Channel) -> None:
        """One was taken: the cell FLUSHES."""
        flat = channel.cells
        disk, flushes = self._both()
        flat[FLUSHES] = 0
        flat[FLUSH_BEGAN_NS] = perf_counter_ns()
        self.taken += 1
        disk.flush_taken(armed=bool(flat[ARMED]))
        flushes.row_taken()

    def answered(self, channel: Channel) -> None:
        """One has succeeded: the cells FLUSHED and COVERED."""
        self._answered(channel, perf_counter_ns() - channel.cells[FLUSH_BEGAN_NS])

    def _answered(self, channel: Channel, took_ns: int) -> None:
        disk, flushes = self._both()
        channel.cells[FLUSHED] = 0
        flushes.row_succeeded(channel.cells[COVERED])
        disk.flush_answered(took_ns)

    def adopt(self, request: Request, channel: Channel) -> Request:
        """The command for the guest's flush `request`, which was a row."""
        flat = channel.cells
        disk, flushes = self._both()
        flat[FLUSH_ROW] = 0
        armed = bool(flat[FLUSH_ARMED])
        flush = disk.adopt_flush(request, flat[FLUSH_BEGAN_NS], armed=armed)
        return flushes.adopt_row(flush, flat[FLUSH_COVERS], flat[FLUSH_SEEN])

    # Compiled turns.

    def begin_turns(self, channel: Channel) -> None:
        """They are about to look."""
        self.look(channel)
        self._alone = bool(channel.cells[MAY_FLUSH])

    def turned(self, channel: Channel, flushes: TurnedFlushes) -> None:
        """What came of them, if anything did."""
        if not (flushes.taken or flushes.took_ns):
            return
        disk, session = self._both()
        channel.cells[FLUSHES] = 0
        self.taken += flushes.taken
        if flushes.took_ns:
            session.row_succeeded(channel.cells[COVERED])
        if flushes.is_new:
            session.row_taken()
        if not self._alone:
            flushes = flushes._replace(durable=False)
        disk.flushes_turned(flushes, armed=bool(channel.cells[ARMED]))

    def go_on(self, channel: Channel) -> None:
        """Their last turn goes on: what was answered in it is so in this one."""
        if channel.cells[FLUSHED]:
            self._answered(channel, channel.cells[FLUSH_TOOK_NS])

    def _both(self) -> tuple[FlushedDisk, Flushes]:
        assert self.disk is not None
        assert self._route.flushes is not None
        return self.disk, self._route.flushes

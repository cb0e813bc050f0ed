"""Where commands go: to the channels of the present generation, or they wait for the next one.

The channels are the connections to the server as the link sees them. `Phase` is explained in
`link`, whose transitions are there, too.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from bridge.datapath.cells import UNFLUSHED, Cells, Outlet, Route, Wire
from bridge.datapath.cells import Channel as FlatChannel
from bridge.datapath.durability import BEFORE
from bridge.datapath.request import Request
from bridge.datapath.turn import Turn


class Phase(Enum):
    """See `link`."""

    NEW = "new"
    UP = "up"
    LEAVING = "leaving"
    DOWN = "down"
    CLOSED = "closed"


class Channel(Protocol):
    """One connection, as the link sees it."""

    @property
    def unflushed(self) -> int:
        """How many writes without FUA it has answered."""

    @property
    def in_flight(self) -> int:
        """How many commands it has not answered."""

    @property
    def flat(self) -> FlatChannel | None:
        """Itself, where the usual case may put commands into its output; None: it may not."""

    @property
    def wire(self) -> Wire | None:
        """Itself, where compiled turns may read and write; None: they may not."""

    def is_one_of_several(self, spans: Cells[int]) -> None:
        """Commands on it and on others could pass each other. It has none yet."""

    def flush_later(self) -> None:
        """Send the output at the end of this turn."""

    def changes(self) -> list[Request]:
        """The commands that change the export and are not finished."""

    @property
    def sent_before_replies(self) -> int:
        """Commands from this number on were sent after the last replies had been read."""

    def durable_changes(self, before: int) -> list[Request]:
        """Those of them with FUA and a lower number than `before`."""

    def send(self, request: Request) -> None:
        """Send a command; it finishes, or is among the unanswered ones when the channel is lost."""

    def abandon(self) -> list[Request]:
        """The commands without an answer that are of abandoned requests: from here on nothing
        touches the buffers that those came with."""


class Channels:
    """See the module's text."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.phase = Phase.NEW
        self.generation = 0
        self.present: Sequence[Channel] = ()
        self.alone: Channel | None = None
        """Where commands go, if that is one place; None: see `send`."""
        self.on_trial = False
        """Only commands on trial, and probes, are sent: see `trial`."""
        self.given_up = False
        """There is no connection, and new commands fail."""
        self.fail_errno = errno.EIO
        self.waiting: list[Request] = []
        """Commands that were not sent."""
        self._next = 0
        self.answered_before = BEFORE
        """The same as `answered`, without the present channels."""
        self.route = Route()
        """Where usual commands go, and how long they may be."""

    @property
    def fails(self) -> bool:
        """New commands fail at once; they must not wait for the end of a grace time."""
        return self.given_up or self.phase is Phase.CLOSED

    @property
    def answered(self) -> int:
        """Changes answered that a FLUSH makes durable; what was before this process is one."""
        flat = self.route.alone
        if flat is not None and not flat.early:  # the usual case
            return self.answered_before + flat.cells[UNFLUSHED]
        return self.answered_before + sum(channel.unflushed for channel in self.present)

    @property
    def in_flight(self) -> int:
        """How many commands were sent or wait to be."""
        return sum(channel.in_flight for channel in self.present) + len(self.waiting)

    def one_more_before(self) -> None:
        """See `ReportingDurability.one_more_before`."""
        self.answered_before += 1

    def send(self, command: Request) -> None:
        """To a channel, if there are any to send to; else it waits for one, or fails."""
        if self.fails:
            self._turn.finish(command, self.fail_errno)
        elif self.phase is not Phase.UP or self.on_trial:
            self.waiting.append(command)
        else:
            index = self._next = (self._next + 1) % len(self.present)
            self.present[index].send(command)

    def take_waiting(self) -> list[Request]:
        """The unsent commands; they no longer wait here."""
        taken, self.waiting = self.waiting, []
        return taken

    def replaced(self, channels: Sequence[Channel]) -> None:
        """A new generation begins."""
        self.generation += 1
        self.present = channels
        if len(channels) > 1:
            for channel in channels:
                channel.is_one_of_several(self.route.spans)
        self.given_up = False
        self.enter(Phase.UP)

    def lost(self, phase: Phase) -> None:
        """The channels are gone, and with them what was answered on them is counted."""
        self.answered_before = self.answered
        self.present = ()
        self.enter(phase, on_trial=False)

    def enter(self, phase: Phase | None = None, *, on_trial: bool | None = None) -> None:
        """What decides where commands go has changed."""
        if phase is not None:
            self.phase = phase
        if on_trial is not None:
            self.on_trial = on_trial
        present = self.present if self.phase is Phase.UP and not self.on_trial else ()
        self.alone = present[0] if len(present) == 1 else None
        outlets = [
            Outlet(channel.flat, channel.flush_later, channel.wire)
            for channel in present
            if channel.flat is not None
        ]
        self.route.lead(tuple(outlets) if len(outlets) == len(present) else ())


def without_abandoned(requests: list[Request]) -> tuple[list[Request], list[Request]]:
    """`requests` without those that were abandoned, and these."""
    abandoned = [each for each in requests if each.is_abandoned]
    if not abandoned:
        return requests, []
    return [each for each in requests if not each.is_abandoned], abandoned

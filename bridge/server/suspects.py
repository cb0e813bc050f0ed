"""Which command makes the server hang up, without I/O.

Theory. A command that was not answered is sent again on the next connection. If the server hangs up
on one (it crashes on it, or closes what breaks a rule of its own), that would never end, and
nothing else would be answered. So after `_LOSSES` connections in a row that ended like that, with
the same command first among the unanswered ones, or without any answer, the unanswered commands are
put **on trial** on the next connection: each is sent alone, in order. The one on which the server
hangs up again fails with EIO, and all else goes on.

A server that hangs up on every command is down, and an outage is waited for.
So no command is blamed without a **proof** that the server does answer: it has answered something
since it first hung up, or a small read elsewhere, a **probe**, right before. If it hangs up on the
probe, too, the trial is off. From then on the blamed command is sent after the others: perhaps
they are answered.

After a verdict the server is known to hang up on some commands, and there may be many of the kind
(the discards of a mkfs): for `_DISTRUST_S` one such end is enough for a trial.
"""

from __future__ import annotations

from typing import Final
from weakref import ReferenceType, ref

from bridge.datapath.request import Request

_LOSSES: Final = 3
_DISTRUST_S: Final = 60.0


class Suspects:
    """What is known about a server that hangs up. See the module's text."""

    def __init__(self) -> None:
        self.proven = False
        """The server has answered something since it first hung up."""
        self._has_hung_up = False
        self._first: ReferenceType[Request] | None = None
        """The blamed command. Not the request: it would keep the guest's memory alive. Not its
        `id`: another request has the same when this one is gone."""
        self._sends_last: ReferenceType[Request] | None = None
        """The same where it is sent after all others; None: it is not."""
        self._losses = 0
        self._distrust_until_s = 0.0

    def in_order(self, requests: list[Request]) -> list[Request]:
        """`requests` as they are to be sent."""
        last = self._sends_last() if self._sends_last is not None else None
        if last is None:
            return requests
        return sorted(requests, key=lambda request: request is last)

    def clear(self) -> None:
        """A connection ended otherwise, or everything was failed: no command is suspected."""
        self.proven = self._has_hung_up = False
        self._sends_last = self._first = None
        self._losses = 0

    def hung_up(self, blamed: Request, now: float, *, answered: bool) -> bool:
        """The server hung up; was it for `blamed`? True: put the unanswered commands on trial.

        `answered`: something else was answered on that connection.
        """
        is_same = self._first is not None and self._first() is blamed
        if not is_same and (answered or not self._losses):
            self.clear()
        self._first = ref(blamed)
        self._losses += 1
        # What it answered before it hung up for the first time is no proof: it may be stuck since.
        self.proven |= answered and self._has_hung_up
        self._has_hung_up = True
        if self._sends_last is not None:
            self._sends_last = self._first
        if self._losses < _LOSSES and now >= self._distrust_until_s:
            return False
        self._losses = 0
        return True

    def probe_failed(self) -> None:
        """The server hung up on something harmless as well."""
        self.proven = False
        self._losses = 0
        self._sends_last = self._first

    def found(self, now: float) -> None:
        """A command was blamed, rightly."""
        self.clear()
        self._distrust_until_s = now + _DISTRUST_S

"""Somebody who waits until what is dirty now has reached the server."""

from __future__ import annotations


class Ticket:
    """Somebody waiting for write-outs."""

    __slots__ = ("error", "fua", "lost", "pending", "unstable")

    def __init__(self, *, fua: bool) -> None:
        self.pending = 0
        self.error = 0
        """The first errno of a write-out."""
        self.fua = fua
        """Send with FUA what is sent for this ticket."""
        self.unstable = False
        """Something it waited for was written without FUA: only a flush makes it durable."""
        self.lost = False
        """Something it waited for was acknowledged, and has to be sent again all the same."""

    def settled(self) -> None:
        """Everything wanted was replied to."""
        raise NotImplementedError

    def release(self) -> None:
        """One thing less to wait for."""
        self.pending -= 1
        if not self.pending:
            self.settled()

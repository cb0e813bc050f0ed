"""What waits until dirty blocks have reached the server: writes, flushes, discards."""

from __future__ import annotations

from abc import abstractmethod


class WriteOutWait:
    """Waits for write-outs; `join_written_out` puts it on a list when all were replied to.

    Nothing else happens within the server's reply: the stage that has the list looks at it in its
    next `advance`.
    """

    __slots__ = ("error", "fua", "lost", "pending", "unstable")

    def __init__(self, *, fua: bool) -> None:
        self.pending = 0
        """Write-outs that have no reply yet."""
        self.error = 0
        """The first errno of a write-out."""
        self.fua = fua
        """Send with FUA what is sent for this."""
        self.unstable = False
        """Something it waited for was written without FUA: only a flush makes it durable."""
        self.lost = False
        """Something it waited for was acknowledged, and has to be sent again all the same."""

    def release(self) -> None:
        """One write-out less to wait for."""
        self.pending -= 1
        if not self.pending:
            self.join_written_out()

    @abstractmethod
    def join_written_out(self) -> None:
        """Append this to the list of its stage; nothing more."""

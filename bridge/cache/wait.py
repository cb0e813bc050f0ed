"""What waits until dirty blocks have reached the server: writes, flushes, discards."""

from __future__ import annotations

from typing import Any


class WriteOutWait:
    """Waits for write-outs; joins the list `settled` when all of them were replied to.

    It is not called back: whoever owns that list looks at it in its next `advance`.
    """

    __slots__ = ("error", "fua", "lost", "pending", "settled", "unstable")

    def __init__(self, settled: list[Any], *, fua: bool) -> None:
        self.settled = settled
        self.pending = 0
        self.error = 0
        """The first errno of a write-out."""
        self.fua = fua
        """Send with FUA what is sent for this."""
        self.unstable = False
        """Something it waited for was written without FUA: only a flush makes it durable."""
        self.lost = False
        """Something it waited for was acknowledged, and has to be sent again all the same."""

    def release(self) -> None:
        """One thing less to wait for."""
        self.pending -= 1
        if not self.pending:
            self.settled.append(self)

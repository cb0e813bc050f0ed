"""Whether a server that says nothing is dead, or only slow. No I/O: `now` is an argument."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from bridge.datapath.cells import FLUSH_ROW
from bridge.datapath.request import FUA, READ, WRITE, Request
from bridge.server.export import Export
from bridge.server.transmission import Transmission

_PATIENCE: Final = 10
"""How many times `--request-timeout` a server may take that is not known to be dead."""


class Silence:
    """The silence of one connection. Times are in seconds of any monotonic clock."""

    __slots__ = (
        "_answers_beside",
        "_export",
        "_moved",
        "_moved_at",
        "_oldest",
        "_oldest_at",
        "_probing",
        "_received_then",
        "_send",
        "_transmission",
        "sent_bytes",
    )

    def __init__(
        self, transmission: Transmission, export: Export, send: Callable[[Request], None]
    ) -> None:
        """`send(request)` sends a command of ours on this connection."""
        self._transmission = transmission
        self._export = export
        self._send = send
        self.sent_bytes = 0
        """What the socket took after it had been full: that the server still reads shows, too."""
        self._moved = self._oldest = self._received_then = 0
        self._moved_at = self._oldest_at = 0.0
        self._answers_beside = False
        """The server has answered something while an older command was in flight that may be
        slow: it does not do one after the other."""
        self._probing = False

    def is_too_long(self, now: float, timeout_s: float) -> bool:
        """Whether the server must be taken for dead. To be asked a few times per `timeout_s`.

        It is if nothing moved for `timeout_s` although something is in flight, or one command is
        unanswered for ten times as long. But a flush, a trim, zeroes or anything with FUA may take
        long, and some servers do nothing else meanwhile. With such a command in flight a quiet
        server is asked for a few bytes: as long as it answers, it may take any time. One that
        never answered beside such a command gets ten times as long.
        """
        # (Rows stay rows: to make requests of them would cost more than all of this.)
        transmission = self._transmission
        pending = transmission.pending
        oldest = transmission.oldest
        flush_row = transmission.cells[FLUSH_ROW]
        slow = {cookie for cookie, each in pending.items() if _may_be_slow(each)}
        if flush_row:
            slow.add(flush_row)
        received = transmission.received_bytes
        moved = received + self.sent_bytes
        if not oldest or moved != self._moved:
            if received != self._received_then and oldest == self._oldest and oldest in slow:
                self._answers_beside = True
            self._received_then = received
            self._moved = moved
            self._moved_at = now
        if oldest != self._oldest:
            self._oldest = oldest
            self._oldest_at = now
        if not oldest:
            return False
        quiet_s = now - max(self._moved_at, self._oldest_at)
        if slow:
            if quiet_s > timeout_s / 2 and not self._probing:
                self._probe()
            return quiet_s > timeout_s * (1.5 if self._answers_beside else _PATIENCE)
        return quiet_s > timeout_s or now - self._oldest_at > _PATIENCE * timeout_s

    def _probe(self) -> None:
        """Ask for a few bytes."""
        length = max(self._export.min_block_bytes, 512)
        if length <= self._export.usable_bytes:
            self._probing = True
            room = memoryview(bytearray(length))
            self._send(Request(READ, 0, length, [room], self._probed))

    def _probed(self, request: Request) -> None:
        self._probing = False


def _may_be_slow(request: Request) -> bool:
    """A command that has the server wait for its disk, or do as much as it likes."""
    return request.op > WRITE or bool(request.flags & FUA)

"""One NBD connection after its handshake, on the data path's loop.

Theory. `connecting.negotiate` connects and shakes hands; a `Connection` takes the raw non-blocking
socket of that and registers it in the `Loop`. From then on nothing awaits: `send` puts a request
into the transmission machine, the turn's end sends everything in one system call, and readable
sockets complete requests from the loop's callback. What a socket does not take is kept and sent
when it is writable again. On any error the connection is dead at once: its socket is closed, and
`lost` is called once with the reason; half a frame is never followed by anything.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import ClassVar, Final

import structlog
import trio

from bridge.datapath.cells import (
    DIRECT_LEFT,
    LONG_READS,
    ROWS,
    Cells,
    Channel,
    Unsent,
    Wire,
    sequence_of,
)
from bridge.datapath.loop import EPOLLIN, EPOLLOUT, Loop
from bridge.datapath.request import CHANGES, FUA, Request
from bridge.datapath.rows import Rows
from bridge.errors import BridgeError, ConnectionLost, ProtocolError
from bridge.server.connecting import Negotiated
from bridge.server.output import rest_after
from bridge.server.silence import Silence
from bridge.server.transmission import Transmission

_log = structlog.get_logger(__name__)

_IOV_MAX: Final = 1024
_RECEIVES_PER_TURN: Final = 8
"""System calls on one socket before the others get their turn."""


class Connection:
    """A connection in the transmission phase. Everything but `hang_up` is synchronous.

    Over TLS it is a `tls_connection.TlsConnection`.
    """

    sends_pieces: ClassVar[bool] = True
    """One call may send many pieces."""

    __slots__ = (
        "_closing",
        "_fd",
        "_idle",
        "_loop",
        "_lost",
        "_queued",
        "_resumable",
        "_send",
        "_sendmsg",
        "_silence",
        "_sock",
        "_unsent",
        "alive",
        "blamed",
        "export",
        "leaving",
        "peer_closed",
        "transmission",
    )

    def __init__(
        self,
        negotiated: Negotiated,
        loop: Loop,
        *,
        lost: Callable[[Connection, BridgeError], None],
        generation: int = 1,
        rows: Rows | None = None,
    ) -> None:
        self._sock = negotiated.sock
        self._fd = self._sock.fileno()
        self._loop = loop
        self._lost = lost
        self._queued = False
        self._closing = False
        self._idle: trio.Event | None = None
        self._unsent: list[bytes | memoryview] = []
        self._resumable = b""
        """Compiled turns have left what is unsent, and may go on with it: see cells.Unsent."""
        self._send = self._sock.send
        self._sendmsg = self._sock.sendmsg
        self.export = negotiated.export
        self.alive = True
        self.leaving = False
        """The server asked to be left (ESHUTDOWN), or we are hanging up: send nothing new."""
        self.peer_closed = False
        """The connection ended because the peer's end was closed (or a reset says so)."""
        self.blamed: Request | None = None
        """The command that may have made the server hang up."""
        self.transmission = Transmission(self.export, loop.turn, generation=generation, rows=rows)
        self._silence = Silence(self.transmission, self.export, self.send)
        try:
            loop.add(self._fd, self._on_event, EPOLLIN)
        except OSError:
            self.transmission.retire()
            raise
        if negotiated.handshake.trailing_data():
            self._fail(ProtocolError("the server sent data before it was asked"))
        else:
            self._begun()

    def _begun(self) -> None:
        """The connection is in the loop, and what comes next is the first reply."""

    @property
    def unflushed(self) -> int:
        """See channels.Channel."""
        return self.transmission.unflushed

    @property
    def in_flight(self) -> int:
        """See channels.Channel."""
        return self.transmission.in_flight

    @property
    def flat(self) -> Channel | None:
        """See channels.Channel."""
        return self.transmission if self.transmission.takes_rows else None

    def is_one_of_several(self, spans: Cells[int]) -> None:
        """See channels.Channel."""
        self.transmission.is_one_of_several(spans)

    def changes(self) -> list[Request]:
        """See channels.Channel. What was refused is sent again with the next connection anyway."""
        transmission = self.transmission
        transmission.adopt_all()
        unfinished = (*transmission.pending.values(), *transmission.early)
        return [request for request in unfinished if request.op in CHANGES]

    @property
    def sent_before_replies(self) -> int:
        """See channels.Channel."""
        return self.transmission.sent_before_replies

    def durable_changes(self, before: int) -> list[Request]:
        """See channels.Channel. None of them is a row."""
        transmission = self.transmission
        unfinished = (*transmission.pending.values(), *transmission.early)
        durable = (each for each in unfinished if each.flags & FUA and each.op in CHANGES)
        return [each for each in durable if sequence_of(each.cookie) < before]

    def stalled(self, now: float, timeout_s: float) -> bool:
        """See silence.Silence.is_too_long."""
        return self._silence.is_too_long(now, timeout_s)

    def send(self, request: Request) -> None:
        """Send `request` at the end of this turn."""
        self.transmission.start(request)
        if not self._queued:
            self.flush_later()

    def flush_later(self) -> None:
        """Send the output at the end of this turn."""
        if not self._queued:
            self._queued = True
            self._loop.turn.at_end(self.flush_output)

    def abandon(self) -> list[Request]:
        """See channels.Channel."""
        found = self.transmission.abandon()
        if found:
            self._unsent = [bytes(piece) for piece in self._unsent]
        return found

    @property
    def has_unsent(self) -> bool:
        """Some of the output is still unsent."""
        return bool(self._unsent or self.transmission.output)

    def flush_output(self) -> None:
        """Send the gathered output, as far as the socket takes it."""
        try:
            self._queued = False
            if not self.alive:
                return
            transmission = self.transmission
            if transmission.held:
                transmission.send_held()
            if self._unsent:
                # The loop says when the socket takes more.
                if transmission.output:
                    self._unsent += transmission.output
                    self._resumable = b""
                transmission.output = []
                return
            output = transmission.output
            if not output:
                return
            transmission.output = []
            has_payload, transmission.has_payload = transmission.has_payload, False
            if self.sends_pieces and len(output) <= _IOV_MAX:
                # The usual case: everything goes out at once.
                try:
                    if has_payload:
                        sent = self._sendmsg(output)
                    else:
                        # Headers only: joining 32 of them costs less than 32 pieces in one call.
                        output = [b"".join(output)]
                        sent = self._send(output[0])
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    self._fail_by(error)
                    return
                if sent == sum(map(len, output)):
                    return
                output = rest_after(output, sent)
            self._unsent = output
            self._push()
        except Exception as error:
            self._fail_unexpectedly(error)

    def _push(self) -> None:
        """Send `_unsent` until the socket is full; then wait for EPOLLOUT."""
        unsent = self._unsent
        self._resumable = b""
        try:
            while unsent:
                sent = self._send_some(unsent)
                self._silence.sent_bytes += sent
                unsent = rest_after(unsent, sent)
        except BlockingIOError:
            pass
        except OSError as error:
            self._fail_by(error)
            return
        transmission = self.transmission
        self._unsent = unsent
        if bool(unsent) != transmission.sending:
            transmission.sending = bool(unsent)
            self._loop.modify(self._fd, EPOLLIN | EPOLLOUT if unsent else EPOLLIN)
        if not unsent and transmission.early:
            self._finish_early()

    def _send_some(self, unsent: list[bytes | memoryview]) -> int:
        """Send what the socket takes in one call: how many bytes. Raises OSError."""
        return self._sendmsg(unsent[:_IOV_MAX])

    def _finish_early(self) -> None:
        """Commands answered before all of them was sent: the rest is no longer needed."""
        early, self.transmission.early = self.transmission.early, []
        self._loop.turn.finished += early

    def _on_event(self, events: int) -> None:
        try:
            if self.transmission.cells[DIRECT_LEFT]:
                self.transmission.adopt_all()  # Compiled turns were amid a payload.
            if events & EPOLLOUT and self._unsent:
                self._push()
            if self.alive and events & ~EPOLLOUT:
                self._receive_some()
                self._after_receiving()
            if self._idle is not None:
                self._check_idle()
        except Exception as error:
            self._fail_unexpectedly(error)

    def _after_receiving(self) -> None:
        if self.transmission.cells[LONG_READS] or self._unsent:
            # A long payload comes and goes in many pieces, one right after the other.
            self._loop.linger()
        if self.transmission.refused and not self.leaving:
            self.leaving = True
            self._lost(self, ConnectionLost("the server is shutting down"))

    # What compiled turns leave: see cells.Wire.

    @property
    def wire(self) -> Wire | None:
        """See channels.Channel."""
        return self

    def received(self) -> tuple[int, int, int, list[bytes | memoryview], bytes] | None:
        """See cells.Wire."""
        if not self.alive or self.leaving or self._idle is not None:
            return None
        if self._unsent and not self._resumable:
            return None
        received = self.transmission.received
        if received is None:
            return None
        return (self._fd, *received, self._unsent, self._resumable)

    def turned(self, start: int, end: int, received: int, unsent: Unsent) -> None:
        """See cells.Wire."""
        transmission = self.transmission
        transmission.turned(start, end, received)
        self._silence.sent_bytes += unsent.late_bytes
        self._unsent, self._resumable = unsent.pieces, unsent.commands
        if bool(unsent.pieces) != transmission.sending:
            # At once: what is answered from here on may have been answered too early.
            transmission.sending = bool(unsent.pieces)
            self._loop.modify(self._fd, EPOLLIN | EPOLLOUT if unsent.pieces else EPOLLIN)

    def unusual(self, *, ended: bool, errno: int) -> None:
        """See cells.Wire."""
        if not self.alive:
            return  # Another connection's end was this one's, too.
        try:
            if self.transmission.cells[DIRECT_LEFT]:
                self.transmission.adopt_all()
            if errno:
                self._fail_by(OSError(errno, os.strerror(errno)))
            elif ended:
                self._end_of_file()
            else:
                self._parse(0)
                self._after_receiving()
        except Exception as error:
            self._fail_unexpectedly(error)

    def _receive_some(self) -> None:
        """Receive and parse what there is, up to a limit."""
        sock = self._sock
        transmission = self.transmission
        for _ in range(_RECEIVES_PER_TURN):
            # Only the system call is guarded: what the parser raises is not the socket's.
            try:
                if transmission.direct:
                    buffers = transmission.next_buffers()
                    n_bytes = sock.recvmsg_into(buffers)[0]
                    drained = n_bytes < sum(map(len, buffers))
                else:
                    buffer = transmission.next_buffer()
                    n_bytes = sock.recv_into(buffer)
                    drained = n_bytes < len(buffer)
            except BlockingIOError:
                return
            except OSError as error:
                self._fail_by(error)
                return
            # Asking again to be told that there is nothing costs more than the next turn.
            if not self._received(n_bytes) or drained:
                return

    def _received(self, n_bytes: int) -> bool:
        """Bytes have come, or the end of file; False if the connection is dead now."""
        if not n_bytes:
            self._end_of_file()
            return False
        self._parse(n_bytes)
        return self.alive

    def _parse(self, n_bytes: int) -> None:
        try:
            self.transmission.bytes_received(n_bytes)
        except ProtocolError as error:
            self._blame()
            self._fail(error)

    def _end_of_file(self) -> None:
        self.peer_closed = True
        self._blame()
        self._fail(ConnectionLost("the server closed the connection"))

    def _fail_by(self, error: OSError) -> None:
        # A server that ends with our commands unread resets the connection.
        self.peer_closed = error.errno in (errno.ECONNRESET, errno.EPIPE)
        if self.peer_closed:
            self._blame()
        self._fail(_lost_by(error))

    def _blame(self) -> None:
        """The connection ends, and a command may be the reason: the first one without an answer.

        Not when the server wants to be left, nor when the network or its silence ends it.
        """
        if self.alive and not self.leaving:
            self.blamed = self.transmission.first_unanswered()

    def _fail_unexpectedly(self, error: Exception) -> None:
        """A bug of ours, in how a reply is read perhaps: it costs this connection, not the disk.

        What had no answer yet is sent again on the next one.
        """
        _log.error("a connection ends by an internal error", exc_info=error)
        self._blame()
        self._fail(ConnectionLost(f"internal error: {type(error).__name__}"))

    def _fail(self, error: BridgeError) -> None:
        """The connection is dead: tell the owner once."""
        if not self.alive:
            return
        try:
            self.close()
        finally:
            if not self._closing:
                self._lost(self, error)

    def fail(self, error: BridgeError) -> None:
        """Give the connection up, as if it had broken."""
        self._fail(error)

    def close(self) -> None:
        """Close the socket now, whatever is in flight."""
        if not self.alive:
            return
        self.alive = False
        self.transmission.retire()
        self._loop.remove(self._fd)
        self._sock.close()
        self._unsent = []
        self._resumable = b""
        self.transmission.output = []
        self.transmission.held = []
        if self._idle is not None:
            self._idle.set()
        self._finish_early()

    async def _quiet(self) -> None:
        """Wait until nothing is in flight and nothing unsent, or the connection is dead."""
        self._idle = trio.Event()
        self._check_idle()
        await self._idle.wait()

    def _check_idle(self) -> None:
        transmission = self.transmission
        rows = transmission.cells[ROWS]
        busy = rows or transmission.pending or self._unsent or transmission.output
        if self._idle is not None and not (self.alive and busy):
            self._idle.set()

    async def hang_up(self, timeout_s: float) -> None:
        """Wait for the replies still to come, say DISC, and close.

        Hanging up with requests in flight aborts nbdkit 1.32. After `timeout_s`, or on
        cancellation, the connection is closed whatever is in flight.
        """
        self._closing = self.leaving = True
        transmission = self.transmission
        try:
            with trio.move_on_after(timeout_s):
                await self._quiet()
                if self.alive:
                    transmission.disconnect()
                    self.flush_output()
                await self._quiet()
        finally:
            self.close()


def _lost_by(error: OSError) -> ConnectionLost:
    reason = error.strerror or str(error)
    if error.errno in (errno.ETIMEDOUT, errno.EHOSTUNREACH):
        reason = "the server cannot be reached any more"
    return ConnectionLost(f"connection lost: {reason}")

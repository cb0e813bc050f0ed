"""A connection over TLS: OpenSSL has buffers of its own, and takes one piece at a time."""

from __future__ import annotations

import socket
import ssl
from typing import ClassVar, Final

from bridge.datapath.cells import Wire
from bridge.datapath.loop import EPOLLIN
from bridge.server.connection import Connection
from bridge.server.output import first_bytes

_RECEIVES_PER_TURN: Final = 64
"""System calls on one socket before the others get their turn. Each brings at most 16 KiB."""
_SEND_BYTES: Final = 256 << 10


class TlsConnection(Connection):
    """A `Connection` whose socket is an `ssl.SSLSocket`. Compiled turns leave it alone."""

    __slots__ = ()

    sends_pieces: ClassVar[bool] = False

    def _begun(self) -> None:
        # The handshake may have left bytes in OpenSSL's buffer, which no epoll shows.
        self._loop.turn.at_end(self._poll)

    def _poll(self) -> None:
        if self.alive:
            self._on_event(EPOLLIN)

    @property
    def wire(self) -> Wire | None:
        """See channels.Channel."""
        return None

    def _send_some(self, unsent: list[bytes | memoryview]) -> int:
        try:
            return self._sock.send(first_bytes(unsent, _SEND_BYTES))
        except (ssl.SSLWantWriteError, ssl.SSLWantReadError):
            raise BlockingIOError from None

    def _receive_some(self) -> None:
        """OpenSSL may hold decrypted bytes that no epoll shows: never stop while it does."""
        sock = self._sock
        assert isinstance(sock, ssl.SSLSocket)
        transmission = self.transmission
        turns = _RECEIVES_PER_TURN
        while turns > 0 or sock.pending():
            turns -= 1
            try:
                n_bytes = sock.recv_into(transmission.next_buffers()[0])
            except ssl.SSLEOFError:
                n_bytes = 0  # No close_notify: tolerated, the protocol has its own lengths.
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return
            except OSError as error:
                self._fail_by(error)
                return
            if not self._received(n_bytes):
                return


def kind_for(sock: socket.socket) -> type[Connection]:
    """The class of a connection over `sock`."""
    return TlsConnection if isinstance(sock, ssl.SSLSocket) else Connection

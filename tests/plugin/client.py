"""A small blocking NBD client that can be as rude as a broken network."""

from __future__ import annotations

import os
import socket
import struct

_MAGIC = 0x4E42444D41474943
_OPTION_MAGIC = 0x49484156454F5054
_REPLY_MAGIC = 0x0003E889045565A9
_REQUEST_MAGIC = 0x25609513
_SIMPLE_MAGIC = 0x67446698
_OPT_GO = 7
_REP_ACK = 1
_REP_INFO = 3
_INFO_EXPORT = 0
_INFO_DESCRIPTION = 2

READ, WRITE, DISCONNECT, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 2, 3, 4, 6
FUA = 1


class Refused(Exception):
    """The server does not open the export."""


class NbdError(OSError):
    """The server answered a request with an errno."""


class RawClient:
    """One connection, opened with NBD_OPT_GO; one request at a time unless `send` is used."""

    def __init__(self, address: str | int, export: str = "", *, timeout_s: float = 30) -> None:
        """`address`: the path of a unix socket, or a port on the loopback interface."""
        self._socket = socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET)
        self._socket.settimeout(timeout_s)
        self.size_bytes = 0
        self.description = ""
        self._cookie = 0
        try:
            self._socket.connect(address if isinstance(address, str) else ("127.0.0.1", address))
            self._handshake(export.encode())
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def properties(self) -> dict[str, str]:
        """The `key=value` words of the export's description."""
        return dict(word.split("=", 1) for word in self.description.split() if "=" in word)

    def read(self, offset: int, length: int) -> bytes:
        self.send(READ, offset, length)
        self._answer()
        return self.receive(length)

    def write(self, offset: int, data: bytes, *, fua: bool = False) -> None:
        self.send(WRITE, offset, len(data), data, flags=FUA if fua else 0)
        self._answer()

    def flush(self) -> None:
        self.send(FLUSH, 0, 0)
        self._answer()

    def trim(self, offset: int, length: int) -> None:
        self.send(TRIM, offset, length)
        self._answer()

    def send(
        self, command: int, offset: int, length: int, data: bytes = b"", *, flags: int = 0
    ) -> None:
        """Send a request and do not wait for its reply."""
        self._cookie += 1
        header = struct.pack(
            ">IHHQQI", _REQUEST_MAGIC, flags, command, self._cookie, offset, length
        )
        self._socket.sendall(header + data)

    def cut(self) -> None:
        """Drop the connection without a word."""
        self._socket.close()

    def close(self) -> None:
        """Leave as the protocol wants it, and wait until the server has closed, too."""
        try:
            self.send(DISCONNECT, 0, 0)
            # nbdkit 1.42 with several threads does not close before it has seen our end.
            self._socket.shutdown(socket.SHUT_WR)
            while self._socket.recv(4096):
                pass
        except OSError:
            pass
        self._socket.close()

    def _handshake(self, export: bytes) -> None:
        magic, option_magic, _flags = struct.unpack(">QQH", self.receive(18))
        assert (magic, option_magic) == (_MAGIC, _OPTION_MAGIC)
        self._socket.sendall(struct.pack(">I", 3))
        data = struct.pack(">I", len(export)) + export + struct.pack(">HH", 1, _INFO_DESCRIPTION)
        self._socket.sendall(struct.pack(">QII", _OPTION_MAGIC, _OPT_GO, len(data)) + data)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.receive(20))
            payload = self.receive(length)
            if kind & 0x80000000:
                raise Refused(f"{kind:#x} {payload.decode(errors='replace')}")
            if kind == _REP_ACK:
                return
            info = struct.unpack_from(">H", payload)[0]
            if info == _INFO_EXPORT:
                self.size_bytes = struct.unpack_from(">Q", payload, 2)[0]
            elif info == _INFO_DESCRIPTION:
                self.description = payload[2:].decode()

    def _answer(self) -> None:
        magic, error, cookie = struct.unpack(">IIQ", self.receive(16))
        assert magic == _SIMPLE_MAGIC
        assert cookie == self._cookie
        if error:
            raise NbdError(error, os.strerror(error))

    def receive(self, length: int) -> bytes:
        """Exactly so many bytes of what the server sends."""
        data = bytearray()
        while len(data) < length:
            piece = self._socket.recv(length - len(data))
            if not piece:
                raise ConnectionResetError("the server hung up")
            data += piece
        return bytes(data)

"""A small NBD client: enough to ask a server for the first sector of an export.

Fixed newstyle negotiation with TLS, NBD_OPT_GO and simple replies (NBD doc/proto.md).
"""

from __future__ import annotations

import socket
import struct
from pathlib import Path

_LIMIT_S = 4.0

_MAGIC, _OPTION_MAGIC, _REPLY_MAGIC = 0x4E42444D41474943, 0x49484156454F5054, 0x3E889045565A9
_REQUEST_MAGIC, _SIMPLE_REPLY_MAGIC = 0x25609513, 0x67446698
_FIXED_NEWSTYLE_NO_ZEROES = 3
_OPT_STARTTLS, _OPT_GO = 5, 7
_REP_ACK, _REP_INFO = 1, 3
_CMD_READ, _CMD_DISC = 0, 2
_MAX_REPLY_BYTES = 64 << 10


class Unhealthy(Exception):
    """What the server did not do; one line."""


def probe(address: tuple[str, int], export: str, certificates: Path | None) -> None:
    """Open `export` and read 512 bytes. Raises Unhealthy or OSError."""
    with socket.create_connection(address, timeout=_LIMIT_S) as plain:
        magic, option_magic, _flags = struct.unpack(">QQH", _receive(plain, 18))
        if (magic, option_magic) != (_MAGIC, _OPTION_MAGIC):
            raise Unhealthy("no NBD server answers")
        plain.sendall(struct.pack(">I", _FIXED_NEWSTYLE_NO_ZEROES))
        if certificates is None:
            _read_first_sector(plain, export)
            return
        _ask(plain, _OPT_STARTTLS, b"")
        import ssl  # late: it takes longer than the rest of this program

        context = ssl.create_default_context(cafile=certificates / "ca-cert.pem")
        context.load_cert_chain(certificates / "client-cert.pem", certificates / "client-key.pem")
        with context.wrap_socket(plain, server_hostname=address[0]) as secure:
            _read_first_sector(secure, export)


def _read_first_sector(sock: socket.socket, export: str) -> None:
    name = export.encode()
    _ask(sock, _OPT_GO, struct.pack(">I", len(name)) + name + struct.pack(">H", 0))
    sock.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_READ, 1, 0, 512))
    magic, error, _cookie = struct.unpack(">IIQ", _receive(sock, 16))
    if magic != _SIMPLE_REPLY_MAGIC or error:
        raise Unhealthy(f"reading {export}: error {error}")
    _receive(sock, 512)
    sock.sendall(struct.pack(">IHHQQI", _REQUEST_MAGIC, 0, _CMD_DISC, 2, 0, 0))


def _ask(sock: socket.socket, option: int, data: bytes) -> None:
    """Send one option and wait for its acknowledgement."""
    sock.sendall(struct.pack(">QII", _OPTION_MAGIC, option, len(data)) + data)
    while True:
        magic, _, kind, length = struct.unpack(">QIII", _receive(sock, 20))
        if magic != _REPLY_MAGIC or length > _MAX_REPLY_BYTES:
            raise Unhealthy("the server broke the protocol")
        said = _receive(sock, length)
        if kind == _REP_ACK:
            return
        if kind != _REP_INFO:
            message = said.decode(errors="replace")[:200]
            raise Unhealthy(f"the server refused: {message or f'reply {kind:#x}'}")


def _receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        more = sock.recv(length - len(data))
        if not more:
            raise Unhealthy("the server hung up")
        data += more
    return data

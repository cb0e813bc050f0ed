"""Connecting to an NBD server with trio, up to the end of the handshake; and leaving one early.

`negotiate` connects, tunes the socket and shakes hands; what it returns is the raw non-blocking
socket that a `connection.Connection` takes over, or that `leave` says goodbye on.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
import stat
from typing import Final

import trio

from bridge.datapath.turn import Turn
from bridge.errors import (
    BridgeError,
    CertificateWanted,
    ConfigError,
    ConnectionLost,
    Remedy,
)
from bridge.server import tls
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.handshake import Handshake, State
from bridge.server.handshake_options import Goal, HandshakeOptions
from bridge.server.transmission import Transmission
from bridge.server.uri import NbdUri

_SOCKET_BUFFER_BYTES: Final = 1 << 20
"""Measured with writes of 1 MiB: the default of 208 KiB costs 234 us each, 512 KiB to 1 MiB 135,
4 MiB 145 to 200 (its pages are cold)."""
_SO_SNDBUFFORCE: Final = 32
_SO_RCVBUFFORCE: Final = 33
_REASON_S: Final = 2.0
"""How long a server that refuses an export may take to say which it has."""
_KEEPALIVE_IDLE_S: Final = 10
_KEEPALIVE_PROBES: Final = 4


class Negotiated:
    """A socket after its handshake, not yet in the loop."""

    def __init__(self, sock: socket.socket, handshake: Handshake) -> None:
        self.sock = sock
        self.handshake = handshake

    @property
    def export(self) -> Export:
        export = self.handshake.export
        assert export is not None
        return export

    def close(self) -> None:
        self.sock.close()


class Silent(ConnectionLost):
    """The server did not answer in time; `about_export`: whether it gives the export."""

    about_export = False


async def negotiate(
    uri: NbdUri, options: ClientOptions, goal: Goal = Goal.GO, export_name: str | None = None
) -> Negotiated:
    """Connect to the URI's server and negotiate, within `options.connect_timeout_s`.

    Raises ConfigError, ConnectionLost or ProtocolError with one line that names the server.
    Cancellation closes the socket.
    """
    handshake = Handshake(_wishes(uri, options, goal, export_name))
    tls.check_options(uri, options)
    context = tls.client_context(uri, options) if uri.tls else None
    waits_for = "the connection"
    try:
        with trio.fail_after(options.connect_timeout_s):
            sock = await _connect(uri)
            waits_for = ""
            sock = await _shake_hands(sock, handshake, context, tls.server_name(uri))
    except trio.TooSlowError:
        raise _silent(uri, options, handshake, waits_for or handshake.waits_for) from None
    except BridgeError as error:
        if handshake.silent_over_tls:
            # A server that does not like its client's certificate, or none, often says no more.
            raise CertificateWanted(
                f"{uri.server}: {error}",
                remedy=Remedy.CERTIFICATE_ACCEPTED
                if tls.has_certificate(uri, options)
                else Remedy.PERHAPS_GIVE_CERTIFICATE,
            ) from None
        raise error.within(type(error), f"{uri.server}: ") from None
    if uri.tls and handshake.export is not None:
        assert handshake.export.tls
    return Negotiated(sock, handshake)


def _wishes(
    uri: NbdUri, options: ClientOptions, goal: Goal, export_name: str | None
) -> HandshakeOptions:
    return HandshakeOptions(
        export_name=uri.export_name if export_name is None else export_name,
        typed_name=uri.export_name,
        list_if_refused=True,
        goal=goal,
        tls=uri.tls,
        structured=options.structured,
        extended=options.extended,
        block_status=options.block_status,
    )


def _silent(uri: NbdUri, options: ClientOptions, handshake: Handshake, waited_for: str) -> Silent:
    silent = Silent(
        f"{uri.server}: no answer within {options.connect_timeout_s:g} s (waited for "
        f"{waited_for}): "
        + (
            "is the export in use?"
            if handshake.waits_for_export
            else "is it an NBD server, and is it alive?"
        )
    )
    silent.about_export = handshake.waits_for_export
    return silent


async def _connect(uri: NbdUri) -> socket.socket:
    try:
        if uri.socket_path is not None:
            stream: trio.SocketStream = await trio.open_unix_socket(uri.socket_path)
        else:
            assert uri.host is not None
            stream = await trio.open_tcp_stream(uri.host, uri.port)
        return _taken_from(stream)
    except FileNotFoundError:
        raise ConnectionLost("there is no such socket: is the server running?") from None
    except socket.gaierror as error:
        raise ConnectionLost(f"cannot find the host {uri.host}: {error.strerror}") from None
    except OSError as error:
        cause: BaseException = error
        while isinstance(cause.__cause__, (OSError, BaseExceptionGroup)):
            cause = cause.__cause__
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        number = getattr(cause, "errno", None)
        reason = os.strerror(number) if number else str(cause)
        if number in (errno.ECONNREFUSED, errno.EACCES) and uri.socket_path is not None:
            _check_socket(uri.socket_path)
        raise ConnectionLost(f"cannot connect: {reason}") from None


def _taken_from(stream: trio.SocketStream) -> socket.socket:
    """The raw socket of `stream`, tuned. Raises OSError, and leaves nothing open then."""
    sock = socket.socket(fileno=stream.socket.detach())
    try:
        sock.setblocking(False)
        _tune(sock)
    except BaseException:
        sock.close()
        raise
    return sock


def _check_socket(path: str) -> None:
    """What is not a socket refuses connections, too; to a user who may not write it, with EACCES.
    Raises ConfigError for it."""
    with contextlib.suppress(OSError):
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise ConfigError("not a socket: write ?socket=PATH with that of the NBD server")


def _tune(sock: socket.socket) -> None:
    """Buffers for a batch; on TCP no delays, and a peer that is gone is noticed."""
    for force, plain in (
        (_SO_SNDBUFFORCE, socket.SO_SNDBUF),
        (_SO_RCVBUFFORCE, socket.SO_RCVBUF),
    ):
        if sock.family != socket.AF_UNIX:
            break  # TCP tunes its own buffers, better than any fixed size.
        try:
            sock.setsockopt(socket.SOL_SOCKET, force, _SOCKET_BUFFER_BYTES)
        except PermissionError:
            sock.setsockopt(socket.SOL_SOCKET, plain, _SOCKET_BUFFER_BYTES)
    if sock.family in (socket.AF_INET, socket.AF_INET6):
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with contextlib.suppress(OSError):
            # As the system has it. Trio has 16 KiB, with which 1 MiB takes seven system calls.
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 0)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_IDLE_S // 2)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)


async def _shake_hands(
    sock: socket.socket, handshake: Handshake, context: ssl.SSLContext | None, name: str | None
) -> socket.socket:
    """Drive the handshake to its end; the socket, or the TLS socket over it."""
    try:
        while handshake.state is not State.DONE:
            await _send_all(sock, handshake.data_to_send())
            data = await _receive(sock)
            if not data:
                raise handshake.receive_eof()
            try:
                handshake.receive(data)
            except BridgeError:
                await _say_goodbye(sock, handshake)
                raise
            if handshake.refused is not None:
                # It may have taken the whole limit to say no, and the reason is still to come.
                with trio.move_on_after(_REASON_S, shield=True):
                    await _hear_reason(sock, handshake)
                raise handshake.refused
            if handshake.state is State.WANTS_TLS:
                assert context is not None
                sock = await tls.start_tls(sock, context, server_name=name, server_side=False)
                handshake.tls_started()
        await _send_all(sock, handshake.data_to_send())
        return sock
    except OSError as error:
        sock.close()
        if handshake.refused is not None:
            raise handshake.refused from None
        if isinstance(error, ssl.SSLEOFError):
            raise handshake.receive_eof() from None
        raise ConnectionLost(
            f"connection lost while waiting for {handshake.waits_for}: {error.strerror or error}"
        ) from None
    except BaseException:
        sock.close()
        raise


async def _hear_reason(sock: socket.socket, handshake: Handshake) -> None:
    """Raises the refusal with what the server adds to it; returns where it adds nothing."""
    while True:
        await _send_all(sock, handshake.data_to_send())
        data = await _receive(sock)
        if not data:
            return
        try:
            handshake.receive(data)
        except BridgeError:
            await _say_goodbye(sock, handshake)
            raise


async def _say_goodbye(sock: socket.socket, handshake: Handshake) -> None:
    """Leave the option phase with ABORT, if the socket takes it at once."""
    with trio.CancelScope(shield=True), trio.move_on_after(1):
        try:
            await _send_all(sock, handshake.data_to_send())
        except OSError:
            return


async def _send_all(sock: socket.socket, data: bytes) -> None:
    while data:
        try:
            data = data[sock.send(data) :]
        except (BlockingIOError, ssl.SSLWantWriteError):
            await trio.lowlevel.wait_writable(sock)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(sock)


async def _receive(sock: socket.socket) -> bytes:
    while True:
        try:
            return sock.recv(65536)
        except (BlockingIOError, ssl.SSLWantReadError):
            await trio.lowlevel.wait_readable(sock)
        except ssl.SSLWantWriteError:
            await trio.lowlevel.wait_writable(sock)
        except ssl.SSLError as error:
            # With TLS 1.3 a server refuses our certificate after our handshake is over.
            raise tls.explain(error, None) from None


async def leave(negotiated: Negotiated) -> None:
    """Say goodbye on a connection that never entered the loop, and close it."""
    try:
        if negotiated.handshake.in_transmission:
            farewell = Transmission(negotiated.export, Turn())
            farewell.disconnect()
            with trio.move_on_after(1):
                with contextlib.suppress(OSError):
                    await _send_all(negotiated.sock, b"".join(farewell.output))
            farewell.retire()
    finally:
        negotiated.close()

"""A small NBD server under trio: the demo's where nbdkit is missing, and the tests' hostile one.

One task per connection; commands are executed one after the other, in the order they came, and
everything that one receive brought is answered in one send. Good enough for a demo and a test,
not meant to be fast.

**Faults** are a feature: `Faults` says what goes wrong, may be changed while the server runs, and
counts bytes and replies over a connection's life, so that a test can cut at an exact byte.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import structlog
import trio

from bridge.errors import BridgeError, ConfigError, ProtocolError
from bridge.peers.nbd_server_core import ServerCore, ServerState
from bridge.peers.nbd_server_disk import ServerDisk
from bridge.peers.nbd_server_rules import Command
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.tls import start_tls
from bridge.spec import nbd as p

_log = structlog.get_logger(__name__)
_RECEIVE_BYTES = 256 << 10


@dataclass(slots=True)
class Faults:
    """What goes wrong. Numbers count from 0, per connection."""

    cut_at_byte: int | None = None
    """Send this many bytes, then close the connection."""
    cut_after_commands: int | None = None
    """Execute this many commands, then close without answering the last batch."""
    garble_byte: int | None = None
    """Invert this byte of the output."""
    stall: bool = False
    """Take commands, execute them, answer nothing."""
    wrong_cookie_at: int | None = None
    """Answer this command under another cookie."""
    oversize_at: int | None = None
    """Answer this READ with more bytes than it asked for."""
    reorder: Random | None = None
    """Answer the commands of a batch in an order drawn from this."""
    errors: dict[int, int] = field(default_factory=dict)
    """Command type → errno: fail these commands (without executing them)."""
    shutting_down: bool = False
    """Refuse every command with ESHUTDOWN."""
    delay_s: float = 0.0
    """Wait this long before answering a batch."""
    leave_writes_behind: bool = False
    """Do not execute changes now; `Server.execute_left_behind` does (a stale write)."""
    hangs_up_on: int | None = None
    """Command type: answer what came before such a command, then close the connection."""
    hangs_up_after: Iterator[int] = field(default_factory=lambda: iter(()))
    """How many commands to answer on the next connection, on the one after it, and so on: then it
    is closed. At the end: no more."""
    refuse_connections: bool = False
    """Close every new connection at once."""


class Server:
    """Serves `exports` (name → disk) until cancelled. Settings apply to new connections."""

    def __init__(
        self,
        exports: Mapping[str, ServerDisk],
        settings: ServerSettings | None = None,
        *,
        faults: Faults | None = None,
        tls_context: ssl.SSLContext | None = None,
    ) -> None:
        self.exports = exports
        self.settings = settings or ServerSettings()
        self.faults = faults or Faults()
        self.connections_total = 0
        self.commands: list[Command] | None = None
        """Set to a list to record every command."""
        self._tls_context = tls_context
        self.sent_bytes = 0
        """Sent on the newest connection."""
        self._sockets: set[socket.socket] = set()
        self._left_behind: list[tuple[ServerDisk, Command]] = []

    async def serve_unix(
        self, path: str | Path, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Listen on a unix socket; the file is removed at the end. Raises ConfigError."""
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            _bind(listener, str(path))
            await self._accept(listener, task_status.started)
        finally:
            listener.close()
            _unlink(path)

    async def serve_tcp(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        task_status: trio.TaskStatus[int] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Listen on TCP; the task's status is the port. Raises ConfigError."""
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(listener, (host, port))
            chosen = listener.getsockname()[1]
            await self._accept(listener, lambda: task_status.started(chosen))

    def cut(self) -> None:
        """Break every connection now."""
        for sock in list(self._sockets):
            # shutdown wakes the connection's task, which closes the socket.
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue

    def crash(self) -> None:
        """Lose power: every connection breaks, and unflushed writes are gone."""
        self.cut()
        for disk in self.exports.values():
            disk.crash()

    def execute_left_behind(self) -> None:
        """Execute the changes that were left behind, as a stalled server does when it wakes."""
        left, self._left_behind = self._left_behind, []
        for disk, command in left:
            _execute_change(disk, command)

    async def _accept(self, listener: socket.socket, started: Callable[[], None]) -> None:
        listener.setblocking(False)
        listener.listen(64)
        async with trio.open_nursery() as nursery:
            started()
            while True:
                await trio.lowlevel.wait_readable(listener)
                try:
                    sock, _ = listener.accept()
                except BlockingIOError:
                    continue
                if self.faults.refuse_connections:
                    sock.close()
                    continue
                sock.setblocking(False)
                nursery.start_soon(self._connection, sock)

    async def _connection(self, sock: socket.socket) -> None:
        self.connections_total += 1
        self._sockets.add(sock)
        connection = _Connection(sock, self)
        try:
            await connection.serve()
        except (BridgeError, OSError) as error:
            _log.debug("connection ended", reason=str(error))
        finally:
            self._sockets.discard(sock)
            connection.sock.close()


class _Connection:
    """One connection of a server."""

    def __init__(self, sock: socket.socket, server: Server) -> None:
        self.sock = sock
        self._server = server
        self._core = ServerCore(server.exports, server.settings)
        self._sent_bytes = 0
        self._answered = 0
        self._answers_at_most = next(server.faults.hangs_up_after, None)
        self._hangs_up = False

    async def serve(self) -> None:
        await self._send()
        while self._core.state is not ServerState.CLOSED:
            data = await self._receive()
            if not data:
                return
            commands = self._core.receive(data)
            if self._core.state is ServerState.WANTS_TLS:
                await self._send()
                await self._start_tls()
                continue
            if self._server.faults.delay_s:
                await trio.sleep(self._server.faults.delay_s)
            if not self._answer(commands):
                return
            await self._send()
            if self._hangs_up:
                return

    async def _start_tls(self) -> None:
        context = self._server._tls_context
        if context is None:
            raise ProtocolError("the server has no certificate")
        self._server._sockets.discard(self.sock)
        self.sock = await start_tls(self.sock, context, server_name=None, server_side=True)
        self._server._sockets.add(self.sock)
        self._core.tls_started()

    def _answer(self, commands: list[Command]) -> bool:
        """Execute and answer commands; False if the connection is to be cut."""
        faults = self._server.faults
        if faults.reorder is not None:
            faults.reorder.shuffle(commands)
        for command in commands:
            if self._server.commands is not None:
                self._server.commands.append(command)
            if command.kind == faults.hangs_up_on or self._answered == self._answers_at_most:
                self._hangs_up = True
                return True
            number = self._answered
            self._answered += 1
            if faults.stall:
                self._execute(command, answer=False)
                continue
            if number == faults.wrong_cookie_at:
                command.cookie ^= 1 << 40
            if number == faults.oversize_at and command.kind == p.CMD_READ:
                command.length += 512
            self._execute(command)
            if (
                faults.cut_after_commands is not None
                and self._answered >= faults.cut_after_commands
            ):
                return False
        return True

    def _execute(self, command: Command, *, answer: bool = True) -> None:
        faults = self._server.faults
        core = self._core
        disk = core.disk
        assert disk is not None
        error = command.error or faults.errors.get(command.kind, 0)
        if faults.shutting_down:
            error = errno.ESHUTDOWN
        data: bytes | memoryview = b""
        extents: list[tuple[int, int]] = []
        if not error:
            try:
                if command.kind == p.CMD_READ:
                    data = disk.read(command.offset, command.length)
                elif command.kind == p.CMD_BLOCK_STATUS:
                    extents = disk.extents(command.offset, command.length)
                elif faults.leave_writes_behind and command.kind != p.CMD_FLUSH:
                    self._server._left_behind.append((disk, command))
                else:
                    _execute_change(disk, command)
            except OSError as caught:
                error = caught.errno or errno.EIO
        if not answer:
            return
        if command.kind == p.CMD_BLOCK_STATUS and not error:
            core.reply_extents(command, extents)
        else:
            core.reply(command, error, data)

    async def _send(self) -> None:
        data = self._core.data_to_send()
        faults = self._server.faults
        start = self._sent_bytes
        self._sent_bytes += len(data)
        self._server.sent_bytes = self._sent_bytes
        if faults.garble_byte is not None and start <= faults.garble_byte < self._sent_bytes:
            index = faults.garble_byte - start
            data = data[:index] + bytes([data[index] ^ 0xFF]) + data[index + 1 :]
        cut = faults.cut_at_byte is not None and self._sent_bytes > faults.cut_at_byte
        if cut:
            assert faults.cut_at_byte is not None
            data = data[: max(0, faults.cut_at_byte - start)]
        await self._send_all(data)
        if cut:
            raise ProtocolError("cut by a fault")

    async def _send_all(self, data: bytes) -> None:
        view = memoryview(data)
        while len(view):
            try:
                view = view[self.sock.send(view) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                await trio.lowlevel.wait_writable(self.sock)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.sock)

    async def _receive(self) -> bytes:
        while True:
            try:
                return self.sock.recv(_RECEIVE_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                await trio.lowlevel.wait_readable(self.sock)
            except ssl.SSLWantWriteError:
                await trio.lowlevel.wait_writable(self.sock)


def _execute_change(disk: ServerDisk, command: Command) -> None:
    kind = command.kind
    if kind == p.CMD_WRITE:
        disk.write(command.offset, command.payload)
    elif kind == p.CMD_WRITE_ZEROES:
        may_unmap = not command.flags & p.CMD_FLAG_NO_HOLE
        disk.zero(command.offset, command.length, may_unmap=may_unmap)
    elif kind == p.CMD_TRIM:
        disk.zero(command.offset, command.length, may_unmap=True)
    if kind == p.CMD_FLUSH or command.flags & p.CMD_FLAG_FUA:
        disk.flush()


def _unlink(path: str | Path) -> None:
    Path(path).unlink(missing_ok=True)


def _bind(listener: socket.socket, address: str | tuple[str, int]) -> None:
    try:
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {os.strerror(error.errno or 0)}") from None

"""The storage side: an NBD server process over a `Medium`, ours or a foreign one.

Both speak NBD through `bridge.peers.nbd_server_core`. *Foreign* is as bad as NBD allows: it
executes what is in flight in any order and replies in any order, a flush covers only what was
answered when it came, and what a lost connection left behind may be executed much later. *Plugin*
is nbdkit with `nbd_plugin`: the service, the sessions, their fence and the generations are the real
ones, over a store of `tests.sim.volume`.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator, Mapping
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from bridge.errors import ProtocolError
from bridge.peers.nbd_server_core import ServerCore, ServerState
from bridge.peers.nbd_server_rules import Command
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.spec import nbd as p
from bridge.spec.nbd import TransmissionFlags as F
from nbd_plugin.errors import PluginError
from nbd_plugin.service import Service
from nbd_plugin.session import Handle
from nbd_plugin.settings import Settings
from tests.sim.bridge import Bridge
from tests.sim.medium import SECTOR, Content, numbers_of, sector_bytes
from tests.sim.volume import Waits, seam

if TYPE_CHECKING:
    from tests.sim.network import SimSocket
    from tests.sim.world import World

_CHANGES = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)
_OPTION_HEADER = struct.Struct(">QII")
_LEFT_BEHIND_S = 3.0
"""A foreign server executes a dead connection's write no later: below the grace time."""


class NbdServer:
    """One server process."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.alive = True
        self.peers: list[ServerPeer] = []
        self.is_plugin = world.config.plugin
        self.service: Service | None = None
        self._blocked: list[ServerPeer] = []
        if self.is_plugin:
            with seam(self):
                self.service = Service(
                    Settings(store="memory", fence_timeout="10"),
                    is_filtered=world.config.filtered,
                )
                self.service.start()

    def accept(self, sock: SimSocket) -> ServerPeer:
        """See `Network.accept`."""
        peer = ServerPeer(self, sock)
        self.peers.append(peer)
        return peer

    def die(self) -> None:
        """kill -9."""
        self.alive = False
        for peer in list(self.peers):
            peer.die()
        self.peers.clear()

    def write_elsewhere(self, first: int, numbers: list[int]) -> bool:
        """A client of another host writes these sectors, and goes. False if it is not let in."""
        assert self.service is not None
        data = b"".join(map(sector_bytes, numbers))
        with seam(self):
            try:
                handle = self.service.open("vm@session=other,client=other", read_only=False)
            except (PluginError, Waits):
                return False
            assert handle.session is not None
            handle.session.note_write(handle)
            handle.disk.pwrite(memoryview(data), first * SECTOR, True)
            self.service.close(handle)
        self.changed()
        return True

    def forget_the_dead(self) -> None:
        """What processes that are gone have left here is not executed any more."""
        for peer in list(self.peers):
            if isinstance(peer.sock.owner, Bridge) and peer.sock.owner.gone.is_set():
                peer.forget()

    def in_flight(self) -> Iterator[tuple[int, int]]:
        """Sector and number of each write that was received and not executed."""
        for peer in self.peers:
            yield from peer.unexecuted()

    # A plugin's `open` that has to wait for the fence.

    def block(self, peer: ServerPeer, for_s: float) -> None:
        """`peer` goes on when a session ends, or after `for_s`."""
        self._blocked.append(peer)
        self.world.timeline.after(for_s, lambda: self.changed(peer))

    def changed(self, only: ServerPeer | None = None) -> None:
        """What peers wait for may have come."""
        for peer in [each for each in self._blocked if only is None or each is only]:
            if peer in self._blocked:
                self._blocked.remove(peer)
                peer.go_on()


class _Exports(Mapping[str, Any]):
    """What a peer's `ServerCore` asks for its exports: any name is the volume."""

    def __init__(self, peer: ServerPeer) -> None:
        self._peer = peer

    def __getitem__(self, name: str) -> Any:
        return self._peer.opened(name)

    def get(self, name: str, default: Any = None) -> Any:
        return self._peer.opened(name)

    def __iter__(self) -> Iterator[str]:
        return iter(("vm",))

    def __len__(self) -> int:
        return 1


class _Disk:
    """The disk that a core wants: it only asks for the size."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes


class ServerPeer:
    """One connection at the server."""

    def __init__(self, server: NbdServer, sock: SimSocket) -> None:
        self.server = server
        self.world = server.world
        self.sock = sock
        self.handle: Handle | None = None
        self._alive = True
        """The process is, and the connection has not been closed by it."""
        self._connected = True
        self._given_up = False
        self._forgets = False
        self._running: list[_Running] = []
        self._options = bytearray()
        self._in_options = True
        self._greeted = False
        self._open_until_s = 0.0
        self.expired = False
        config = self.world.config
        self.settings = ServerSettings(
            flags=config.flags,
            structured=config.structured,
            extended=config.extended,
            block_sizes=(config.min_block, max(4096, config.min_block), 1 << 20),
        )
        self.core = ServerCore(_Exports(self), self.settings)
        self._send()

    # Bytes in.

    def receive(self, data: bytes) -> None:
        """See `network.Peer`."""
        if not self._alive:
            return
        if self._in_options and self.server.is_plugin:
            self._options += data
            self.go_on()
        else:
            self._feed(data)

    def go_on(self) -> None:
        """Pass on whole options; one that opens the volume is held until the fence lets it in."""
        buffer = self._options
        while self._alive and self._in_options and self._connected:
            if not self._greeted:
                if len(buffer) < 4:
                    return
                self._greeted = True
                size = 4
            else:
                if len(buffer) < 16:
                    return
                _, option, length = _OPTION_HEADER.unpack_from(buffer)
                size = 16 + length
                if len(buffer) < size:
                    return
                if option in (p.OPT_GO, p.OPT_INFO) and not self._try_to_open(
                    bytes(buffer[16:size])
                ):
                    return
            piece = bytes(buffer[:size])
            del buffer[:size]
            self._feed(piece)
            self._in_options = self.core.state is ServerState.OPTIONS
        if self._alive and self._connected and buffer:
            rest = bytes(buffer)
            buffer.clear()
            self._feed(rest)

    def _try_to_open(self, data: bytes) -> bool:
        """The plugin's `open`; False while it waits."""
        name = data[4 : 4 + int.from_bytes(data[:4], "big")].decode()
        now = trio.current_time()
        self._close_handle()
        if not self._open_until_s:
            self._open_until_s = now + 10
        # A difference of times may round to less: the moment would come again and again.
        self.expired = now >= self._open_until_s - 1e-6
        service = self.server.service
        assert service is not None
        try:
            with seam(self.server, expired=self.expired):
                read_only = bool(self.world.config.flags & F.READ_ONLY)
                self.handle = service.open(name, read_only=read_only)
        except Waits as wait:
            self.server.block(self, min(wait.seconds, max(0.0, self._open_until_s - now)))
            return False
        except PluginError as error:
            self.world.note("server refuses", reason=str(error))
            self.handle = None
        self._open_until_s = 0.0
        return True

    def opened(self, name: str) -> Any:
        """What the core finds under `name`; None: nothing."""
        if not self.server.is_plugin:
            return _Disk(self.world.medium.sectors * SECTOR)
        if self.handle is None:
            return None
        service = self.server.service
        assert service is not None
        with seam(self.server):
            self.settings.description = service.describe(self.handle)
        flags = self.world.config.flags & ~F.CAN_MULTI_CONN
        if self.handle.multi_conn:
            flags |= F.CAN_MULTI_CONN
        self.settings.flags = flags
        return _Disk(self.handle.disk.size_bytes)

    def _feed(self, data: bytes) -> None:
        try:
            commands = self.core.receive(data)
        except ProtocolError as error:
            raise AssertionError(f"the client broke the protocol: {error}") from error
        self._send()
        for command in commands:
            if self._connected:
                self._start(command)
        if self.core.state is ServerState.CLOSED:
            self._close()

    def _send(self) -> None:
        data = self.core.data_to_send()
        if data and self._connected:
            self.sock.deliver(data)

    # The end.

    def hung_up(self) -> None:
        """See `network.Peer`."""
        if self._alive and self._connected:
            self._connected = False
            if not (self.server.is_plugin or self._given_up):
                self._leave_behind(self.world.rng)
            self._take_long()
            self._end_if_idle()

    def given_up(self) -> None:
        """See `network.Peer`. The grace time of what is in flight begins."""
        if not self.server.is_plugin:
            self._given_up = True
            self._leave_behind(self.world.own_rng)

    def _close(self) -> None:
        """Close our end."""
        if self._connected:
            self._connected = False
            self.sock.end()
            self._take_long()
        self._end_if_idle()

    def hang_up(self) -> None:
        """The server closes the connection for a reason of its own."""
        self._close()

    def forget(self) -> None:
        """No change that has come here, or comes, is executed."""
        self._forgets = True
        for running in self._running:
            if not running.executed and running.command.kind in _CHANGES:
                running.cancelled = True
        self._running = [each for each in self._running if not each.cancelled]
        self._end_if_idle()

    def _leave_behind(self, rng: Random) -> None:
        """A foreign server may forget what a lost connection has in flight, or do it later."""
        for running in self._running:
            if not running.executed and running.command.kind in _CHANGES:
                if rng.random() < 0.5:
                    running.cancelled = True
                else:
                    self.world.count("left behind")
                    running.due_s = trio.current_time() + rng.random() * _LEFT_BEHIND_S
                    self.world.timeline.at(running.due_s, running.execute_late)
        self._running = [each for each in self._running if not each.cancelled]

    @property
    def is_heard(self) -> bool:
        """The client has not left the connection yet, as far as the line tells."""
        return self._connected and not self.sock.closed

    @property
    def may_take_long(self) -> bool:
        """Nothing promises anything of a foreign server that executes what a lost connection has
        left there later than the grace time."""
        return (self._connected and not self._given_up) or self.server.is_plugin

    def _take_long(self) -> None:
        """The storage behind nbdkit is slow with what a lost connection has in flight. In a session
        that others are in, or join, nothing waits for that but the next writer."""
        if not self.world.config.migrates:
            return
        rng = self.world.own_rng
        for running in self._running:
            if not running.executed and running.command.kind in _CHANGES and rng.random() < 0.7:
                self.world.count("left behind in a shared session")
                running.due_s = trio.current_time() + rng.random() * _LEFT_BEHIND_S
                self.world.timeline.at(running.due_s, running._execute)

    def _end_if_idle(self) -> None:
        if not self._connected and not self._running and self in self.server.peers:
            self.server.peers.remove(self)
            self._alive = False
            self._close_handle()

    def _close_handle(self) -> None:
        handle, self.handle = self.handle, None
        if handle is not None and self.server.alive:
            service = self.server.service
            assert service is not None
            with seam(self.server):
                service.close(handle)
            self.server.changed()

    def die(self) -> None:
        """With the process."""
        self._alive = False
        for running in self._running:
            running.cancelled = True
        self._running.clear()
        if self._connected:
            self._connected = False
            self.sock.peer = None
            if self.world.rng.random() < 0.5:
                self.sock.end()
            else:
                self.sock.reset()

    # Commands.

    def _start(self, command: Command) -> None:
        if command.error:
            raise AssertionError(
                f"the client sent what must not be sent: command {command.kind} at "
                f"{command.offset}, {command.length}: {errno.errorcode[command.error]}"
            )
        if command.kind in _CHANGES and isinstance(self.sock.owner, Bridge):
            self.world.change_comes(self.sock.owner)
        if self._forgets and command.kind in _CHANGES:
            return
        faults = self.world.faults
        if faults.hangs_up_on == command.kind:
            self.world.count("hung up on")
            self._close()
            return
        running = _Running(self, command)
        self._running.append(running)
        running.begin()

    def finished(self, running: _Running, error: int, data: bytes) -> None:
        """The reply goes out."""
        if running in self._running:
            self._running.remove(running)
        if self._connected and self._alive:
            self.core.reply(running.command, error, data)
            self._send()
        self._end_if_idle()

    def unexecuted(self) -> Iterator[tuple[int, int]]:
        for running in self._running:
            command = running.command
            if not running.executed and command.kind in _CHANGES:
                first = command.offset // SECTOR
                count = command.length // SECTOR
                numbers = numbers_of(command.payload) if command.payload else [0] * count
                yield from enumerate(numbers, first)


class _Running:
    """One command between its arrival and its reply."""

    def __init__(self, peer: ServerPeer, command: Command) -> None:
        self.peer = peer
        self.world = peer.world
        self.command = command
        self.executed = False
        self.cancelled = False
        self.due_s = 0.0
        self.error = 0
        self._data = b""
        self._made: list[Content] = []
        self._covered: list[tuple[int, Content]] | None = None

    def begin(self) -> None:
        """It has arrived."""
        world = self.world
        if self.command.kind == p.CMD_FLUSH and not self.peer.server.is_plugin:
            self._covered = world.medium.begin_flush(answered_only=True)
        handle = self.peer.handle
        if handle is not None:
            # As nbd_plugin/plugin.py does.
            handle.busy.append(None)
            if handle.revoked:
                self.error = errno.ESHUTDOWN
        self.due_s = trio.current_time() + world.service_s()
        world.timeline.at(self.due_s, self._execute)

    def execute_late(self) -> None:
        """The connection is gone."""
        if not self.cancelled:
            self._do()
            self._end()

    def _execute(self) -> None:
        if self.cancelled or self.executed or trio.current_time() < self.due_s:
            return
        if self.world.faults.stalls and self.peer.may_take_long:
            self.due_s = trio.current_time() + 0.5
            self.world.timeline.at(self.due_s, self._execute)
            return
        if self._do():
            self.world.timeline.after(self.world.reply_s(), self._end)

    def _end(self) -> None:
        if self.cancelled:
            return
        if not self.error:
            for content in self._made:
                content.answered = True
        self.peer.finished(self, self.error, self._data)

    def _do(self) -> bool:
        """Execute it; False if it waits for others."""
        handle = self.peer.handle
        try:
            if not self.error:
                self._perform(handle)
        except Waits as wait:
            # Of the plugin's `note_write`: nothing is done yet.
            self.due_s = trio.current_time() + wait.seconds
            self.world.timeline.at(self.due_s, self._execute)
            return False
        except PluginError as error:
            self.error = error.errno or errno.EIO
        except OSError as error:
            self.error = error.errno or errno.EIO
        self.executed = True
        if handle is not None:
            handle.busy.pop()
            self.peer.server.changed()
        return True

    def __repr__(self) -> str:
        command = self.command
        name = {
            p.CMD_READ: "read",
            p.CMD_WRITE: "write",
            p.CMD_FLUSH: "flush",
            p.CMD_TRIM: "trim",
            p.CMD_WRITE_ZEROES: "zero",
        }[command.kind]
        if command.kind == p.CMD_FLUSH:
            return name
        first, count = command.offset // SECTOR, command.length // SECTOR
        what = f"{name} {first}+{count}"
        if command.kind == p.CMD_WRITE:
            what += " = " + ",".join(map(str, dict.fromkeys(self._numbers(count))))
        return what + " with FUA" * bool(command.flags & p.CMD_FLAG_FUA)

    def _perform(self, handle: Handle | None) -> None:
        command, medium, world = self.command, self.world.medium, self.world
        first, count = command.offset // SECTOR, command.length // SECTOR
        fua = bool(command.flags & p.CMD_FLAG_FUA) or not world.config.flushes
        if handle is not None and command.kind in _CHANGES:
            self._enter_as_writer(handle)
        world.note("server executes", command=self)
        if command.kind in _CHANGES:
            world.check_space(command.kind)
        if handle is not None:
            self._perform_ours(handle, fua)
        elif command.kind == p.CMD_READ:
            self._data = medium.read(first, count)
        elif command.kind in _CHANGES:
            if fua and world.fsync_fails():
                medium.write(first, self._numbers(count), fua=False)
                world.fsync_failed(heard=self.peer.is_heard)
                raise OSError(errno.EIO, "flush failed")
            if command.kind != p.CMD_TRIM or world.rng.random() < 0.7:
                self._made = medium.write(first, self._numbers(count), fua=fua)
        elif command.kind == p.CMD_FLUSH:
            if world.fsync_fails():
                world.fsync_failed(heard=self.peer.is_heard)
                raise OSError(errno.EIO, "flush failed")
            assert self._covered is not None
            medium.end_flush(self._covered)

    def _numbers(self, count: int) -> list[int]:
        payload = self.command.payload
        return numbers_of(payload) if payload else [0] * count

    def _enter_as_writer(self, handle: Handle) -> None:
        """As nbd_plugin/plugin.py does. Raises Waits."""
        handle.check_alive()
        session = handle.session
        if session is None:
            raise PluginError("this export is read-only", errno.EROFS)
        if session.writer != handle.client:
            with seam(self.peer.server):
                session.note_write(handle)

    def _perform_ours(self, handle: Handle, fua: bool) -> None:
        """As nbd_plugin/plugin.py does."""
        command, disk = self.command, handle.disk
        handle.check_alive()
        with seam(self.peer.server):
            if command.kind == p.CMD_READ:
                room = bytearray(command.length)
                disk.pread(memoryview(room), command.offset)
                self._data = bytes(room)
            elif command.kind == p.CMD_WRITE:
                disk.pwrite(memoryview(command.payload), command.offset, fua)
            elif command.kind == p.CMD_TRIM:
                disk.trim(command.offset, command.length, fua)
            elif command.kind == p.CMD_WRITE_ZEROES:
                disk.zero(command.offset, command.length, may_trim=True, fua=fua, fast=False)
            elif command.kind == p.CMD_FLUSH:
                disk.flush()

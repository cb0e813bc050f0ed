"""A TCP proxy in front of an NBD server that cuts, swallows and refuses connections."""

from __future__ import annotations

import socket
import struct
from pathlib import Path
from random import Random

import trio

_LARGEST_PIECE_BYTES = 65536
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER with no time: closing resets the connection, whatever is still under way."""


class Proxy:
    """Hands everything on between a TCP port of the loopback interface and a unix socket."""

    def __init__(self, target: Path, rng: Random) -> None:
        self._target = target
        self._rng = rng
        self._pairs: set[tuple[trio.SocketStream, trio.SocketStream]] = set()
        self._flows = trio.Event()
        self._flows.set()
        self.refuses = False
        self.port = 0
        self.cuts = 0
        self.from_server_bytes = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled; `port` is known once started."""
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, [listener])

    def cut(self) -> None:
        """Reset every connection, in the middle of whatever is under way."""
        self.cuts += 1
        for pair in self._pairs:
            for stream in pair:
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                stream.socket.close()
        self._pairs.clear()

    def swallow(self) -> None:
        """From now on nothing comes out on either side, and no connection ends."""
        if self._flows.is_set():
            self._flows = trio.Event()

    def flow(self) -> None:
        """What was kept back goes on, and all that comes."""
        self._flows.set()

    async def _serve(self, client: trio.SocketStream) -> None:
        if self.refuses:
            await trio.aclose_forcefully(client)
            return
        try:
            server = trio.SocketStream(await self._connect())
        except OSError:
            await trio.aclose_forcefully(client)
            return
        pair = (client, server)
        self._pairs.add(pair)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._pass, client, server, nursery.cancel_scope)
                nursery.start_soon(self._pass, server, client, nursery.cancel_scope)
        finally:
            self._pairs.discard(pair)
            for stream in pair:
                await trio.aclose_forcefully(stream)

    async def _connect(self) -> trio.socket.SocketType:
        sock = trio.socket.socket(trio.socket.AF_UNIX)
        try:
            await sock.connect(str(self._target))
        except BaseException:
            sock.close()
            raise
        return sock

    async def _pass(
        self, source: trio.SocketStream, sink: trio.SocketStream, scope: trio.CancelScope
    ) -> None:
        """Pieces of any size, so that a cut leaves half a frame."""
        try:
            while data := await source.receive_some(self._rng.randint(1, _LARGEST_PIECE_BYTES)):
                await self._flows.wait()
                if source.socket.family == trio.socket.AF_UNIX:
                    self.from_server_bytes += len(data)
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            pass
        scope.cancel()

"""What the tests of the NBD client share: a client over a loop, requests that can be awaited."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator, Callable

import trio

from bridge.datapath.loop import Loop
from bridge.datapath.request import BLOCK_STATUS, READ, WRITE, Request
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.chunks import StatusRequest
from bridge.server.client import Client
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.uri import parse_uri
from tests.processes import short_directory, unix_uri
from tests.tools import HUNG_S

FAST = ClientOptions(reconnect_first_s=0.01, reconnect_max_s=0.05, close_timeout_s=2.0)


class LayerAbove:
    """What stands above a client or a link, and does what a test wants of it."""

    def __init__(
        self,
        *,
        reconnected: Callable[[], object] = lambda: None,
        export_changed: Callable[[Export], object] = lambda export: None,
    ) -> None:
        self._reconnected = reconnected
        self._export_changed = export_changed

    def reconnected(self) -> None:
        self._reconnected()

    def disconnected(self) -> None:
        pass

    def export_changed(self, export: Export) -> None:
        self._export_changed(export)

    async def examine(self, export: Export, submit: Callable[[Request], None]) -> str:
        return ""


@contextlib.asynccontextmanager
async def running_client(
    uri: str,
    options: ClientOptions = FAST,
    *,
    connect: bool = True,
    above: LayerAbove | None = None,
) -> AsyncIterator[Client]:
    """A client on a loop of its own, connected."""
    loop = Loop(poll_us=0)
    client = Client(parse_uri(uri), loop, options, above=above)
    try:
        async with trio.open_nursery() as nursery:
            if connect:
                await client.connect()
            nursery.start_soon(loop.run)
            nursery.start_soon(client.run)
            try:
                yield client
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(10):
                    await client.close()
                nursery.cancel_scope.cancel()
    finally:
        loop.close()


@contextlib.asynccontextmanager
async def served(
    size_bytes: int = 1 << 20,
    settings: ServerSettings | None = None,
    *,
    faults: Faults | None = None,
    options: ClientOptions = FAST,
    volatile: bool = False,
    above: LayerAbove | None = None,
) -> AsyncIterator[tuple[Client, Server, MemoryDisk]]:
    """Our server with one export in memory on a unix socket, and a client on it."""
    disk = MemoryDisk(size_bytes, volatile=volatile)
    server = Server({"": disk}, settings, faults=faults)
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            async with running_client(unix_uri(folder / "s"), options, above=above) as client:
                yield client, server, disk
            nursery.cancel_scope.cancel()


class Waiter:
    """A request that can be awaited."""

    def __init__(self, client: Client, request: Request) -> None:
        self.request = request
        self.finished = trio.Event()
        self.count = 0
        request.done = self._done
        client.submit(request)

    def _done(self, request: Request) -> None:
        self.count += 1
        self.finished.set()

    async def wait(self) -> int:
        """The request's errno."""
        with trio.fail_after(HUNG_S):
            await self.finished.wait()
        return self.request.error


def start(
    client: Client, op: int, offset: int, length: int, buffers: list[memoryview], flags: int = 0
) -> Waiter:
    kind = StatusRequest if op == BLOCK_STATUS else Request
    request = kind(op, offset, length, buffers, _ignore, flags)
    if isinstance(request, StatusRequest):
        request.extents = []
    return Waiter(client, request)


async def do(client: Client, op: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
    """A request without data; its errno."""
    return await start(client, op, offset, length, [], flags).wait()


async def read(client: Client, offset: int, length: int, pieces: int = 1) -> bytes:
    """Read into `pieces` buffers; fails the test on an error."""
    data = bytearray(b"\xee" * length)
    error = await start(client, READ, offset, length, cut(data, pieces)).wait()
    assert error == 0, os.strerror(error)
    return bytes(data)


async def write(client: Client, offset: int, data: bytes, flags: int = 0, pieces: int = 1) -> int:
    buffers = cut(bytearray(data), pieces)
    return await start(client, WRITE, offset, len(data), buffers, flags).wait()


async def status(client: Client, offset: int, length: int) -> list[tuple[int, int]]:
    waiter = start(client, BLOCK_STATUS, offset, length, [])
    error = await waiter.wait()
    assert error == 0, os.strerror(error)
    assert isinstance(waiter.request, StatusRequest)
    return waiter.request.extents


def cut(data: bytearray, pieces: int) -> list[memoryview]:
    """`data` as views of it; empty ones where there are more pieces than bytes."""
    view = memoryview(data)
    size = -(-len(view) // pieces) if view else 0
    return [view[i * size : (i + 1) * size] for i in range(pieces)] if size else [view]


def pattern(offset: int, length: int, seed: int = 0) -> bytes:
    """Bytes that tell where they belong."""
    words = range(offset // 8, (offset + length + 7) // 8 + 1)
    data = b"".join(
        (word * 0x9E3779B97F4A7C15 + seed & (1 << 64) - 1).to_bytes(8) for word in words
    )
    return data[offset % 8 : offset % 8 + length]


def _ignore(request: Request) -> None:
    """Replaced by Waiter."""

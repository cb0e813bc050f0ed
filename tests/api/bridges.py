"""A bridge in this process, with its control socket, over a server whose faults a test chooses."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from bridge.api.client import ask
from bridge.app.serve import serve_disk
from bridge.app.settings import (
    CacheSettings,
    ControlSettings,
    DiskSettings,
    LimitSettings,
    ServeSettings,
)
from bridge.cache.cache_options import OFF
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from tests.processes import unix_uri
from tests.tools import HUNG_S

SIZE_BYTES = 16 << 20


class Bridge:
    """A served disk: where a guest connects, and what it answers to an operator."""

    def __init__(self, directory: Path, server: Server) -> None:
        self.server = server
        self.vhost = directory / "vm0.sock"
        self.control = directory / "vm0.api"

    async def ask(self, method: str, target: str, body: dict[str, Any] | None = None) -> Any:
        """As the commands do."""
        call = partial(ask, self.control, method, target, body, timeout_s=HUNG_S)
        return await trio.to_thread.run_sync(call)

    async def status(self) -> Any:
        return await self.ask("GET", "/status")

    async def until(self, what: str, **wanted: Any) -> Any:
        """The status, once its part `what` has these values."""
        with trio.fail_after(HUNG_S):
            while True:
                found = await self.status()
                if all(found[what][key] == value for key, value in wanted.items()):
                    return found
                await trio.sleep(0.02)


@asynccontextmanager
async def served(
    directory: Path,
    *,
    cache: str = OFF,
    export: str = "",
    slow_s: float = 1.0,
    flush_interval_s: float = 60.0,
    server: Server | None = None,
    socket_group: str | None = None,
) -> AsyncIterator[Bridge]:
    """A bridge that serves, until the end of the block or until it was asked to stop."""
    server = server or Server({"": MemoryDisk(SIZE_BYTES)})
    bridge = Bridge(directory, server)
    settings = ServeSettings(
        disk=DiskSettings(socket_path=str(bridge.vhost), socket_group=socket_group),
        cache=CacheSettings(
            mode=cache,
            size_bytes=8 << 20,
            directory=str(directory),
            flush_interval_s=flush_interval_s,
        ),
        limits=LimitSettings(stop_timeout_s=2.0, drain_timeout_s=2.0),
        control=ControlSettings(socket=str(bridge.control), slow_ms=slow_s * 1000),
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, directory / "nbd")
        async with trio.open_nursery() as serving:
            serving.start_soon(serve_disk, unix_uri(directory / "nbd", export), settings)
            with trio.fail_after(HUNG_S):
                while not bridge.vhost.exists():
                    await trio.sleep(0.01)
            yield bridge
            if bridge.vhost.exists():
                signal.raise_signal(signal.SIGTERM)  # It serves in this process.
        nursery.cancel_scope.cancel()

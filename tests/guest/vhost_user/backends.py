"""A whole back-end in this process: real device, real socket, a disk in memory below."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio

from bridge.datapath.loop import Loop
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user.backend import serve
from bridge.guest.vhost_user.listener import Listener
from bridge.guest.virtio.blk_config import DiskGeometry
from bridge.peers.blk_driver import BlkDriver
from tests.guest.device_guest import StorageSide
from tests.guest.memory_target import MemoryTarget
from tests.tools import HUNG_S, until


@dataclass
class Running:
    """A back-end that runs."""

    path: Path
    device: BlkDevice
    target: MemoryTarget
    loop: Loop
    scope: trio.CancelScope
    connections: list[bool] = field(default_factory=list)


@asynccontextmanager
async def running_backend(
    directory: Path,
    *,
    size_bytes: int = 16 << 20,
    max_queues: int = 4,
    geometry: dict[str, Any] | None = None,
    make_device: Callable[..., BlkDevice] = BlkDevice,
    **options: Any,
) -> AsyncIterator[Running]:
    """A back-end that listens at `directory`/disk.sock until the block ends."""
    loop = Loop(poll_us=0)
    target = MemoryTarget(loop.turn, size_bytes)
    device = make_device(
        loop,
        target,
        DiskGeometry(**{"size_bytes": size_bytes, **(geometry or {})}),
        serial="test-disk",
        max_queues=max_queues,
        above=StorageSide(on_abandoned=target.abandoned),
        **options,
    )
    path = directory / "disk.sock"
    try:
        with Listener.at_path(path) as listener:
            async with trio.open_nursery() as nursery:
                running = Running(path, device, target, loop, trio.CancelScope())

                async def serving() -> None:
                    with running.scope:
                        await serve(device, listener, on_connected=running.connections.append)

                nursery.start_soon(loop.run)
                nursery.start_soon(device.run)
                nursery.start_soon(serving)
                with trio.fail_after(HUNG_S):
                    yield running
                running.scope.cancel()
                await until(lambda: not running.connections or not running.connections[-1])
                nursery.cancel_scope.cancel()
    finally:
        loop.close()


@asynccontextmanager
async def guest_on(directory: Path, **options: Any) -> AsyncIterator[tuple[Running, BlkDriver]]:
    """A back-end and a guest that is connected to it with `options`."""
    async with (
        running_backend(directory) as backend,
        await BlkDriver.connect(backend.path, **options) as guest,
    ):
        yield backend, guest

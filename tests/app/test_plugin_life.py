"""A bridge on our plugin, as processes: what others do to the volume, readers, and a server that
is told to stop while the bridge is idle."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from bridge.errors import RequestError
from bridge.peers.blk_driver import BlkDriver
from tests.app.test_cache import cached, directory, nbdkit
from tests.plugin.test_outside_changes import wait_for_another_tick
from tests.processes import process, serving, unix_uri, wait_for
from tests.tools import HUNG_S

__all__ = ["directory"]

OLD, NEW = b"o" * 4096, b"n" * 4096


async def write_and_read(vhost: Path) -> None:
    async with await BlkDriver.connect(vhost) as guest:
        await guest.write(0, OLD)
        await guest.flush()
        assert await guest.read(0, 4096) == OLD


def edit(image: Path) -> None:
    with open(image, "r+b") as file:
        file.write(NEW)


@pytest.mark.parametrize("kill", [True, False])
async def test_image_edited_while_nbdkit_was_stopped_guest_reads_the_edit(
    directory: Path, kill: bool
) -> None:
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with process(nbdkit(directory), ready=nbd) as server:
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            await write_and_read(vhost)
        if kill:
            server.kill()
    edit(directory / "disk.img")
    async with (
        process(nbdkit(directory), ready=nbd),
        serving(unix_uri(nbd), vhost, *cached(directory)),
        await BlkDriver.connect(vhost) as guest,
    ):
        assert await guest.read(0, 4096) == NEW


async def test_image_edited_under_a_running_bridge_while_nbdkit_was_dead_guest_reads_it(
    directory: Path,
) -> None:
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with AsyncExitStack() as servers:
        server = await servers.enter_async_context(process(nbdkit(directory), ready=nbd))
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            await write_and_read(vhost)
            server.kill()
            await wait_for(server, limit_s=HUNG_S)
            wait_for_another_tick()
            edit(directory / "disk.img")
            await servers.enter_async_context(process(nbdkit(directory), ready=nbd))
            async with await BlkDriver.connect(vhost) as guest:
                with trio.fail_after(HUNG_S):
                    # A hit of before the reconnect may still be served.
                    while await guest.read(0, 4096) != NEW:
                        await trio.sleep(0.02)


async def test_nbdkit_ends_at_sigterm_while_an_idle_bridge_is_connected(directory: Path) -> None:
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with AsyncExitStack() as servers:
        server = await servers.enter_async_context(process(nbdkit(directory), ready=nbd))
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            await write_and_read(vhost)
            server.send_signal(signal.SIGTERM)
            assert await wait_for(server, limit_s=HUNG_S) == 0
            await servers.enter_async_context(process(nbdkit(directory), ready=nbd))
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(4096, NEW)
                await guest.flush()
    assert (directory / "disk.img").read_bytes()[:8192] == OLD + NEW


@pytest.mark.parametrize("mode", ["off", "writeback"])
async def test_filter_that_loses_data_with_nbdkit_no_flush_vouches_for_it(
    directory: Path, mode: str
) -> None:
    """nbdkit's cache filter has acknowledged the write and holds it in its memory."""
    nbd, vhost = directory / "nbd", directory / "vhost"
    argv = [*nbdkit(directory), "cache=writeback"]
    argv[1:1] = ["--filter=cache"]
    async with AsyncExitStack() as servers:
        server = await servers.enter_async_context(process(argv, ready=nbd))
        async with serving(unix_uri(nbd), vhost, *cached(directory, mode)):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, OLD)
                server.kill()
                await wait_for(server, limit_s=10)
                await servers.enter_async_context(process(argv, ready=nbd))
                if mode == "off":
                    with pytest.raises(RequestError):
                        await guest.flush()
                else:
                    await guest.flush()
                    assert (directory / "disk.img").read_bytes()[:4096] == OLD


async def test_read_only_bridge_beside_one_that_writes(directory: Path) -> None:
    nbd, writer, reader = (directory / name for name in ("nbd", "writer", "reader"))
    async with (
        process(nbdkit(directory), ready=nbd),
        serving(unix_uri(nbd), reader, "--read-only", "--cache-mode", "off"),
        serving(unix_uri(nbd), writer, *cached(directory)),
    ):
        await write_and_read(writer)
        async with await BlkDriver.connect(reader) as guest:
            assert await guest.read(0, 4096) == OLD

"""Without a cache: what a bridge leaves unflushed, told or made good by the next one, whatever
happens to the server meanwhile; and how a stop tells what may be missing."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import trio

from bridge.errors import RequestError
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.spec import nbd as p
from tests.processes import bridge_argv, process, unix_uri, wait_for
from tests.tools import HUNG_S

BLOCK = 4096
DATA = b"W" * BLOCK
ANONYMOUS = ""
"""Of a server that does not say which instance it is."""


class Setting:
    """A server that loses what is not flushed, bridges one after the other, one guest."""

    def __init__(self, directory: Path, description: str, nursery: trio.Nursery) -> None:
        self._socket = directory / "nbd"
        self.vhost = directory / "vhost"
        self._nursery = nursery
        self.disk = MemoryDisk(8 << 20, volatile=True)
        self.server = Server({"": self.disk}, ServerSettings(description=description))
        self.server.commands = []
        self._serving = trio.CancelScope()
        self._served = trio.Event()
        self._served.set()

    async def start_server(self) -> None:
        await self._served.wait()  # The one before may still listen.
        self._serving, self._served = trio.CancelScope(), trio.Event()
        await self._nursery.start(self._serve)

    async def _serve(self, task_status: trio.TaskStatus[None]) -> None:
        served = self._served
        try:
            with self._serving:
                await self.server.serve_unix(self._socket, task_status=task_status)
        finally:
            served.set()

    def stop_server(self) -> None:
        self.server.cut()
        self._serving.cancel()

    def lose_power(self, description: str | None = None) -> None:
        """The server is a new one afterwards."""
        if description is not None:
            self.server.settings = ServerSettings(description=description)
        self.server.crash()

    @asynccontextmanager
    async def bridge(self, *options: str) -> AsyncIterator[subprocess.Popen[bytes]]:
        """Without a wish how it ends."""
        uri = unix_uri(self._socket)
        argv = bridge_argv("serve", uri, "--socket-path", str(self.vhost), *options)
        async with process(argv, ready=self.vhost) as child:
            yield child

    async def flushed(self, count: int = 1) -> None:
        """The server has executed so many flushes since the last call."""
        commands = self.server.commands
        assert commands is not None
        with trio.fail_after(HUNG_S):
            while sum(command.kind == p.CMD_FLUSH for command in commands) < count:
                await trio.sleep(0.01)
        commands.clear()

    @property
    def survives(self) -> bool:
        """What was written would outlive the server."""
        self.disk.crash()
        return self.disk.read(0, BLOCK) == DATA


@asynccontextmanager
async def setting(directory: Path, description: str = ANONYMOUS) -> AsyncIterator[Setting]:
    async with trio.open_nursery() as nursery:
        made = Setting(directory, description, nursery)
        await made.start_server()
        yield made
        nursery.cancel_scope.cancel()


async def flush_fails(guest: BlkDriver) -> bool:
    try:
        await guest.flush()
    except RequestError as error:
        return error.errno == errno.EIO
    return False


async def write_and_kill(
    made: Setting, guests: AsyncExitStack, *, flush: bool = False
) -> BlkDriver:
    """A guest has written; its bridge is dead."""
    async with made.bridge() as bridge:
        guest = await guests.enter_async_context(await BlkDriver.connect(made.vhost, inflight=True))
        await guest.write(0, DATA)
        if flush:
            await guest.flush()
            await made.flushed()
            # The region says so a turn after the guest was told; by now it does.
            await guest.read(0, len(DATA))
        bridge.kill()
        bridge.wait()
    return guest


@pytest.mark.parametrize("description", [ANONYMOUS, "instance=a"])
async def test_killed_then_power_lost_the_next_flush_is_true(directory, description):
    """The next bridge flushes when the guest comes: nothing hangs on what the server does then."""
    async with setting(directory, description) as made, AsyncExitStack() as guests:
        guest = await write_and_kill(made, guests)
        async with made.bridge():
            await guest.reconnect()
            await made.flushed()
            made.lose_power(description and "instance=b")
            with trio.fail_after(HUNG_S):
                assert await guest.read(0, BLOCK) == DATA
                assert not await flush_fails(guest)
            assert made.survives


async def test_first_flush_of_the_next_bridge_that_fails_is_told(directory):
    async with setting(directory) as made, AsyncExitStack() as guests:
        guest = await write_and_kill(made, guests)
        made.server.faults.errors[p.CMD_FLUSH] = errno.EIO
        async with made.bridge():
            await guest.reconnect()
            await made.flushed()
            made.server.faults.errors.clear()
            with trio.fail_after(HUNG_S):
                assert await flush_fails(guest)
                assert not await flush_fails(guest)


@pytest.mark.parametrize("description", [ANONYMOUS, "instance=a"])
async def test_power_lost_before_the_guest_comes_to_the_next_bridge_is_told(directory, description):
    async with setting(directory, description) as made, AsyncExitStack() as guests:
        guest = await write_and_kill(made, guests)
        async with made.bridge():
            made.lose_power(description and "instance=b")
            await guest.reconnect()
            with trio.fail_after(HUNG_S):
                assert await flush_fails(guest)
                assert not await flush_fails(guest)


async def test_power_lost_then_killed_before_the_server_was_back_is_told(directory):
    """The server names no instance, so that the next bridge has nothing to compare. What was
    unflushed counted as lost only from the guest's next write or flush on, and the bridge died
    before there was one: the guest's flush succeeded."""
    async with setting(directory) as made, AsyncExitStack() as guests:
        async with made.bridge() as bridge:
            guest = await guests.enter_async_context(
                await BlkDriver.connect(made.vhost, inflight=True)
            )
            await guest.write(0, DATA)
            made.stop_server()
            made.disk.crash()
            with trio.fail_after(HUNG_S):
                while not loss_is_remembered(guest):
                    await trio.sleep(0.01)
            bridge.kill()
            bridge.wait()
        await made.start_server()
        async with made.bridge():
            await guest.reconnect()
            with trio.fail_after(HUNG_S):
                assert await flush_fails(guest)
                assert not await flush_fails(guest)


def loss_is_remembered(guest: BlkDriver) -> bool:
    """The in-flight region says that the guest's next flush has to fail."""
    assert guest._inflight is not None
    (word,) = struct.unpack("<Q", os.pread(guest._inflight[1], 8, 0))
    return bool(word >> 62 & 1)


async def test_server_restarted_before_a_guest_begins_fails_no_flush(directory):
    async with setting(directory) as made, made.bridge():
        made.lose_power()
        async with await BlkDriver.connect(made.vhost, inflight=True) as guest:
            with trio.fail_after(HUNG_S):
                assert not await flush_fails(guest)
                made.lose_power()
                assert not await flush_fails(guest)


async def test_bridge_and_server_died_together_the_next_flush_fails_once(directory):
    """The instance that had what was not flushed is remembered beside the requests in flight."""
    async with setting(directory, "instance=a") as made, AsyncExitStack() as guests:
        guest = await write_and_kill(made, guests)
        made.lose_power("instance=b")
        async with made.bridge():
            await guest.reconnect()
            with trio.fail_after(HUNG_S):
                assert await flush_fails(guest)
                assert not await flush_fails(guest)


async def test_bridge_and_server_died_together_with_everything_flushed_no_flush_fails(directory):
    async with setting(directory, "instance=a") as made, AsyncExitStack() as guests:
        guest = await write_and_kill(made, guests, flush=True)
        made.lose_power("instance=b")
        async with made.bridge():
            await guest.reconnect()
            with trio.fail_after(HUNG_S):
                assert not await flush_fails(guest)


async def test_stopped_and_server_restarted_for_an_upgrade_no_flush_fails(directory):
    async with setting(directory, "instance=a") as made, AsyncExitStack() as guests:
        async with made.bridge() as bridge:
            guest = await guests.enter_async_context(
                await BlkDriver.connect(made.vhost, inflight=True)
            )
            await guest.write(0, DATA)
            bridge.send_signal(signal.SIGTERM)
            assert await wait_for(bridge, limit_s=HUNG_S) == 0
        made.lose_power("instance=b")
        async with made.bridge():
            await guest.reconnect()
            with trio.fail_after(HUNG_S):
                assert not await flush_fails(guest)
            assert made.survives


async def test_timed_flush_that_failed_is_told_although_the_bridge_was_killed_since(directory):
    async with setting(directory) as made, AsyncExitStack() as guests:
        async with made.bridge("--flush-interval", "0.2") as bridge:
            guest = await guests.enter_async_context(
                await BlkDriver.connect(made.vhost, inflight=True)
            )
            made.server.faults.errors[p.CMD_FLUSH] = errno.EIO
            await guest.write(0, DATA)
            await made.flushed(2)
            bridge.kill()
            bridge.wait()
        made.server.faults.errors.clear()
        async with made.bridge():
            await guest.reconnect()
            with trio.fail_after(HUNG_S):
                assert await flush_fails(guest)
                assert not await flush_fails(guest)


# Stops.


async def stop(bridge: subprocess.Popen[bytes], *, within_s: float) -> int:
    bridge.send_signal(signal.SIGTERM)
    return await wait_for(bridge, limit_s=within_s)


@pytest.mark.parametrize("attached", [True, False])
async def test_stop_after_the_server_died_with_something_unflushed_is_status_1(
    directory: Path, attached: bool
):
    async with setting(directory) as made, made.bridge("--stop-timeout", "2") as bridge:
        guest = await BlkDriver.connect(made.vhost)
        async with guest:
            await guest.write(0, DATA)
            made.stop_server()
            if attached:
                assert await stop(bridge, within_s=20) == 1
        if not attached:
            assert await stop(bridge, within_s=20) == 1


async def test_stop_after_the_server_lost_unflushed_writes_is_status_1(directory):
    """The guest has sent no flush that could have told it."""
    async with setting(directory) as made, made.bridge() as bridge:
        async with await BlkDriver.connect(made.vhost) as guest:
            await guest.write(0, DATA)
            made.lose_power()
            await guest.read(0, BLOCK)
            assert await stop(bridge, within_s=20) == 1


@pytest.mark.parametrize("cache", [(), ("--cache-mode", "writeback", "--cache-size", "4M")])
@pytest.mark.parametrize("attached", [True, False])
async def test_stop_with_nothing_written_and_the_server_away_is_status_0_at_once(
    directory: Path, attached: bool, cache: tuple[str, ...]
):
    more = (*cache, "--cache-dir", str(directory)) if cache else ()
    # A stop that waited for the server would take a quarter of its limit at least.
    async with setting(directory) as made, made.bridge("--stop-timeout", "400", *more) as bridge:
        async with AsyncExitStack() as guests:
            if attached:
                guest = await guests.enter_async_context(await BlkDriver.connect(made.vhost))
                await guest.read(0, BLOCK)
            made.stop_server()
            assert await stop(bridge, within_s=20) == 0

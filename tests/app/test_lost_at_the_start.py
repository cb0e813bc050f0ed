"""The server is lost again at the start, while what is cached is compared with the export.

With a server that can be waited for, the start goes on waiting, and each attempt looks at all of it
anew. A difference that was found is never passed over: neither by an attempt that was cut off after
it, nor by the next one.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path

import pytest
import trio
from structlog.testing import capture_logs

from bridge.app.cache_ownership import check_content
from bridge.app.storage import Storage
from bridge.cache.file.inspect import show
from bridge.cache.file.opening import open_file
from bridge.cli.wording import explain
from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, WRITE
from bridge.errors import ConfigError, ConnectionLost
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.spec.nbd import CMD_READ
from tests.app.test_storage import (
    SIZE_BYTES,
    cache_file,
    changes,
    ended,
    mark_as_killed,
    new_storage,
    running,
    start,
)
from tests.processes import bridge_argv, process, unix_uri, wait_for
from tests.tools import HUNG_S, told, until

CLEAN_BYTES = 64 << 10
"""From 0 on: 16 blocks that were flushed."""
DIRTY_AT = 1 << 20
DIRTY_BYTES = 4096


@dataclass
class Left:
    """A server, and a cache file with data that it lacks."""

    directory: Path
    server: Server
    disk: MemoryDisk

    @property
    def path(self) -> str:
        return cache_file(self.directory)

    @property
    def has_dirty(self) -> bool:
        return self.disk.data[DIRTY_AT:][:DIRTY_BYTES] == b"w" * DIRTY_BYTES


@pytest.fixture
async def left(directory: Path) -> AsyncIterator[Left]:
    async with left_behind(directory) as found:
        yield found


@asynccontextmanager
async def left_behind(directory: Path) -> AsyncIterator[Left]:
    disk = MemoryDisk(SIZE_BYTES)
    server = Server({"": disk})
    server.commands = []
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, directory / "nbd")
        async with running(directory) as storage:
            assert start(storage, WRITE, 0, CLEAN_BYTES) == [0]
            assert await ended(start(storage, FLUSH, 0, 0)) == 0
            server.faults.refuse_connections = True
            server.cut()
            await until(lambda: not storage.client.connected)
            assert start(storage, WRITE, DIRTY_AT, DIRTY_BYTES) == [0]
            await storage.close(0.1)
        server.faults.refuse_connections = False
        server.commands.clear()
        server.connections_total = 0
        yield Left(directory, server, disk)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def starting(directory: Path) -> AsyncIterator[Storage]:
    """A storage that is to be opened, and is closed at the end, as `serve` does."""
    loop = Loop(poll_us=0)
    storage = new_storage(directory, loop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        try:
            with trio.fail_after(HUNG_S):
                yield storage
        finally:
            with trio.CancelScope(shield=True):
                await storage.close(1)
        nursery.cancel_scope.cancel()
    loop.close()


def reads(server: Server) -> int:
    return sum(each.kind == CMD_READ for each in server.commands or ())


@pytest.mark.parametrize("killed", [False, True], ids=["closed in order", "killed"])
@pytest.mark.parametrize("answered", [0, 5], ids=["at once", "amid the comparison"])
async def test_start_that_waits_compares_again_when_the_connection_is_lost_meanwhile(
    answered: int, killed: bool, left: Left
) -> None:
    if killed:
        mark_as_killed(left.path)
    left.server.faults.hangs_up_after = iter([answered])
    async with starting(left.directory) as storage:
        client_id = storage.client.client_id
        with capture_logs() as logs:
            await storage.open(wait=True)
        assert left.server.connections_total == 2
        assert reads(left.server) > CLEAN_BYTES // 4096, "all of it on the second one"
        assert changes(left.server) == []
        assert storage.client.client_id == client_id, "our plugin would shut out another client"
        (said,) = [each for each in logs if each["event"] == "waiting for the server"]
        assert "did not answer when it was compared" in explain(said["reason"])
        await flushed(storage)
    assert left.has_dirty
    assert show(left.path).dirty_bytes == 0


async def test_start_waits_for_as_long_as_every_comparison_is_cut_off(left: Left) -> None:
    left.server.faults.hangs_up_after = repeat(2)
    async with starting(left.directory) as storage:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened, storage)
            await until(lambda: left.server.connections_total > 3)
            assert changes(left.server) == []
            left.server.faults.hangs_up_after = iter(())
        await flushed(storage)
    assert left.has_dirty


async def opened(storage: Storage) -> None:
    await storage.open(wait=True)


async def flushed(storage: Storage) -> None:
    """The dirty data of an open storage is at the server."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(storage.run)
        assert await ended(start(storage, FLUSH, 0, 0)) == 0
        nursery.cancel_scope.cancel()


async def test_start_that_waits_after_a_lost_comparison_can_be_ended_and_loses_nothing(
    left: Left,
) -> None:
    left.server.faults.hangs_up_after = repeat(0)
    async with starting(left.directory) as storage, trio.open_nursery() as nursery:
        nursery.start_soon(opened, storage)
        await until(lambda: left.server.connections_total > 1)
        nursery.cancel_scope.cancel()
    file = open_file(left.path)  # it is not in use any more
    assert file.header.clean
    file.close(clean=False)
    assert show(left.path).dirty_bytes == DIRTY_BYTES
    assert changes(left.server) == []


async def test_cache_file_that_was_closed_in_order_survives_a_loss_of_power_while_one_waits(
    left: Left,
) -> None:
    """Its mark comes back before the wait for the server: nothing was stored since."""
    left.server.faults.hangs_up_after = iter([0])
    async with starting(left.directory) as storage, trio.open_nursery() as nursery:
        first = storage.client
        nursery.start_soon(opened, storage)
        await until(lambda: left.server.connections_total == 1)
        left.server.faults.refuse_connections = True
        await until(lambda: storage.client is not first)
        file = open_file(left.path)
        assert file.header.clean
        file.close(clean=True)
        nursery.cancel_scope.cancel()


async def test_start_that_does_not_wait_ends_with_one_line(left: Left) -> None:
    left.server.faults.hangs_up_after = iter([5])
    said = pytest.RaisesExc(
        ConnectionLost, check=told("did not answer when it was compared with the export")
    )
    async with starting(left.directory) as storage:
        with pytest.raises(ConnectionLost) as caught:
            await storage.open()
        assert said.matches(caught.value)
        assert "\n" not in explain(caught.value)
    assert left.server.connections_total == 1
    assert show(left.path).dirty_bytes == DIRTY_BYTES


@pytest.mark.parametrize("wait", [True, False])
async def test_difference_that_was_found_counts_though_the_connection_is_lost_after_it(
    wait: bool, left: Left
) -> None:
    """The first block of the disk is compared first. Of the others nothing is known."""
    left.disk.data[0] ^= 0xFF
    left.server.faults.hangs_up_after = repeat(1)
    async with starting(left.directory) as storage:
        with pytest.raises(ConfigError, check=told("1 blocks that were read or flushed before")):
            await storage.open(wait=wait)
    assert left.server.connections_total == 1
    assert not left.has_dirty
    assert changes(left.server) == []
    assert show(left.path).dirty_bytes == DIRTY_BYTES


async def test_difference_that_another_start_sees_ends_the_waiting(left: Left) -> None:
    left.server.faults.hangs_up_after = iter([1, 0])
    left.disk.data[8 * 4096] ^= 0xFF
    async with starting(left.directory) as storage:
        with pytest.raises(ConfigError, check=told("another host wrote it")):
            await storage.open(wait=True)
    assert left.server.connections_total == 3
    assert changes(left.server) == []


async def test_server_that_is_silent_when_it_is_compared_is_connected_to_again(
    left: Left, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(check_content.__kwdefaults__, "limit_s", 0.1)
    left.server.faults.stall = True
    async with starting(left.directory) as storage:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened, storage)
            await until(lambda: left.server.connections_total > 1)
            monkeypatch.undo()
            left.server.faults.stall = False
        await flushed(storage)
    assert left.has_dirty


async def test_server_that_fails_every_read_is_asked_again(left: Left) -> None:
    left.server.faults.errors = {CMD_READ: 5}
    async with starting(left.directory) as storage:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(opened, storage)
            await until(lambda: left.server.connections_total > 1)
            left.server.faults.errors = {}
        await flushed(storage)
    assert left.has_dirty


async def test_guest_keeps_its_disk_when_the_server_is_lost_amid_an_upgrade(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --wait-for-server: a guest that was taken over waits in any case."""
    for name in ("API", "CACHE_MODE"):
        monkeypatch.delenv(f"NBD_BRIDGE_SERVE_{name}", raising=False)
    disk = MemoryDisk(SIZE_BYTES)
    server = Server({"": disk})
    nbd, vhost, api = directory / "nbd", directory / "vhost", directory / "vm0.api"
    argv = bridge_argv("serve", unix_uri(nbd), "--socket-path", str(vhost), "--api", str(api))
    argv += ["--cache-dir", str(directory), "--cache-size", "32M", "--flush-interval", "0"]
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, nbd)
        async with process(argv, ready=vhost) as child:
            async with await BlkDriver.connect(vhost, inflight=True) as guest:
                await guest.write(0, b"c" * CLEAN_BYTES)
                await guest.flush()
                await guest.write(DIRTY_AT, b"d" * DIRTY_BYTES)
                before = server.connections_total
                server.faults.hangs_up_after = iter([0, 5])
                await trio.run_process(bridge_argv("upgrade", str(api)), capture_stdout=True)
                assert server.connections_total == before + 3
                assert await guest.read(DIRTY_AT, DIRTY_BYTES) == b"d" * DIRTY_BYTES
                await guest.flush()
                assert child.poll() is None
            child.terminate()
            assert await wait_for(child, limit_s=HUNG_S) == 0
        nursery.cancel_scope.cancel()
    assert disk.data[DIRTY_AT:][:DIRTY_BYTES] == b"d" * DIRTY_BYTES

"""What a killed bridge left at a server without a fence must not go over what the next one wrote.

(What the lost connection of a living bridge left behind: see tests/server.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

from bridge.app.cache_names import cache_path
from bridge.app.settings import CacheSettings
from bridge.app.storage import Storage
from bridge.cache.cache_options import WRITEBACK
from bridge.cache.file.opening import open_file
from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, WRITE, Request
from bridge.errors import ConnectionLost
from bridge.peers.blk_driver import BlkDriver
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri
from tests.processes import bridge_argv, process, serving, unix_uri
from tests.tools import HUNG_S, need

PLUGIN = Path(__file__).with_name("unfenced_plugin.py")
BLOCK = 4096
OLD = b"STALL".ljust(BLOCK, b"A")
NEW = b"B" * BLOCK
GRACE_S = 6.0
"""The old write must land within it, however slowly everything starts."""
STALL_S = 0.5
"""Less than the grace, and time enough for a bridge that has none to write and flush."""


@pytest.fixture
def directory(directory: Path) -> Path:
    (directory / "disk").write_bytes(bytes(8 << 20))
    return directory


def nbdkit(directory: Path) -> list[str]:
    socket = str(directory / "nbd")
    return [need("nbdkit"), "-f", "-U", socket, "python", str(PLUGIN), f"folder={directory}"]


def first_block(directory: Path) -> bytes:
    return (directory / "disk").read_bytes()[:BLOCK]


async def appears(path: Path) -> None:
    with trio.fail_after(HUNG_S):
        while not path.exists():
            await trio.sleep(0.01)


async def let_the_old_write_go(directory: Path) -> None:
    await trio.sleep(STALL_S)
    (directory / "go").touch()


async def test_killed_without_a_cache_old_write_does_not_go_over_a_newer_one(directory: Path):
    """The next process finds it in the in-flight region, and executes it again."""
    vhost, uri, repeated = directory / "vhost", unix_uri(directory / "nbd"), trio.Event()

    async def write_once(guest: BlkDriver) -> None:
        await guest.write(0, OLD)
        repeated.set()

    async with (
        process(nbdkit(directory), ready=directory / "nbd"),
        trio.open_nursery() as nursery,
        AsyncExitStack() as guests,
    ):
        argv = bridge_argv("serve", uri, "--socket-path", str(vhost))
        async with process(argv, ready=vhost) as bridge:
            guest = await guests.enter_async_context(await BlkDriver.connect(vhost, inflight=True))
            nursery.start_soon(write_once, guest)
            await appears(directory / "reached")
            bridge.kill()
            bridge.wait()
        async with serving(uri, vhost, "--stale-write-grace", f"{GRACE_S}"):
            await guest.reconnect()
            nursery.start_soon(let_the_old_write_go, directory)
            with trio.fail_after(HUNG_S):
                assert await guest.read(BLOCK, BLOCK) == bytes(BLOCK)
                await repeated.wait()
                await guest.write(0, NEW)
                await guest.flush()
            await appears(directory / "done")
            assert first_block(directory) == NEW


async def test_killed_with_a_cache_old_write_out_does_not_go_over_the_newer_one(directory: Path):
    vhost, uri = directory / "vhost", unix_uri(directory / "nbd")
    cache = ("--cache-mode", "writeback", "--cache-dir", str(directory), "--cache-size", "4M")

    async def flush_in_vain(guest: BlkDriver) -> None:
        with suppress(ConnectionLost):
            await guest.flush()

    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = bridge_argv("serve", uri, "--socket-path", str(vhost), *cache)
        async with (
            process(argv, ready=vhost) as bridge,
            await BlkDriver.connect(vhost) as guest,
            trio.open_nursery() as nursery,
        ):
            await guest.write(0, OLD)
            nursery.start_soon(flush_in_vain, guest)
            await appears(directory / "reached")
            await guest.write(0, NEW)
            bridge.kill()
            bridge.wait()
        async with (
            serving(uri, vhost, *cache, "--stale-write-grace", f"{GRACE_S}"),
            await BlkDriver.connect(vhost) as guest,
            trio.open_nursery() as nursery,
        ):
            nursery.start_soon(let_the_old_write_go, directory)
            with trio.fail_after(HUNG_S):
                assert await guest.read(0, BLOCK) == NEW
                await guest.flush()
            await appears(directory / "done")
            assert first_block(directory) == NEW


# Who has to expect them.


@asynccontextmanager
async def running(
    directory: Path, *, close_s: float = 10, **options: float
) -> AsyncIterator[Storage]:
    loop = Loop(poll_us=0)
    storage = Storage(
        parse_uri(unix_uri(directory / "nbd")),
        loop,
        ClientOptions(**options),  # type: ignore[arg-type]
        CacheSettings(mode=WRITEBACK, size_bytes=4 << 20, directory=str(directory)),
    )
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await storage.open()
        nursery.start_soon(storage.run)
        try:
            yield storage
        finally:
            with trio.CancelScope(shield=True):
                await storage.close(close_s)
        nursery.cancel_scope.cancel()
    loop.close()


def file_of(directory: Path) -> str:
    return str(cache_path(parse_uri(unix_uri(directory / "nbd")), str(directory)))


def is_clean(directory: Path) -> bool:
    file = open_file(file_of(directory))
    clean = file.header.clean
    file.close(clean=False)
    return clean


def mark_as_killed(directory: Path) -> None:
    file = open_file(file_of(directory))
    file.begin()
    file.close(clean=False)


async def do(storage: Storage, op: int) -> int:
    ended = trio.Event()
    data = [memoryview(bytearray(NEW))] if op == WRITE else []
    request = Request(op, 0, BLOCK if data else 0, data, lambda _: ended.set())
    storage.target.submit(request)
    storage.turn.end()
    await ended.wait()
    return request.error


async def test_start_after_a_clean_stop_expects_no_stale_writes(directory: Path):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        for _ in range(2):
            async with running(directory, stale_write_grace_s=3600) as storage:
                assert not storage.client.may_leave_writes
                assert await do(storage, WRITE) == 0
                assert await do(storage, FLUSH) == 0
            assert is_clean(directory)


async def test_start_after_a_stop_that_kept_dirty_data_expects_stale_writes(directory: Path):
    """A stop that the server did not answer may have left the same data there.

    The file is clean then: that data outlives the host's next boot.
    """
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with running(directory):
            pass
        mark_as_killed(directory)
        async with running(directory, stale_write_grace_s=3600, close_s=0.1) as storage:
            assert await do(storage, WRITE) == 0
        assert is_clean(directory)
        async with running(directory, stale_write_grace_s=0.2) as storage:
            assert storage.client.may_leave_writes
            assert await do(storage, FLUSH) == 0
            assert not storage.client.may_leave_writes
        assert first_block(directory) == NEW


async def test_start_after_a_kill_expects_stale_writes_for_the_grace_time(directory: Path):
    """Also when nothing is dirty: discards, and writes past the cache, leave no trace in it."""
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with running(directory):
            pass
        mark_as_killed(directory)
        async with running(directory, stale_write_grace_s=0.2) as storage:
            assert storage.client.may_leave_writes
            assert await do(storage, WRITE) == 0
            assert await do(storage, FLUSH) == 0
            assert not storage.client.may_leave_writes
        assert is_clean(directory)


async def test_stop_before_the_grace_is_over_leaves_the_next_process_to_expect_them(
    directory: Path,
):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with running(directory):
            pass
        mark_as_killed(directory)
        for _ in range(2):
            async with running(directory, stale_write_grace_s=3600) as storage:
                assert storage.client.may_leave_writes
            assert not is_clean(directory)

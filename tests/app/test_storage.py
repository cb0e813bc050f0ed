"""The storage side of a disk: starts that fail, and ends with requests in flight."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, MutableSequence
from contextlib import asynccontextmanager
from errno import EIO
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
import trio.testing
from structlog.testing import capture_logs

from bridge.app.cache_flush import flush_file
from bridge.app.cache_names import cache_path
from bridge.app.settings import CacheSettings
from bridge.app.storage import Storage
from bridge.cache.cache_options import WRITEBACK
from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.layout import HEADER_AREA_BYTES
from bridge.cache.file.opening import open_file
from bridge.cli.wording import explain
from bridge.datapath.loop import Loop
from bridge.datapath.request import DISCARD, FLUSH, PREFETCH, READ, WRITE, Request
from bridge.datapath.turn import Turn
from bridge.errors import ConfigError
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_rules import Command
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri
from bridge.spec.nbd import CMD_FLUSH, CMD_READ, CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES
from tests.datapath.engines import BOTH, engine
from tests.datapath.worlds import World
from tests.processes import pause, process, unix_uri, wait_for
from tests.tools import HUNG_S, need, told
from tests.turns import turn_of_the_loop

SIZE_BYTES = 64 << 20
CLOSE_TIMEOUT_S = 0.1


def slow_nbdkit(directory: Path, *, read_delay: str = "0") -> list[str]:
    return [
        *(need("nbdkit"), "-f", "-U", str(directory / "nbd"), "--filter=delay", "memory"),
        *(str(SIZE_BYTES), f"rdelay={read_delay}"),
    ]


def new_storage(directory: Path, loop: Loop) -> Storage:
    return Storage(
        parse_uri(unix_uri(directory / "nbd")),
        loop,
        ClientOptions(close_timeout_s=CLOSE_TIMEOUT_S, stale_write_grace_s=0.1),
        CacheSettings(mode=WRITEBACK, size_bytes=32 << 20, directory=str(directory)),
    )


def cache_file(directory: Path) -> str:
    return str(cache_path(parse_uri(unix_uri(directory / "nbd")), str(directory)))


@asynccontextmanager
async def running(directory: Path) -> AsyncIterator[Storage]:
    """An open storage; its loop runs on for a while after the block, whatever that left there."""
    loop = Loop(poll_us=0)
    storage = new_storage(directory, loop)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await storage.open()
        nursery.start_soon(storage.run)
        yield storage
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
    loop.close()


def start(storage: Storage, op: int, offset: int, length: int) -> list[int]:
    """Submit a request; the result gets its error."""
    buffers = [memoryview(bytearray(b"w" * length))] if op in (READ, WRITE) else []
    ended: list[int] = []
    storage.target.submit(
        Request(op, offset, length, buffers, lambda request: ended.append(request.error))
    )
    storage.turn.end()
    return ended


async def started(storage: Storage, op: int, offset: int, length: int) -> list[int]:
    """The same for a request that ends at once, or has to wait: within a turn."""
    ended = start(storage, op, offset, length)
    if not ended:
        await turn_of_the_loop()
    return ended


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.nbdkit
async def test_open_with_a_damaged_index_lets_go_of_the_file(directory):
    loop = Loop(poll_us=0)
    async with process(slow_nbdkit(directory), ready=directory / "nbd"):
        async with running(directory) as storage:
            start(storage, WRITE, 0, 4096)
            await storage.close(10)
        path = cache_file(directory)
        with open(path, "r+b") as file:
            file.seek(HEADER_AREA_BYTES)
            file.write(os.urandom(64))
        mark_as_killed(path)
        storage = new_storage(directory, loop)
        before = open_descriptors()
        threads = threading.active_count()

        with pytest.raises(ConfigError, check=told("cache drop")):
            await storage.open()

        open_file(path).close(clean=False)  # It would raise: in use.
        await storage.close(10)
        assert open_descriptors() == before
        assert threading.active_count() == threads
    loop.close()


def mark_as_killed(path: str) -> None:
    """Take the clean mark off, as every use does that does not end well."""
    file = open_file(path)
    file.begin()
    file.close(clean=False)


@pytest.mark.nbdkit
async def test_close_waits_for_reads_in_flight_longer_than_the_client_would(directory):
    argv = slow_nbdkit(directory, read_delay="500ms")
    async with process(argv, ready=directory / "nbd") as server:
        async with running(directory) as storage:
            ended = [start(storage, PREFETCH, number << 21, 1 << 20) for number in range(4)]
            await trio.testing.wait_all_tasks_blocked(0.01)  # They are sent.
            await storage.close(20)
        assert ended == [[0]] * 4
        server.terminate()
        assert await wait_for(server, limit_s=HUNG_S) == 0, "not aborted by our hanging up"


@pytest.mark.nbdkit
async def test_close_sends_no_further_reads(directory):
    """What waits for its turn is dropped: only what the server has already is waited for."""
    argv = slow_nbdkit(directory, read_delay="100ms")
    async with process(argv, ready=directory / "nbd") as server:
        async with running(directory) as storage:
            ended = [start(storage, PREFETCH, number << 20, 1 << 20) for number in range(60)]
            storage.client.link.leaving()
            late = start(storage, READ, 63 << 20, 4096)
            with trio.fail_after(HUNG_S):
                await storage.client.close(10)
                await storage.close(0)
        assert late != [0]
        assert all(ended)
        server.terminate()
        assert await wait_for(server, limit_s=HUNG_S) == 0, "not aborted by our hanging up"


@pytest.mark.nbdkit
async def test_close_with_a_hung_server_ends_in_time_and_keeps_dirty_data(directory):
    async with process(slow_nbdkit(directory), ready=directory / "nbd") as server:
        async with running(directory) as storage:
            pause(server)
            reads = [start(storage, PREFETCH, (32 << 20) + (n << 20), 1 << 20) for n in range(8)]
            for number in range(64):
                assert await started(storage, WRITE, number << 16, 65536) == [0]
            flush = start(storage, FLUSH, 0, 0)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for number in range(64):  # Again, while the first content is on its way.
                assert await started(storage, WRITE, number << 16, 65536) == [0]
            with trio.fail_after(HUNG_S):
                await storage.close(0.3)
            server.send_signal(signal.SIGCONT)
        assert flush[0]
        assert all(each and each[0] for each in reads)
    file = open_file(cache_file(directory))
    assert file.header.clean
    file.close(clean=False)
    async with process(slow_nbdkit(directory), ready=directory / "nbd"):
        async with running(directory) as storage:
            buffer = bytearray(4 << 20)
            done: list[int] = []
            storage.target.submit(
                Request(
                    *(READ, 0, 4 << 20, [memoryview(buffer)]), lambda each: done.append(each.error)
                )
            )
            await turn_of_the_loop()
            assert done == [0]
            assert buffer == b"w" * (4 << 20)
            await storage.close(10)


@pytest.mark.nbdkit
async def test_write_that_waits_for_room_is_never_done_once_it_is_abandoned(
    directory: Path,
) -> None:
    """Its memory is the guest's again: when the server is back, nothing may be read from there."""
    # One thread: hung up on with several requests at work, nbdkit 1.32 aborts.
    async with process([*slow_nbdkit(directory), "-t", "1"], ready=directory / "nbd") as nbdkit:
        async with running(directory) as storage:
            pause(nbdkit)
            ended, granule, buffer = [0], -1, bytearray()
            while ended:
                granule += 1
                buffer = bytearray(b"w" * 4096)
                ended = []
                request = Request(
                    *(WRITE, granule << 16, 4096, [memoryview(buffer)]),
                    lambda request, ended=ended: ended.append(request.error),
                )
                storage.target.submit(request)
                storage.turn.end()
                if not ended:
                    await turn_of_the_loop()
            request.abandon(lambda request: None, memoryview(b""))
            storage.departure.abandon([request])
            buffer[:] = b"!" * 4096
            nbdkit.send_signal(signal.SIGCONT)
            with trio.fail_after(HUNG_S):
                flush = start(storage, FLUSH, 0, 0)
                while not flush:
                    await trio.sleep(0.01)
            assert flush == [0]
            assert await read(storage, granule << 16) == bytes(4096)
            assert await read(storage, (granule - 1) << 16) == b"w" * 4096
            await storage.close(10)


async def read(storage: Storage, offset: int) -> bytes:
    """4 KiB of the disk."""
    buffer = bytearray(4096)
    ended: list[int] = []
    storage.target.submit(
        Request(READ, offset, 4096, [memoryview(buffer)], lambda each: ended.append(each.error))
    )
    storage.turn.end()
    while not ended:
        await trio.sleep(0.01)
    assert ended == [0]
    return bytes(buffer)


@pytest.mark.nbdkit
async def test_close_with_a_stuck_cache_disk_ends_and_says_so(directory, monkeypatch):
    """Neither a sync nor a read that never returns delays a stop without limit."""
    stuck, began = threading.Event(), threading.Event()

    def wait(*_: object) -> None:
        began.set()
        stuck.wait()

    monkeypatch.setattr("bridge.app.storage.FILE_LIMIT_S", 0.1)
    async with process(slow_nbdkit(directory), ready=directory / "nbd"):
        async with running(directory) as storage:
            assert start(storage, WRITE, 0, 4096) == [0]
            assert storage._cached is not None
            assert storage._cached.cold is not None
            storage._cached.cold.run(wait, lambda error: None)
            monkeypatch.setattr("bridge.cache.file.cache_file.os.fsync", wait)
            problem = await storage.close(0)
            assert began.is_set()
            problem = explain(problem)
            assert cache_file(directory) in problem
            assert "not marked as closed" in problem
            stuck.set()
            with trio.fail_after(HUNG_S):
                while True:
                    try:
                        file = open_file(cache_file(directory))
                    except ConfigError:
                        await trio.sleep(0.01)
                    else:
                        break
            assert not file.header.clean
            file.close(clean=False)


@asynccontextmanager
async def own_server(directory: Path, faults: Faults, name: str = "") -> AsyncIterator[MemoryDisk]:
    """Our own server with a disk in memory at the socket of `new_storage`."""
    disk = MemoryDisk(SIZE_BYTES)
    server = Server({name: disk}, faults=faults)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, directory / "nbd")
        yield disk
        nursery.cancel_scope.cancel()


async def test_stop_with_a_silent_server_finishes_everything_before_the_file_is_closed(
    directory, monkeypatch
):
    """What ends afterwards would touch memory that is no longer mapped."""
    faults = Faults()
    closed: list[bool] = []
    late: list[str] = []
    real_close = CacheFile.close
    real_settle = Turn.settle

    def close(file: CacheFile, *, clean: bool) -> None:
        closed.append(True)
        real_close(file, clean=clean)

    def settle(turn: Turn) -> bool:
        if closed:
            late.extend(map(repr, turn.finished))
        return real_settle(turn)

    monkeypatch.setattr(CacheFile, "close", close)
    monkeypatch.setattr(Turn, "settle", settle)
    async with own_server(directory, faults):
        async with running(directory) as storage:
            faults.stall = True
            ended = [start(storage, READ, 1 << 20, 65536)]  # a fetch without an answer
            ended += [start(storage, WRITE, number << 16, 65536) for number in range(4)]
            ended += [start(storage, DISCARD, 0, 1 << 20), start(storage, DISCARD, 0, 1 << 20)]
            ended += [start(storage, WRITE, 4096, 512), start(storage, FLUSH, 0, 0)]
            await trio.testing.wait_all_tasks_blocked(0.01)
            left_behind = await storage.close(0.2)
            assert storage.client.in_flight == 0
    assert closed == [True]
    assert late == []
    *others, flush = ended
    assert [len(each) for each in others] == [1] * len(others)
    assert len(flush) <= 1  # The cache may keep it: a flush has no memory of the guest's.
    assert "is kept in" in explain(left_behind)


async def test_write_back_on_which_the_server_hangs_up_stays_dirty_and_fails_the_flush(directory):
    faults = Faults(hangs_up_on=CMD_WRITE)
    async with own_server(directory, faults) as disk:
        async with running(directory) as storage:
            assert start(storage, WRITE, 0, 4096) == [0]
            flush = start(storage, FLUSH, 0, 0)
            read = start(storage, READ, 1 << 20, 4096)
            with trio.fail_after(HUNG_S):
                while not (flush and read):
                    await trio.sleep(0.001)
            assert (flush, read) == ([EIO], [0])
            assert storage._cache is not None
            assert storage._cache.index.dirty_slots == 1
            faults.hangs_up_on = None
            flush = start(storage, FLUSH, 0, 0)
            with trio.fail_after(HUNG_S):
                while not flush:
                    await trio.sleep(0.001)
            assert flush == [0]
            assert disk.data[:4096] == b"w" * 4096
            await storage.close(10)


class FlushSecond(Random):
    """One other command is executed before a flush, and the rest after it: a server with threads,
    which dies of the flush."""

    def shuffle(self, commands: MutableSequence[Any]) -> None:
        commands.sort(key=lambda command: command.kind == CMD_FLUSH)
        if len(commands) > 2:
            commands.insert(1, commands.pop())


async def test_flush_on_which_the_server_hangs_up_fails_although_each_connection_compares_first(
    directory,
):
    """Each new comparison was blamed for the flush, and was another one the next time: the bridge
    connected again without a pause and without an end, and the guest's flush had no answer."""
    faults = Faults(reorder=FlushSecond())
    async with own_server(directory, faults):
        async with running(directory) as storage:
            for number in range(8):
                assert start(storage, WRITE, number << 20, 4096) == [0]
            assert await ended(start(storage, FLUSH, 0, 0)) == 0
            # Nothing is dirty after that, so that it is compared beside the other commands.
            assert await ended(start(storage, DISCARD, 9 << 20, 4096)) == 0
            faults.hangs_up_on = CMD_FLUSH
            flush = start(storage, FLUSH, 0, 0)
            with trio.fail_after(HUNG_S):
                while not flush and storage.client.generation < 10:
                    await trio.sleep(0.001)
            assert flush == [EIO]
            faults.hangs_up_on = None
            assert await ended(start(storage, FLUSH, 0, 0)) == 0
            await storage.close(10)


@pytest.mark.parametrize("name", BOTH)
async def test_closed_cache_file_is_not_mapped_any_more_and_serves_nothing(directory, name):
    compiled = engine(name)
    async with own_server(directory, Faults()):
        async with running(directory) as storage:
            assert start(storage, WRITE, 0, 4096) == [0]
            assert storage._cache is not None
            assert storage._file is not None
            resident, mapping = storage._cache.hits.resident, storage._file._map
            world = World(compiled, 1)
            compiled.take_hits(world.queues[0], world.disk, resident)  # It looks at the file.
            await storage.close(10)
            assert mapping.closed
            with contextlib.suppress(ValueError):  # What Python says of a view that is released.
                assert compiled.take_hits(world.queues[0], world.disk, resident) == (0, 0)


async def test_cache_file_of_an_export_with_a_long_name_can_be_flushed(directory):
    """The file has room for the first 1500 bytes of it."""
    name = "v" * 1600
    uri = parse_uri(unix_uri(directory / "nbd", name))
    loop = Loop(poll_us=0)
    settings = CacheSettings(mode=WRITEBACK, size_bytes=32 << 20, directory=str(directory))
    path = str(cache_path(uri, str(directory)))
    async with own_server(directory, Faults(), name):
        storage = Storage(uri, loop, ClientOptions(close_timeout_s=CLOSE_TIMEOUT_S), settings)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            await storage.open()
            await storage.close(1)
            nursery.cancel_scope.cancel()
        assert await flush_file(path, uri.text, moved=False, timeout_s=10) == 0
        with pytest.raises(ConfigError, check=told("give the URI")):
            await flush_file(path, None, moved=False, timeout_s=10)
        other = unix_uri(directory / "nbd", name[:-1])
        with pytest.raises(ConfigError, check=told("--moved")):
            await flush_file(path, other, moved=False, timeout_s=10)
    loop.close()


@asynccontextmanager
async def changeable(
    directory: Path, description: str = ""
) -> AsyncIterator[tuple[Server, MemoryDisk, Storage]]:
    """A server, and a storage on it with a flushed block at 0 and, since the server is away now,
    a dirty one at 1 MiB."""
    disk = MemoryDisk(SIZE_BYTES)
    server = Server({"": disk}, ServerSettings(description=description))
    server.commands = []
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, directory / "nbd")
        async with running(directory) as storage:
            assert start(storage, WRITE, 0, 4096) == [0]
            assert await ended(start(storage, FLUSH, 0, 0)) == 0
            server.faults.refuse_connections = True
            server.cut()
            with trio.fail_after(HUNG_S):
                while storage.client.connected:
                    await trio.sleep(0.001)
            assert start(storage, WRITE, 1 << 20, 4096) == [0]
            server.commands.clear()
            yield server, disk, storage
            await storage.close(0.1)
        nursery.cancel_scope.cancel()


async def ended(result: list[int]) -> int:
    with trio.fail_after(HUNG_S):
        while not result:
            await trio.sleep(0.001)
    return result[0]


async def refused_attempts(server: Server, storage: Storage, count: int) -> None:
    """The server is there again, and `count` connections to it were not wanted."""
    server.faults.refuse_connections = False
    before = server.connections_total
    with trio.fail_after(HUNG_S):
        while server.connections_total <= before + count:
            await trio.sleep(0.001)
    assert not storage.client.connected


CHANGES = (CMD_WRITE, CMD_WRITE_ZEROES, CMD_TRIM, CMD_FLUSH)


def changes(server: Server) -> list[Command]:
    return [each for each in server.commands or () if each.kind in CHANGES]


async def test_image_replaced_under_dirty_data_while_serving_nothing_is_sent_until_it_is_back(
    directory,
):
    async with changeable(directory) as (server, disk, storage):
        ours = bytes(disk.data)
        disk.data[:] = b"z" * SIZE_BYTES
        with capture_logs() as logs:
            await refused_attempts(server, storage, 3)
        flush = start(storage, FLUSH, 0, 0)
        read = start(storage, READ, 2 << 20, 4096)
        assert changes(server) == []
        (problem,) = [each["problem"] for each in logs if each["log_level"] == "error"]
        said = explain(problem)
        path = cache_file(directory)
        assert "4096 bytes" in said
        assert "another host wrote it" in said
        assert f"cache flush --force {path}" in said
        assert f"cache drop --discard-dirty {path}" in said
        assert (flush, read) == ([], [])

        disk.data[:] = ours

        assert await ended(flush) == 0
        assert await ended(read) == 0
        assert disk.data[1 << 20 :][:4096] == b"w" * 4096


async def test_volume_written_by_another_host_under_dirty_data_while_serving_nothing_is_sent(
    directory,
):
    """Our plugin counts who writes."""
    numbers = "generation={} written={}"
    async with changeable(directory, numbers.format(1, 1)) as (server, _, storage):
        server.settings = ServerSettings(description=numbers.format(3, 2))
        await refused_attempts(server, storage, 3)
        assert changes(server) == []

        left_behind = await storage.close(5)

        assert changes(server) == []
        said = explain(left_behind)
        assert "another host wrote the export since" in said
        assert f"cache flush --force {cache_file(directory)}" in said
        loop = Loop(poll_us=0)
        again = new_storage(directory, loop)
        with pytest.raises(ConfigError, check=told("another host wrote the export since")):
            await again.open()
        await again.close(1)
        loop.close()


async def test_server_that_lost_unflushed_writes_is_used_again_at_once(directory):
    async with changeable(directory) as (server, disk, storage):
        server.faults.refuse_connections = False
        assert await ended(start(storage, FLUSH, 0, 0)) == 0
        assert disk.data[1 << 20 :][:4096] == b"w" * 4096


async def test_connection_lost_while_the_server_is_compared_is_tried_again(directory):
    async with changeable(directory) as (server, _, storage):
        server.faults.hangs_up_on = CMD_READ
        await refused_attempts(server, storage, 3)
        server.faults.hangs_up_on = None
        assert await ended(start(storage, FLUSH, 0, 0)) == 0

"""The client against our own server: requests, limits, the server going away and coming back."""

from __future__ import annotations

import errno
import mmap
import socket
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing

from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.errors import BridgeError, ConfigError, ConnectionLost
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS, ServerSettings
from bridge.server import client as client_module
from bridge.server import commands
from bridge.server.client_options import ClientOptions
from bridge.server.inspection import inspect, list_exports
from bridge.server.uri import parse_uri
from bridge.spec import nbd as p
from bridge.spec.nbd import TransmissionFlags
from tests.processes import short_directory, unix_uri
from tests.server.helpers import (
    FAST,
    LayerAbove,
    Waiter,
    do,
    pattern,
    read,
    running_client,
    served,
    start,
    status,
    write,
)
from tests.tools import HUNG_S, until

FORMATS = {
    "simple": ServerSettings(structured=False, extended=False),
    "structured": ServerSettings(extended=False),
    "extended": ServerSettings(),
    "structured-chunks": ServerSettings(extended=False, read_chunk_bytes=4096, holes=True),
    "extended-chunks": ServerSettings(read_chunk_bytes=1000, holes=True),
}


@pytest.fixture(params=list(FORMATS))
def settings(request: pytest.FixtureRequest) -> ServerSettings:
    """A server with each reply format."""
    return replace(FORMATS[request.param])


@pytest.mark.parametrize("length", [1, 512, 4096, 33000, 65536, 300_000, 1 << 20])
@pytest.mark.parametrize("pieces", [1, 3])
async def test_read_any_length_returns_what_was_written(
    settings: ServerSettings, length: int, pieces: int
) -> None:
    async with served(2 << 20, settings) as (client, _, disk):
        data = pattern(512, length)
        assert await write(client, 512, data, pieces=pieces) == 0
        assert disk.data[512 : 512 + length] == data
        assert await read(client, 512, length, pieces) == data


async def test_requests_in_flight_mixed_sizes_all_complete_with_their_data(
    settings: ServerSettings,
) -> None:
    random = Random(7)
    faults = Faults(reorder=random)
    async with served(8 << 20, settings, faults=faults) as (client, _, disk):
        disk.data[:] = pattern(0, 8 << 20)
        waiters = []
        for _ in range(200):
            length = random.choice([512, 4096, 40_000, 200_000, 1 << 20])
            offset = random.randrange((8 << 20) - length)
            data = bytearray(length)
            waiters.append((start(client, READ, offset, length, [memoryview(data)]), offset, data))
        for waiter, offset, data in waiters:
            assert await waiter.wait() == 0
            assert waiter.count == 1
            assert data == disk.data[offset : offset + len(data)]


async def test_zeroes_trim_prefetch_flush_reach_the_server(settings: ServerSettings) -> None:
    async with served(1 << 20, settings) as (client, server, disk):
        server.commands = []
        await write(client, 0, b"x" * 65536)
        assert await do(client, WRITE_ZEROES, 4096, 4096) == 0
        assert await do(client, WRITE_ZEROES, 8192, 4096, MAY_UNMAP) == 0
        assert await do(client, DISCARD, 16384, 4096) == 0
        assert await do(client, PREFETCH, 0, 4096) == 0
        assert await do(client, FLUSH) == 0
        assert disk.data[4096:12288] == bytes(8192)
        assert disk.flushes == 1
        kinds = [
            (command.kind, command.flags & ~p.CMD_FLAG_PAYLOAD_LEN) for command in server.commands
        ]
        assert kinds == [
            (p.CMD_WRITE, 0),
            (p.CMD_WRITE_ZEROES, p.CMD_FLAG_NO_HOLE),
            (p.CMD_WRITE_ZEROES, 0),
            (p.CMD_TRIM, 0),
            (p.CMD_CACHE, 0),
            (p.CMD_FLUSH, 0),
        ]


async def test_fua_write_with_server_fua_is_durable_at_completion() -> None:
    async with served(volatile=True) as (client, _, disk):
        assert await write(client, 0, b"a" * 512, FUA) == 0
        disk.crash()
        assert disk.data[:512] == b"a" * 512


async def test_fua_write_without_server_fua_is_followed_by_a_flush() -> None:
    settings = ServerSettings(flags=DEFAULT_FLAGS & ~TransmissionFlags.SEND_FUA)
    async with served(settings=settings, volatile=True) as (client, _, disk):
        assert await write(client, 0, b"a" * 512, FUA) == 0
        disk.crash()
        assert disk.data[:512] == b"a" * 512


async def test_block_status_reports_data_and_holes() -> None:
    for settings in (ServerSettings(extended=False), ServerSettings()):
        async with served(1 << 20, settings) as (client, _, disk):
            disk.data[65536:131072] = b"x" * 65536
            assert await status(client, 0, 1 << 20) == [
                (65536, 3),
                (65536, 0),
                ((1 << 20) - 131072, 3),
            ]


async def test_block_status_without_context_is_not_supported() -> None:
    async with served(settings=ServerSettings(structured=False, extended=False)) as (client, _, _d):
        assert not client.export.can_block_status
        assert await do(client, 6, 0, 512) != 0


@pytest.mark.parametrize(
    ("op", "offset", "length", "expected"),
    [
        (READ, 1 << 20, 512, errno.EINVAL),
        (READ, (1 << 20) - 512, 1024, errno.EINVAL),
        (WRITE, 1 << 63, 512, errno.EINVAL),
        (READ, -512, 512, errno.EINVAL),
        (READ, 0, 0, 0),
        (DISCARD, 0, (1 << 20) + 1, errno.EINVAL),
    ],
)
async def test_request_outside_the_export_fails_without_the_server(
    op: int, offset: int, length: int, expected: int
) -> None:
    async with served() as (client, server, _):
        server.commands = []
        assert await do(client, op, offset, length) == expected
        assert server.commands == []


async def test_change_on_read_only_export_fails_without_the_server() -> None:
    settings = ServerSettings(flags=DEFAULT_FLAGS | TransmissionFlags.READ_ONLY)
    async with served(settings=settings) as (client, server, _):
        server.commands = []
        assert client.export.read_only
        assert await write(client, 0, bytes(512)) == errno.EPERM
        assert await do(client, DISCARD, 0, 512) == errno.EPERM
        assert await do(client, WRITE_ZEROES, 0, 512) == errno.EPERM
        assert server.commands == []


async def test_missing_commands_are_replaced_or_ignored() -> None:
    settings = ServerSettings(flags=TransmissionFlags.HAS_FLAGS)
    async with served(4 << 20, settings) as (client, server, disk):
        server.commands = []
        disk.data[:] = b"x" * (4 << 20)
        assert await do(client, FLUSH) == 0
        assert await do(client, DISCARD, 0, 4096) == 0
        assert await do(client, PREFETCH, 0, 4096) == 0
        assert server.commands == []
        assert await do(client, WRITE_ZEROES, 512, 3 << 20) == 0
        assert disk.data[512 : 512 + (3 << 20)] == bytes(3 << 20)
        assert disk.data[:512] == b"x" * 512
        assert disk.data[512 + (3 << 20)] == ord("x")


async def test_server_error_fails_one_request_only(settings: ServerSettings) -> None:
    faults = Faults(errors={p.CMD_WRITE: errno.ENOSPC})
    async with served(settings=settings, faults=faults) as (client, _, _d):
        assert await write(client, 0, bytes(512)) == errno.ENOSPC
        assert await read(client, 0, 512) == bytes(512)
        assert client.generation == 1


# Limits.


async def test_long_requests_are_split_at_the_maximum_payload(settings: ServerSettings) -> None:
    settings.block_sizes = (512, 4096, 65536)
    async with served(1 << 20, settings) as (client, server, _disk):
        server.commands = []
        data = pattern(0, 300_032)
        assert await write(client, 1024, data, pieces=2) == 0
        assert await read(client, 1024, len(data), 5) == data
        assert max(command.length for command in server.commands) <= 65536


async def test_refused_long_trim_is_tried_again_in_pieces() -> None:
    settings = ServerSettings(block_sizes=(512, 4096, 65536), effect_max_bytes=65536)
    async with served(1 << 20, settings) as (client, server, disk):
        disk.data[:] = b"x" * (1 << 20)
        assert await do(client, WRITE_ZEROES, 512, 1 << 19) == 0
        assert disk.data == b"x" * 512 + bytes(1 << 19) + b"x" * ((1 << 19) - 512)
        server.commands = []
        assert await do(client, DISCARD, 0, 1 << 19) == 0
        assert len(server.commands) == 8  # It has learned: no refusal any more.


class _HugeDisk(MemoryDisk):
    """Two terabytes of nothing."""

    def __init__(self) -> None:
        super().__init__(0)
        self.size_bytes = 2 << 40
        self.zeroed: list[tuple[int, int]] = []

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        self.zeroed.append((offset, length))


async def test_discard_of_two_terabytes_is_split_at_32_bits() -> None:
    disk = _HugeDisk()
    server = Server({"": disk}, ServerSettings(extended=False))
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            async with running_client(unix_uri(folder / "s")) as client:
                assert await do(client, DISCARD, 4096, (2 << 40) - 4096) == 0
            nursery.cancel_scope.cancel()
    assert sum(length for _, length in disk.zeroed) == (2 << 40) - 4096
    assert max(length for _, length in disk.zeroed) <= 1 << 30
    assert all(offset % (1 << 30) in (0, 4096) for offset, _ in disk.zeroed)


@pytest.mark.parametrize("block", [512, 4096, 65536])
async def test_large_minimum_block_any_sector_range_is_exact(block: int) -> None:
    """Random sector ranges on a server that refuses everything off its grid, against a shadow."""
    random = Random(block)
    settings = ServerSettings(block_sizes=(block, max(block, 4096), 1 << 20))
    size = 1 << 20
    async with served(size, settings) as (client, _server, disk):
        shadow = bytearray(size)
        for round_ in range(60):
            offset = random.randrange(size // 512) * 512
            length = min(random.choice([512, 1024, 4096, 5120, 70_144]), size - offset)
            kind = random.choice(["write", "read", "zero", "discard"])
            if kind == "write":
                data = pattern(offset, length, round_)
                assert await write(client, offset, data, pieces=2) == 0
                shadow[offset : offset + length] = data
            elif kind == "zero":
                assert await do(client, WRITE_ZEROES, offset, length) == 0
                shadow[offset : offset + length] = bytes(length)
            elif kind == "discard":
                assert await do(client, DISCARD, offset, length) == 0
                shadow[:] = disk.data if _only_zeroed(shadow, disk.data, offset, length) else b""
            else:
                assert await read(client, offset, length, 3) == shadow[offset : offset + length]
        assert disk.data == shadow
        if block > 512:
            assert await status(client, 512, 1024) == [(1024, 3 if not any(shadow[:65536]) else 0)]


def _only_zeroed(before: bytearray, after: bytearray, offset: int, length: int) -> bool:
    """A discard changed nothing outside its range, and inside only to zero."""
    stop = offset + length
    inside = all(
        new in (0, old) for old, new in zip(before[offset:stop], after[offset:stop], strict=True)
    )
    return inside and before[:offset] == after[:offset] and before[stop:] == after[stop:]


async def test_concurrent_sector_writes_in_one_large_block_do_not_lose_each_other() -> None:
    settings = ServerSettings(block_sizes=(4096, 4096, 1 << 20))
    async with served(65536, settings, faults=Faults(reorder=Random(1))) as (client, _, disk):
        expected = bytearray(65536)
        waiters = []
        for sector in range(128):
            data = pattern(sector * 512, 512, 5)
            expected[sector * 512 : sector * 512 + 512] = data
            waiters.append(start(client, WRITE, sector * 512, 512, [memoryview(data)]))
        for waiter in waiters:
            assert await waiter.wait() == 0
        assert disk.data == expected


# The server goes away.


@pytest.mark.parametrize("cut_at", [0, 5, 15, 16, 20, 28, 30, 540, 5000, 70_000])
async def test_connection_cut_at_any_byte_requests_survive(
    settings: ServerSettings, cut_at: int
) -> None:
    faults = Faults()
    async with served(1 << 20, settings, faults=faults) as (client, server, disk):
        disk.data[:] = pattern(0, 1 << 20)
        waiters = []
        faults.cut_at_byte = server.sent_bytes + cut_at
        for i in range(20):
            data = bytearray(40_000 if i % 3 else 512)
            waiters.append((start(client, READ, i * 512, len(data), [memoryview(data)]), i, data))
            waiter = start(client, WRITE, 900_000 + i * 512, 512, [memoryview(pattern(i, 512))])
            waiters.append((waiter, None, bytearray()))
        await trio.sleep(0.01)
        faults.cut_at_byte = None
        for waiter, i, data in waiters:
            assert await waiter.wait() == 0
            assert waiter.count == 1
            if i is not None:
                assert data == disk.data[i * 512 : i * 512 + len(data)]
        for i in range(20):
            assert disk.data[900_000 + i * 512 : 900_512 + i * 512] == pattern(i, 512)


@pytest.mark.parametrize(
    "fault",
    [
        {"garble_byte": 0},
        {"wrong_cookie_at": 3},
        {"oversize_at": 3},
        {"cut_after_commands": 2},
        {"stall": True},
    ],
    ids=lambda fault: next(iter(fault)),
)
async def test_misbehaving_server_is_left_and_requests_survive(fault: dict[str, int]) -> None:
    faults = Faults()
    options = replace(FAST, request_timeout_s=0.2)
    async with served(1 << 20, faults=faults, options=options) as (client, server, disk):
        disk.data[:] = pattern(0, 1 << 20)
        for name, value in fault.items():
            setattr(faults, name, server.sent_bytes + 1 if name == "garble_byte" else value)
        waiters = []
        for i in range(10):
            data = bytearray(4096)
            waiters.append((start(client, READ, i * 4096, 4096, [memoryview(data)]), i, data))
        await until(lambda: not (client.generation == 1 and client.connected))
        for name in fault:
            setattr(faults, name, False if name == "stall" else None)
        for waiter, i, data in waiters:
            assert await waiter.wait() == 0
            assert data == disk.data[i * 4096 : i * 4096 + 4096]
        assert client.generation >= 2


async def test_server_shutting_down_is_left_in_order_and_requests_are_sent_again() -> None:
    """Rule `shutdown`: ESHUTDOWN means a soft disconnect, and it is not an answer."""
    faults = Faults(shutting_down=True)
    async with served(faults=faults) as (client, _server, disk):
        waiter = start(client, WRITE, 0, 512, [memoryview(b"a" * 512)])
        await until(lambda: client.generation >= 2)
        faults.shutting_down = False
        assert await waiter.wait() == 0
        assert disk.data[:512] == b"a" * 512


async def test_new_requests_while_down_wait_for_the_server() -> None:
    async with served() as (client, server, _disk):
        server.faults.refuse_connections = True
        server.cut()
        await until(lambda: not client.connected)
        waiter = start(client, WRITE, 0, 512, [memoryview(b"b" * 512)])
        await trio.sleep(0.05)
        assert not waiter.finished.is_set()
        server.faults.refuse_connections = False
        assert await waiter.wait() == 0
        assert waiter.request.generation == client.generation == 2


async def test_reconnect_timeout_fails_requests_until_the_server_is_back() -> None:
    options = replace(FAST, reconnect_timeout_s=0.1)
    async with served(options=options) as (client, server, _):
        server.faults.refuse_connections = True
        server.cut()
        await until(lambda: not client.connected)
        assert await write(client, 0, bytes(512)) == errno.EIO
        assert client.link.given_up
        assert await write(client, 0, bytes(512)) == errno.EIO
        server.faults.refuse_connections = False
        await until(lambda: client.connected)
        assert await write(client, 0, bytes(512)) == 0


async def test_idle_client_is_woken_by_all_that_ends_by_the_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_module, "_IDLE_TICK_S", 10 * HUNG_S)
    options = replace(FAST, request_timeout_s=0, stale_write_grace_s=0.1)
    async with served(options=options) as (client, server, _):
        await trio.testing.wait_all_tasks_blocked()
        ticks = 0
        tick = client.link.tick

        def count(now: float) -> None:
            nonlocal ticks
            ticks += 1
            tick(now)

        monkeypatch.setattr(client.link, "tick", count)
        assert await write(client, 0, bytes(512)) == 0
        assert ticks == 0
        client.expect_stale_writes()
        assert await write(client, 0, bytes(512)) == 0
        assert ticks > 0
        await until(lambda: client.link.next_deadline_s() is None)
        # And with a limit that is set while it is idle.
        client.use(replace(options, reconnect_timeout_s=0.1))
        server.faults.refuse_connections = True
        server.cut()
        assert await write(client, 0, bytes(512)) == errno.EIO
        server.faults.refuse_connections = False


async def test_export_grown_while_away_is_reported() -> None:
    seen: list[int] = []
    above = LayerAbove(export_changed=lambda export: seen.append(export.size_bytes))
    async with served(1 << 20, above=above) as (client, server, disk):
        disk.resize(2 << 20)
        server.cut()
        await until(lambda: client.generation >= 2)
        assert seen == [2 << 20]
        assert await write(client, (2 << 20) - 512, bytes(512)) == 0


@pytest.mark.parametrize("change", ["smaller", "read-only", "no flush"])
async def test_export_worse_after_reconnect_is_not_used(change: str) -> None:
    async with served(1 << 20) as (client, server, disk):
        good = server.settings
        if change == "smaller":
            disk.resize(1 << 19)
        elif change == "read-only":
            server.settings = replace(good, flags=good.flags | TransmissionFlags.READ_ONLY)
        else:
            server.settings = replace(good, flags=good.flags & ~TransmissionFlags.SEND_FLUSH)
        server.cut()
        connections = server.connections_total
        await until(lambda: server.connections_total >= connections + 2)
        waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
        await trio.sleep(0.02)
        assert not waiter.finished.is_set()
        disk.resize(1 << 20)
        server.settings = good
        assert await waiter.wait() == 0


async def test_flush_after_crash_with_unflushed_writes_fails_once() -> None:
    """QEMU's client says OK here, and the data is gone."""
    async with served(volatile=True) as (client, server, _disk):
        assert await write(client, 0, b"a" * 512) == 0
        server.crash()
        await until(lambda: client.generation >= 2)
        assert await do(client, FLUSH) == errno.EIO
        assert await do(client, FLUSH) == 0


async def test_flush_in_flight_when_the_server_crashes_fails() -> None:
    async with served(volatile=True) as (client, server, _disk):
        assert await write(client, 0, b"a" * 512) == 0
        server.faults.stall = True
        waiter = start(client, FLUSH, 0, 0, [])
        await trio.sleep(0.01)
        server.faults.stall = False
        server.crash()
        assert await waiter.wait() == errno.EIO


async def test_flush_after_crash_with_everything_flushed_succeeds() -> None:
    async with served(volatile=True) as (client, server, disk):
        assert await write(client, 0, b"a" * 512) == 0
        assert await do(client, FLUSH) == 0
        server.crash()
        await until(lambda: client.generation >= 2)
        assert await do(client, FLUSH) == 0
        assert disk.data[:512] == b"a" * 512


async def test_flush_after_reconnect_to_the_same_instance_succeeds() -> None:
    settings = ServerSettings(description="disk instance=abc session=yes")
    async with served(settings=settings) as (client, server, _disk):
        assert await write(client, 0, b"a" * 512) == 0
        server.cut()
        await until(lambda: client.generation >= 2)
        assert await do(client, FLUSH) == 0


async def test_layer_that_keeps_unflushed_writes_is_told_and_flush_succeeds() -> None:
    told: list[int] = []
    above = LayerAbove(reconnected=lambda: told.append(client.generation))
    async with served(volatile=True, above=above) as (client, server, _disk):
        client.keeps_unflushed = True
        assert await write(client, 0, b"a" * 512) == 0
        server.crash()
        await until(lambda: client.generation >= 2)
        assert told == [2]
        assert await do(client, FLUSH) == 0


async def test_close_with_requests_in_flight_drains_them() -> None:
    """Hanging up with requests in flight aborts nbdkit 1.32."""
    disk = MemoryDisk(1 << 20)
    server = Server({"": disk}, faults=Faults(delay_s=0.05))
    server.commands = []
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            async with running_client(unix_uri(folder / "s")) as client:
                waiters = [
                    start(client, WRITE, i * 512, 512, [memoryview(b"z" * 512)]) for i in range(9)
                ]
                await client.close()
                assert [waiter.request.error for waiter in waiters] == [0] * 9
                assert await write(client, 0, bytes(512)) == errno.EIO
            nursery.cancel_scope.cancel()


async def test_close_while_the_server_is_away_fails_what_waits() -> None:
    async with served() as (client, server, _):
        server.faults.refuse_connections = True
        server.cut()
        await until(lambda: not client.connected)
        waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
        await client.close()
        assert await waiter.wait() == errno.EIO


async def test_leaving_fails_everything_and_stays_away_until_it_comes_back() -> None:
    async with served(faults=Faults(stall=True)) as (client, server, _):
        waiters = [start(client, READ, 0, 512, [memoryview(bytearray(512))]) for _ in range(5)]
        await client.leave(0.01, errno.EIO)
        assert [waiter.count for waiter in waiters] == [1] * 5
        assert client.in_flight == 0
        server.faults.stall = False
        waiting = start(client, READ, 0, 512, [memoryview(bytearray(512))])
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (server.connections_total, waiting.count) == (1, 0)
        client.come_back()
        assert await waiting.wait() == 0
        assert server.connections_total == 2


async def test_leaving_while_the_server_is_away_ends_the_attempts_to_connect() -> None:
    async with served() as (client, server, _):
        server.faults.refuse_connections = True
        server.cut()
        await until(lambda: not client.connected)
        await client.leave(0.01, errno.EIO)
        server.faults.refuse_connections = False
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert server.connections_total == 1
        client.come_back()
        assert await read(client, 0, 512) == bytes(512)


# Several connections.


async def test_several_connections_spread_requests_and_keep_overlapping_writes_apart() -> None:
    options = replace(FAST, connections=4)
    async with served(1 << 20, options=options, faults=Faults(reorder=Random(3))) as (
        client,
        server,
        disk,
    ):
        assert server.connections_total == 4
        waiters = []
        for round_ in range(50):
            data = bytes([round_]) * 8192
            waiters.append(start(client, WRITE, 4096 * (round_ % 3), 8192, [memoryview(data)]))
        for waiter in waiters:
            assert await waiter.wait() == 0
        # In the order they came: 47 → 8192, 48 → 0, 49 → 4096.
        assert disk.data[:4096] == bytes([48]) * 4096
        assert disk.data[4096:12288] == bytes([49]) * 8192
        assert disk.data[12288:16384] == bytes([47]) * 4096
        assert await do(client, FLUSH) == 0


async def test_several_connections_without_multi_conn_use_one() -> None:
    settings = ServerSettings(flags=DEFAULT_FLAGS & ~TransmissionFlags.CAN_MULTI_CONN)
    async with served(settings=settings, options=replace(FAST, connections=4)) as (
        client,
        server,
        _,
    ):
        assert server.connections_total == 1
        assert await write(client, 0, bytes(512)) == 0


async def test_several_connections_one_lost_all_are_replaced() -> None:
    async with served(options=replace(FAST, connections=3)) as (client, server, disk):
        waiters = [
            start(client, WRITE, i * 512, 512, [memoryview(pattern(i, 512))]) for i in range(60)
        ]
        server.cut()
        for i, waiter in enumerate(waiters):
            assert await waiter.wait() == 0
            assert disk.data[i * 512 : i * 512 + 512] == pattern(i, 512)
        assert server.connections_total == 6


# The stale write.


async def test_stale_write_with_grace_does_not_overwrite_newer_data() -> None:
    """The old connection's write is executed after the reconnect."""
    options = replace(FAST, request_timeout_s=0.1, stale_write_grace_s=3600)
    async with served(options=options) as (client, server, disk):
        server.faults.leave_writes_behind = True
        server.faults.stall = True
        first = start(client, WRITE, 0, 512, [memoryview(b"A" * 512)])
        await until(lambda: bool(server._left_behind))
        server.faults.leave_writes_behind = False
        server.faults.stall = False
        assert await first.wait() == 0  # sent again on the second connection
        second = start(client, WRITE, 0, 512, [memoryview(b"B" * 512)])
        elsewhere = start(client, WRITE, 4096, 512, [memoryview(b"C" * 512)])
        assert await elsewhere.wait() == 0
        assert not second.finished.is_set()
        server.execute_left_behind()
        client.link.tick(trio.current_time() + 3600)
        assert await second.wait() == 0
        assert disk.data[:512] == b"B" * 512


async def test_stale_write_no_grace_with_a_fencing_server() -> None:
    options = replace(FAST, request_timeout_s=0.1, stale_write_grace_s=3600)
    settings = ServerSettings(description="volume=x session=yes instance=1")
    async with served(settings=settings, options=options) as (client, server, _disk):
        server.faults.stall = True
        first = start(client, WRITE, 0, 512, [memoryview(b"A" * 512)])
        await trio.sleep(0.02)
        server.faults.stall = False
        assert await first.wait() == 0
        assert await write(client, 0, b"B" * 512) == 0


# Bad input.


@pytest.mark.parametrize(
    ("uri", "kind", "text"),
    [
        ("nbd://127.0.0.1:1/", ConnectionLost, "cannot connect"),
        ("nbd+unix:///?socket=/nonexistent/socket", ConnectionLost, "no such socket"),
    ],
)
async def test_connect_unreachable_server_says_so(
    uri: str, kind: type[BridgeError], text: str
) -> None:
    async with running_client(uri, connect=False) as client:
        with pytest.raises(kind, match=text):
            await client.connect()


async def test_connect_unknown_export_is_a_config_error() -> None:
    server = Server({"disk": MemoryDisk(512)})
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            async with running_client(unix_uri(folder / "s", "nope"), connect=False) as client:
                with pytest.raises(
                    ConfigError, match=r"refused the export 'nope'.* there is 'disk'"
                ):
                    await client.connect()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("look", [inspect, list_exports])
async def test_inspect_and_list_leave_a_silent_server_in_time(
    look: Callable[..., Awaitable[object]], autojump_clock: trio.testing.MockClock
) -> None:
    options = replace(FAST, connect_timeout_s=7.0)
    with short_directory() as folder, socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(folder / "s"))
        listening.listen()

        with pytest.raises(ConnectionLost, match=r"no answer within 7 s \(waited for the greeting"):
            await look(parse_uri(unix_uri(folder / "s")), options)

    assert trio.current_time() == 7.0


@pytest.mark.parametrize("what", ["file", "directory"])
async def test_connect_to_a_path_that_is_not_a_socket_says_so(what: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "directory").mkdir()
    async with running_client(unix_uri(tmp_path / what), connect=False) as client:
        with pytest.raises(ConfigError, match=f"{what}: not a socket"):
            await client.connect()


@pytest.mark.parametrize(
    ("says", "text"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "not an NBD server"),
        (b"SSH-2.0-x\r\n", "not an NBD server"),
        (b"", "waited for the greeting"),
    ],
)
async def test_connect_to_something_else_says_so_in_time(says: bytes, text: str) -> None:
    async def speak(stream: trio.SocketStream) -> None:
        async with stream:
            if says:
                await stream.send_all(says)
                return
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, speak, listeners)
        options = ClientOptions(connect_timeout_s=HUNG_S if says else 0.3)
        async with running_client(f"nbd://127.0.0.1:{port}", options, connect=False) as client:
            with pytest.raises(BridgeError, match=text):
                await client.connect()
        nursery.cancel_scope.cancel()


async def test_finished_requests_leave_no_view_of_their_memory() -> None:
    """A region of guest memory with a view of it cannot be unmapped."""
    async with served(8 << 20, options=replace(FAST, connections=1)) as (client, server, _):
        memory = mmap.mmap(-1, 4 << 20)
        views = [memoryview(memory)[i << 20 : (i + 1) << 20] for i in range(4)]
        for op in (WRITE, READ):
            waiters = [start(client, op, 0, 1 << 20, [view]) for view in views]
            server.cut()
            for waiter in waiters:
                assert await waiter.wait() == 0
            waiters.clear()
        del waiter
        for view in views:
            view.release()
        memory.close()


@pytest.mark.parametrize("connections", [1, 4])
async def test_server_that_hangs_up_on_trims_costs_the_trims_only(connections: int) -> None:
    faults = Faults(hangs_up_on=p.CMD_TRIM)
    options = replace(FAST, connections=connections)
    async with served(faults=faults, options=options) as (client, _, _d):
        trims = [start(client, DISCARD, 4096 * number, 4096, []) for number in range(3)]
        beside = start(client, WRITE, 65536, 512, [memoryview(bytearray(b"x" * 512))])
        assert await beside.wait() == 0
        assert [await trim.wait() for trim in trims] == [errno.EIO] * 3
        assert await read(client, 65536, 512) == b"x" * 512
        assert client.in_flight == 0


async def test_reply_that_breaks_a_rule_each_time_does_not_freeze_the_disk() -> None:
    """What makes us hang up again and again is the same as what makes the server do it."""
    settings = ServerSettings(structured=False, extended=False)
    faults = Faults(oversize_at=1)
    async with served(settings=settings, faults=faults) as (client, _, _d):
        requests = [
            start(client, READ, 512 * number, 512, [memoryview(bytearray(512))])
            for number in range(8)
        ]
        # The second answer on each connection is bad, so about one in two comes through.
        assert {await request.wait() for request in requests} <= {0, errno.EIO}
        assert client.in_flight == 0


async def test_server_that_hangs_up_on_everything_fails_requests_after_the_reconnect_timeout() -> (
    None
):
    faults = Faults(cut_after_commands=1)
    options = replace(FAST, reconnect_timeout_s=0.3)
    async with served(faults=faults, options=options) as (client, _, _d):
        assert await do(client, READ, 0, 0) == 0
        waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
        assert await waiter.wait() == errno.EIO


@pytest.mark.parametrize("extended", [False, True])
async def test_block_status_of_more_than_a_command_takes_tells_of_the_beginning(
    extended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "_STATUS_MAX_BYTES", 128 << 10)
    async with served(1 << 20, ServerSettings(extended=extended)) as (client, server, disk):
        disk.data[64 << 10 : 128 << 10] = b"x" * (64 << 10)
        server.commands = []

        extents = await status(client, 0, 512 << 10)

        assert [length for length, _ in extents] == [64 << 10, 64 << 10]
        assert [command.length for command in server.commands] == [128 << 10]


async def test_block_status_and_prefetch_within_blocks_are_of_whole_blocks() -> None:
    settings = ServerSettings(block_sizes=(4096, 4096, 1 << 20))
    async with served(1 << 20, settings) as (client, server, disk):
        disk.data[65536:131072] = b"x" * 65536
        server.commands = []

        extents = await status(client, 61440 + 512, 7168)
        assert await do(client, PREFETCH, 4096 + 512, 1024) == 0

        assert [length for length, _ in extents] == [3584, 3584]
        sent = [(command.offset, command.length) for command in server.commands]
        assert sent == [(61440, 8192), (4096, 4096)]


async def test_block_status_of_a_server_that_has_none_is_refused_and_nothing_sent() -> None:
    async with served(1 << 20, ServerSettings(block_status=False)) as (client, server, _):
        server.commands = []
        waiter = start(client, BLOCK_STATUS, 0, 4096, [])
        assert await waiter.wait() == errno.EOPNOTSUPP
        plain = Waiter(client, Request(BLOCK_STATUS, 0, 4096, [], lambda _: None))
        assert await plain.wait() == errno.EINVAL
        assert not server.commands


class SizedPerConnection(MemoryDisk):
    """Each connection is told of another size, as of a server in front of two that differ."""

    @property
    def size_bytes(self) -> int:
        self._told += 1
        return self._size_bytes * self._told

    @size_bytes.setter
    def size_bytes(self, size_bytes: int) -> None:
        self._size_bytes, self._told = size_bytes, 0


class DescribedPerConnection(ServerSettings):
    """Each connection is told of the next number, as when the first one's session has ended before
    the second one was let in."""

    _told = 0

    @property
    def description(self) -> str:  # type: ignore[override]
        DescribedPerConnection._told += 1
        return self._text.format(DescribedPerConnection._told)

    @description.setter
    def description(self, text: str) -> None:
        self._text = text


@pytest.mark.parametrize(
    ("disk", "description", "difference"),
    [
        (SizedPerConnection, "", "size: "),
        (MemoryDisk, "nbd-bridge volume=v generation={} written=0 instance=one", "session: "),
        (MemoryDisk, "nbd-bridge volume=v generation=1 written=0 instance={}", "instance"),
    ],
)
async def test_connections_that_are_told_different_things_are_not_used(
    disk: type[MemoryDisk], description: str, difference: str
) -> None:
    """Of two sessions only the first one's counters would be looked at, while writes go to the
    second: another host's, in between, would not be noticed, and our own would look like it."""
    server = Server({"": disk(1 << 20)}, DescribedPerConnection(description=description))
    options = replace(FAST, connections=2)
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            async with running_client(unix_uri(folder / "s"), options, connect=False) as client:
                with pytest.raises(ConnectionLost, match=f"connections differ in .*{difference}"):
                    await client.connect()
            nursery.cancel_scope.cancel()


class ReadOnlyFromTheSecondOn(ServerSettings):
    """As of a volume that another host has got before the second connection is made."""

    _told = 0

    @property
    def flags(self) -> TransmissionFlags:  # type: ignore[override]
        self._told += 1
        return self._first if self._told == 1 else self._first | TransmissionFlags.READ_ONLY

    @flags.setter
    def flags(self, flags: TransmissionFlags) -> None:
        self._first = flags


async def test_connections_of_which_one_takes_no_writes_are_not_used() -> None:
    """Some of the guest's writes would fail."""
    server = Server({"": MemoryDisk(1 << 20)}, ReadOnlyFromTheSecondOn())
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            uri, options = unix_uri(folder / "s"), replace(FAST, connections=2)
            async with running_client(uri, options, connect=False) as client:
                with pytest.raises(ConnectionLost, match="differ in what may be asked of them"):
                    await client.connect()
            nursery.cancel_scope.cancel()


async def test_what_a_server_offers_is_told_without_using_it() -> None:
    disks = {name: MemoryDisk(1 << 20) for name in ("one", "two")}
    server = Server(disks, ServerSettings(description="a disk"))
    server.commands = []
    with short_directory() as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, folder / "s")
            uri = parse_uri(unix_uri(folder / "s", "two"))

            assert (await inspect(uri)).size_bytes == 1 << 20
            listed = await list_exports(uri)
            with pytest.raises(ConfigError, match="no export"):
                await inspect(parse_uri(unix_uri(folder / "s", "three")))

            assert [each.name for each in listed] == ["one", "two"]
            assert not server.commands
            nursery.cancel_scope.cancel()

"""The awaits at the edge, cancelled; and descriptors, none of which may be left behind."""

from __future__ import annotations

import errno
import os
import resource
import socket
from dataclasses import replace

import pytest
import trio
import trio.testing

from bridge.datapath.request import READ, Request
from bridge.errors import BridgeError
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.server.client_options import ClientOptions
from bridge.server.inspection import inspect, list_exports
from bridge.server.uri import parse_uri
from tests.server.helpers import FAST, LayerAbove, read, running_client, served, start
from tests.tools import HUNG_S, until


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _say_nothing(stream: trio.SocketStream) -> None:
    await trio.sleep_forever()


async def test_connect_cancelled_leaves_no_socket() -> None:
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        port = listeners[0].socket.getsockname()[1]
        nursery.start_soon(trio.serve_listeners, _say_nothing, listeners)
        async with running_client(f"nbd://127.0.0.1:{port}", connect=False) as client:
            before = open_descriptors()
            with trio.move_on_after(0.05) as scope:
                await client.connect()
            assert scope.cancelled_caught
            await trio.testing.wait_all_tasks_blocked()
            assert open_descriptors() <= before + 1  # the listener's end
        nursery.cancel_scope.cancel()


async def test_a_tcp_socket_takes_as_much_as_its_buffer_has_room_for() -> None:
    server = Server({"": MemoryDisk(1 << 20)})
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.serve_tcp)
        async with running_client(f"nbd://127.0.0.1:{port}") as client:
            sock = client._connections[0]._sock
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT) == 0
        nursery.cancel_scope.cancel()


async def test_close_cancelled_closes_at_once_and_fails_requests_in_flight() -> None:
    async with served(faults=Faults(stall=True)) as (client, _, _d):
        waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
        with trio.move_on_after(0.05):
            await client.close()
        assert waiter.count == 1
        assert not any(connection.alive for connection in client._connections)


async def test_close_of_a_silent_server_takes_no_longer_than_its_limit() -> None:
    options = replace(FAST, close_timeout_s=0.1)
    async with served(faults=Faults(stall=True), options=options) as (client, _, _d):
        waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
        with trio.fail_after(HUNG_S):
            await client.close()
        assert waiter.count == 1


async def test_run_cancelled_while_reconnecting_leaves_no_socket() -> None:
    before = open_descriptors()
    async with served() as (client, server, _):
        server.faults.refuse_connections = True
        server.cut()
        await until(lambda: not client.connected)
    assert open_descriptors() <= before


async def test_many_reconnects_leave_no_descriptors() -> None:
    async with served() as (client, server, _):
        assert await read(client, 0, 512) == bytes(512)
        before = open_descriptors()
        for generation in range(2, 30):
            server.cut()
            await until(lambda generation=generation: client.generation >= generation)
        await until(lambda: open_descriptors() <= before)


@pytest.mark.parametrize("look", [inspect, list_exports])
async def test_looking_leaves_no_descriptors_whatever_comes(look: object) -> None:
    assert callable(look)
    server = Server({"": MemoryDisk(512)})
    async with trio.open_nursery() as nursery:
        port = await nursery.start(server.serve_tcp)
        await look(parse_uri(f"nbd://127.0.0.1:{port}"))
        before = open_descriptors()
        for garble in (0, 5, 17, 30, 40, 60):
            server.faults.garble_byte = garble
            with trio.move_on_after(0.2):
                try:
                    await look(parse_uri(f"nbd://127.0.0.1:{port}"), ClientOptions())
                except BridgeError:
                    continue
        await until(lambda: open_descriptors() <= before)
        nursery.cancel_scope.cancel()


async def test_reconnect_without_a_descriptor_left_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A front-end may hold nearly all of them for a while."""
    failures: list[Exception] = []
    async with served() as (client, server, _):
        failed = client.outages.failed

        def noted(reason: Exception) -> bool:
            failures.append(reason)
            return failed(reason)

        monkeypatch.setattr(client.outages, "failed", noted)
        assert await read(client, 0, 512) == bytes(512)
        limits = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(map(int, os.listdir("/proc/self/fd")))
        taken = [os.dup(0) for _ in range(highest)]
        try:
            for spare in range(4):  # Each of them is used up at another place.
                resource.setrlimit(resource.RLIMIT_NOFILE, (max(taken) + 1 - spare, limits[1]))
                failures.clear()
                server.cut()
                waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
                await until(lambda: bool(failures) or not client.connected)
                await until(lambda: bool(failures) or client.connected)
                resource.setrlimit(resource.RLIMIT_NOFILE, limits)
                assert await waiter.wait() == 0
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in taken:
                os.close(fd)


@pytest.mark.parametrize("code", [errno.ENOPROTOOPT, errno.ENOBUFS])
async def test_socket_that_cannot_be_tuned_is_a_lost_connection_and_closed(
    monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    async with served() as (client, server, _):
        assert await read(client, 0, 512) == bytes(512)
        before = open_descriptors()

        def refuse(sock: socket.socket) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("bridge.server.connecting._tune", refuse)
        server.cut()
        await until(lambda: os.strerror(code) in client.outages.reason)
        assert open_descriptors() <= before
        monkeypatch.undo()
        assert await read(client, 0, 512) == bytes(512)


async def test_connection_that_cannot_be_watched_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with served() as (client, server, _):
        assert await read(client, 0, 512) == bytes(512)
        before = open_descriptors()

        def refuse(fd: int, callback: object, events: int = 0) -> None:
            raise OSError(errno.ENOSPC, "no more watches")

        monkeypatch.setattr(client._loop, "add", refuse)
        server.cut()
        await until(lambda: "no more watches" in client.outages.reason)
        assert open_descriptors() <= before
        monkeypatch.undo()
        assert await read(client, 0, 512) == bytes(512)


async def test_exception_in_a_completion_does_no_harm_to_other_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    logged: list[str] = []
    monkeypatch.setattr(
        "bridge.datapath.turn._log.error", lambda text, **more: logged.append(str(more))
    )
    async with served() as (client, _, _d):

        def fail(request: Request) -> None:
            raise ValueError("a bug of ours")

        buffers = [memoryview(bytearray(512))]
        client.submit(Request(READ, 0, 512, buffers, fail))
        beside = start(client, READ, 512, 512, [memoryview(bytearray(512))])
        assert await beside.wait() == 0
        assert await read(client, 0, 512) == bytes(512)
        assert client.generation == 1
    assert len(logged) == 1
    assert "a bug of ours" in logged[0]


async def test_exception_while_sending_ends_that_connection_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with served() as (client, _, _d):

        def fail(buffer: object) -> int:
            raise MemoryError

        monkeypatch.setattr(client._connections[0], "_send", fail)
        assert await read(client, 0, 512) == bytes(512)
        assert client.generation == 2


async def test_exception_after_a_reconnect_costs_that_connection_only() -> None:
    """What the layer above does with the new export may fail: the next one may be another."""
    calls = 0

    def fail_twice() -> None:
        nonlocal calls
        calls += 1
        if calls < 3:
            raise ValueError("a bug of ours")

    async with served(above=LayerAbove(reconnected=fail_twice)) as (client, server, _):
        assert await read(client, 0, 512) == bytes(512)
        server.cut()
        await until(lambda: not client.connected or client.generation > 1)
        assert await read(client, 0, 512) == bytes(512)
        assert calls == 3

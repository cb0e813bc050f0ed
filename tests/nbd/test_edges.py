"""The awaits at the edge, cancelled; and descriptors, none of which may be left behind."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import trio
import trio.testing

from bridge.errors import BridgeError
from bridge.nbd.client import inspect, list_exports
from bridge.nbd.options import ClientOptions
from bridge.nbd.server import Faults, Server
from bridge.nbd.server_disk import MemoryDisk
from bridge.nbd.uri import parse_uri
from bridge.request import READ
from tests.nbd.helpers import FAST, read, running_client, served, start, until
from tests.tools import HUNG_S


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


async def test_close_cancelled_closes_at_once_and_fails_what_is_in_flight() -> None:
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

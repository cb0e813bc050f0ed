"""Connections that would never end: silent ones, and idle ones when nbdkit is to stop."""

from __future__ import annotations

import select
import socket
import threading
import time
from pathlib import Path

import pytest

from nbd_plugin.connections import HANDSHAKE_S, MAX_SILENT, Connections
from tests.plugin.client import READ, RawClient
from tests.plugin.server import Nbdkit
from tests.plugin.test_deployment import free_port
from tests.tools import HUNG_S

MIB = 1 << 20


class World:
    """A clock, and whose connections were ended."""

    def __init__(self) -> None:
        self.now = 0.0
        self.ended: list[bytes] = []
        self.connections = Connections(now=lambda: self.now, end=self._end)

    def _end(self, peers: set[bytes]) -> None:
        self.ended += sorted(peers)

    def at(self, now: float) -> list[bytes]:
        self.now = now
        self.connections.end_silent()
        ended, self.ended = self.ended, []
        return ended


def test_connection_that_opens_nothing_is_ended_after_a_time() -> None:
    world = World()
    assert world.connections.due_in_s() is None
    world.connections.is_silent(b"a")
    world.now = 1
    world.connections.is_silent(b"b")
    assert world.connections.due_in_s() == HANDSHAKE_S - 1
    assert world.at(HANDSHAKE_S - 0.1) == []
    assert world.at(HANDSHAKE_S) == [b"a"]
    assert world.at(HANDSHAKE_S + 1) == [b"b"]
    assert world.connections.due_in_s() is None


def test_connection_with_an_export_is_left_alone() -> None:
    world = World()
    world.connections.is_silent(b"a")
    world.connections.is_heard(b"a")
    assert world.at(10 * HANDSHAKE_S) == []
    world.connections.is_silent(b"a")  # it closed the export, and may open another
    assert world.at(11 * HANDSHAKE_S - 0.1) == []
    assert world.at(11 * HANDSHAKE_S) == [b"a"]


def test_of_too_many_silent_connections_the_oldest_are_ended() -> None:
    world = World()
    peers = [f"{number:04}".encode() for number in range(MAX_SILENT + 3)]
    for peer in peers:
        world.connections.is_silent(peer)
    assert world.connections.due_in_s() == 0
    assert world.at(0) == peers[:3]


def test_peers_without_an_address_cannot_be_told_apart_and_are_left_alone() -> None:
    world = World()
    world.connections.is_silent(b"")
    assert world.connections.due_in_s() is None


def serve(volumes: Path, where: str, *parameters: str, options: tuple[str, ...] = ()) -> Nbdkit:
    return Nbdkit(f"file={volumes}/disk", f"size={MIB}", *parameters, options=options, where=where)


def test_crowd_of_silent_connections_does_not_keep_a_client_out(volumes: Path, where: str) -> None:
    port = free_port()
    with Nbdkit(
        *(f"file={volumes}/disk", f"size={MIB}"),
        options=("-i", "127.0.0.1", "-p", str(port)),
        where=where,
        unix=False,
    ):
        held = RawClient(port, "disk@readonly")
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(3 * MAX_SILENT)]
        assert held.read(0, 4) == bytes(4), "who has an export stays"
        with RawClient(port, "disk") as client:
            client.write(0, b"x" * 512)
        deadline = time.monotonic() + HUNG_S
        while (alive := sum(not is_ended(sock) for sock in crowd)) > MAX_SILENT:
            assert time.monotonic() < deadline, f"{alive} are left"
            time.sleep(0.05)
        assert held.read(0, 4) == b"xxxx"
        held.close()
        for sock in crowd:
            sock.close()


def is_ended(sock: socket.socket) -> bool:
    """The server closed it: after its greeting (18 bytes) comes the end."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLRDHUP)
    return any(events & (select.POLLRDHUP | select.POLLHUP) for _, events in poll.poll(0))


@pytest.mark.parametrize("unix", [True, False])
def test_nbdkit_ends_at_sigterm_while_idle_clients_are_connected(
    volumes: Path, where: str, unix: bool
) -> None:
    port = free_port()
    options = () if unix else ("-i", "127.0.0.1", "-p", str(port))
    server = Nbdkit(f"file={volumes}/disk", f"size={MIB}", options=options, where=where, unix=unix)
    with server:
        address: str | int = str(server.socket) if unix else port
        clients = [RawClient(address, "disk"), RawClient(address, "disk@readonly")]
        clients[0].write(0, b"x" * 512)
        silent = socket.socket(socket.AF_UNIX if unix else socket.AF_INET)
        silent.connect(address if unix else ("127.0.0.1", port))
        server.process.terminate()
        assert server.process.wait(HUNG_S) == 0
        for client in clients:
            client.cut()
        silent.close()


@pytest.mark.parametrize("parallel", ["on", "off"])
def test_nbdkit_ends_at_sigterm_while_clients_are_busy(
    volumes: Path, where: str, parallel: str
) -> None:
    with serve(volumes, where, f"parallel={parallel}", options=("-t", "4")) as server:
        clients = [RawClient(str(server.socket), "disk@session=s") for _ in range(2)]
        stop = threading.Event()
        begun = threading.Barrier(3)

        def read(client: RawClient) -> None:
            try:
                client.read(0, 4096)
                begun.wait(HUNG_S)
                while not stop.is_set():
                    for number in range(8):
                        client.send(READ, number * 4096, 4096)
                    client.receive(8 * (16 + 4096))
            except OSError:
                pass
            client.cut()

        threads = [threading.Thread(target=read, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        begun.wait(HUNG_S)
        server.process.terminate()
        status = server.process.wait(HUNG_S)
        stop.set()
        for thread in threads:
            thread.join()
        assert status == 0, server.log

"""What a service manager is told, and the start before the server is there."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import trio
import trio.lowlevel

from bridge.app import service_manager
from bridge.app.cache_names import default_directory
from bridge.app.serve import serve_disk
from bridge.app.service_manager import notify, pid_file
from bridge.app.settings import (
    CacheSettings,
    ControlSettings,
    DiskSettings,
    LimitSettings,
    ServeSettings,
)
from bridge.cache.cache_options import OFF
from bridge.errors import ConfigError, ConnectionLost
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from tests.processes import unix_uri
from tests.tools import HUNG_S, until


class Manager:
    """The manager's end of NOTIFY_SOCKET."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self.told: list[str] = []

    def look(self) -> list[str]:
        """All lines so far."""
        while True:
            try:
                self.told += self._sock.recv(4096, socket.MSG_DONTWAIT).decode().splitlines()
            except BlockingIOError:
                return self.told


@pytest.fixture
def manager(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Manager]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(directory / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(directory / "notify"))
        yield Manager(sock)


def settings_for(directory: Path, *, wait: bool) -> ServeSettings:
    return ServeSettings(
        disk=DiskSettings(socket_path=str(directory / "vm0.sock")),
        cache=CacheSettings(mode=OFF),
        limits=LimitSettings(wait_for_server=wait, stop_timeout_s=2.0),
        control=ControlSettings(socket=OFF, pid_file=str(directory / "pid")),
    )


async def test_serve_waits_for_its_server_and_says_when_it_is_ready(
    directory: Path, manager: Manager
) -> None:
    vhost = directory / "vm0.sock"
    server = Server({"": MemoryDisk(1 << 20)})
    async with trio.open_nursery() as nursery:
        serve = partial(serve_disk, unix_uri(directory / "nbd"), settings_for(directory, wait=True))
        async with trio.open_nursery() as serving:
            serving.start_soon(serve)
            await until(lambda: any("waiting for the server" in line for line in manager.look()))
            assert "READY=1" not in manager.told
            assert not vhost.exists()
            assert not (directory / "pid").exists()
            await nursery.start(server.serve_unix, directory / "nbd")
            await until(lambda: "READY=1" in manager.look())
            assert (directory / "pid").read_text() == f"{os.getpid()}\n"
            assert "STATUS=guest none, server connected" in manager.told
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"a" * 512)
            signal.raise_signal(signal.SIGTERM)
        assert "STOPPING=1" in manager.look()
        assert not (directory / "pid").exists()
        nursery.cancel_scope.cancel()


async def test_serve_that_waits_for_its_server_can_be_stopped(
    directory: Path, manager: Manager
) -> None:
    with trio.fail_after(HUNG_S):
        async with trio.open_nursery() as serving:
            settings = settings_for(directory, wait=True)
            serving.start_soon(serve_disk, unix_uri(directory / "nbd"), settings)
            await until(lambda: any("waiting for the server" in line for line in manager.look()))
            signal.raise_signal(signal.SIGTERM)


async def test_serve_without_a_server_ends_unless_it_is_to_wait(directory: Path) -> None:
    with pytest.RaisesGroup(ConnectionLost, allow_unwrapped=True, flatten_subgroups=True):
        await serve_disk(unix_uri(directory / "nbd"), settings_for(directory, wait=False))


async def test_serve_does_not_wait_for_an_export_that_does_not_exist(directory: Path) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(Server({"other": MemoryDisk(1 << 20)}).serve_unix, directory / "nbd")
        with pytest.RaisesGroup(ConfigError, allow_unwrapped=True, flatten_subgroups=True):
            await serve_disk(unix_uri(directory / "nbd"), settings_for(directory, wait=True))
        nursery.cancel_scope.cancel()


async def test_manager_gets_signs_of_life_and_a_status_that_has_changed(
    manager: Manager, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "2000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    texts = iter(["one", "one", "two"])
    with trio.move_on_after(5.5):
        await service_manager.run(lambda: next(texts, "two"))
    told = manager.look()
    assert told[:3] == ["READY=1", f"MAINPID={os.getpid()}", "STATUS=one"]
    assert told.count("STATUS=two") == 1
    assert told.count("STATUS=one") == 1
    assert told.count("WATCHDOG=1") == 6


async def test_manager_that_has_too_much_to_read_is_told_later_that_the_disk_is_there(
    manager: Manager,
) -> None:
    while notify("STATUS=flood"):
        pass
    async with trio.open_nursery() as nursery:
        nursery.start_soon(service_manager.run, lambda: "one")
        await trio.lowlevel.checkpoint()
        assert "READY=1" not in manager.look()
        await until(lambda: "READY=1" in manager.look())
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("usec", "pid"), [("", ""), ("x", ""), ("2000000", "1"), ("-5", ""), ("0", "")]
)
async def test_manager_that_wants_no_signs_of_life_gets_none(
    usec: str,
    pid: str,
    manager: Manager,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", usec)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    with trio.move_on_after(60):
        await service_manager.run(lambda: "one")
    assert "WATCHDOG=1" not in manager.look()


@pytest.mark.parametrize("address", ["", "nonsense", "/nowhere", "@nobody-there"])
def test_manager_that_is_not_there_costs_nothing(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    notify("READY=1")


def test_manager_with_an_abstract_socket_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"nbd-bridge-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(f"\0{name}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}")
        notify("READY=1", "STATUS=x")
        assert sock.recv(100) == b"READY=1\nSTATUS=x"


def test_pid_file_of_a_successor_stays(directory: Path) -> None:
    path = directory / "pid"
    with pid_file(str(path)):
        path.write_text("1\n")
    assert path.read_text() == "1\n"


def test_pid_file_that_cannot_be_written_is_one_line(directory: Path) -> None:
    with pytest.raises(ConfigError, match=f"pid file {directory}/no/pid: No such file"):
        with pid_file(str(directory / "no" / "pid")):
            pytest.fail("it was written")
    (directory / "folder").mkdir()
    with pytest.raises(ConfigError, match="Is a directory"):
        with pid_file(str(directory / "folder")):
            pytest.fail("it was written")
    assert sorted(each.name for each in directory.iterdir()) == ["folder"]


def test_cache_is_in_the_directory_that_the_manager_has_made_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CACHE_DIRECTORY", "/var/cache/nbd-bridge:/other")
    assert default_directory() == Path("/var/cache/nbd-bridge")
    monkeypatch.setenv("CACHE_DIRECTORY", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "/home/me/.cache")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert default_directory() == Path("/home/me/.cache/nbd-bridge")

"""nbdkit with our plugin, killed and restarted under load: no error, nothing stale or lost."""

from __future__ import annotations

import contextlib
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from bridge.datapath.request import FLUSH
from bridge.peers.blk_driver import BlkDriver
from bridge.server.client import Client
from tests.processes import serving
from tests.server.helpers import FAST, do, pattern, read, running_client, write
from tests.tools import need, until

ROOT = Path(__file__).parents[2]
SIZE = 16 << 20
BLOCK = 4096
KILLS = 50
WORKERS = 8


class Nbdkit:
    """nbdkit with our plugin on a file, to be killed and started again."""

    def __init__(self, folder: Path) -> None:
        self._argv = [
            need("nbdkit"),
            "-f",
            "-U",
            str(folder / "s"),
            "python",
            str(ROOT / "nbd_plugin" / "plugin.py"),
            f"file={folder / 'disk.img'}",
            f"size={SIZE}",
        ]
        self._socket = folder / "s"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen(
            self._argv, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _listens(self) -> bool:
        """The file is there a moment before anybody may connect to it."""
        with socket.socket(socket.AF_UNIX) as sock:
            return sock.connect_ex(str(self._socket)) == 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.start()
        try:
            await until(self._listens)
            yield
        finally:
            self.kill()


class Plain:
    """The client itself, with errors raised as the built-in guest raises them."""

    def __init__(self, client: Client) -> None:
        self._client = client

    async def read(self, offset: int, length: int) -> bytes:
        return await read(self._client, offset, length)

    async def write(self, offset: int, data: bytes) -> None:
        assert await write(self._client, offset, data) == 0

    async def flush(self) -> None:
        assert await do(self._client, FLUSH) == 0


async def _work(
    disk: Plain | BlkDriver, number: int, versions: dict[int, int], stop: trio.Event
) -> int:
    """Write and read blocks of one's own; the number of operations."""
    random = Random(number)
    mine = range(number, SIZE // BLOCK, WORKERS)
    count = 0
    while not stop.is_set():
        block = random.choice(mine)
        if random.randrange(3):
            version = versions.get(block, 0) + 1
            await disk.write(block * BLOCK, pattern(block, BLOCK, version))
            versions[block] = version
        elif block in versions:
            expected = pattern(block, BLOCK, versions[block])
            assert await disk.read(block * BLOCK, BLOCK) == expected
        if random.randrange(50) == 0:
            await disk.flush()
        count += 1
    return count


@pytest.mark.timeout(120)
@pytest.mark.parametrize("connections", [1, 4])
async def test_server_killed_under_load_no_error_nothing_lost(
    folder: Path, connections: int
) -> None:
    server = Nbdkit(folder)
    versions: dict[int, int] = {}
    kills = KILLS if connections == 1 else 10
    options = replace(FAST, connections=connections)
    async with server.running():
        uri = f"nbd+unix:///?socket={folder}/s"
        async with running_client(uri, options) as client:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for number in range(WORKERS):
                    nursery.start_soon(_work, Plain(client), number, versions, stop)
                random = Random(1)
                for kill in range(kills):
                    await trio.sleep(random.uniform(0, 0.1))
                    server.kill()
                    server.start()
                    await until(lambda kill=kill: client.generation >= kill + 2)
                    # On a busy machine it would be killed before it has answered anything, again
                    # and again: like one that hangs up on a command, which then fails.
                    await read(client, 0, BLOCK)
                stop.set()
            assert client.generation == kills + 1
            for block, version in versions.items():
                found = await read(client, block * BLOCK, BLOCK)
                assert found == pattern(block, BLOCK, version), f"block {block}"
    image = (folder / "disk.img").read_bytes()
    for block, version in versions.items():
        assert image[block * BLOCK : (block + 1) * BLOCK] == pattern(block, BLOCK, version)


@pytest.mark.timeout(120)
async def test_server_killed_50_times_under_a_guest_no_error_nothing_lost(folder: Path) -> None:
    """The whole path: what the guest was told is written, is there, and nothing older."""
    server = Nbdkit(folder)
    versions: dict[int, int] = {}
    disk_socket = folder / "vm"
    async with server.running(), serving(f"nbd+unix:///?socket={folder}/s", disk_socket):
        async with await BlkDriver.connect(disk_socket) as guest:
            stop = trio.Event()
            async with trio.open_nursery() as nursery:
                for number in range(WORKERS):
                    nursery.start_soon(_work, guest, number, versions, stop)
                random = Random(2)
                for _ in range(KILLS):
                    await trio.sleep(random.uniform(0, 0.1))
                    server.kill()
                    server.start()
                    # A request that was sent after the kill is answered by the new server.
                    await guest.flush()
                stop.set()
            for block, version in versions.items():
                found = await guest.read(block * BLOCK, BLOCK)
                assert found == pattern(block, BLOCK, version), f"block {block}"
            await guest.flush()
    image = (folder / "disk.img").read_bytes()
    for block, version in versions.items():
        assert image[block * BLOCK : (block + 1) * BLOCK] == pattern(block, BLOCK, version)

"""Things that go wrong under load: a killed server, a full disk, a medium that fails."""

from __future__ import annotations

import contextlib
import errno
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import peers
from tests.plugin.client import WRITE, NbdError, RawClient
from tests.plugin.server import PEERS, Nbdkit
from tests.tools import missing

BLOCK = 4096


def block(number: int) -> bytes:
    return number.to_bytes(8, "big") * (BLOCK // 8)


@pytest.fixture
def small_disk(volumes: Path, where: str) -> Iterator[Path]:
    """A file system of 4 MiB, mounted here and for the peers."""
    path = volumes / "small"
    path.mkdir()
    mounts = [["-t", "tmpfs", "-o", "size=4M", "tmpfs", str(path)]]
    if where == PEERS:
        mounts.append(["--bind", str(path), f"{peers.ROOT}{path}"])
    with contextlib.ExitStack() as stack:
        for mount in mounts:
            done = subprocess.run(["mount", *mount], capture_output=True, check=False)
            if done.returncode != 0:
                missing("mounting a small file system needs root")
            stack.callback(subprocess.run, ["umount", mount[-1]], check=True)
        yield path


def fill(client: RawClient) -> tuple[int, int | None]:
    """Write blocks until one fails; returns how many did not, and the errno."""
    for number in range(client.size_bytes // BLOCK):
        try:
            client.write(number * BLOCK, block(number))
        except NbdError as error:
            return number, error.errno
    return client.size_bytes // BLOCK, None


def test_nbdkit_killed_under_writes_flushed_data_is_there(volumes: Path, where: str) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=64M", where=where) as server:
        client = RawClient(str(server.socket))
        for number in range(1, 400):
            client.write(number * BLOCK, block(number))
        client.flush()
        for number in range(400, 500):
            client.send(WRITE, number * BLOCK, BLOCK, block(number))
        server.kill()
        client.cut()
    with (
        Nbdkit(f"file={volumes}/disk", where=where) as server,
        RawClient(str(server.socket)) as client,
    ):
        for number in range(1, 400):
            assert client.read(number * BLOCK, BLOCK) == block(number)
        for number in range(400, 500):
            assert client.read(number * BLOCK, BLOCK) in (block(number), bytes(BLOCK))


@pytest.mark.root
def test_disk_full_client_gets_enospc_and_volume_is_intact(small_disk: Path, where: str) -> None:
    with (
        Nbdkit(f"file={small_disk}/disk", "size=64M", where=where) as server,
        RawClient(str(server.socket)) as client,
    ):
        written, error = fill(client)
        assert error == errno.ENOSPC
        assert 500 < written < 1024
        client.flush()
        for number in range(written):
            assert client.read(number * BLOCK, BLOCK) == block(number)
        # Space that is given back can be used again.
        client.trim(0, 16 * BLOCK)
        client.write(written * BLOCK, block(written))
        assert client.read(written * BLOCK, BLOCK) == block(written)
        assert client.read(0, BLOCK) == bytes(BLOCK)


def test_clients_hanging_up_with_requests_in_flight_server_lives(volumes: Path, where: str) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=64M", where=where) as server:
        for _ in range(20):
            client = RawClient(str(server.socket))
            for number in range(32):
                client.send(WRITE, number * BLOCK, BLOCK, block(number))
            client.cut()
        with RawClient(str(server.socket)) as client:
            client.write(0, block(1))
            assert client.read(0, BLOCK) == block(1)
        assert server.process.poll() is None

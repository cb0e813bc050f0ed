"""Our client against real servers, and real clients against our server."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import trio

from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.client import Client
from bridge.server.inspection import inspect, list_exports
from bridge.server.uri import parse_uri
from tests.processes import short_directory, unix_uri
from tests.server import certificates, servers
from tests.server.helpers import FAST, do, pattern, read, running_client, start, status, write
from tests.tools import need, peer

REPLIES = {
    "simple": replace(FAST, structured=False, extended=False),
    "structured": replace(FAST, extended=False),
    "extended": FAST,
}


@pytest.fixture(scope="module")
def pki() -> Iterator[dict[str, Path]]:
    with short_directory() as path:
        yield certificates.make(path)


async def exercise(client: Client, image: bytearray) -> None:
    """Reads, writes, flush, trim, zero, block status of all sizes; `image` follows along."""
    export = client.export
    random = Random(11)
    waiters = []
    for i in range(64):
        offset = i * 65536
        data = pattern(offset, 4096 if i % 2 else 65536, 3)
        image[offset : offset + len(data)] = data
        waiters.append(start(client, WRITE, offset, len(data), [memoryview(data)]))
    assert [await waiter.wait() for waiter in waiters] == [0] * 64
    assert await do(client, FLUSH) == 0
    data = pattern(1, 1 << 20)
    image[1 << 20 : 2 << 20] = data
    assert await write(client, 1 << 20, data, FUA, pieces=7) == 0
    for flags, offset in ((0, 512), (MAY_UNMAP, 1 << 19)):
        image[offset : offset + 66_560] = bytes(66_560)
        assert await do(client, WRITE_ZEROES, offset, 66_560, flags) == 0
    assert await do(client, DISCARD, 6 << 20, 1 << 20) == 0
    assert await do(client, PREFETCH, 0, 65536) == 0
    for _ in range(40):
        length = random.choice([512, 4096, 70_144, 1 << 20])
        offset = random.randrange((6 << 20) - length) & -512
        assert await read(client, offset, length, 3) == image[offset : offset + length]
    if export.can_block_status:
        extents = await status(client, 0, len(image))
        assert 0 < sum(length for length, _ in extents) <= len(image)
    whole = await read(client, 0, 6 << 20)
    assert whole == image[: 6 << 20]


@pytest.mark.parametrize("reply", list(REPLIES))
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
@pytest.mark.parametrize("tcp", [False, True], ids=["unix", "tcp"])
@pytest.mark.parametrize("kind", servers.KINDS)
async def test_matrix(
    kind: str, tcp: bool, tls: bool, reply: str, folder: Path, pki: dict[str, Path]
) -> None:
    if reply == "extended" and kind not in servers.EXTENDED:
        options = REPLIES["extended"]  # Asked for, refused, and served all the same.
    else:
        options = REPLIES[reply]
    with servers.serve(kind, folder, tcp=tcp, tls=pki["good"] if tls else None) as served:
        async with running_client(served.uri, options) as client:
            export = client.export
            assert export.size_bytes == servers.SIZE
            assert export.tls == tls
            assert export.extended == (reply == "extended" and kind in servers.EXTENDED)
            if kind != "nbd-server":
                assert export.structured == (reply != "simple")
            image = bytearray(servers.SIZE)
            await exercise(client, image)
        assert served.image.read_bytes()[: 6 << 20] == image[: 6 << 20]


@pytest.mark.nbdkit
@pytest.mark.qemu
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-nbd", "nbd-server"])
async def test_info_and_list_leave_the_server_alive(kind: str, folder: Path) -> None:
    with servers.serve(kind, folder, tcp=False, tls=None) as served:
        uri = parse_uri(served.uri)
        export = await inspect(uri)
        assert export.size_bytes == servers.SIZE
        assert uri.export_name in [listed.name for listed in await list_exports(uri)]
        assert (await inspect(uri)).size_bytes == servers.SIZE


# nbdkit's downgrades: each switch takes something away.

DOWNGRADES = {
    "no structured replies": (["--no-sr", "memory", "8M"], lambda e: not e.structured),
    "no fixed newstyle": (["--mask-handshake=0", "memory", "8M"], lambda e: not e.structured),
    "no NO_ZEROES": (["--mask-handshake=1", "memory", "8M"], lambda e: e.structured),
    "no zero": (
        ["--filter=nozero", "memory", "8M", "zeromode=none"],
        lambda e: not e.can_write_zeroes,
    ),
    "no extents": (["--filter=noextents", "memory", "8M"], lambda e: True),
    "fua none": (["--filter=fua", "memory", "8M"], lambda e: not e.can_fua),
    "fua emulate": (["--filter=fua", "memory", "8M", "fuamode=emulate"], lambda e: e.can_fua),
    "fua native": (["--filter=fua", "memory", "8M", "fuamode=native"], lambda e: e.can_fua),
    "fua force": (["--filter=fua", "memory", "8M", "fuamode=force"], lambda e: e.can_fua),
    "no cache": (
        ["--filter=nocache", "memory", "8M", "cachemode=none"],
        lambda e: not e.can_cache,
    ),
    "no multi-conn": (
        ["--filter=multi-conn", "memory", "8M", "multi-conn-mode=disable"],
        lambda e: not e.can_multi_conn,
    ),
    "blocks of 4096": (
        [
            "--filter=blocksize-policy",
            "memory",
            "8M",
            "blocksize-minimum=4096",
            "blocksize-preferred=65536",
            "blocksize-maximum=128k",
            "blocksize-error-policy=error",
        ],
        lambda e: (e.min_block_bytes, e.max_payload_bytes) == (4096, 128 << 10),
    ),
    "blocks of 64k": (
        [
            "--filter=blocksize-policy",
            "memory",
            "8M",
            "blocksize-minimum=64k",
            "blocksize-preferred=64k",
            "blocksize-maximum=1M",
            "blocksize-error-policy=error",
        ],
        lambda e: e.min_block_bytes == 65536,
    ),
    "one thread": (["-t", "1", "memory", "8M"], lambda e: True),
    "out of order": (
        ["--filter=delay", "memory", "8M", "rdelay=3ms", "wdelay=2ms"],
        lambda e: True,
    ),
}


@pytest.mark.nbdkit
@pytest.mark.parametrize("name", list(DOWNGRADES))
async def test_nbdkit_downgraded_still_serves_exactly(name: str, folder: Path) -> None:
    arguments, expected = DOWNGRADES[name]
    with servers.nbdkit(folder, *arguments) as uri:
        async with running_client(uri, replace(FAST, connections=2)) as client:
            assert expected(client.export)
            await exercise(client, bytearray(8 << 20))


@pytest.mark.nbdkit
async def test_nbdkit_oldstyle_reads_and_writes(folder: Path) -> None:
    """nbdkit 1.32 announces flush and FUA in its oldstyle handshake, and refuses both."""
    with servers.nbdkit(folder, "-o", "memory", "8M") as uri:
        async with running_client(uri) as client:
            assert await write(client, 4096, pattern(0, 1 << 20)) == 0
            assert await read(client, 4096, 1 << 20) == pattern(0, 1 << 20)


@pytest.mark.nbdkit
async def test_nbdkit_read_only_export_refuses_changes(folder: Path) -> None:
    with servers.nbdkit(folder, "-r", "memory", "1M") as uri:
        async with running_client(uri) as client:
            assert client.export.read_only
            assert await write(client, 0, bytes(512)) == errno.EPERM
            assert await read(client, 0, 512) == bytes(512)


@pytest.mark.nbdkit
async def test_nbdkit_errors_reach_the_request(folder: Path) -> None:
    arguments = ("--filter=error", "memory", "1M", "error-pread=ENOSPC", "error-pread-rate=100%")
    with servers.nbdkit(folder, *arguments) as uri:
        async with running_client(uri) as client:
            waiter = start(client, READ, 0, 512, [memoryview(bytearray(512))])
            assert await waiter.wait() == errno.ENOSPC
            assert await write(client, 0, bytes(512)) == 0


@pytest.mark.nbdkit
async def test_nbdkit_hung_up_on_with_requests_in_flight_lives_on(folder: Path) -> None:
    """nbdkit 1.32 aborts when a client leaves with three requests in flight."""
    with servers.nbdkit(folder, "--filter=delay", "memory", "1M", "rdelay=20ms") as uri:
        for _ in range(10):
            async with running_client(uri) as client:
                for i in range(16):
                    start(client, READ, i * 512, 512, [memoryview(bytearray(512))])
                await trio.sleep(0.001)
        assert (await inspect(parse_uri(uri))).size_bytes == 1 << 20


@pytest.mark.nbdkit
async def test_nbdkit_several_connections_work_in_parallel(folder: Path) -> None:
    with servers.nbdkit(folder, "memory", "8M") as uri:
        async with running_client(uri, replace(FAST, connections=4)) as client:
            assert len(client._connections) == 4
            await exercise(client, bytearray(8 << 20))


# Real clients against our server.

_CHANGES_AND_READS = [
    *("-c", "write -P 0x5a 64k 128k"),
    *("-c", "write -z 96k 32k"),
    *("-c", "discard 128k 64k"),
    *("-c", "flush"),
    *("-c", "read -P 0x5a 64k 32k"),
    *("-c", "read -P 0 96k 32k"),
]
"""For qemu-io: what it changes, and finds then."""


async def _run(argv: list[str]) -> str:
    done = await trio.run_process(
        argv, capture_stdout=True, capture_stderr=True, check=False, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, f"{argv}: {done.stderr.decode()}"
    return done.stdout.decode()


@pytest.mark.nbdkit
@pytest.mark.qemu
@pytest.mark.parametrize(
    "settings", ["simple", "structured", pytest.param("extended", marks=pytest.mark.peers)]
)
async def test_our_server_serves_real_clients(settings: str, folder: Path) -> None:
    chosen = ServerSettings(
        description="ours",
        structured=settings != "simple",
        extended=settings == "extended",
        read_chunk_bytes=10_000,
        holes=True,
    )
    disk = MemoryDisk(4 << 20)
    disk.data[1 << 20 : 2 << 20] = pattern(0, 1 << 20)
    server = Server({"": disk, "second": MemoryDisk(512)}, chosen)
    uri = unix_uri(folder / "s")
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, folder / "s")
        found = json.loads(await _run([need("nbdinfo"), "--json", "--list", uri]))
        assert {each["export-name"] for each in found["exports"]} == {"", "second"}
        target = folder / "copy"
        await _run([need("nbdcopy"), uri, str(target)])
        assert await trio.Path(target).read_bytes() == disk.data
        if settings != "simple":
            mapped = json.loads(await _run([need("nbdinfo"), "--map", "--json", uri]))
            assert [(each["offset"], each["type"]) for each in mapped] == [
                (0, 3),
                (1 << 20, 0),
                (2 << 20, 3),
            ]
        await _run([need("qemu-io"), "-f", "raw", *_CHANGES_AND_READS, uri])
        assert disk.flushes > 0
        if settings == "extended":
            await _run([*peer("nbdcopy"), uri, str(folder / "again")])
            assert await trio.Path(folder / "again").read_bytes() == disk.data
        nursery.cancel_scope.cancel()

"""Real clients on the plugin: this host's nbdkit and the newer one, file and memory stores."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugin.server import Nbdkit, run
from tests.tools import HUNG_S, missing, need

SIZE_BYTES = 64 << 20


@pytest.fixture(params=["file", "memory"])
def server(request: pytest.FixtureRequest, volumes: Path, where: str) -> Iterator[Nbdkit]:
    """A volume `disk` of 64 MiB."""
    store = [f"dir={volumes}", "create=on"] if request.param == "file" else ["store=memory"]
    with Nbdkit(*store, f"size={SIZE_BYTES}", "volume=disk", where=where) as nbdkit:
        yield nbdkit


def sample(path: Path, size_bytes: int = SIZE_BYTES) -> str:
    """Fill a file with data and holes, seeded; returns its checksum."""
    source = random.Random(7)
    with open(path, "wb") as file:
        file.truncate(size_bytes)
        for offset in range(0, size_bytes, 4 << 20):
            file.seek(offset + source.randrange(1 << 20))
            file.write(source.randbytes(source.randrange(1 << 20)))
    return checksum(path)


def checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_nbdinfo_every_capability(server: Nbdkit) -> None:
    need("nbdinfo")
    for ability in ("cache", "df", "fast-zero", "flush", "fua", "trim", "write", "zero"):
        run("nbdinfo", "--can", ability, server.uri())
    for wrong in (["--is", "read-only"], ["--is", "rotational"], ["--can", "multi-conn"]):
        assert subprocess.run(["nbdinfo", *wrong, server.uri()], check=False).returncode == 2
    run("nbdinfo", "--can", "multi-conn", server.uri("disk@session=t"))
    run("nbdinfo", "--is", "read-only", server.uri("disk@readonly"))
    shown = json.loads(run("nbdinfo", "--json", server.uri()))["exports"][0]
    assert shown["export-size"] == SIZE_BYTES
    assert shown["block_size_minimum"] == 1
    assert shown["block_size_preferred"] == 4096
    assert shown["block_size_maximum"] == 4 << 20


def test_nbdinfo_list_names_the_volumes(server: Nbdkit) -> None:
    shown = json.loads(run("nbdinfo", "--list", "--json", server.uri()))["exports"]
    assert [export["export-name"] for export in shown] == ["disk"]


def test_map_after_writes_trims_and_zeroes(server: Nbdkit) -> None:
    run(
        "qemu-io",
        *("-f", "raw", "-d", "unmap"),
        *("-c", "write -P 1 0 1M"),
        *("-c", "discard 256k 256k"),
        *("-c", "write -zu 768k 128k"),
        *("-c", "write -P 2 32M 64k"),
        server.uri(),
    )
    extents = json.loads(run("nbdinfo", "--map", "--json", server.uri()))
    # Neighbours of one type may come as several.
    merged: list[tuple[int, int]] = []
    for extent in extents:
        if merged and merged[-1][1] == extent["type"]:
            continue
        merged.append((extent["offset"], extent["type"]))
    assert merged == [
        (0, 0),
        (256 << 10, 3),
        (512 << 10, 0),
        (768 << 10, 3),
        (896 << 10, 0),
        (1 << 20, 3),
        (32 << 20, 0),
        ((32 << 20) + (64 << 10), 3),
    ]


def test_nbdcopy_in_and_out_same_bytes(server: Nbdkit, tmp_path: Path) -> None:
    digest = sample(tmp_path / "in")
    run("nbdcopy", str(tmp_path / "in"), server.uri())
    run("nbdcopy", server.uri(), str(tmp_path / "out"))
    assert checksum(tmp_path / "out") == digest


def test_nbdcopy_over_many_connections_of_one_session(server: Nbdkit, tmp_path: Path) -> None:
    digest = sample(tmp_path / "in")
    uri = server.uri("disk@session=copy")
    run("nbdcopy", "--connections=4", "--flush", str(tmp_path / "in"), uri)
    run("nbdcopy", "--connections=4", uri, str(tmp_path / "out"))
    assert checksum(tmp_path / "out") == digest


def test_qemu_img_convert_and_compare(server: Nbdkit, tmp_path: Path) -> None:
    sample(tmp_path / "in")
    run("qemu-img", "convert", "-n", "-O", "raw", str(tmp_path / "in"), server.uri())
    run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(tmp_path / "in"), server.uri())


def test_qemu_img_bench_writes_and_reads(server: Nbdkit) -> None:
    for direction in (["-w", "--flush-interval=64"], []):
        run("qemu-img", "bench", "-f", "raw", "-c", "2000", "-d", "16", *direction, server.uri())


def test_qemu_io_patterns_hold_after_flush_fua_trim_zero(server: Nbdkit) -> None:
    run(
        "qemu-io",
        *("-f", "raw", "-d", "unmap"),
        *("-c", "write -P 1 0 1M"),
        *("-c", "write -f -P 2 513 1023"),
        *("-c", "flush"),
        *("-c", "write -z 4096 8192"),
        *("-c", "write -zu 65000 5000"),
        *("-c", "discard 128k 64k"),
        *("-c", "read -P 1 0 513"),
        *("-c", "read -P 2 513 1023"),
        *("-c", "read -P 0 4096 8192"),
        *("-c", "read -P 0 65000 5000"),
        *("-c", "read -P 1 70000 1000"),
        *("-c", "read -P 0 128k 64k"),
        *("-c", "read -P 0 63M 1M"),
        server.uri(),
    )


def test_zero_without_hole_keeps_space_allocated(volumes: Path, where: str) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=4M", where=where) as server:
        run("qemu-io", "-f", "raw", "-c", "write -z 0 1M", server.uri())
        assert os.stat(volumes / "disk").st_blocks * 512 >= 1 << 20
        run("qemu-io", "-f", "raw", "-d", "unmap", "-c", "write -zu 0 1M", server.uri())
        assert os.stat(volumes / "disk").st_blocks * 512 < 1 << 20


def test_ext4_through_nbdfuse_is_clean(server: Nbdkit, tmp_path: Path) -> None:
    need("mke2fs")
    need("e2fsck")
    if not os.path.exists("/dev/fuse"):
        missing("/dev/fuse is not there")
    disk = tmp_path / "disk"
    disk.touch()
    fuse = subprocess.Popen([need("nbdfuse"), str(disk), server.uri()])
    try:
        deadline = time.monotonic() + HUNG_S
        while disk.stat().st_size != SIZE_BYTES:
            assert time.monotonic() < deadline
            assert fuse.poll() is None
            time.sleep(0.02)
        run("mke2fs", "-q", "-F", "-t", "ext4", "-d", str(Path(__file__).parent), str(disk))
        run("e2fsck", "-fn", str(disk))
    finally:
        fuse.terminate()  # it unmounts
        fuse.wait(HUNG_S)
    digest = checksum_of_export(server, tmp_path)
    assert digest == checksum_of_export(server, tmp_path)


def checksum_of_export(server: Nbdkit, tmp_path: Path) -> str:
    run("nbdcopy", server.uri(), str(tmp_path / "copy"))
    run("e2fsck", "-fn", str(tmp_path / "copy"))
    return checksum(tmp_path / "copy")

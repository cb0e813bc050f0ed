"""The rbd store on a real Ceph of one node."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import threading
import time
import uuid
from pathlib import Path

import pytest
import trio

from bridge.server.inspection import list_exports
from bridge.server.uri import parse_uri
from tests.ceph.cluster import POOL, Cluster
from tests.plugin.client import NbdError, RawClient, Refused
from tests.plugin.server import PACKAGE, Nbdkit, refusal, run

BLOCK = 4096
MIB = 1 << 20

pytestmark = pytest.mark.timeout(300)


def serve(ceph: Cluster, *parameters: str, threads: int = 16) -> Nbdkit:
    return Nbdkit(
        "store=rbd",
        f"pool={POOL}",
        f"conf={ceph.conf}",
        *parameters,
        options=("-t", str(threads)),
    )


@pytest.fixture
def image(ceph: Cluster) -> str:
    """A fresh image of 64 MiB."""
    name = f"t{uuid.uuid4().hex[:8]}"
    command_line(ceph, "create", name, "64M")
    return name


def command_line(ceph: Cluster, command: str, *words: str, status: int = 0) -> str:
    store = ["store=rbd", f"pool={POOL}", f"conf={ceph.conf}"]
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "nbd_plugin", command, *store, *words],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def block(number: int) -> bytes:
    return number.to_bytes(8, "big") * (BLOCK // 8)


def test_nbdinfo_capabilities_and_block_sizes(ceph: Cluster, image: str) -> None:
    with serve(ceph) as server:
        for ability in ("cache", "df", "fast-zero", "flush", "fua", "trim", "write", "zero"):
            run("nbdinfo", "--can", ability, server.uri(image))
        run("nbdinfo", "--can", "multi-conn", server.uri(f"{image}@session=t"))
        shown = json.loads(run("nbdinfo", "--json", server.uri(image)))["exports"][0]
        assert shown["export-size"] == 64 * MIB
        assert shown["block_size_preferred"] == 4 * MIB
        assert image in run("nbdinfo", "--list", server.uri())


def test_nbdcopy_in_and_out_same_bytes(ceph: Cluster, image: str, tmp_path: Path) -> None:
    data = bytearray(64 * MIB)
    source = random.Random(5)
    for offset in range(0, len(data), 8 * MIB):
        data[offset : offset + MIB] = source.randbytes(MIB)
    (tmp_path / "in").write_bytes(data)
    with serve(ceph) as server:
        uri = server.uri(f"{image}@session=copy")
        run("nbdcopy", "--flush", str(tmp_path / "in"), uri)
        run("nbdcopy", uri, str(tmp_path / "out"))
    copied = hashlib.sha256((tmp_path / "out").read_bytes()).digest()
    assert copied == hashlib.sha256(data).digest()


def test_qemu_io_patterns_and_map(ceph: Cluster, image: str) -> None:
    with serve(ceph) as server:
        run(
            "qemu-io",
            *("-f", "raw", "-d", "unmap"),
            *("-c", "write -P 1 0 8M"),
            *("-c", "write -f -P 2 513 1023"),
            *("-c", "write -z 64k 8k"),
            *("-c", "write -zu 4M 4M"),
            *("-c", "discard 1M 1M"),
            *("-c", "flush"),
            *("-c", "read -P 1 0 513"),
            *("-c", "read -P 2 513 1023"),
            *("-c", "read -P 0 64k 8k"),
            *("-c", "read -P 1 2M 2M"),
            *("-c", "read -P 0 4M 60M"),
            server.uri(image),
        )
        extents = json.loads(run("nbdinfo", "--map", "--json", server.uri(image)))
        assert extents[0]["type"] == 0
        assert extents[-1] == {**extents[-1], "type": 3}
        assert extents[-1]["offset"] <= 4 * MIB


def test_second_host_refused_while_first_writes(ceph: Cluster, image: str) -> None:
    with (
        serve(ceph) as first,
        serve(ceph, "fence_timeout=1") as second,
        RawClient(str(first.socket), image) as writer,
    ):
        writer.write(0, block(1))
        with pytest.raises(Refused):
            RawClient(str(second.socket), image)
        assert f"volume {image} is open for writing by another Ceph client" in second.log
        writer.write(0, block(2))
        writer.flush()
        with RawClient(str(second.socket), f"{image}@readonly") as reader:
            assert reader.read(0, BLOCK) == block(2)


def test_next_host_after_the_first_left_sees_a_new_generation(ceph: Cluster, image: str) -> None:
    with serve(ceph) as first, serve(ceph) as second:
        with RawClient(str(first.socket), image) as writer:
            writer.write(0, block(1))
            before = writer.properties
        with RawClient(str(second.socket), image) as writer:
            after = writer.properties
            assert writer.read(0, BLOCK) == block(1)
    assert int(after["generation"]) == int(before["generation"]) + 1
    assert after["written"] == before["generation"]
    assert after["instance"] != before["instance"]


def believes(cached: dict[str, str], now: dict[str, str]) -> bool:
    """The rule of README.md for a client that cached the volume in an earlier session."""
    return cached["identity"] == now["identity"] and (
        int(now["written"]) <= int(cached["generation"]) <= int(now["generation"])
    )


def write_once(server: Nbdkit, image: str) -> dict[str, str]:
    with RawClient(str(server.socket), image) as client:
        client.write(0, block(1))
        client.flush()
        return client.properties


def visit(server: Nbdkit, image: str) -> dict[str, str]:
    with RawClient(str(server.socket), image, timeout_s=90) as client:
        return client.properties


def look_after_session(server: Nbdkit, image: str) -> dict[str, str]:
    """A reader's view when the session is over, of which clients see the end a little earlier."""
    deadline = time.monotonic() + 20
    while "generation" not in (seen := visit(server, f"{image}@readonly")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return seen


def test_image_that_only_the_plugin_wrote_is_believed(ceph: Cluster, image: str) -> None:
    with serve(ceph) as server:
        cached = write_once(server, image)
        assert believes(cached, visit(server, image))
        assert believes(cached, look_after_session(server, image))
    ceph.rbd("info", image)
    command_line(ceph, "resize", image, "128M")
    command_line(ceph, "snapshot", image, "s")
    with serve(ceph) as server:
        assert believes(cached, visit(server, image))


def test_image_written_by_another_ceph_client_is_another_generation(
    ceph: Cluster, image: str
) -> None:
    with serve(ceph) as server:
        for change in (
            ["bench", "--io-type", "write", "--io-size", "4096", "--io-total", "4096", image],
            ["snap", "rollback", f"{image}@s"],
        ):
            cached = write_once(server, image)
            if change[0] == "snap":
                command_line(ceph, "snapshot", image, "s")
            ceph.rbd(*change)
            with RawClient(str(server.socket), f"{image}@readonly") as reader:
                assert "generation" not in reader.properties
            now = visit(server, image)
            assert not believes(cached, now)
            assert believes(now, visit(server, image)), "one change, one new generation"


@pytest.mark.parametrize("write", [True, False])
def test_kill_of_nbdkit_is_no_change_of_an_image_by_others(
    ceph: Cluster, image: str, write: bool
) -> None:
    with serve(ceph) as server:
        client = RawClient(str(server.socket), image)
        if write:
            client.write(0, block(1))
        server.kill()
        client.cut()
    with serve(ceph, "fence_timeout=60") as server:
        assert believes(client.properties, visit(server, image))


def test_image_written_by_another_ceph_client_after_a_kill_is_another_generation(
    ceph: Cluster, image: str
) -> None:
    with serve(ceph) as server:
        client = RawClient(str(server.socket), image)
        client.write(0, block(1))
        server.kill()
        client.cut()
    # It waits until Ceph has given up the dead client.
    words = ["--io-type", "write", "--io-size", "4096", "--io-total", "4096"]
    ceph.rbd("bench", *words, image)
    with serve(ceph, "fence_timeout=60") as server:
        assert not believes(client.properties, visit(server, image))


def test_image_that_is_made_anew_by_a_copy_is_another_generation(ceph: Cluster, image: str) -> None:
    with serve(ceph) as server:
        cached = write_once(server, image)
        ceph.rbd("deep", "cp", image, f"{image}-copy")
        ceph.rbd("rm", image)
        ceph.rbd("rename", f"{image}-copy", image)
        assert not believes(cached, visit(server, image))


def test_nbdkit_killed_next_writer_is_let_in_and_flushed_data_is_there(
    ceph: Cluster, image: str
) -> None:
    with serve(ceph) as first:
        client = RawClient(str(first.socket), image)
        for number in range(200):
            client.write(number * BLOCK, block(number))
        client.flush()
        first.kill()
        client.cut()
    with (
        serve(ceph, "fence_timeout=60") as second,
        RawClient(str(second.socket), image, timeout_s=90) as client,
    ):
        for number in range(200):
            assert client.read(number * BLOCK, BLOCK) == block(number)
        client.write(0, block(7))
        client.flush()


def test_lock_of_a_live_holder_on_this_machine_is_not_broken(ceph: Cluster, image: str) -> None:
    with serve(ceph) as first, RawClient(str(first.socket), image) as writer:
        writer.write(0, block(1))
        for _ in range(2):
            with serve(ceph, "fence_timeout=1") as second, pytest.raises(Refused):
                RawClient(str(second.socket), image)
        writer.write(0, block(2))
        writer.flush()


def test_osd_killed_and_restarted_clients_wait_and_lose_nothing(ceph: Cluster, image: str) -> None:
    with serve(ceph) as server, RawClient(str(server.socket), image, timeout_s=120) as client:
        for number in range(100):
            client.write(number * BLOCK, block(number))
        client.flush()
        ceph.kill_osd()
        restart = threading.Timer(3, ceph.start_osd)
        restart.start()
        for number in range(100, 300):
            client.write(number * BLOCK, block(number))
        client.flush()
        restart.join()
        for number in range(300):
            assert client.read(number * BLOCK, BLOCK) == block(number)


def test_handshake_while_osd_is_down_refused_in_time(ceph: Cluster, image: str) -> None:
    with serve(ceph, "timeout=2") as server:
        ceph.kill_osd()
        try:
            start = time.monotonic()
            with pytest.raises(Refused):
                RawClient(str(server.socket), image)
            waited_s = time.monotonic() - start
            assert f"opening volume {image}: no answer in 2 s" in server.log
        finally:
            ceph.start_osd()
        # A bound, not a measurement: without the limit it would wait for the osd.
        assert waited_s < 30
    run("timeout", "60", "rbd", "-c", str(ceph.conf), "info", image)


def test_snapshot_resize_remove(ceph: Cluster, image: str) -> None:
    with serve(ceph) as server:
        with RawClient(str(server.socket), image) as client:
            client.write(0, block(1))
            for words in (["resize", image, "128M"], ["snapshot", image, "s"], ["remove", image]):
                assert "open for writing" in command_line(ceph, *words, status=1)
        command_line(ceph, "snapshot", image, "s")
        with RawClient(str(server.socket), image) as client:
            client.write(0, block(2))
        command_line(ceph, "resize", image, "128M")
        with RawClient(str(server.socket), f"{image}@s") as client:
            assert client.read(0, BLOCK) == block(1)
            assert client.size_bytes == 64 * MIB
            with pytest.raises(NbdError):
                client.write(0, block(3))
        with RawClient(str(server.socket), image) as client:
            assert client.size_bytes == 128 * MIB
    assert "has snapshots" in command_line(ceph, "remove", image, status=1)
    command_line(ceph, "remove", f"{image}@s")
    command_line(ceph, "remove", image)


def test_created_on_request(ceph: Cluster) -> None:
    name = f"t{uuid.uuid4().hex[:8]}"
    with (
        serve(ceph, "create=on", "size=10G") as server,
        RawClient(str(server.socket), name) as client,
    ):
        assert client.size_bytes == 10 << 30


def test_lone_image_created_at_start(ceph: Cluster) -> None:
    name = f"t{uuid.uuid4().hex[:8]}"
    with serve(ceph, f"image={name}", "create=on", "size=1G") as server:
        assert "1073741824" in ceph.rbd("info", "--format", "json", name)
        with RawClient(str(server.socket)) as client:
            assert client.properties["volume"] == name


def test_image_without_exclusive_lock_refused_with_the_remedy(ceph: Cluster) -> None:
    name = f"t{uuid.uuid4().hex[:8]}"
    ceph.rbd("create", name, "--size", "4M", "--image-feature", "layering")
    with serve(ceph) as server:
        with pytest.raises(Refused):
            RawClient(str(server.socket), name)
        assert f"rbd feature enable {POOL}/{name} exclusive-lock" in server.log


def test_demoted_image_refused_with_the_remedy_and_readable(ceph: Cluster, image: str) -> None:
    ceph.rbd("mirror", "pool", "enable", POOL, "image")
    ceph.rbd("mirror", "image", "enable", f"{POOL}/{image}", "snapshot")
    ceph.rbd("mirror", "image", "demote", f"{POOL}/{image}")
    try:
        with serve(ceph, f"image={image}") as server:
            with pytest.raises(Refused):
                RawClient(str(server.socket), image)
            assert f"volume {image} is demoted" in server.log
            assert f"rbd mirror image promote {POOL}/{image}" in server.log
            (listed,) = trio.run(list_exports, parse_uri(server.uri()))
            assert f"refused: volume {image} is demoted" in listed.description
            with RawClient(str(server.socket), f"{image}@readonly") as reader:
                assert reader.read(0, BLOCK) == bytes(BLOCK)
    finally:
        ceph.rbd("mirror", "image", "promote", f"{POOL}/{image}")
        ceph.rbd("mirror", "image", "disable", f"{POOL}/{image}")
        ceph.rbd("mirror", "pool", "disable", POOL)


@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        (["pool=absent"], "pool absent does not exist"),
        ([f"pool={POOL}", "image=absent"], "volume absent does not exist"),
        ([f"pool={POOL}", "conf=/absent.conf"], "conf=/absent.conf"),
    ],
)
def test_missing_object_is_refused_in_one_line(
    ceph: Cluster, parameters: list[str], text: str
) -> None:
    said = refusal("store=rbd", f"conf={ceph.conf}", *parameters)
    assert text in said
    assert len(said.splitlines()) == 1


def test_cluster_out_of_reach_refused_in_one_line(ceph: Cluster, tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    # Port 1: no process listens there.
    lines = ceph.conf.read_text().splitlines()
    lines = [
        "mon host = [v2:127.0.0.1:1]" if line.startswith("mon host") else line for line in lines
    ]
    conf.write_text("\n".join(lines) + "\n")
    said = refusal("store=rbd", f"pool={POOL}", f"conf={conf}", "timeout=2")
    assert "cannot be reached" in said
    assert len(said.splitlines()) == 1

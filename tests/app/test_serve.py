"""The whole path, as its users run it: front-end, bridge process, real NBD servers."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from bridge.errors import RequestError
from bridge.peers.blk_driver import BlkDriver
from tests.ports import free_port
from tests.processes import (
    bridge_argv,
    cpu_seconds,
    private_memory_bytes,
    process,
    serving,
    unix_uri,
    wait_for,
)
from tests.tools import HUNG_S, need, peer

PLUGIN = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"
SIZE_BYTES = 64 << 20


def nbdkit_plugin(directory: Path, *options: str) -> list[str]:
    image = directory / "disk.img"
    return [
        *(need("nbdkit"), "-f", "-U", str(directory / "nbd"), *options),
        *("python", str(PLUGIN), f"file={image}", f"size={SIZE_BYTES}"),
    ]


def qemu_nbd(directory: Path) -> list[str]:
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, SIZE_BYTES)
    return [
        *(need("qemu-nbd"), "--persistent", "--shared=4", "--discard=unmap", "--format=raw"),
        *("--socket", str(directory / "nbd"), str(image)),
    ]


@asynccontextmanager
async def nbd_server(directory: Path, port: int) -> AsyncIterator[None]:
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, SIZE_BYTES)
    config = directory / "nbd-server.conf"
    config.write_text(
        f"[generic]\nport = {port}\nlistenaddr = 127.0.0.1\n"
        f"[export]\nexportname = {image}\nflush = true\nfua = true\ntrim = true\n"
    )
    # In the foreground (-d) it would serve one client and exit: it goes to the background.
    pid_file = directory / "pid"
    subprocess.run([need("nbd-server"), "-C", str(config), "-p", str(pid_file)], check=True)
    with trio.fail_after(HUNG_S):
        while not pid_file.exists() or not pid_file.read_text().strip():
            await trio.sleep(0.02)
    try:
        yield
    finally:
        os.kill(int(pid_file.read_text()), signal.SIGTERM)


@pytest.fixture
async def disk(directory: Path) -> AsyncIterator[Path]:
    """nbdkit with our plugin, and a bridge on it; gives the bridge's socket."""
    vhost = directory / "vhost"
    async with (
        process(nbdkit_plugin(directory), ready=directory / "nbd"),
        serving(unix_uri(directory / "nbd"), vhost, "--serial", "serial-1", "--num-queues", "2"),
    ):
        yield vhost


async def exercise(vhost: Path) -> dict[int, bytes]:
    """Write, zero and discard through the bridge; what the image must hold, by offset."""
    expected = {}
    async with await BlkDriver.connect(vhost) as guest:
        for index, length in enumerate((512, 4096, 65536, 1 << 20)):
            offset = (index + 1) * (4 << 20) + 512
            data = os.urandom(length)
            await guest.write(offset, data)
            assert await guest.read(offset, length) == data
            expected[offset] = data
        await guest.write_zeroes([(8 << 20, 2 << 20)], unmap=True)
        expected[8 << 20] = bytes(2 << 20)
        del expected[(8 << 20) + 512]
        assert await guest.read(8 << 20, 1 << 20) == bytes(1 << 20)
        await guest.discard([(32 << 20, 1 << 20), (40 << 20, 1 << 20)])
        await guest.flush()
    return expected


@pytest.mark.parametrize("server", [nbdkit_plugin, pytest.param(qemu_nbd, marks=pytest.mark.qemu)])
async def test_serve_real_server_image_holds_what_was_written(server, directory):
    vhost = directory / "vhost"
    async with process(server(directory), ready=directory / "nbd"):
        async with serving(unix_uri(directory / "nbd"), vhost):
            expected = await exercise(vhost)
    image = (directory / "disk.img").read_bytes()
    for offset, data in expected.items():
        assert image[offset : offset + len(data)] == data, offset


async def test_serve_nbd_server_image_holds_what_was_written(directory):
    # nbd-server knows no WRITE_ZEROES: zeroes are written instead.
    vhost, port = directory / "vhost", free_port()
    async with nbd_server(directory, port):
        async with serving(f"nbd://127.0.0.1:{port}/export", vhost):
            expected = await exercise(vhost)
    image = (directory / "disk.img").read_bytes()
    for offset, data in expected.items():
        assert image[offset : offset + len(data)] == data, offset


async def test_serve_tcp_server_works_like_a_unix_socket(directory):
    vhost, port = directory / "vhost", free_port()
    argv = [need("nbdkit"), "-f", "-i", "127.0.0.1", "-p", str(port)]
    argv += ["-P", str(directory / "pid"), "memory", str(SIZE_BYTES)]
    async with process(argv, ready=directory / "pid"):
        async with serving(f"nbd://127.0.0.1:{port}", vhost):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(4096, b"x" * 4096)
                assert await guest.read(4096, 4096) == b"x" * 4096


async def test_serve_device_shows_size_serial_and_cache(disk):
    async with await BlkDriver.connect(disk, num_queues=2) as guest:
        assert guest.size_bytes == SIZE_BYTES
        assert await guest.get_id() == "serial-1"
        assert guest.config.writeback == 1
        await guest.write(0, b"a" * 512, queue=0)
        assert await guest.read(0, 512, queue=1) == b"a" * 512


@pytest.mark.peers
async def test_serve_libblkio_client_reads_back_its_patterns(disk, directory):
    target = f"driver=virtio-blk-vhost-user,path={disk},cache.direct=on"
    commands = ["write -P 0x5a 0 1M", "write -P 0x33 4k 8k", "flush", "write -z 256k 64k"]
    commands += ["read -P 0x5a 12k 100k", "read -P 0x33 4k 8k", "read -P 0 256k 64k"]
    argv = peer("qemu-io", *(x for c in commands for x in ("-c", c)), "--image-opts", target)
    done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
    output = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, output
    assert "failed" not in output
    image = (directory / "disk.img").read_bytes()
    assert image[:4096] == b"\x5a" * 4096
    assert image[4096:12288] == b"\x33" * 8192
    assert image[256 << 10 : 320 << 10] == bytes(64 << 10)


async def test_serve_listens_again_after_a_front_end_left(disk):
    for number in range(3):
        async with await BlkDriver.connect(disk) as guest:
            await guest.write(number * 512, bytes([number + 1]) * 512)
    async with await BlkDriver.connect(disk) as guest:
        assert await guest.read(0, 1536) == b"\1" * 512 + b"\2" * 512 + b"\3" * 512


async def test_serve_unflushed_write_is_flushed_at_a_clean_stop(directory):
    log = directory / "requests.log"
    nbd, vhost = directory / "nbd", directory / "vhost"
    argv = [need("nbdkit"), "-f", "-U", str(nbd), "--filter=log", "memory", "64M", f"logfile={log}"]
    async with process(argv, ready=nbd):
        async with serving(unix_uri(nbd), vhost):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"a" * 512)
                assert " Flush " not in log.read_text()
        assert " Flush " in log.read_text()


async def test_serve_flush_timer_fires_without_the_guest(directory):
    log = directory / "requests.log"
    nbd, vhost = directory / "nbd", directory / "vhost"
    argv = [need("nbdkit"), "-f", "-U", str(nbd), "--filter=log", "memory", "64M", f"logfile={log}"]
    async with process(argv, ready=nbd):
        async with serving(unix_uri(nbd), vhost, "--flush-interval", "0.2"):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"a" * 512)
                with trio.fail_after(HUNG_S):
                    while " Flush " not in log.read_text():
                        await trio.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP])
async def test_serve_signal_stops_cleanly_and_removes_the_socket(number, directory):
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with process([need("nbdkit"), "-f", "-U", str(nbd), "memory", "64M"], ready=nbd):
        async with serving(unix_uri(nbd), vhost) as child:
            assert stat.S_IMODE(vhost.stat().st_mode) == 0o600
            guest = await BlkDriver.connect(vhost)
            child.send_signal(number)
            assert await wait_for(child, limit_s=HUNG_S) == 0
            guest.close()
    assert not vhost.exists()


async def test_serve_idle_disk_uses_no_cpu_and_little_memory(disk, directory):
    # The bridge is the child that has the socket; find it by the log of its own listening socket.
    pids = [
        int(entry.name)
        for entry in Path("/proc").iterdir()
        if entry.name.isdigit() and str(disk) in _command_line(entry)
    ]
    assert len(pids) == 1
    async with await BlkDriver.connect(disk) as guest:
        await guest.write(0, b"a" * 65536)
        await guest.flush()
        for _ in range(3):  # on a busy machine the start may not be over yet
            await trio.sleep(0.5)
            before = cpu_seconds(pids[0])
            await trio.sleep(10)
            used = cpu_seconds(pids[0]) - before
            if used <= 0.02:
                break
        assert used <= 0.02  # 0.2 % of 10 s
        assert private_memory_bytes(pids[0]) < 60_000_000


def _command_line(entry: Path) -> str:
    try:
        return (entry / "cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


async def test_serve_read_only_export_is_served_read_only(directory):
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with process([need("nbdkit"), "-r", "-f", "-U", str(nbd), "memory", "64M"], ready=nbd):
        async with serving(unix_uri(nbd), vhost):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(0, 512) == bytes(512)
                with pytest.raises(RequestError):
                    await guest.write(0, b"a" * 512)


async def test_serve_inherited_descriptor_instead_of_a_path(directory):
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with process([need("nbdkit"), "-f", "-U", str(nbd), "memory", "64M"], ready=nbd):
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(vhost))
            listening.listen()
            fd = listening.fileno()
            child = subprocess.Popen(
                bridge_argv("serve", unix_uri(nbd), "--fd", str(fd)), pass_fds=[fd]
            )
        async with await BlkDriver.connect(vhost) as guest:
            await guest.write(0, b"a" * 512)
        child.terminate()
        assert await wait_for(child, limit_s=HUNG_S) == 0


def test_info_json_names_what_the_server_offers(directory):
    nbd = directory / "nbd"
    argv = [need("nbdkit"), "-U", str(nbd), "memory", "10M", "--run"]
    command = " ".join(f"'{word}'" for word in bridge_argv("info", "--json", unix_uri(nbd)))
    done = subprocess.run([*argv, command], capture_output=True, check=True)
    told = json.loads(done.stdout)
    assert told["size_bytes"] == 10 << 20
    assert "SEND_FLUSH" in told["flags"]


@pytest.mark.parametrize("arguments", [["--print-capabilities"], ["serve", "--print-capabilities"]])
def test_print_capabilities_is_json_of_a_block_device(arguments):
    done = subprocess.run(bridge_argv(*arguments), capture_output=True, check=True)
    assert json.loads(done.stdout)["type"] == "block"

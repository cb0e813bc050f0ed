"""The two sides against other people's: qemu-storage-daemon as back-end, libblkio as front-end."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

from bridge.errors import RequestError
from bridge.peers.blk_driver import FEATURES, BlkDriver
from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT
from tests.guest.vhost_user.backends import running_backend
from tests.tools import peer


@contextmanager
def storage_daemon(directory: Path) -> Iterator[Path]:
    """A qemu-storage-daemon that serves a file of 64 MiB; its socket."""
    image = directory / "image"
    image.write_bytes(b"")
    os.truncate(image, 64 << 20)
    path = directory / "peer.sock"
    process = subprocess.Popen(
        peer(
            "qemu-storage-daemon",
            "--object",
            "iothread,id=io",
            "--blockdev",
            f"driver=file,node-name=f,filename={image},discard=unmap",
            "--export",
            "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=2,iothread=io,"
            f"addr.type=unix,addr.path={path}",
        )
    )
    try:
        for _ in range(1000):
            if path.exists():
                break
            time.sleep(0.01)
        yield path
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("left_out", [0, F_INDIRECT, F_EVENT_IDX, F_INDIRECT | F_EVENT_IDX])
async def test_guest_uses_a_disk_of_qemu_storage_daemon(directory: Path, left_out: int) -> None:
    data = os.urandom(300 * 1024)
    with storage_daemon(directory) as path:
        async with await BlkDriver.connect(
            path, features=FEATURES & ~left_out, num_queues=2, regions=3
        ) as guest:
            assert guest.size_bytes == 64 << 20
            assert await guest.get_id() == "vhost_user_blk"
            await guest.write(4096, data)
            assert await guest.read(4096, len(data)) == data
            await guest.flush()
            await guest.write_zeroes([(4096, 65536)], unmap=True)
            await guest.discard([(1 << 20, 1 << 20)])
            assert await guest.read(4096, 65536) == bytes(65536)
            with pytest.raises(RequestError):
                await guest.read(64 << 20, 512)
            bases = await guest.stop()
            assert bases == [queue.driver.base for queue in guest.queues]
    stored = (directory / "image").read_bytes()
    assert stored[4096 + 65536 : 4096 + len(data)] == data[65536:]


async def test_libblkio_writes_and_reads_patterns(directory: Path, no_fd_leak: None) -> None:
    async with running_backend(directory, size_bytes=32 << 20) as backend:
        argv = peer(
            "qemu-io",
            "--image-opts",
            f"driver=virtio-blk-vhost-user,path={backend.path},cache.direct=on",
            *("-c", "write -P 7 1M 1M", "-c", "read -P 7 1M 1M"),
            *("-c", "write -z 1M 64k", "-c", "read -P 0 1M 64k"),
            *("-c", "discard 8M 4M", "-c", "flush", "-c", "aio_write -P 9 3M 512k"),
            *("-c", "aio_flush", "-c", "read -P 9 3M 512k"),
        )
        done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
        output = done.stdout.decode() + done.stderr.decode()
        assert done.returncode == 0, output
        assert "error" not in output.lower(), output
        assert "verification failed" not in output, output
        assert backend.target.data[3 << 20 : (3 << 20) + 524288] == b"\x09" * 524288

"""vhost-user-blk back-ends for the guest tests: the bridge over nbdkit, and a peer of it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from bridge.demo.servers import Server, bridge_command, nbdkit_command, running
from tests.tools import need

MIB = 1 << 20


def make_image(folder: Path, size_mib: int, content: bytes = b"") -> Path:
    """A sparse disk image that starts with `content`."""
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.write(content)
        file.truncate(size_mib * MIB)
    return image


@asynccontextmanager
async def nbdkit_on(image: Path, folder: Path, *parameters: str) -> AsyncIterator[str]:
    """nbdkit with our plugin serving `image`; its NBD URI."""
    need("nbdkit")
    socket = folder / "nbd.sock"
    command = nbdkit_command(image, socket, *parameters)
    async with running("nbdkit", command, socket, folder / "nbdkit.log"):
        yield f"nbd+unix:///?socket={socket}"


@asynccontextmanager
async def bridge_to(
    uri: str, folder: Path, *options: str, name: str = "disk"
) -> AsyncIterator[Server]:
    """A bridge to the NBD server at `uri`, listening on `folder/NAME.sock`."""
    socket = folder / f"{name}.sock"
    command = bridge_command(uri, socket, *options)
    async with running("bridge", command, socket, folder / f"{name}.bridge.log") as server:
        yield server


@asynccontextmanager
async def bridge_on(image: Path, folder: Path, *options: str) -> AsyncIterator[Server]:
    """nbdkit on `image` and a bridge to it."""
    async with nbdkit_on(image, folder) as uri, bridge_to(uri, folder, *options) as server:
        yield server


@asynccontextmanager
async def storage_daemon_on(
    image: Path, folder: Path, *, name: str = "disk", queues: int = 1, block_bytes: int = 512
) -> AsyncIterator[Server]:
    """qemu-storage-daemon on `image`: somebody else's back-end, to test the tests with."""
    socket = folder / f"{name}.sock"
    command = [
        need("qemu-storage-daemon"),
        "--blockdev", f"driver=file,node-name=d,filename={image},discard=unmap,locking=off",
        "--chardev", f"socket,path={folder}/{name}.qmp,server=on,wait=off,id=m",
        "--monitor", "chardev=m",
        "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},"
        f"writable=on,num-queues={queues},logical-block-size={block_bytes}",
    ]  # fmt: skip
    async with running("storage daemon", command, socket, folder / f"{name}.log") as server:
        yield server

"""vhost-user-blk back-ends for the guest tests: the bridge over nbdkit, and a peer of it."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

from bridge.demo.servers import ServerProcess, bridge_command, nbdkit_command, running, start_server
from tests.processes import pause
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
async def nbdkit_on(image: Path, folder: Path) -> AsyncIterator[str]:
    """nbdkit with our plugin serving `image`; its NBD URI."""
    need("nbdkit")
    socket = folder / "nbd.sock"
    command = nbdkit_command(image, socket)
    async with running("nbdkit", command, socket, folder / "nbdkit.log"):
        yield f"nbd+unix:///?socket={socket}"


@asynccontextmanager
async def bridge_to(
    uri: str, folder: Path, *options: str, name: str = "disk"
) -> AsyncIterator[ServerProcess]:
    """A bridge to the NBD server at `uri`, listening on `folder/NAME.sock`."""
    socket = folder / f"{name}.sock"
    command = bridge_command(uri, socket, *options)
    async with running("bridge", command, socket, folder / f"{name}.bridge.log") as server:
        yield server


@asynccontextmanager
async def bridge_on(image: Path, folder: Path, *options: str) -> AsyncIterator[ServerProcess]:
    """nbdkit on `image` and a bridge to it."""
    async with nbdkit_on(image, folder) as uri, bridge_to(uri, folder, *options) as server:
        yield server


@asynccontextmanager
async def storage_daemon_on(
    image: Path, folder: Path, *, name: str = "disk", queues: int = 1, block_bytes: int = 512
) -> AsyncIterator[ServerProcess]:
    """qemu-storage-daemon on `image`: another project's back-end, to test the tests with."""
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


class Killable:
    """A server that may be killed and started again on the same socket."""

    def __init__(self, name: str, command: list[str], socket: Path, log_path: Path) -> None:
        self.name = name
        self.socket = socket
        self._command = command
        self._log_path = log_path
        self._server: ServerProcess | None = None

    @property
    def uri(self) -> str:
        """Of an NBD server: the URI of its default export."""
        return self.uri_of("")

    def uri_of(self, export: str) -> str:
        """Of an NBD server: the URI of `export`."""
        return f"nbd+unix:///{export}?socket={self.socket}"

    async def start(self) -> None:
        """Start it; it listens when this returns."""
        self._server = await start_server(self.name, self._command, self.socket, self._log_path)

    def pause(self) -> None:
        """SIGSTOP: requests gather."""
        assert self._server is not None
        pause(self._server.process)

    def resume(self) -> None:
        """SIGCONT."""
        assert self._server is not None
        self._server.process.send_signal(signal.SIGCONT)

    async def kill(self) -> None:
        """SIGKILL."""
        if self._server is not None:
            await self._server.kill()
            if self.name == "nbdkit":
                self.socket.unlink(missing_ok=True)  # It does not replace a dead one's socket.


@asynccontextmanager
async def _killed_in_the_end(server: Killable) -> AsyncIterator[Killable]:
    try:
        await server.start()
        yield server
    finally:
        await server.kill()


def killable_bridge(uri: str, folder: Path, *options: str) -> AbstractAsyncContextManager[Killable]:
    """A running bridge to `uri` on `folder/disk.sock`."""
    socket = folder / "disk.sock"
    command = bridge_command(uri, socket, *options)
    return _killed_in_the_end(Killable("bridge", command, socket, folder / "bridge.log"))


def killable_nbdkit(image: Path, folder: Path) -> AbstractAsyncContextManager[Killable]:
    """A running nbdkit on `image` and `folder/nbd.sock`."""
    need("nbdkit")
    socket = folder / "nbd.sock"
    command = nbdkit_command(image, socket)
    return _killed_in_the_end(Killable("nbdkit", command, socket, folder / "nbdkit.log"))

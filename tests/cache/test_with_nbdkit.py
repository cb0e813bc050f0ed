"""The cache over the real client and a real server that is killed and loses what was not flushed.

nbdkit's cache filter keeps writes in an unlinked file until a flush: killed with -9 it forgets
them, although it acknowledged them. With QEMU's nbd driver the next flush then says OK and the
data is gone.
"""

from __future__ import annotations

import os
import random
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from bridge.app.settings import CacheSettings
from bridge.app.storage import Storage
from bridge.datapath.loop import Loop
from bridge.datapath.request import FLUSH, READ, WRITE, Request
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri
from tests.tools import HUNG_S

from ..tools import need

SIZE = 8 << 20
BLOCK = 4096


class _Server:
    """nbdkit on a unix socket, with a write-back cache of its own."""

    def __init__(self, folder: str, image: Path) -> None:
        self.socket = f"{folder}/nbd.sock"
        self._command = [need("nbdkit"), "-f", "-U", self.socket, "--filter=cache", "file"]
        self._command += [str(image), "cache=writeback"]
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        self._process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        with trio.fail_after(HUNG_S):
            while not os.path.exists(self.socket):
                await trio.sleep(0.01)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()
        os.unlink(self.socket)


class _Requests:
    """Requests that are awaited."""

    def __init__(self, submit: Callable[[Request], None], loop: Loop) -> None:
        self._submit = submit
        self._loop = loop

    async def do(self, op: int, offset: int = 0, buffer: bytearray | None = None) -> None:
        finished = trio.Event()
        buffers = [] if buffer is None else [memoryview(buffer)]
        length = len(buffer) if buffer else 0
        request = Request(op, offset, length, buffers, lambda _: finished.set())
        self._submit(request)
        self._loop.turn.want()
        with trio.fail_after(HUNG_S):
            await finished.wait()
        assert request.error == 0


@asynccontextmanager
async def _disk(server: _Server, folder: str, mode: str) -> AsyncIterator[_Requests]:
    loop = Loop()
    storage = Storage(
        parse_uri(f"nbd+unix:///?socket={server.socket}"),
        loop,
        ClientOptions(),
        CacheSettings(mode=mode, size_bytes=64 * 65536, directory=folder),
    )
    await storage.open()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        nursery.start_soon(storage.run)
        yield _Requests(storage.target.submit, loop)
        await storage.close(30)
        nursery.cancel_scope.cancel()
    loop.close()


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
async def test_server_killed_again_and_again_loses_nothing_that_was_flushed(
    mode: str, tmp_path: Path
) -> None:
    rng = random.Random(5)
    image = tmp_path / "image"
    image.write_bytes(bytes(SIZE))
    model = bytearray(SIZE)
    with tempfile.TemporaryDirectory(prefix="nbdk") as folder:
        server = _Server(folder, image)
        await server.start()
        async with _disk(server, str(tmp_path), mode) as guest:
            for round_number in range(4):
                for step in range(150):
                    length = rng.choice((512, 4096, 4096, 20480))
                    offset = rng.randrange((SIZE - length) // 512) * 512
                    if rng.random() < 0.7:
                        data = rng.randbytes(length)
                        model[offset : offset + length] = data
                        await guest.do(WRITE, offset, bytearray(data))
                    else:
                        buffer = bytearray(length)
                        await guest.do(READ, offset, buffer)
                        assert buffer == model[offset : offset + length], (round_number, step)
                server.kill()
                await server.start()
                await guest.do(FLUSH)
                flushed = bytes(model)
                server.kill()
                assert image.read_bytes() == flushed
                await server.start()
        server.kill()

"""QEMU's monitor (QMP) over its unix socket, as far as the tests need it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import trio


class Qmp:
    """One connection to a monitor; made by `open_qmp`."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._buffer = b""

    async def _message(self) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            data = bytes(await self._stream.receive_some(65536))
            if not data:
                raise ConnectionError("QEMU closed its monitor")
            self._buffer += data
        line, self._buffer = self._buffer.split(b"\n", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    async def execute(self, command: str, **arguments: Any) -> Any:
        """The command's return value; AssertionError with QEMU's reason when it refuses."""
        request: dict[str, Any] = {"execute": command}
        if arguments:
            request["arguments"] = {k.replace("_", "-"): v for k, v in arguments.items()}
        await self._stream.send_all(json.dumps(request).encode() + b"\n")
        while True:
            message = await self._message()
            assert "error" not in message, f"{command}: {message}"
            if "return" in message:
                return message["return"]

    async def migrate(self, uri: str) -> dict[str, Any]:
        """Migrate to `uri`; what `query-migrate` says once that has completed."""
        await self.execute("migrate", uri=uri)
        while True:
            status: dict[str, Any] = await self.execute("query-migrate")
            assert status["status"] not in ("failed", "cancelled"), status
            if status["status"] == "completed":
                return status
            await trio.sleep(0.05)


@asynccontextmanager
async def open_qmp(path: Path) -> AsyncIterator[Qmp]:
    """Connect as soon as QEMU listens at `path`."""
    while True:
        try:
            stream = await trio.open_unix_socket(path)
            break
        except OSError:
            await trio.sleep(0.02)
    async with stream:
        qmp = Qmp(stream)
        await qmp._message()
        await qmp.execute("qmp_capabilities")
        yield qmp

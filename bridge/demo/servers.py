"""The two server processes of the demo: nbdkit with our plugin, and the bridge itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from bridge.demo.guest import end_process
from bridge.errors import BridgeError, ConfigError

_START_LIMIT_S = 20.0
_STOP_LIMIT_S = 20.0
_LOOK_EVERY_S = 0.02

PLUGIN = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"


class ServerFailed(BridgeError):
    """A server process did not start, died, or did not stop cleanly; says what it said."""


@dataclass
class Server:
    """A running server process that listens on a unix socket."""

    name: str
    process: trio.Process
    socket: Path
    log_path: Path

    async def stop(self) -> None:
        """SIGTERM, and wait for the end.

        Raises ServerFailed when it takes too long (it is killed then) or ends with a status
        other than 0.
        """
        if self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(_STOP_LIMIT_S):
            await self.process.wait()
        if self.process.returncode is None:
            await end_process(self.process)
            raise ServerFailed(f"{self.name} did not stop within {_STOP_LIMIT_S:.0f} s of SIGTERM")
        if self.process.returncode != 0:
            raise ServerFailed(
                f"{self.name} ended with status {self.process.returncode}: {self.said()}"
            )

    def said(self) -> str:
        """The end of the server's log."""
        return self.log_path.read_text(errors="replace").strip()[-500:]


@asynccontextmanager
async def running(
    name: str, command: Sequence[str], socket: Path, log_path: Path
) -> AsyncIterator[Server]:
    """Run `command` until the block ends; enters once `socket` is there.

    Stops it with SIGTERM when the block ends well and has not done so itself; kills it when the
    block fails or is cancelled. Raises ServerFailed as `Server.stop` does, or when it does not
    start.
    """
    with log_path.open("ab") as log:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment()
        )
    server = Server(name, process, socket, log_path)
    try:
        await _wait_listening(server)
        yield server
        await server.stop()
    finally:
        if process.returncode is None:
            await end_process(process)


def _environment() -> dict[str, str]:
    """Our own, in which `python -m bridge` finds this very package, installed or not."""
    paths = [str(PLUGIN.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


async def _wait_listening(server: Server) -> None:
    with trio.move_on_after(_START_LIMIT_S):
        while not server.socket.is_socket():
            # poll() and not wait(): the server is expected to live.
            if server.process.poll() is not None:
                raise ServerFailed(f"{server.name} did not start: {server.said()}")
            await trio.sleep(_LOOK_EVERY_S)
        return
    raise ServerFailed(
        f"{server.name} was not listening on {server.socket} after {_START_LIMIT_S:.0f} s"
    )


def nbdkit_command(image: Path, socket: Path, *, size: str, plugin: Path = PLUGIN) -> list[str]:
    """nbdkit serving the sparse file `image` with our plugin.

    Raises ConfigError when nbdkit, its Python plugin or ours is missing.
    """
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise ConfigError("nbdkit is missing: install the packages nbdkit and nbdkit-plugin-python")
    probe = subprocess.run([nbdkit, "python", "--dump-plugin"], capture_output=True, check=False)
    if probe.returncode:
        raise ConfigError("nbdkit has no python plugin: install the package nbdkit-plugin-python")
    if not plugin.exists():
        raise ConfigError(f"no nbdkit plugin at {plugin}: run from the project's source folder")
    return [
        nbdkit, "--foreground", "--exit-with-parent", "--unix", str(socket),
        "python", str(plugin), f"file={image}", f"size={size}",
    ]  # fmt: skip


def bridge_command(uri: str, socket: Path, *options: str) -> list[str]:
    """The bridge, run by this interpreter."""
    if importlib.util.find_spec("bridge.__main__") is None:
        raise ConfigError("this installation of the bridge has no command line")
    return [sys.executable, "-m", "bridge", "serve", uri, "--socket-path", str(socket), *options]

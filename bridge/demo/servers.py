"""The two server processes of the demo: nbdkit with our plugin, and the bridge itself."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from bridge.demo.unwrap import unwrapped
from bridge.errors import BridgeError, ConfigError
from bridge.host import PLUGIN

_START_LIMIT_S = 20.0
_STOP_LIMIT_S = 20.0
_LOOK_EVERY_S = 0.02

_ACCEPTS = 1 << 16
"""__SO_ACCEPTCON, of the flags in /proc/net/unix."""


class ServerFailed(BridgeError):
    """A server process did not start, died, or did not stop cleanly; with its last log lines."""


@dataclass
class ServerProcess:
    """A running server process that listens on a unix socket."""

    name: str
    process: subprocess.Popen[bytes]
    socket: Path
    log_path: Path

    async def wait(self) -> int:
        """The exit status, once the process has ended."""
        if self.process.poll() is None:
            fd = os.pidfd_open(self.process.pid)
            try:
                await trio.lowlevel.wait_readable(fd)
            finally:
                os.close(fd)
        return self.process.wait()

    async def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended; do nothing if it already has."""
        self.process.kill()
        with trio.CancelScope(shield=True):
            await self.wait()

    async def stop(self) -> None:
        """Send SIGTERM and wait until the process has ended.

        Raises ServerFailed when that takes too long (the process is killed then), or when it ends
        with a status other than 0.
        """
        self.process.send_signal(signal.SIGTERM)
        with trio.move_on_after(_STOP_LIMIT_S):
            await self.wait()
        if self.process.poll() is None:
            await self.kill()
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
) -> AsyncIterator[ServerProcess]:
    """Run `command` until the block ends; the block begins once `socket` exists.

    Stops the process with SIGTERM when the block ends well, unless the block has; kills it when the
    block fails or is cancelled. Raises ServerFailed as `ServerProcess.stop` does, or when the
    process does not start.
    """
    server = await start_server(name, command, socket, log_path)
    try:
        yield server
        await server.stop()
    finally:
        await server.kill()


async def start_server(
    name: str, command: Sequence[str], socket: Path, log_path: Path
) -> ServerProcess:
    """Run `command`; return once it listens on `socket`. A dead process's socket does not count.

    Raises ServerFailed when it does not come to listen. Kills it then, and when cancelled.
    """
    before = _socket_identity(socket)
    server = ServerProcess(name, _start(command, log_path), socket, log_path)
    try:
        with trio.fail_after(_START_LIMIT_S):
            while _socket_identity(socket) in (None, before) or not is_listening(socket):
                if server.process.poll() is not None:
                    raise ServerFailed(f"{name} did not start: {server.said()}")
                await trio.sleep(_LOOK_EVERY_S)
    except BaseException as error:
        await server.kill()
        if isinstance(error, trio.TooSlowError):
            raise ServerFailed(
                f"{name} was not listening on {socket} after {_START_LIMIT_S:.0f} s"
            ) from None
        raise
    return server


def _socket_identity(path: Path) -> tuple[int, int] | None:
    """Inode and time of the socket at `path`; None without one. The kernel reuses inode numbers."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return (status.st_ino, status.st_ctime_ns) if stat.S_ISSOCK(status.st_mode) else None


def is_listening(path: Path) -> bool:
    """It takes connections: a moment after its file is there (proc(5): flags, path)."""
    try:
        lines = Path("/proc/net/unix").read_bytes().splitlines()
    except OSError:
        return True  # It cannot be told here.
    for line in lines[1:]:
        words = line.split(maxsplit=7)
        if len(words) == 8 and words[7] == os.fsencode(path) and int(words[3], 16) & _ACCEPTS:
            return True
    return False


@asynccontextmanager
async def watched(*servers: ServerProcess) -> AsyncIterator[None]:
    """Cancel the block and raise ServerFailed when one of `servers` ends meanwhile."""
    dead: list[ServerProcess] = []

    async def watch(server: ServerProcess, scope: trio.CancelScope) -> None:
        await server.wait()
        dead.append(server)
        scope.cancel()

    with unwrapped():
        async with trio.open_nursery() as nursery:
            for server in servers:
                nursery.start_soon(watch, server, nursery.cancel_scope)
            yield
            nursery.cancel_scope.cancel()
    for server in dead:
        status = server.process.returncode
        raise ServerFailed(f"{server.name} ended by itself (status {status}): {server.said()}")


def _start(command: Sequence[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start `command` from this very thread.

    nbdkit in the foreground ends with its parent (PR_SET_PDEATHSIG), and to Linux the parent is
    the thread: trio's own way starts processes from a worker thread that is gone after 10 s idle.
    """
    with log_path.open("ab") as log:
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=_environment()
        )


def _environment() -> dict[str, str]:
    """This process's environment, in which `python -m bridge` finds this package."""
    paths = [str(PLUGIN.parents[1]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def nbdkit_command(image: Path, socket: Path, *parameters: str, plugin: Path = PLUGIN) -> list[str]:
    """nbdkit serving the sparse file `image` with our plugin and more `parameters` for it.

    The plugin makes a missing image, if the parameter `size=…` is among them.

    Raises ConfigError when nbdkit, its Python plugin or ours is missing.
    """
    nbdkit = shutil.which("nbdkit")
    if nbdkit is None:
        raise ConfigError("nbdkit is missing: install the packages nbdkit and nbdkit-plugin-python")
    probe = subprocess.run([nbdkit, "python", "--dump-plugin"], capture_output=True, check=False)
    if probe.returncode:
        raise ConfigError("nbdkit has no Python plugin: install the package nbdkit-plugin-python")
    if not plugin.exists():
        raise ConfigError(f"no nbdkit plugin at {plugin}: run from the project's source folder")
    return [
        nbdkit, "--foreground", "--unix", str(socket),
        "python", str(plugin), f"file={image}", *parameters,
    ]  # fmt: skip


def small_server_command(image: Path, socket: Path, size_bytes: int) -> list[str]:
    """The bridge's own NBD server on the sparse file `image`, where nbdkit is missing."""
    module = "bridge.demo.small_server"
    return [sys.executable, "-m", module, str(image), str(size_bytes), str(socket)]


def bridge_command(uri: str, socket: Path, *options: str) -> list[str]:
    """The bridge, run by this interpreter."""
    if importlib.util.find_spec("bridge.__main__") is None:
        raise ConfigError("this installation lacks the bridge's command line: install it again")
    command = [sys.executable, "-m", "bridge", "serve", uri, "--socket-path", str(socket)]
    return [*command, "--api", "off", *options]

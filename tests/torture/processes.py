"""A program that is started, stopped, killed and watched again and again."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import trio

from tests.torture.memory import MemoryGroup

_PR_SET_PDEATHSIG = 1
_LOOK_EVERY_S = 0.05
_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Called in a new process: it is killed when the campaign ends."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Program:
    """One process at a time, with one log for all of them."""

    def __init__(self, name: str, log: Path, group: MemoryGroup | None = None) -> None:
        """`group`: of all of its processes."""
        self.name = name
        self.log = log
        self.group = group
        self._kills_seen = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process that runs. Raises RuntimeError when there is none."""
        if self._process is None:
            raise RuntimeError(f"{self.name} does not run")
        return self._process.pid

    @property
    def runs(self) -> bool:
        """It was started, and neither killed nor stopped; it may have ended by itself."""
        return self._process is not None

    def start(self, argv: Sequence[str], more_environment: dict[str, str]) -> None:
        """Start it; it may take a while until it listens."""
        if self._process is not None:
            raise RuntimeError(f"{self.name} runs already")
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **more_environment},
                preexec_fn=self._begin,
            )

    def _begin(self) -> None:
        die_with_parent()
        if self.group is not None:
            self.group.enter()

    def was_out_of_memory(self, status: int) -> bool:
        """It ended with `status` because the kernel killed it at its memory limit."""
        if self.group is None or status != -signal.SIGKILL:
            return False
        seen, self._kills_seen = self._kills_seen, self.group.kills
        return self._kills_seen > seen

    async def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with trio.CancelScope(shield=True):
                await _ended(process)

    async def stop(self) -> int:
        """SIGTERM, and wait until it has ended; its status."""
        process, self._process = self._process, None
        if process is None:
            raise RuntimeError(f"{self.name} does not run")
        process.send_signal(signal.SIGTERM)
        return await self._leave(process)

    async def wait(self) -> int:
        """Wait until it ends by itself; its status."""
        process, self._process = self._process, None
        if process is None:
            raise RuntimeError(f"{self.name} does not run")
        return await self._leave(process)

    async def _leave(self, process: subprocess.Popen[bytes]) -> int:
        try:
            return await _ended(process)
        except BaseException:
            process.kill()
            with trio.CancelScope(shield=True):
                await _ended(process)
            raise

    def pause(self) -> None:
        """SIGSTOP."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """SIGCONT."""
        os.kill(self.pid, signal.SIGCONT)

    async def watch(self, ended: Callable[[int], None]) -> None:
        """Call `ended(status)` whenever it ends and nobody here has ended it."""
        while True:
            await trio.sleep(_LOOK_EVERY_S)
            process = self._process
            if process is not None and process.poll() is not None:
                self._process = None
                ended(process.returncode)

    def said(self) -> str:
        """The end of its log."""
        return self.log.read_text(errors="replace").strip()[-600:] if self.log.exists() else ""


async def _ended(process: subprocess.Popen[bytes]) -> int:
    if process.poll() is None:
        fd = os.pidfd_open(process.pid)
        try:
            await trio.lowlevel.wait_readable(fd)
        finally:
            os.close(fd)
    return process.wait()

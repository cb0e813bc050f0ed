"""Runs one guest in QEMU and reads its console.

The guest's own `PASS` or `FAIL reason` line decides, not QEMU's exit status. QEMU has always ended
afterwards: after power-off, failure, time limit and cancellation.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import trio

from bridge.demo.qemu import GuestConfig, command_line, find_qemu, qemu_version
from bridge.demo.report import GuestReport, SerialParser
from bridge.demo.unwrap import unwrapped
from bridge.errors import BridgeError

_LOG_MAX_BYTES = 16 << 20
"""So that a guest that floods its console does not fill the disk."""
_READ_BYTES = 65536
_KILL_WAIT_S = 5.0


class GuestEnded(BridgeError):
    """The guest ended while a caller waited for a line of its console."""


Checkpoint = Callable[[str], Awaitable[None]]
"""Called with a checkpoint's name while the guest waits."""


class VirtualMachine:
    """A running guest. Made by `open_guest`."""

    def __init__(self, process: trio.Process, log_path: Path, checkpoint: Checkpoint | None):
        self.process = process
        self.log_path = log_path
        self.lines: list[str] = []
        """The console's lines so far, without escape sequences."""
        self._parser = SerialParser()
        self._checkpoint = checkpoint
        self._changed = trio.Event()
        self._began_s = time.monotonic()
        self.ended = False

    @property
    def report(self) -> GuestReport:
        """The verdict so far; final once `wait()` has returned."""
        return self._parser.report

    async def wait_for_line(self) -> None:
        """Wait until the console shows more. Raises GuestEnded if the guest has ended."""
        if self.ended:
            raise GuestEnded(f"the guest has ended: {self.report.reason or 'no failure'}")
        await self._changed.wait()

    async def wait_for(self, text: str, *, after: int = 0) -> str:
        """Wait for a line that contains `text`, from number `after` on; return it.

        Raises GuestEnded when the guest ends first.
        """
        seen = after
        while True:
            while seen < len(self.lines):
                if text in self.lines[seen]:
                    return self.lines[seen]
                seen += 1
            await self.wait_for_line()

    async def send_line(self, line: str = "") -> None:
        """Type a line at the guest's console; do nothing if the guest has ended."""
        assert self.process.stdin is not None
        try:
            await self.process.stdin.send_all(line.encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            return

    async def wait(self) -> GuestReport:
        """The final report, once QEMU has exited."""
        while not self.ended:
            await self._changed.wait()
        return self.report

    def kill(self) -> None:
        """Kill QEMU at once, as if its host had failed."""
        self.process.kill()

    async def read_console(self) -> None:
        """Read until QEMU exits; answers checkpoints. Run by `open_guest`."""
        assert self.process.stdout is not None
        logged = 0
        with self.log_path.open("ab", buffering=0) as log:
            while True:
                data = bytes(await self.process.stdout.receive_some(_READ_BYTES))
                if not data:
                    break
                if logged < _LOG_MAX_BYTES:
                    log.write(data)
                    logged += len(data)
                await self._lines_read(self._parser.feed(data))
        await self._lines_read(self._parser.finish())
        await self.process.wait()
        self._finish()

    async def _lines_read(self, lines: list[str]) -> None:
        if not lines:
            return
        if len(self.lines) < 10000:
            self.lines += lines
        self._wake()
        for line in lines:
            if line.startswith("CHECKPOINT "):
                if self._checkpoint is not None:
                    await self._checkpoint(line.removeprefix("CHECKPOINT "))
                await self.send_line()

    def _finish(self) -> None:
        report = self.report
        report.elapsed_s = time.monotonic() - self._began_s
        if not report.passed and not report.reason:
            said = _tail(self.log_path.with_suffix(".err")) or " | ".join(list(report.tail)[-3:])
            report.reason = f"QEMU exited ({self.process.returncode}) without a verdict: {said}"
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()


@asynccontextmanager
async def open_guest(
    config: GuestConfig, log_path: Path, *, checkpoint: Checkpoint | None = None
) -> AsyncIterator[VirtualMachine]:
    """Start the guest; kill QEMU at the end of the block if it still runs.

    Appends the serial console to `log_path`, and QEMU's own messages to the same path with the
    suffix `.err`. Awaits `checkpoint` for each `CHECKPOINT` line before the guest goes on. Raises
    ConfigError when QEMU cannot be started.
    """
    qemu = list(config.qemu) or [find_qemu()]
    version = await trio.to_thread.run_sync(qemu_version, qemu)
    command = command_line(replace(config, qemu=qemu), version)
    with log_path.with_suffix(".err").open("ab") as errors:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors
        )
    guest = VirtualMachine(process, log_path, checkpoint)
    try:
        with unwrapped():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.read_console)
                yield guest
                nursery.cancel_scope.cancel()
    finally:
        await end_process(process)


async def run_guest(
    config: GuestConfig,
    log_path: Path,
    *,
    time_limit_s: float = 120.0,
    checkpoint: Checkpoint | None = None,
) -> GuestReport:
    """Boot, wait for the end, return the report. A guest that exceeds the limit has failed."""
    async with open_guest(config, log_path, checkpoint=checkpoint) as guest:
        with trio.move_on_after(time_limit_s) as scope:
            await guest.wait()
        if scope.cancelled_caught:
            tail = " | ".join(list(guest.report.tail)[-3:])
            guest.report.passed = False
            guest.report.reason = f"not finished after {time_limit_s:.0f} s; last lines: {tail}"
            guest.report.elapsed_s = time_limit_s
    return guest.report


async def end_process(process: trio.Process) -> None:
    """Kill `process` if it runs, and reap it; stop waiting after a few seconds.

    SIGKILL does not end a process that hangs inside the kernel (a broken KVM).
    """
    if process.returncode is None:
        process.kill()
    with trio.move_on_after(_KILL_WAIT_S, shield=True):
        await process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with trio.CancelScope(shield=True):
                await stream.aclose()


def _tail(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()[-500:]
    except OSError:
        return ""

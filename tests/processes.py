"""Processes for the end-to-end tests: servers, and the bridge as its users start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import trio

from bridge.demo.servers import is_listening
from tests.tools import HUNG_S


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory under /tmp: socket paths have 107 bytes, and the peers' chroot shares /tmp."""
    with tempfile.TemporaryDirectory(prefix="nbb-", dir="/tmp") as name:
        yield Path(name)


def bridge_argv(*arguments: str) -> list[str]:
    """The command line of `nbd-bridge ARGUMENTS…`."""
    return [sys.executable, "-m", "bridge", *arguments]


def unix_uri(path: Path | str, export: str = "") -> str:
    """The URI of `export` of the server at `path`."""
    return f"nbd+unix:///{export}?socket={path}"


@asynccontextmanager
async def process(argv: list[str], *, ready: Path) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A process that has made its socket `ready`; it is ended, by force if need be."""
    ready.unlink(missing_ok=True)  # of one that was killed
    child = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        with trio.fail_after(HUNG_S):
            while not _is_ready(ready):
                assert child.poll() is None, f"{argv[0]} ended with {child.returncode}"
                await trio.sleep(0.02)
        yield child
    finally:
        if child.poll() is None:
            child.terminate()
            with trio.CancelScope(shield=True):
                await wait_for(child, limit_s=HUNG_S)


@contextmanager
def program(argv: list[str], *, ready: Path | int) -> Iterator[None]:
    """A program that has made its socket `ready`, or listens on that port of the loopback
    interface; it is killed at the end. For tests that need no loop."""
    child = subprocess.Popen(
        argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert child.stderr is not None
    try:
        deadline = time.monotonic() + HUNG_S
        while not _is_ready(ready):
            if child.poll() is not None:
                said = child.stderr.read().decode(errors="replace")
                raise AssertionError(f"{argv} ended: {said}")
            assert time.monotonic() < deadline, f"{argv} does not listen"
            time.sleep(0.02)
        yield
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def _is_ready(ready: Path | int) -> bool:
    if isinstance(ready, int):
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", ready)) == 0
    return is_listening(ready) if ready.is_socket() else ready.exists()


async def wait_for(child: subprocess.Popen[bytes], *, limit_s: float) -> int:
    """The exit status of `child`, which is killed if it takes longer than `limit_s`."""
    with trio.move_on_after(limit_s):
        while child.poll() is None:
            await trio.sleep(0.02)
    if child.poll() is None:
        child.kill()
        child.wait()
        raise AssertionError(f"{child.args!r} did not end")
    return child.returncode


def pause(child: subprocess.Popen[bytes]) -> None:
    """SIGSTOP, and wait until all of it stands still: it may be at work on the other processor."""
    child.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)


@asynccontextmanager
async def serving(uri: str, path: Path, *options: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """`nbd-bridge serve URI --socket-path PATH OPTIONS…`; it must end cleanly."""
    argv = bridge_argv("serve", uri, "--socket-path", str(path), *options)
    async with process(argv, ready=path) as child:
        yield child
        if child.poll() is None:
            child.send_signal(signal.SIGTERM)
            assert await wait_for(child, limit_s=HUNG_S) == 0


def cpu_seconds(pid: int) -> float:
    """Processor time that the process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def private_memory_bytes(pid: int) -> int:
    """Resident memory of the process without what it shares (the guest's memory)."""
    status = Path(f"/proc/{pid}/status").read_text()
    values = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return sum(int(values[key].split()[0]) for key in ("RssAnon", "RssFile")) * 1024

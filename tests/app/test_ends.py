"""How a command lives and ends, whatever becomes of its log and whichever signal comes."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge.peers.blk_driver import BlkDriver
from tests.processes import (
    bridge_argv,
    process,
    serving,
    unix_uri,
    wait_for,
)
from tests.tools import HUNG_S, need


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """subprocess.Popen; what a test that failed leaves behind is killed."""
    with ExitStack() as children:

        def popen(argv: list[str], **how: Any) -> subprocess.Popen[bytes]:
            child = subprocess.Popen(argv, **how)
            children.callback(child.wait)
            children.callback(child.kill)
            return child

        yield popen


def nbdkit(directory: Path) -> list[str]:
    return [need("nbdkit"), "-f", "-U", str(directory / "nbd"), "memory", "16M"]


def serve_argv(directory: Path, *options: str) -> list[str]:
    vhost = str(directory / "vhost")
    uri = unix_uri(directory / "nbd")
    return bridge_argv("serve", uri, "--socket-path", vhost, *options)


def cached(cache: Path) -> list[str]:
    return ["--cache-mode", "writeback", "--cache-dir", str(cache), "--cache-size", "4M"]


async def until_there(path: Path) -> None:
    with trio.fail_after(HUNG_S):
        while not path.exists():
            await trio.sleep(0.02)


def _full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


def _reader_gone() -> int:
    reader, writer = os.pipe()
    os.close(reader)
    return writer


@pytest.mark.parametrize("log", [_full, _reader_gone])
async def test_serve_log_that_cannot_be_written_changes_nothing(log, start, directory):
    stderr = log()
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = serve_argv(directory, "--cache-mode", "off")
        child = start(argv, stdin=subprocess.DEVNULL, stderr=stderr)
        os.close(stderr)
        await until_there(directory / "vhost")
        for _ in range(3):
            async with await BlkDriver.connect(directory / "vhost") as guest:
                await guest.write(0, b"a" * 512)
        child.terminate()
        assert await wait_for(child, limit_s=HUNG_S) == 0
    assert not (directory / "vhost").exists()


async def test_serve_unread_log_delays_nothing(start, directory):
    reader, stderr = os.pipe()
    fcntl.fcntl(stderr, fcntl.F_SETPIPE_SZ, 4096)
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = serve_argv(directory, "--cache-mode", "off")
        child = start(argv, stdin=subprocess.DEVNULL, stderr=stderr)
        os.close(stderr)
        await until_there(directory / "vhost")
        for _ in range(60):
            with trio.fail_after(HUNG_S):
                async with await BlkDriver.connect(directory / "vhost") as guest:
                    assert await guest.read(0, 512) == bytes(512)
        child.terminate()
        assert await wait_for(child, limit_s=HUNG_S) == 0
    os.close(reader)


async def test_serve_without_standard_error_starts_and_keeps_its_descriptors_apart(
    start, directory
):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = serve_argv(directory, "--cache-mode", "off")
        child = start(["sh", "-c", 'exec "$@" 0<&- 1>&- 2>&-', "sh", *argv])
        await until_there(directory / "vhost")
        for fd in (0, 1, 2):
            assert os.readlink(f"/proc/{child.pid}/fd/{fd}") == "/dev/null"
        async with await BlkDriver.connect(directory / "vhost") as guest:
            await guest.write(0, b"a" * 512)
        child.terminate()
        assert await wait_for(child, limit_s=HUNG_S) == 0


async def test_serve_log_as_json_is_one_object_per_line_in_order(start, directory):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = serve_argv(directory, "--cache-mode", "off", "--log-format", "json")
        child = start(argv, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE)
        await until_there(directory / "vhost")
        assert child.stderr is not None
        (await BlkDriver.connect(directory / "vhost")).close()
        events = []
        while "front-end disconnected" not in events:  # else it may come after "stopping"
            line = await trio.to_thread.run_sync(child.stderr.readline)
            events.append(json.loads(line)["event"])
        child.terminate()
        assert await wait_for(child, limit_s=HUNG_S) == 0
    events += [json.loads(line)["event"] for line in child.stderr]
    child.stderr.close()
    assert events[0] == "serving"
    assert events[-2:] == ["stopping", "stopped"]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGQUIT])
async def test_serve_signal_leaves_a_cache_that_was_closed_in_order(number, start, directory):
    cache = directory / "cache"
    cache.mkdir()
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = serve_argv(directory, *cached(cache))
        child = start(argv, stdin=subprocess.DEVNULL)
        await until_there(directory / "vhost")
        async with await BlkDriver.connect(directory / "vhost") as guest:
            await guest.write(0, b"a" * 4096)
        child.send_signal(number)
        assert await wait_for(child, limit_s=HUNG_S) == 0
    (file,) = cache.glob("*.cache")
    shown = subprocess.run(
        bridge_argv("cache", "show", "--json", str(file)), capture_output=True, check=True
    )
    assert json.loads(shown.stdout)["clean_shutdown"]
    assert json.loads(shown.stdout)["dirty_bytes"] == 0


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
async def test_serve_signal_without_a_meaning_changes_nothing(number, directory):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        uri = unix_uri(directory / "nbd")
        async with serving(uri, directory / "vhost", "--cache-mode", "off") as child:
            child.send_signal(number)
            async with await BlkDriver.connect(directory / "vhost") as guest:
                await guest.write(0, b"a" * 512)
            assert child.poll() is None


async def test_serve_under_nohup_outlives_its_terminal(start, directory):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = serve_argv(directory, "--cache-mode", "off")
        child = start(["sh", "-c", 'trap "" HUP; exec "$@"', "sh", *argv], stderr=subprocess.PIPE)
        await until_there(directory / "vhost")
        child.send_signal(signal.SIGHUP)
        async with await BlkDriver.connect(directory / "vhost") as guest:
            await guest.write(0, b"a" * 512)
        child.terminate()
        assert await wait_for(child, limit_s=HUNG_S) == 0
    assert child.stderr is not None
    text = child.stderr.read().decode()
    child.stderr.close()
    assert "SIGHUP" not in text
    assert "signal=SIGTERM" in text


async def test_serve_signals_that_keep_coming_do_not_change_the_exit_status(start, directory):
    """From the first one to the very end of the process."""
    async with process(nbdkit(directory), ready=directory / "nbd"):
        child = start(serve_argv(directory, "--cache-mode", "off"))
        await until_there(directory / "vhost")
        async with await BlkDriver.connect(directory / "vhost") as guest:
            await guest.write(0, b"a" * 512)
            await trio.to_thread.run_sync(partial(_bombard, child))
        assert child.returncode == 0
    assert not (directory / "vhost").exists()


_LAST_SIGNAL = """
import os, signal, trio
from bridge.app.signals import ending_signals

async def main():
    with ending_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    await trio.lowlevel.checkpoint()

trio.run(main)
"""


def test_signal_that_comes_right_before_they_are_ignored_ends_nothing() -> None:
    """Told of in trio's next turn, it found a closed channel: internal error, status 1."""
    done = subprocess.run([sys.executable, "-c", _LAST_SIGNAL], capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def _bombard(child: subprocess.Popen[bytes]) -> None:
    signals = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT]
    deadline_s = time.monotonic() + HUNG_S
    while child.poll() is None and time.monotonic() < deadline_s:
        for number in signals:
            child.send_signal(number)
        time.sleep(0.0005)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_cache_flush_interrupted_is_one_line_and_keeps_the_data(number, start, directory):
    cache = directory / "cache"
    cache.mkdir()
    # Every write takes so long that nothing is written out before the kill, and no flush ends.
    argv = [*nbdkit(directory)[:-2], "--filter=delay", "memory", "16M", "wdelay=1000"]
    async with process(argv, ready=directory / "nbd") as server:
        child = start(serve_argv(directory, *cached(cache)))
        await until_there(directory / "vhost")
        guest = await BlkDriver.connect(directory / "vhost")
        await guest.write(0, b"a" * 4096)
        child.kill()
        child.wait()
        guest.close()
        (file,) = cache.glob("*.cache")
        flush = start(bridge_argv("cache", "flush", str(file)), stderr=subprocess.PIPE)
        with trio.fail_after(HUNG_S):
            while not _has_open(flush.pid, file):
                await trio.sleep(0.02)
        flush.send_signal(number)
        flush.send_signal(number)
        assert await wait_for(flush, limit_s=HUNG_S) == 1
        server.kill()
    assert flush.stderr is not None
    text = flush.stderr.read().decode()
    flush.stderr.close()
    assert "nbd-bridge: interrupted" in text.splitlines()
    assert "Traceback" not in text
    shown = subprocess.run(
        bridge_argv("cache", "show", "--json", str(file)), capture_output=True, check=True
    )
    assert json.loads(shown.stdout)["dirty_bytes"] == 4096


def _has_open(pid: int, file: Path) -> bool:
    try:
        return any(
            os.path.realpath(link) == str(file) for link in Path(f"/proc/{pid}/fd").iterdir()
        )
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
async def test_demo_ended_by_a_signal_leaves_no_process_and_no_image(number, start, directory):
    need("nbdkit")

    def started():
        return start(
            bridge_argv("demo", "--no-guest"),
            env={**os.environ, "TMPDIR": str(directory)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    demo = started()
    with trio.fail_after(HUNG_S):
        while not any(directory.glob("*/disk.sock")):
            if demo.poll() is not None:  # It was over before it was looked for.
                demo.stderr.close()
                demo = started()
            await trio.sleep(0.005)

    demo.send_signal(number)

    assert await wait_for(demo, limit_s=HUNG_S) == 1
    assert demo.stderr is not None
    assert demo.stderr.read() == b"nbd-bridge: interrupted\n"
    demo.stderr.close()
    assert list(directory.iterdir()) == []
    assert _processes_of(directory) == []


def _processes_of(directory: Path) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        except (OSError, UnicodeDecodeError):
            continue
        if entry.name.isdigit() and f"{directory}/" in line:
            found.append(line)
    return found

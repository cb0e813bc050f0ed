"""`nbd-bridge top`: in a terminal, and without one."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge.cache.cache_options import WRITEBACK
from bridge.cli.rates import rates
from bridge.cli.top_screen import Watched, printed, screen, sparkline
from bridge.peers.blk_driver import BlkDriver
from tests.api.bridges import Bridge, served
from tests.processes import bridge_argv, wait_for
from tests.tools import HUNG_S


@asynccontextmanager
async def busy(directory: Path) -> AsyncIterator[Bridge]:
    """A bridge whose guest reads and writes."""

    async def work(guest: BlkDriver) -> None:
        while True:
            await guest.write(0, b"a" * 4096)
            await guest.read(0, 4096)
            await trio.sleep(0.002)

    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(work, guest)
                yield bridge
                nursery.cancel_scope.cancel()


async def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    done = await trio.run_process(
        bridge_argv("top", *arguments),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        stdin=b"",
        env={**os.environ, **(env or {})},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_top_without_a_terminal_prints_one_table_and_ends(directory: Path) -> None:
    async with busy(directory) as bridge:
        status, text, error = await run(str(bridge.control), "--interval", "0.3")
    assert (status, error) == (0, "")
    assert "\x1b" not in text
    assert text.startswith("vm0  nbd+unix:///")
    assert "safe to reboot this host: no" in text
    names = [line.split()[0] for line in text.splitlines()[3:]]
    assert names == ["reads", "writes", "read", "written", "median", "99", "hits", "dirty", "in"]


async def test_top_of_all_bridges_has_a_line_for_each_and_for_a_dead_one(directory: Path) -> None:
    own = directory / "nbd-bridge"
    own.mkdir(mode=0o700)
    env = {"XDG_RUNTIME_DIR": str(directory)}
    async with busy(directory) as bridge:
        (own / "vm0.api").symlink_to(bridge.control)
        (own / "gone.api").symlink_to(directory / "nowhere")
        status, text, error = await run("--once", "--interval", "0.3", env=env)
        assert (status, error) == (0, "")
        lines = {line.split()[0]: line for line in text.splitlines()}
        assert "not running" in lines["gone"]
        assert "connected" in lines["vm0"]
        status, text, _ = await run("--json", "--interval", "0.5", env=env)
    found = {each["name"]: each for each in json.loads(text)}
    assert "not running" in found["gone"]["error"]
    assert found["vm0"]["reads_per_s"] > 0
    assert found["vm0"]["dirty_bytes"] == 4096


@pytest.mark.parametrize("end", [b"q", b"\x03", signal.SIGTERM])
async def test_top_in_a_terminal_is_ended_by_q_or_a_signal_and_leaves_it_as_it_was(
    directory: Path, end: bytes | signal.Signals
) -> None:
    ours, theirs = pty.openpty()
    try:
        async with busy(directory) as bridge:
            child = subprocess.Popen(
                bridge_argv("top", str(bridge.control), "--interval", "0.2"),
                stdin=theirs,
                stdout=theirs,
                stderr=theirs,
                start_new_session=True,
                preexec_fn=_take_terminal,
                env={**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"},
            )
            os.close(theirs)
            async with trio.lowlevel.FdStream(os.dup(ours)) as terminal:
                seen = b""
                with trio.fail_after(HUNG_S):
                    while b"in flight" not in seen:
                        seen += await terminal.receive_some()
                    if isinstance(end, bytes):
                        await terminal.send_all(end)
                    else:
                        child.send_signal(end)
                    with suppress(
                        trio.BrokenResourceError
                    ):  # The terminal of a process that ended.
                        while part := await terminal.receive_some():
                            seen += part
            assert await wait_for(child, limit_s=HUNG_S) == 0
        assert b"\x1b[?1049h" in seen  # A screen of its own …
        assert b"\x1b[?1049l" in seen[-80:]  # … which is left, with the cursor shown.
        assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")
        assert b"Traceback" not in seen
    finally:
        os.close(ours)


def _take_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.mark.parametrize("no_color", ["", "1"])
async def test_top_has_no_colours_where_none_are_wanted(directory: Path, no_color: str) -> None:
    ours, theirs = pty.openpty()
    async with busy(directory) as bridge:
        child = subprocess.Popen(
            bridge_argv("top", str(bridge.control), "--interval", "0.2"),
            stdin=theirs,
            stdout=theirs,
            env={**os.environ, "TERM": "xterm", "NO_COLOR": no_color},
        )
        os.close(theirs)
        seen = b""
        async with trio.lowlevel.FdStream(ours) as terminal:
            with trio.fail_after(HUNG_S):
                while b"in flight" not in seen:
                    seen += await terminal.receive_some()
            child.terminate()
            assert await wait_for(child, limit_s=HUNG_S) == 0
    assert b"safe to reboot" in seen
    assert bool(re.search(rb"\x1b\[3[0-7]m", seen)) is (not no_color)


async def test_bridge_that_is_not_there_is_one_line_and_exit_status_2(directory: Path) -> None:
    status, text, error = await run(str(directory / "no.api"), "--once")
    assert (status, text) == (2, "")
    assert error.count("\n") == 1
    assert "is not running" in error


async def test_terminal_that_cannot_show_it_is_one_line(directory: Path) -> None:
    ours, theirs = pty.openpty()
    async with busy(directory) as bridge:
        done = await trio.run_process(
            bridge_argv("top", str(bridge.control)),
            stdin=theirs,
            stdout=theirs,
            capture_stderr=True,
            check=False,
            env={**os.environ, "TERM": "no-such-terminal"},
        )
    os.close(ours)
    os.close(theirs)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"use --once" in done.stderr


def look(**more: Any) -> dict[str, Any]:
    """What a bridge says of itself."""
    return {
        "bridge": {"name": "vm0", "started_s": 1.0},
        "guest": {"in_flight": 3},
        "cache": None,
        "traffic": {
            op: {"requests_total": 0, "bytes_total": 0} for op in ("read", "write", "flush")
        },
        "latency_bounds_s": [0.001, 0.01, 0.1],
        "latency": {},
        **more,
    }


def test_rates_are_differences_per_second() -> None:
    def cache(hits: int) -> dict[str, int]:
        return {"hits_total": hits, "lookups_total": 2 * hits, "dirty_bytes": 7}

    before = look(cache=cache(10))
    now = look(
        cache=cache(30),
        traffic={
            "read": {"requests_total": 10, "bytes_total": 4096},
            "write": {"requests_total": 4, "bytes_total": 0},
            "flush": {"requests_total": 2, "bytes_total": 0},
        },
        latency={"read cache": {"counts": [50, 0, 50, 0]}},
    )
    found = rates(now, before, 2.0, timed_since=before)
    assert (found.reads_per_s, found.writes_per_s, found.others_per_s) == (5, 2, 1)
    assert found.read_bytes_per_s == 2048
    assert (found.hit_ratio, found.dirty_bytes, found.in_flight) == (0.5, 7, 3)
    assert found.p50_s == 0.001
    assert found.p99_s == pytest.approx(0.01 + 0.09 * 49 / 50)


def test_nothing_timed_has_no_latency_and_what_is_above_all_bounds_has_the_last() -> None:
    assert rates(look(), look(), 1.0, timed_since=look()).p50_s is None
    late = look(latency={"flush server": {"counts": [0, 0, 0, 9]}})
    assert rates(late, look(), 1.0, timed_since=look()).p99_s == 0.1


def test_bridge_that_was_started_again_is_not_compared_with_the_one_before() -> None:
    watched = Watched("vm0")
    watched.add(0.0, look())
    watched.add(1.0, look())
    assert len(watched.history) == 1
    watched.add(2.0, look(bridge={"name": "vm0", "started_s": 2.0}))
    assert len(watched.history) == 1
    watched.add(3.0, {"bridge": {"name": "vm0"}, "error": "bridge vm0 is not running"})
    assert watched.error


def test_bridge_of_an_older_version_is_not_looked_into() -> None:
    watched = Watched("vm0")
    watched.add(0.0, {"bridge": {"name": "vm0", "version": "0.1.0"}, "guest": {}})
    (line,) = screen([watched], width=80, unicode=True)
    assert "version 0.1.0" in line[0][0]


def test_table_has_its_columns_below_one_another_whatever_is_dead() -> None:
    def disk(name: str) -> Watched:
        watched = Watched(name)
        for number in range(3):
            watched.add(
                float(number),
                look(guest={"in_flight": 0, "state": "running"}, server={"state": "connected"}),
            )
        return watched

    dead = Watched("a-dead-one")
    dead.add(0.0, {"bridge": {"name": "x"}, "error": "it is not there " * 20})
    lines = printed(screen([disk("vm0"), dead, disk("vm10")], width=80, unicode=True)).splitlines()
    assert len(lines) == 4
    assert lines[0].index("SERVER") == lines[1].index("connected") == lines[3].index("connected")
    assert lines[0].index("REQUESTS") == lines[1].index("▁")


def test_what_a_terminal_would_obey_is_not_shown() -> None:
    assert printed([[("a\x1b[2Jb", ""), ("\x07c", "red")]]) == "a?[2Jb?c"


def test_sparkline_is_higher_for_more() -> None:
    assert sparkline([0, 1, None, 4, 8]) == "▁▂ ▅█"
    assert sparkline([0, 0]) == "▁▁"
    assert sparkline([]) == ""
    assert sparkline([1, 2], unicode=False).isascii()

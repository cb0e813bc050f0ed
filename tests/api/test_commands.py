"""The commands that speak to running bridges, as an operator types them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

from bridge.peers.blk_driver import BlkDriver
from tests.processes import bridge_argv, process, serving, unix_uri, wait_for
from tests.tools import HUNG_S, need


@asynccontextmanager
async def bridge(directory: Path, *options: str) -> AsyncIterator[subprocess.Popen[bytes]]:
    """A bridge over a file, with a cache and a control socket in `directory`."""
    image = directory / "disk.img"
    image.touch()
    os.truncate(image, 16 << 20)
    nbd = directory / "nbd"
    async with process([need("nbdkit"), "-f", "-U", str(nbd), "file", str(image)], ready=nbd):
        own = ("--cache-mode", "writeback", "--cache-size", "8M", "--cache-dir", str(directory))
        control = ("--api", str(directory / "vm0.api"))
        vhost = directory / "vm0.sock"
        async with serving(unix_uri(nbd), vhost, *own, *control, *options) as child:
            yield child


async def run(*arguments: str, env: dict[str, str] | None = None) -> tuple[int, str, str]:
    """(exit status, standard output, standard error) of a command."""
    done = await trio.run_process(
        bridge_argv(*arguments),
        capture_stdout=True,
        capture_stderr=True,
        check=False,
        stdin=b"",
        env={**os.environ, **(env or {})},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


async def test_status_says_whether_the_host_may_be_rebooted(directory: Path) -> None:
    control = str(directory / "vm0.api")
    async with bridge(directory):
        status, text, _ = await run("status", control)
        assert status == 0
        assert "safe to reboot this host: yes" in text.splitlines()
        async with await BlkDriver.connect(directory / "vm0.sock") as guest:
            await guest.write(0, b"a" * (1 << 20))
            _, text, _ = await run("status", control)
            assert "safe to reboot this host: no, because 1 MiB are not on the server" in text
            assert "write 16" in text
            status, text, _ = await run("flush", control)
            assert (status, text[:8]) == (0, "flushed ")
            found = json.loads((await run("status", control, "--json"))[1])
            assert found["safe_to_reboot"]["safe"] is True
            assert found["cache"]["dirty_bytes"] == 0


async def test_stop_when_clean_stops_and_leaves_nothing_behind(directory: Path) -> None:
    control = str(directory / "vm0.api")
    async with bridge(directory) as child:
        async with await BlkDriver.connect(directory / "vm0.sock") as guest:
            await guest.write(0, b"a" * 4096)
            status, _, error = await run("stop", control, "--when-clean")
            assert status == 1
            assert "a guest uses the disk" in error
            assert error.count("\n") == 1
        status, text, _ = await run("stop", control, "--when-clean")
        assert (status, text) == (0, "stopping\n")
        assert await wait_for(child, limit_s=HUNG_S) == 0
    assert not Path(control).exists()
    assert (directory / "disk.img").read_bytes()[:4096] == b"a" * 4096


async def test_resize_and_set_print_the_new_state(directory: Path) -> None:
    control = str(directory / "vm0.api")
    async with bridge(directory):
        assert (await run("resize", control))[1] == "the disk has 16 MiB, as before\n"
        os.truncate(directory / "disk.img", 32 << 20)
        assert (await run("resize", control))[1] == "the disk has 32 MiB now\n"
        status, text, _ = await run("set", control, "--cache-mode", "writethrough")
        assert status == 0
        assert "writethrough" in text
        text = (await run("set", control, "--slow-ms", "5", "--json"))[1]
        assert json.loads(text)["slow_ms"] == 5


async def test_list_shows_living_and_dead_bridges(directory: Path) -> None:
    env = {"XDG_RUNTIME_DIR": str(directory)}
    own = directory / "nbd-bridge"
    own.mkdir(mode=0o700)
    async with bridge(directory):
        (own / "vm0.api").symlink_to(directory / "vm0.api")
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(os.fspath(own / "dead.api"))
        status, text, _ = await run("list", env=env)
        assert status == 0
        lines = [line.split() for line in text.splitlines()]
        assert lines[0][:3] == ["NAME", "GUEST", "SERVER"]
        assert ["vm0", "none", "connected", "16", "MiB", "writeback"] in [x[:6] for x in lines]
        assert any(line[0] == "dead" and "not running" in " ".join(line) for line in lines)
        found = json.loads((await run("list", "--json", env=env))[1])
        assert {each["bridge"]["name"] for each in found} >= {"vm0", "dead"}


async def test_full_backlog_of_a_control_socket_is_no_answer(directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as deaf, socket.socket(socket.AF_UNIX) as first:
        deaf.bind(os.fspath(directory / "deaf.api"))
        deaf.listen(0)
        first.connect(os.fspath(directory / "deaf.api"))
        status, _, error = await run("status", str(directory / "deaf.api"))
        assert status == 1
        assert "bridge deaf did not answer" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("status", "no-such-bridge"), "no bridge is called no-such-bridge"),
        (("flush", "/nope/x.api"), "bridge x is not running"),
        (("stop", "../x"), "bridge x is not running|is not running"),
        (("stop", "no-such-bridge"), "'nbd-bridge list' shows those that run"),
        (("statu",), "did you mean 'status'?"),
        (("cache", "lst"), "did you mean 'list'?"),
        (("set", ".x"), "cannot be called"),
        (("set", "x", "--slow-ms", "nan"), "not a finite number"),
    ],
)
async def test_bridge_that_is_not_there_is_one_line_and_exit_status_2(
    arguments: tuple[str, ...], said: str
) -> None:
    status, text, error = await run(*arguments)
    assert status == 2
    assert text == ""
    assert error.count("\n") == 1
    assert any(each in error for each in said.split("|"))


async def test_second_bridge_of_one_name_does_not_start(directory: Path) -> None:
    async with bridge(directory) as child:
        second = await run(
            *("serve", unix_uri(directory / "nbd"), "--socket-path", str(directory / "other.sock")),
            *("--api", str(directory / "vm0.api"), "--cache-mode", "off", "--read-only"),
        )
        assert second[0] == 2
        assert f"process {child.pid}" in second[2]
        assert (await run("status", str(directory / "vm0.api")))[0] == 0


async def test_answer_of_something_that_is_no_bridge_is_one_line(directory: Path) -> None:
    path = directory / "odd.api"

    async def talk(listening: trio.SocketListener) -> None:
        async def answer(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            await stream.send_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]")

        await trio.serve_listeners(answer, [listening])

    sock = trio.socket.socket(socket.AF_UNIX)
    await sock.bind(os.fspath(path))
    sock.listen(1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk, trio.SocketListener(sock))
        status, _, error = await run("status", str(path))
        assert status == 1
        assert "not a JSON object" in error
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("name", ["status", "list", "flush", "resize", "set", "stop"])
async def test_help_has_an_example(name: str) -> None:
    status, text, _ = await run(name, "--help")
    assert status == 0
    assert f"nbd-bridge {name}" in text.partition("Example:")[2]

"""A program that replaces itself under a guest: the guest waits, and sees no error."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge.errors import RequestError
from bridge.peers.blk_driver import BlkDriver
from tests.processes import bridge_argv, pause, process, unix_uri, wait_for
from tests.tools import HUNG_S, need, until

PLUGIN = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"
BLOCK = 4096
TASKS = 4


@dataclass
class Served:
    """A bridge with a configuration file."""

    directory: Path
    child: subprocess.Popen[bytes]
    server: subprocess.Popen[bytes]

    @property
    def vhost(self) -> Path:
        return self.directory / "vm0.sock"

    async def run(self, command: str, *options: str) -> tuple[int, str, str]:
        argv = bridge_argv(command, str(self.directory / "vm0.api"), *options)
        done = await trio.run_process(
            argv, capture_stdout=True, capture_stderr=True, check=False, stdin=b""
        )
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    async def status(self) -> Any:
        return json.loads((await self.run("status", "--json"))[1])

    def write_config(self, **more: object) -> None:
        options = {
            "uri": unix_uri(self.directory / "nbd"),
            "socket-path": str(self.vhost),
            "api": str(self.directory / "vm0.api"),
            "cache-dir": str(self.directory),
            "cache-size": "16M",
            **{name.replace("_", "-"): value for name, value in more.items()},
        }
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in options.items())
        (self.directory / "vm0.toml").write_text(text)


@asynccontextmanager
async def served(
    directory: Path, monkeypatch: pytest.MonkeyPatch, server: str, **options: object
) -> AsyncIterator[Served]:
    for name in ("API", "CACHE_MODE"):
        monkeypatch.delenv(f"NBD_BRIDGE_SERVE_{name}", raising=False)
    nbd = directory / "nbd"
    what = ["memory", "64M"]
    if server == "plugin":
        what = ["python", str(PLUGIN), f"file={directory / 'disk.img'}", "size=64M"]
    async with process([need("nbdkit"), "-f", "-U", str(nbd), *what], ready=nbd) as nbdkit:
        found = Served(directory, nbdkit, nbdkit)
        found.write_config(**options)
        argv = bridge_argv("serve", "--config", str(directory / "vm0.toml"))
        async with process(argv, ready=found.vhost) as child:
            found.child = child
            yield found
            if child.poll() is None:
                child.terminate()
                assert await wait_for(child, limit_s=HUNG_S) == 0


class Load:
    """Tasks that write, flush and verify until they are told to stop."""

    def __init__(self, guest: BlkDriver) -> None:
        self.guest = guest
        self.rounds = 0
        self.is_over = False

    async def run(self, number: int) -> None:
        dice = random.Random(number)
        written: dict[int, bytes] = {}
        while not self.is_over:
            offset = (number * 512 + dice.randrange(512)) * BLOCK
            written[offset] = dice.randbytes(64) * 64
            await self.guest.write(offset, written[offset])
            if dice.random() < 0.1:
                await self.guest.flush()
            where = dice.choice(list(written))
            assert await self.guest.read(where, BLOCK) == written[where]
            self.rounds += 1
        for offset, data in written.items():
            assert await self.guest.read(offset, BLOCK) == data

    async def further(self) -> None:
        """Wait until it has done something more."""
        before = self.rounds
        await until(lambda: self.rounds > before + TASKS)


@asynccontextmanager
async def loaded(guest: BlkDriver) -> AsyncIterator[Load]:
    load = Load(guest)
    async with trio.open_nursery() as nursery:
        for number in range(TASKS):
            nursery.start_soon(load.run, number)
        await load.further()
        yield load
        load.is_over = True


PACKED = (1 << 34) | (1 << 32) | (1 << 30) | (1 << 28) | (1 << 29) | (1 << 9)


@pytest.mark.parametrize(
    ("server", "cache", "driver"),
    [
        ("plugin", "writeback", {"inflight": True, "num_queues": 2}),
        ("plugin", "off", {"inflight": True}),
        ("plugin", "writethrough", {}),
        ("memory", "writeback", {"regions": 3}),
        ("memory", "off", {"inflight": True}),
        ("memory", "writeback", {"inflight": True, "features": PACKED}),
    ],
)
async def test_guest_under_load_sees_no_error_when_its_bridge_is_replaced_again_and_again(
    server: str,
    cache: str,
    driver: dict[str, Any],
    directory: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with served(directory, monkeypatch, server, cache_mode=cache, num_queues=2) as bridge:
        async with await BlkDriver.connect(bridge.vhost, **driver) as guest, loaded(guest) as load:
            before = await bridge.status()
            for _ in range(3):
                code, said, error = await bridge.run("upgrade")
                assert (code, error) == (0, "")
                assert "serves the disk; the guest has waited for" in said
                await load.further()
            after = await bridge.status()
            assert after["bridge"]["pid"] == before["bridge"]["pid"] == bridge.child.pid
            assert after["bridge"]["started_s"] > before["bridge"]["started_s"]
            assert after["guest"]["faults"] == {}
            assert after["guest"]["loss_unreported"] is False


async def test_no_descriptor_is_left_by_an_upgrade(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory") as bridge:
        async with await BlkDriver.connect(bridge.vhost, inflight=True) as guest:
            counts = []
            for _ in range(4):
                assert (await bridge.run("upgrade"))[0] == 0
                await guest.write(0, b"a" * 512)
                await bridge.run("status")
                counts.append(len(os.listdir(f"/proc/{bridge.child.pid}/fd")))
    # Timers of the trial and of the API come and go; what grows each time is left behind.
    assert counts[3] <= counts[1]


async def test_configuration_that_was_changed_counts_after_an_upgrade(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "plugin") as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * BLOCK)
            bridge.write_config(slow_ms=77, cache_mode="writethrough")
            assert (await bridge.run("upgrade"))[0] == 0
            status = await bridge.status()
            assert status["settings"]["slow_ms"] == 77
            assert status["cache"]["mode"] == "writethrough"
            assert await guest.read(0, BLOCK) == b"a" * BLOCK


async def test_program_that_refuses_its_options_does_not_take_over(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory") as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            bridge.write_config(num_queues=99)
            code, _, error = await bridge.run("upgrade")
            assert code == 1
            assert error.count("\n") == 1
            assert "the disk is served as before" in error
            assert "vm0.toml, line 6: num-queues: 99 is not in the range" in error
            await guest.write(0, b"a" * 512)
            assert (await bridge.status())["bridge"]["took_over_after_s"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"uri": "nbd://other/"}, "the uri is another one (nbd://other/)"),
        ({"socket_group": "no-such-group"}, "there is no group no-such-group"),
    ],
)
async def test_configuration_that_a_running_guest_cannot_have_is_refused(
    options: dict[str, str], says: str, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory") as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            bridge.write_config(**options)
            code, _, error = await bridge.run("upgrade")
            assert code == 1
            assert says in error
            await guest.write(0, b"a" * 512)


async def test_name_that_another_bridge_has_by_now_costs_the_control_socket_and_not_the_disk(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory") as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            bridge.write_config(api="/nowhere/x.api")
            with trio.move_on_after(HUNG_S) as scope:
                code, _, error = await bridge.run("upgrade", "--timeout", "1")
            assert not scope.cancelled_caught
            assert code == 1
            assert "see its log" in error
            await guest.write(0, b"a" * 512)
            assert await guest.read(0, 512) == b"a" * 512


async def test_upgrade_while_the_server_does_not_answer_is_refused_and_the_guest_goes_on(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory", cache_mode="off") as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            pause(bridge.server)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(guest.write, 0, b"a" * 512)
                    with trio.fail_after(HUNG_S):
                        while not (await bridge.status())["guest"]["in_flight"]:
                            await trio.sleep(0.02)
                    code, _, error = await bridge.run("upgrade")
                    bridge.server.send_signal(signal.SIGCONT)
            finally:
                bridge.server.send_signal(signal.SIGCONT)
            assert code == 1
            assert "requests of the guest are not answered within 2 s" in error
            assert await guest.read(0, 512) == b"a" * 512
            assert (await bridge.run("upgrade"))[0] == 0
            assert await guest.read(0, 512) == b"a" * 512


async def test_bridge_without_a_guest_is_replaced_and_its_socket_is_there_all_the_time(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory") as bridge:
        inode = bridge.vhost.stat().st_ino
        code, said, _ = await bridge.run("upgrade")
        assert code == 0
        assert "waited" not in said
        assert bridge.vhost.stat().st_ino == inode
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 512)
    assert not bridge.vhost.exists()


async def test_front_end_that_connects_meanwhile_is_served_by_the_next_program(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "memory") as bridge:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.run, "upgrade")
            for _ in range(20):
                async with await BlkDriver.connect(bridge.vhost, inflight=True) as guest:
                    await guest.write(0, b"a" * 512)
                    assert await guest.read(0, 512) == b"a" * 512


async def test_dirty_data_and_guest_are_there_after_an_upgrade_and_a_kill(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "plugin", cache_mode="writeback") as bridge:
        async with await BlkDriver.connect(bridge.vhost, inflight=True) as guest:
            await guest.write(0, b"a" * BLOCK)
            assert (await bridge.status())["cache"]["dirty_bytes"] == BLOCK
            assert (await bridge.run("upgrade"))[0] == 0
            assert await guest.read(0, BLOCK) == b"a" * BLOCK
            bridge.child.kill()
            bridge.child.wait()
            argv = bridge_argv("serve", "--config", str(directory / "vm0.toml"))
            async with process(argv, ready=bridge.vhost) as second:
                await guest.reconnect()
                assert await guest.read(0, BLOCK) == b"a" * BLOCK
                await guest.flush()
                second.terminate()
                assert await wait_for(second, limit_s=HUNG_S) == 0
    assert (directory / "disk.img").read_bytes()[:BLOCK] == b"a" * BLOCK


async def test_write_cache_that_the_guest_turned_off_stays_off(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(directory, monkeypatch, "plugin", cache_mode="off") as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.set_writeback(False)
            assert (await bridge.run("upgrade"))[0] == 0
            assert (await guest.refresh_config()).writeback == 0


async def test_disk_that_has_become_read_only_fails_writes_and_no_more(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the guest was offered is offered no longer: its front-end has to connect anew."""
    async with served(directory, monkeypatch, "memory", cache_mode="off") as bridge:
        guest = await BlkDriver.connect(bridge.vhost)
        bridge.write_config(read_only=True, cache_mode="off")
        assert (await bridge.run("upgrade"))[0] == 0
        guest.close()
        async with await BlkDriver.connect(bridge.vhost) as again:
            assert await again.read(0, 512) == bytes(512)
            with pytest.raises(RequestError):
                await again.write(0, b"a" * 512)


_REPLACE = """
import os, signal, sys, threading, trio
from bridge.app.signals import ENDING, ending_signals, pass_signals_on, send_late_signals

async def first():
    with ending_signals():
        pass_signals_on()
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Event().wait(0.05)
    os.kill(os.getpid(), signal.SIGTERM)
    send_late_signals(signal.SIGINT)

async def second():
    with ending_signals() as signals:
        numbers = {await signals.receive(), await signals.receive()}
    print(sorted(numbers))

if len(sys.argv) == 1:
    trio.run(first)
    os.execv(sys.executable, [sys.executable, __file__, "second"])
trio.run(second)
"""


def test_signal_that_comes_while_the_program_is_replaced_is_for_the_next_one(
    directory: Path,
) -> None:
    script = directory / "replace.py"
    script.write_text(_REPLACE)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        timeout=HUNG_S,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        check=False,
    )
    assert done.stderr == ""
    assert done.stdout == "[<Signals.SIGINT: 2>, <Signals.SIGTERM: 15>]\n"

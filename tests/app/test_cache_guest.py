"""A real Linux guest on a write-back cache, while the bridge and the server are killed in turn.

The guest verifies what it reads, all the time. What it has flushed in the end is looked for in
the server's image, with bridge and server dead: nothing of it may be in the cache only.
"""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
import trio

from bridge.demo.qemu import GuestConfig, VhostUserDisk
from bridge.demo.virtual_machine import VirtualMachine, open_guest
from tests.qemu.backends import MIB, Killable, killable_bridge, killable_nbdkit, make_image
from tests.qemu.conftest import GuestMachine, folder, machine

__all__ = ["folder", "machine"]

KILLS = int(os.environ.get("NBD_BRIDGE_KILLS", "3"))
"""How often each of the two is killed."""
LIMIT_S = 120.0 + 20 * KILLS

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


async def progress(guest: VirtualMachine) -> None:
    """Wait until the guest has written and verified something more."""
    before = _rounds(guest)
    while _rounds(guest) <= before:
        await guest.wait_for_line()


def _rounds(guest: VirtualMachine) -> int:
    told = [line for line in guest.lines if line.startswith("PROGRESS ")]
    return int(told[-1].split()[1]) if told else 0


async def kill_in_turn(bridge: Killable, server: Killable, guest: VirtualMachine) -> None:
    """Each time after the guest has come further, at a random moment of its work.

    Twice before the bridge is killed again: a QEMU before 9.0 does not try again when its
    back-end dies during the first message of a reconnect. Every other time the server is paused
    before, so that the bridge dies with write-outs in flight, which the server does later.
    """
    dice = random.Random(KILLS)
    for number in range(KILLS):
        await progress(guest)
        await progress(guest)
        if number % 2:
            server.pause()
        await trio.sleep(dice.random() / 4)
        await bridge.kill()
        if number % 2:
            server.resume()
        await bridge.start()
        await progress(guest)
        await trio.sleep(dice.random() / 4)
        await server.kill()
        await server.start()


def sums_told(guest: VirtualMachine) -> dict[int, str]:
    """The guest's checksums: MiB of the disk → MD5."""
    words = [line.split() for line in guest.lines if line.startswith("SUM ")]
    return {int(slot): digest for _, slot, digest, *_ in words}


def sums_of(image: Path, slots: list[int]) -> dict[int, str]:
    with image.open("rb") as file:
        found = {}
        for slot in slots:
            file.seek(slot * MIB)
            found[slot] = hashlib.md5(file.read(MIB), usedforsecurity=False).hexdigest()
    return found


async def test_what_the_guest_flushed_is_on_the_server_after_many_kills(
    machine: GuestMachine, folder: Path
) -> None:
    image = make_image(folder, 128)
    (folder / "cache").mkdir()
    # Less cache than the guest writes to, and a flush timer that goes off now and then.
    options = ["--cache-mode", "writeback", "--cache-size", "16M", "--flush-interval", "3"]
    options += ["--cache-dir", str(folder / "cache")]
    told: dict[int, str] = {}
    found: dict[int, str] = {}
    async with (
        killable_nbdkit(image, folder) as server,
        killable_bridge(server.uri, folder, *options) as bridge,
    ):

        async def compare(name: str) -> None:
            assert name == "flushed"
            await bridge.kill()
            await server.kill()
            told.update(sums_told(guest))
            found.update(sums_of(image, list(told)))

        config = GuestConfig(
            disks=[VhostUserDisk(bridge.socket, reconnect_ms=100)],
            kernel=machine.kernel.image,
            initrd=machine.initrd,
            words={"guest_script": "flushed"},
        )
        with trio.fail_after(LIMIT_S):
            async with open_guest(config, folder / "guest.log", checkpoint=compare) as guest:
                await kill_in_turn(bridge, server, guest)
                await progress(guest)
                await guest.send_line("stop")
                report = await guest.wait()

    assert report.passed, report
    assert len(told) >= 6
    assert found == told

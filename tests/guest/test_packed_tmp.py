import random
from pathlib import Path

import trio

from bridge.demo.guest import run_guest
from bridge.demo.qemu import VhostUserDisk
from tests.guest.backends import bridge_on, killable_bridge, make_image, nbdkit_on
from tests.guest.conftest import GuestMachine
from tests.guest.test_guest_life import LIMIT_S, config, progress, stressed


async def test_packed_fs(machine: GuestMachine, folder: Path) -> None:
    async with bridge_on(make_image(folder, 128), folder) as server:
        disk = VhostUserDisk(server.socket, options="packed=on")
        report = await run_guest(
            config(machine, "filesystem", disk), folder / "log", time_limit_s=LIMIT_S
        )
    print((folder / "disk.bridge.log").read_text()[-2000:])
    assert report.passed, report


async def test_packed_kill(machine: GuestMachine, folder: Path) -> None:
    async with nbdkit_on(make_image(folder, 128), folder) as uri, killable_bridge(uri, folder) as b:
        disk = VhostUserDisk(b.socket, options="packed=on", reconnect_ms=100)
        async with stressed(config(machine, "stress", disk), folder) as guest:
            for _ in range(5):
                await trio.sleep(random.uniform(0.1, 0.8))
                await b.kill()
                await b.start()
                await progress(guest, 1)
        print((folder / "bridge.log").read_text()[-3000:])

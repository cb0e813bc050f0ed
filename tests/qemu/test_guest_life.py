"""What a guest's life does to its disk: queues, resets, resizing, migration, a bridge that dies.

Most tests run the guest's `stress` script: it writes and verifies until a line is typed at its
console, and fails if ever a byte is not what it last wrote there.
"""

import json
import os
import random
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from bridge.demo.qemu import GuestConfig, VhostUserDisk
from bridge.demo.virtual_machine import VirtualMachine, open_guest, run_guest
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_rules import Command
from bridge.spec.nbd import CMD_FLAG_FUA, CMD_WRITE
from tests.processes import bridge_argv
from tests.qemu.backends import (
    MIB,
    Killable,
    bridge_on,
    bridge_to,
    killable_bridge,
    killable_nbdkit,
    make_image,
)
from tests.qemu.conftest import GuestMachine
from tests.qemu.newer_qemu import newer_qemu
from tests.qemu.qmp import open_qmp

KILLS = int(os.environ.get("NBD_BRIDGE_KILLS", "3"))
"""How often something is killed in each of those tests; 100 takes about ten minutes."""
LIMIT_S = 240.0 + 20 * KILLS

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


def config(machine: GuestMachine, script: str, *disks: VhostUserDisk, **words: int) -> GuestConfig:
    return GuestConfig(
        disks=disks,
        kernel=machine.kernel.image,
        initrd=machine.initrd,
        words={"guest_script": script, **words},
    )


@asynccontextmanager
async def stressed(config: GuestConfig, folder: Path) -> AsyncIterator[VirtualMachine]:
    """A guest that has begun to write; it must end well once it is told to stop."""
    with trio.fail_after(LIMIT_S):
        async with open_guest(config, folder / "guest.log") as guest:
            await progress(guest, 1)
            yield guest
            await guest.send_line("stop")
            report = await guest.wait()
            assert report.passed, report


def rounds_done(guest: VirtualMachine) -> int:
    """How many rounds of writing and verifying the guest has told of, since it last booted."""
    for line in reversed(guest.lines):
        if line.startswith("PROGRESS "):
            return int(line.split()[1])
    return 0


async def progress(guest: VirtualMachine, more: int) -> None:
    """Wait until the guest has done `more` rounds more than now."""
    wanted = rounds_done(guest) + more
    while rounds_done(guest) < wanted:
        await guest.wait_for_line()


async def test_four_queues_are_all_there_and_carry_writes(
    machine: GuestMachine, folder: Path
) -> None:
    async with bridge_on(make_image(folder, 128), folder, "--num-queues", "4") as server:
        disk = VhostUserDisk(server.socket, num_queues=4)
        guest_config = replace(config(machine, "stress", disk, guest_queues=4), cpus=4)
        async with stressed(guest_config, folder) as guest:
            await progress(guest, 12)


async def test_blocks_of_4096_bytes_carry_a_file_system(
    machine: GuestMachine, folder: Path
) -> None:
    async with bridge_on(make_image(folder, 128), folder, "--block-size", "4096") as server:
        disk = VhostUserDisk(server.socket)
        guest_config = config(machine, "filesystem", disk, guest_block=4096)
        report = await run_guest(guest_config, folder / "log", time_limit_s=LIMIT_S)

    assert report.passed, report


async def test_guest_that_reboots_finds_what_it_wrote(machine: GuestMachine, folder: Path) -> None:
    async with bridge_on(make_image(folder, 16), folder) as server:
        guest_config = config(machine, "reboot", VhostUserDisk(server.socket))
        guest_config = replace(guest_config, may_reboot=True)
        report = await run_guest(guest_config, folder / "log", time_limit_s=LIMIT_S)

    assert report.passed, report
    assert report.values["boots"] == "2"


async def test_guest_reset_while_it_writes_comes_back(machine: GuestMachine, folder: Path) -> None:
    async with bridge_on(make_image(folder, 128), folder) as server:
        guest_config = replace(
            config(machine, "stress", VhostUserDisk(server.socket)),
            may_reboot=True,
            qmp_socket=folder / "qmp",
        )
        async with stressed(guest_config, folder) as guest, open_qmp(folder / "qmp") as qmp:
            await qmp.execute("system_reset")
            await guest.wait_for("SeaBIOS", after=len(guest.lines))
            await guest.wait_for("PROGRESS 0", after=len(guest.lines))
            await progress(guest, 1)

    assert sum("SeaBIOS" in line for line in guest.lines) == 2


async def test_memory_plugged_in_while_the_guest_writes(
    machine: GuestMachine, folder: Path
) -> None:
    """The guest's memory gets a region more under running rings."""
    async with bridge_on(make_image(folder, 128), folder) as server:
        guest_config = replace(
            config(machine, "stress", VhostUserDisk(server.socket)),
            qmp_socket=folder / "qmp",
            extra=["-m", "256M,slots=2,maxmem=1G"],
        )
        async with stressed(guest_config, folder) as guest, open_qmp(folder / "qmp") as qmp:
            for number in range(2):
                memory = {"id": f"more{number}", "size": 128 * MIB, "share": True}
                await qmp.execute("object-add", qom_type="memory-backend-memfd", **memory)
                await qmp.execute(
                    "device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"more{number}"
                )
                await progress(guest, 2)


async def test_disk_that_grows_is_seen_in_the_guest(machine: GuestMachine, folder: Path) -> None:
    """The server comes back with a larger export; the guest is told without a restart."""
    image = make_image(folder, 16)

    async def grow(name: str) -> None:
        await nbdkit.kill()
        os.truncate(image, 32 * MIB)
        await nbdkit.start()

    async with (
        killable_nbdkit(image, folder) as nbdkit,
        bridge_to(nbdkit.uri, folder) as server,
    ):
        disk = VhostUserDisk(server.socket)
        guest_config = config(machine, "resize", disk, guest_new_sectors=32 * MIB // 512)
        report = await run_guest(
            guest_config, folder / "log", time_limit_s=LIMIT_S, checkpoint=grow
        )

    assert report.passed, report


async def test_read_only_disk_is_one_in_the_guest(machine: GuestMachine, folder: Path) -> None:
    async with bridge_on(make_image(folder, 16), folder, "--read-only") as server:
        guest_config = config(machine, "readonly", VhostUserDisk(server.socket))
        report = await run_guest(guest_config, folder / "log", time_limit_s=LIMIT_S)

    assert report.passed, report


@pytest.mark.parametrize("killed", [False, True], ids=["", "killed"])
async def test_write_cache_switched_off_by_the_guest_makes_writes_durable(
    machine: GuestMachine, folder: Path, killed: bool
) -> None:
    """With `write through` the guest sends no flush: every write has to be durable by itself.

    So it is after the bridge was killed: the guest does not say it again.
    """
    nbd_socket = folder / "nbd.sock"
    server = Server({"": MemoryDisk(16 * MIB)})
    commands: list[Command] = []
    by_mode: dict[str, list[Command]] = {}

    async def checkpoint(name: str) -> None:
        if name.endswith(" end"):
            writes = [each for each in commands if each.kind == CMD_WRITE]
            by_mode[name.removesuffix(" end")] = writes
        elif killed:
            await bridge.kill()
            await bridge.start()
        commands.clear()

    server.commands = commands
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, nbd_socket)
        async with killable_bridge(f"nbd+unix:///?socket={nbd_socket}", folder) as bridge:
            disk = VhostUserDisk(bridge.socket, reconnect_ms=100)
            guest_config = config(machine, "writethrough", disk)
            report = await run_guest(
                guest_config, folder / "log", time_limit_s=LIMIT_S, checkpoint=checkpoint
            )
        nursery.cancel_scope.cancel()

    assert report.passed, report
    assert [each.flags & CMD_FLAG_FUA for each in by_mode["write through"]] == [CMD_FLAG_FUA] * 16
    assert [each.flags & CMD_FLAG_FUA for each in by_mode["write back"]] == [0] * 16


async def test_guest_moves_to_another_qemu_while_it_writes(
    machine: GuestMachine, folder: Path
) -> None:
    """Two QEMU processes, a bridge for each, one export: a session that both belong to."""
    async with (
        killable_nbdkit(make_image(folder, 128), folder) as nbdkit,
        bridge_to(nbdkit.uri_of("@session=move"), folder, name="old") as old,
        bridge_to(nbdkit.uri_of("@session=move"), folder, name="new") as new,
    ):
        here = replace(
            config(machine, "stress", VhostUserDisk(old.socket)), qmp_socket=folder / "old.qmp"
        )
        there = replace(
            here,
            disks=[VhostUserDisk(new.socket)],
            qmp_socket=folder / "new.qmp",
            incoming=f"unix:{folder}/migration",
        )
        with trio.fail_after(LIMIT_S):
            async with (
                open_guest(here, folder / "old.log") as source,
                open_guest(there, folder / "new.log") as target,
                open_qmp(folder / "old.qmp") as source_qmp,
            ):
                await progress(source, 1)
                status = await source_qmp.migrate(f"unix:{folder}/migration")
                await source_qmp.execute("quit")
                await source.wait()
                await target.wait_for("PROGRESS")
                await progress(target, 5)
                await target.send_line("stop")
                report = await target.wait()

    assert status["status"] == "completed"
    assert report.passed, report


async def kill_repeatedly(
    victim: Killable, guest: VirtualMachine, times: int, *, server: Killable | None = None
) -> None:
    """Kill and restart at random moments, each time after the guest has come a bit further.

    Twice a bit, because the first news may be from before the last kill: a QEMU before 9.0 whose
    back-end dies during the first message of a reconnect never tries again. With `server` every
    other kill comes while that is paused: then the guest surely has requests in flight, and the
    server has commands of the dead bridge before it when it goes on.
    """
    dice = random.Random(times)
    for number in range(times):
        await progress(guest, 1)
        await progress(guest, 1)
        paused = server if number % 2 else None
        if paused is not None:
            paused.pause()
        await trio.sleep(dice.random() / 4)
        await victim.kill()
        if paused is not None:
            paused.resume()
        await victim.start()
    await progress(guest, 1)


@pytest.mark.parametrize("cache_mode", ["off", "writeback"])
async def test_bridge_killed_while_the_guest_writes_loses_nothing(
    machine: GuestMachine, folder: Path, cache_mode: str
) -> None:
    """The in-flight region: the next bridge executes what the killed one had begun.

    With a write-back cache it also finds there what the guest wrote and the server has not.
    """
    options = ["--cache-mode", cache_mode, "--cache-size", "16M", "--cache-dir", str(folder)]
    async with (
        killable_nbdkit(make_image(folder, 128), folder) as nbdkit,
        killable_bridge(nbdkit.uri, folder, *options) as bridge,
    ):
        disk = VhostUserDisk(bridge.socket, reconnect_ms=100)
        async with stressed(config(machine, "stress", disk), folder) as guest:
            await kill_repeatedly(bridge, guest, KILLS, server=nbdkit)


async def test_server_killed_while_the_guest_writes_loses_nothing(
    machine: GuestMachine, folder: Path
) -> None:
    """The bridge connects again and sends once more what was not answered."""
    image = make_image(folder, 128)
    async with (
        killable_nbdkit(image, folder) as nbdkit,
        bridge_to(nbdkit.uri, folder) as bridge,
    ):
        disk = VhostUserDisk(bridge.socket)
        async with stressed(config(machine, "stress", disk), folder) as guest:
            await kill_repeatedly(nbdkit, guest, KILLS)


@pytest.mark.peers
async def test_newer_qemu_runs_the_file_system_and_survives_a_killed_bridge(
    machine: GuestMachine, folder: Path
) -> None:
    """QEMU 10: other features, another spelling of reconnect, 20 times as often."""
    qemu = await trio.to_thread.run_sync(newer_qemu)
    kernel, initrd = folder / "kernel", folder / "initrd"
    shutil.copy(machine.kernel.image, kernel)
    shutil.copy(machine.initrd, initrd)
    async with (
        killable_nbdkit(make_image(folder, 128), folder) as nbdkit,
        killable_bridge(nbdkit.uri, folder) as bridge,
    ):
        disk = VhostUserDisk(bridge.socket, reconnect_ms=50)
        first = replace(
            config(machine, "filesystem", disk), qemu=qemu, kernel=kernel, initrd=initrd
        )
        report = await run_guest(first, folder / "log", time_limit_s=LIMIT_S)
        assert report.passed, report
        async with stressed(replace(first, words={"guest_script": "stress"}), folder) as guest:
            await kill_repeatedly(bridge, guest, KILLS, server=nbdkit)


async def upgrade(api: Path) -> float:
    """Have another program take over the bridge; how long its guest has waited, in seconds."""
    argv = bridge_argv("upgrade", str(api), "--json")
    done = await trio.run_process(argv, capture_stdout=True, stdin=b"")
    return float(json.loads(done.stdout)["took_over_after_s"])


async def upgrade_under(guest_config: GuestConfig, folder: Path, api: Path) -> list[float]:
    """Replace the bridge's program while the guest writes and verifies; its waits in seconds."""
    waits = []
    async with stressed(guest_config, folder) as guest:
        for _ in range(KILLS):
            await progress(guest, 1)
            waits.append(await upgrade(api))
        await progress(guest, 2)
    return waits


def without_disconnects(log: Path) -> None:
    """QEMU has stayed connected: the bridge has accepted it once."""
    assert log.read_text().count("front-end connected") == 1


@pytest.mark.parametrize("cache_mode", ["off", "writeback"])
async def test_bridge_replaced_by_another_program_while_the_guest_writes(
    machine: GuestMachine, folder: Path, cache_mode: str
) -> None:
    api = folder / "disk.api"
    options = ["--api", str(api), "--cache-mode", cache_mode, "--cache-size", "16M"]
    options += ["--cache-dir", str(folder), "--num-queues", "2"]
    async with bridge_on(make_image(folder, 128), folder, *options) as server:
        disk = VhostUserDisk(server.socket, num_queues=2)  # QEMU would not connect again
        waits = await upgrade_under(config(machine, "stress", disk), folder, api)
    print("seconds that the guest waited:", waits)
    without_disconnects(folder / "disk.bridge.log")


@pytest.mark.peers
async def test_bridge_of_a_newer_qemu_replaced_by_another_program_while_the_guest_writes(
    machine: GuestMachine, folder: Path
) -> None:
    qemu = await trio.to_thread.run_sync(newer_qemu)
    kernel, initrd, api = folder / "kernel", folder / "initrd", folder / "disk.api"
    shutil.copy(machine.kernel.image, kernel)
    shutil.copy(machine.initrd, initrd)
    async with bridge_on(make_image(folder, 128), folder, "--api", str(api)) as server:
        guest_config = replace(
            config(machine, "stress", VhostUserDisk(server.socket)),
            qemu=qemu,
            kernel=kernel,
            initrd=initrd,
        )
        waits = await upgrade_under(guest_config, folder, api)
    print("seconds that the guest waited:", waits)
    without_disconnects(folder / "disk.bridge.log")

"""A real Linux guest in QEMU (software emulation), on the bridge and on a peer of it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from bridge.demo.demo import DemoConfig, run_demo
from bridge.demo.image import allocated_bytes, check_filesystem, check_sums, extract_files
from bridge.demo.qemu import GuestConfig, VhostUserDisk
from bridge.demo.servers import (
    ServerFailed,
    running,
    small_server_command,
    start_server,
    watched,
)
from bridge.demo.virtual_machine import open_guest, run_guest
from tests.qemu.conftest import GuestMachine
from tests.tools import need

MIB = 1 << 20


def config(machine: GuestMachine, script: str, *disks: VhostUserDisk, **words: str) -> GuestConfig:
    return GuestConfig(
        disks=disks,
        kernel=machine.kernel.image,
        initrd=machine.initrd,
        words={"guest_script": script, **words},
    )


async def test_guest_without_its_disk_fails_with_the_reason(
    machine: GuestMachine, folder: Path
) -> None:
    report = await run_guest(config(machine, "no-such-script"), folder / "log")

    assert not report.passed
    assert report.reason == "no script /scripts/no-such-script.sh"


async def test_guest_over_its_time_limit_fails_and_is_gone(
    machine: GuestMachine, folder: Path
) -> None:
    report = await run_guest(config(machine, "probe"), folder / "log", time_limit_s=0.2)

    assert not report.passed
    assert report.reason.startswith("not finished after")


async def test_guest_whose_disk_has_no_back_end_fails_with_what_qemu_said(
    machine: GuestMachine, folder: Path
) -> None:
    disk = VhostUserDisk(folder / "nothing.sock")

    report = await run_guest(config(machine, "probe", disk), folder / "log")

    assert not report.passed
    assert "nothing.sock" in report.reason


async def test_guest_on_a_storage_daemon_passes_both_boots(
    machine: GuestMachine, folder: Path
) -> None:
    """The guest's side of every test here, on qemu-storage-daemon."""
    image, socket = folder / "disk.img", folder / "disk.sock"
    with image.open("wb") as file:
        file.truncate(256 * MIB)
    command = [
        need("qemu-storage-daemon"),
        "--blockdev", f"driver=file,node-name=d,filename={image},discard=unmap",
        "--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={socket},"
        "writable=on",
    ]  # fmt: skip
    # Its config space says write-through, and such a guest never sends a flush.
    disk = VhostUserDisk(socket, options="config-wce=off")
    sizes: dict[str, int] = {}

    async def checkpoint(name: str) -> None:
        sizes[name] = allocated_bytes(image)

    async with running("storage daemon", command, socket, folder / "daemon.log"):
        first = await run_guest(
            config(machine, "filesystem", disk, guest_sectors="524288"),
            folder / "log",
            checkpoint=checkpoint,
        )
        second = await run_guest(config(machine, "verify", disk), folder / "log")

    assert first.passed, first
    assert second.passed, second
    assert sizes["trimmed"] < sizes["deleted"]
    assert sizes["raw_discarded"] < sizes["raw_written"]
    assert check_filesystem(image) == ""
    extract_files(image, folder / "files")
    assert check_sums(folder / "files") == (2, [])


async def test_guest_killed_when_the_block_ends(machine: GuestMachine, folder: Path) -> None:
    async with open_guest(config(machine, "probe"), folder / "log") as guest:
        await guest.wait_for("SeaBIOS")

    assert guest.process.returncode is not None


@pytest.mark.nbdkit
async def test_demo_passes_with_every_check(machine: GuestMachine, folder: Path) -> None:
    """The main job: file system, discards, second boot, image on the server, clean stop."""
    need("nbdkit")

    result = await run_demo(
        DemoConfig(total_mib=16, disk_mib=256, accelerator="tcg"), folder=folder
    )

    assert result.failures == []
    assert result.files_right == 2
    assert result.boots["boot 1"].values["write_cache"] == "write back"


@pytest.mark.nbdkit
async def test_demo_without_a_guest_passes_with_every_check(folder: Path) -> None:
    need("nbdkit")

    result = await run_demo(DemoConfig(total_mib=8, disk_mib=32, guest=False), folder=folder)

    assert result.failures == []
    assert result.boots["front-end"].values["written_chunks"] == "4"


@pytest.mark.nbdkit
async def test_demo_notices_a_server_that_dies(folder: Path) -> None:
    need("nbdkit")

    def say(line: str) -> None:
        if line.startswith("bridge "):
            os.kill(int(line.split("process ")[1].rstrip(")")), signal.SIGKILL)

    result = await run_demo(
        DemoConfig(total_mib=8, disk_mib=32, guest=False), folder=folder, say=say
    )

    assert any("bridge ended" in failure for failure in result.failures)


async def test_demo_without_nbdkit_uses_the_small_server(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(folder))

    result = await run_demo(DemoConfig(total_mib=8, disk_mib=32, guest=False), folder=folder)

    assert result.failures == []
    assert result.allocated["trimmed"] < result.allocated["written"]


@pytest.mark.nbdkit
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
async def test_demo_ended_by_a_signal_leaves_no_guest_and_no_image(
    number: signal.Signals, machine: GuestMachine, folder: Path
) -> None:
    need("nbdkit")
    demo = subprocess.Popen(
        [sys.executable, "-m", "bridge", "demo"],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.DEVNULL,
    )
    try:
        with trio.fail_after(60):
            while not any("qemu-system" in line for line in _commands_in(folder)):
                assert demo.poll() is None
                await trio.sleep(0.05)
        demo.send_signal(number)
        with trio.fail_after(60):
            while demo.poll() is None:
                await trio.sleep(0.05)
    finally:
        demo.kill()
        demo.wait()

    assert demo.returncode == 1
    assert _commands_in(folder) == []
    assert list(folder.iterdir()) == []


def _commands_in(folder: Path) -> list[str]:
    """The command lines of the processes that have to do with files in `folder`."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if f"{folder}/" in line:
                found.append(line)
    return found


async def test_watched_block_that_fails_fails_as_itself(folder: Path) -> None:
    socket = folder / "s"
    command = small_server_command(folder / "i", socket, 512)
    async with running("server", command, socket, folder / "log") as server:
        with pytest.raises(ZeroDivisionError):
            async with watched(server):
                raise ZeroDivisionError


async def test_watched_block_is_cancelled_when_a_server_ends(folder: Path) -> None:
    socket = folder / "s"
    server = await start_server(
        "server", small_server_command(folder / "i", socket, 512), socket, folder / "log"
    )
    server.process.kill()

    with pytest.raises(ServerFailed, match="server ended by itself"):
        async with watched(server):
            await trio.sleep_forever()


async def test_server_that_does_not_start_says_why(folder: Path) -> None:
    command = ["sh", "-c", "echo no such disk; exit 3"]
    with pytest.raises(ServerFailed, match="server did not start: no such disk"):
        await start_server("server", command, folder / "s", folder / "log")

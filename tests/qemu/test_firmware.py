"""Booting from the disk: firmware drivers are the pickiest guests."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import trio

from bridge.demo.qemu import GuestConfig, VhostUserDisk
from bridge.demo.virtual_machine import open_guest, run_guest
from tests.qemu.backends import MIB, bridge_on, make_image
from tests.qemu.boot_sector import COPY_LBA, DATA_SECTORS, boot_disk
from tests.qemu.conftest import GuestMachine
from tests.tools import missing, need

OVMF = Path("/usr/share/OVMF")
LIMIT_S = 240.0

pytestmark = pytest.mark.timeout(2 * LIMIT_S)


async def test_seabios_boots_from_the_disk_reads_and_writes(folder: Path) -> None:
    need("qemu-system-x86_64")
    content = boot_disk()
    image = make_image(folder, 16, content)

    async with bridge_on(image, folder) as server:
        config = GuestConfig(disks=[VhostUserDisk(server.socket, boot=True)])
        report = await run_guest(config, folder / "log", time_limit_s=LIMIT_S)

    assert report.passed, report
    with image.open("rb") as file:
        file.seek(COPY_LBA * 512)
        assert file.read(DATA_SECTORS * 512) == content[512:]


def efi_disk(image: Path, machine: GuestMachine) -> None:
    """Make `image` a FAT disk from which the UEFI shell starts Linux, kernel and initrd."""
    subprocess.run([need("mkfs.vfat"), "-F", "32", image], check=True, capture_output=True)
    # (Without a timer check: on a busy machine the emulated one may not pass it.)
    line = (
        "\\linux.efi initrd=\\initrd console=ttyS0 quiet loglevel=3 no_timer_check panic=-1 "
        "guest_script=firmware"
    )
    script = image.with_name("startup.nsh")
    script.write_text(line + "\r\n")
    files = {"linux.efi": machine.kernel.image, "initrd": machine.initrd, "startup.nsh": script}
    for name, path in files.items():
        subprocess.run(
            [need("mcopy"), "-i", image, path, f"::/{name}"],
            check=True, env={**os.environ, "MTOOLS_SKIP_CHECK": "1"},
        )  # fmt: skip


@pytest.fixture
def ovmf(folder: Path) -> list[str]:
    """QEMU's arguments for UEFI firmware with variables of its own."""
    for suffix in ("_4M", ""):
        code, variables = OVMF / f"OVMF_CODE{suffix}.fd", OVMF / f"OVMF_VARS{suffix}.fd"
        if code.exists() and variables.exists():
            break
    else:
        missing("ovmf is not installed")
    shutil.copy(variables, folder / "variables")
    return [
        "-drive", f"if=pflash,format=raw,unit=0,readonly=on,file={code}",
        "-drive", f"if=pflash,format=raw,unit=1,file={folder}/variables",
    ]  # fmt: skip


async def test_ovmf_boots_linux_from_the_disk(
    machine: GuestMachine, folder: Path, ovmf: list[str]
) -> None:
    """The firmware's own driver reads boot script, kernel and initrd; then Linux' driver reads."""
    image = make_image(folder, 64)
    efi_disk(image, machine)

    async with bridge_on(image, folder) as server:
        config = GuestConfig(disks=[VhostUserDisk(server.socket)], extra=ovmf)
        with trio.fail_after(LIMIT_S):
            async with open_guest(config, folder / "log") as guest:
                await guest.wait_for("Press")
                await guest.send_line()  # The shell need not wait 5 s.
                report = await guest.wait()

    assert report.passed, report
    assert report.values["sectors"] == str(64 * MIB // 512)

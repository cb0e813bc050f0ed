"""Booting from the disk: firmware drivers are the pickiest guests."""

from pathlib import Path

from bridge.demo.guest import run_guest
from bridge.demo.qemu import GuestConfig, VhostUserDisk
from tests.guest.backends import bridge_on, make_image
from tests.guest.boot_sector import COPY_LBA, DATA_SECTORS, boot_disk
from tests.tools import need


async def test_seabios_boots_from_the_disk_reads_and_writes(folder: Path) -> None:
    need("qemu-system-x86_64")
    content = boot_disk()
    image = make_image(folder, 16, content)

    async with bridge_on(image, folder) as server:
        config = GuestConfig(disks=[VhostUserDisk(server.socket, boot=True)])
        report = await run_guest(config, folder / "log", time_limit_s=60)

    assert report.passed, report
    with image.open("rb") as file:
        file.seek(COPY_LBA * 512)
        assert file.read(DATA_SECTORS * 512) == content[512:]

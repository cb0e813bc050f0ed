"""The guest's whole user space: busybox, e2fsprogs, kernel modules and scripts in one initrd.

It is not compressed: unpacking would take an emulated CPU longer than QEMU takes to load it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

from bridge.demo.cpio import CpioArchive
from bridge.demo.kernel import Kernel
from bridge.errors import ConfigError

SCRIPTS = Path(__file__).parent / "scripts"
"""The guest scripts of this package. `init.sh` starts the one that the kernel's command line names.
"""

GUEST_TOOLS = ("mke2fs", "e2fsck")
"""Programs beside busybox, whose own mke2fs makes ext2 only."""

_SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin", "/usr/bin"])
_LIBRARY = re.compile(r"^\s*(?:\S+ => )?(/\S+) \(0x[0-9a-f]+\)$", re.MULTILINE)


def build_initramfs(kernel: Kernel, scripts: Iterable[Path] = ()) -> bytes:
    """An initrd (newc, not compressed) with the package's scripts and the caller's.

    `scripts` are put into `/scripts`, in place of scripts of the package with the same name. Raises
    ConfigError for a program that is missing on this machine.
    """
    archive = CpioArchive()
    for folder in ("/dev", "/proc", "/sys", "/mnt", "/tmp", "/etc"):
        archive.add_folder(folder)
    archive.add_device("/dev/console", 5, 1)
    archive.add_symlink("/etc/mtab", "/proc/mounts")
    _add_busybox(archive)
    for tool in GUEST_TOOLS:
        _add_program(archive, _find(tool, "e2fsprogs"))
    for number, module in enumerate(kernel.modules):
        # init.sh loads them in the order of their names.
        archive.add_file(f"/modules/{number:02}-{module.name}", module.read_bytes())
    for script in [*scripts, *sorted(SCRIPTS.glob("*.sh"))]:
        target = "/init" if script.name == "init.sh" else f"/scripts/{script.name}"
        archive.add_file(target, script.read_bytes(), executable=True)
    return archive.finish()


def _add_busybox(archive: CpioArchive) -> None:
    busybox = _find("busybox", "busybox-static")
    libraries = _libraries(busybox)
    archive.add_file("/bin/busybox", busybox.read_bytes(), executable=True)
    for library in libraries:
        archive.add_file(str(library), library.read_bytes(), executable=True)
    archive.add_symlink("/bin/sh", "busybox")


def _add_program(archive: CpioArchive, program: Path) -> None:
    archive.add_file(f"/bin/{program.name}", program.read_bytes(), executable=True)
    for library in _libraries(program):
        archive.add_file(str(library), library.read_bytes(), executable=True)


def _find(name: str, package: str) -> Path:
    found = shutil.which(name, path=_SEARCH_PATH)
    if found is None:
        raise ConfigError(f"{name} is missing, the guest needs it: install the package {package}")
    return Path(found)


def _libraries(program: Path) -> list[Path]:
    """The libraries that the dynamic linker loads for `program`; none for a static one."""
    shown = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
    return [Path(name) for name in _LIBRARY.findall(shown.stdout)]

"""QEMU's command line for a guest whose disk is a vhost-user-blk socket."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bridge.errors import ConfigError

_QUIET_WORDS = "quiet loglevel=3"

_MACHINES = {
    # Only the devices that the guest needs: each costs start-up time under emulation.
    "x86_64": ("qemu-system-x86_64", "q35", "sata=off,smbus=off,vmport=off,usb=off,graphics=off",
               "ttyS0"),
    "aarch64": ("qemu-system-aarch64", "virt", "gic-version=max", "ttyAMA0"),
}  # fmt: skip

_KERNEL_WORDS = "nokaslr mitigations=off tsc=reliable no_timer_check random.trust_cpu=on panic=-1"
"""Skip calibrations and waits while booting; `panic=-1` makes QEMU exit after a panic."""


@dataclass(frozen=True)
class VhostUserDisk:
    """One vhost-user-blk disk of the guest."""

    socket: Path
    num_queues: int = 1
    queue_size: int = 128
    reconnect_ms: int = 0
    """QEMU connects again after this time when the back-end hangs up; 0: the disk fails then.
    Rounded up to whole seconds for QEMU before 9.2."""
    boot: bool = False
    options: str = ""
    """More properties of the device, "config-wce=off" for example."""


@dataclass(frozen=True)
class GuestConfig:
    """One boot: what runs, on which disks, and how."""

    disks: Sequence[VhostUserDisk] = ()
    kernel: Path | None = None
    """None boots from the disk, through the firmware."""
    initrd: Path | None = None
    words: Mapping[str, str | int] = field(default_factory=dict)
    """Parameters for the guest's script; `guest_script` is its name."""
    accelerator: str = "tcg"
    memory_mib: int = 256
    cpus: int = 1
    qemu: Sequence[str] = ()
    """The command, if not this machine's QEMU: a path, or a wrapper with arguments."""
    qmp_socket: Path | None = None
    firmware: Path | None = None
    """A firmware image in place of SeaBIOS."""
    may_reboot: bool = False
    """A reset restarts the guest; otherwise it ends QEMU."""
    incoming: str = ""
    """Wait for a migration ("defer") in place of booting."""
    extra: Sequence[str] = ()


def find_qemu() -> str:
    """The path of QEMU for this machine's architecture. Raises ConfigError without one."""
    machine = platform.machine()
    name = f"qemu-system-{machine}"
    found = shutil.which(name)
    if found is None:
        package = {"x86_64": "qemu-system-x86", "aarch64": "qemu-system-arm"}.get(machine, name)
        raise ConfigError(f"{name} is missing: install the package {package}")
    return found


def qemu_version(qemu: Sequence[str]) -> tuple[int, int]:
    """(major, minor). Raises ConfigError when the command is not QEMU."""
    try:
        shown = subprocess.run(
            [*qemu, "--version"], capture_output=True, text=True, check=False, timeout=30
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"cannot run {qemu[0]}: {error}") from error
    match = re.search(r"version (\d+)\.(\d+)", shown.stdout)
    if match is None:
        raise ConfigError(f"{' '.join(qemu)} --version does not print a QEMU version")
    return int(match[1]), int(match[2])


def command_line(config: GuestConfig, version: tuple[int, int]) -> list[str]:
    """QEMU's arguments for `config`; the serial console is standard input and output.

    Raises ConfigError on a machine of an unknown architecture.
    """
    machine = platform.machine()
    if machine not in _MACHINES:
        raise ConfigError(f"no guest is known for {machine}, only for x86_64 and aarch64")
    program, machine_type, switches, console = _MACHINES[machine]
    # `-cpu max` has RDRAND: without it the guest waits seconds for entropy.
    arguments = [
        *(config.qemu or [program]),
        "-machine", f"{machine_type},accel={config.accelerator},memory-backend=ram,{switches}",
        "-cpu", "max" if config.accelerator == "tcg" else "host",
        "-m", f"{config.memory_mib}M", "-smp", str(config.cpus),
        # The back-end maps the guest's memory: it must be shared, with a descriptor to pass on.
        "-object", f"memory-backend-memfd,id=ram,size={config.memory_mib}M,share=on",
        "-nodefaults", "-no-user-config", "-display", "none",
        "-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
    ]  # fmt: skip
    if not config.may_reboot:
        arguments += ["-no-reboot"]
    if config.kernel is not None:
        words = " ".join(f"{key}={value}" for key, value in config.words.items())
        append = f"console={console} {_QUIET_WORDS} {_KERNEL_WORDS} {words}"
        arguments += ["-kernel", str(config.kernel), "-append", append]
    if config.initrd is not None:
        arguments += ["-initrd", str(config.initrd)]
    if config.firmware is not None:
        arguments += ["-bios", str(config.firmware)]
    if config.qmp_socket is not None:
        arguments += ["-qmp", f"unix:{config.qmp_socket},server=on,wait=off"]
    if config.incoming:
        arguments += ["-incoming", config.incoming]
    for number, disk in enumerate(config.disks):
        arguments += _disk_arguments(number, disk, version)
    return [*arguments, *config.extra]


def _disk_arguments(number: int, disk: VhostUserDisk, version: tuple[int, int]) -> list[str]:
    chardev = f"socket,id=disk{number},path={disk.socket}"
    if disk.reconnect_ms:
        chardev += (
            f",reconnect-ms={disk.reconnect_ms}"
            if version >= (9, 2)
            else f",reconnect={-(-disk.reconnect_ms // 1000)}"
        )
    device = (
        f"vhost-user-blk-pci,id=vblk{number},chardev=disk{number},"
        f"num-queues={disk.num_queues},queue-size={disk.queue_size}"
    )
    device += ",bootindex=1" if disk.boot else ""
    device += f",{disk.options}" if disk.options else ""
    return ["-chardev", chardev, "-device", device]

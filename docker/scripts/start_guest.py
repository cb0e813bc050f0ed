"""The guest container's first process: a small Linux in QEMU that uses the disk and reports.

Its console is this container's log; the exit status is 0 after PASS. Every setting is an
environment variable of docker/README.md's table.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import trio
from environment import SettingError, choice, integer, run, text

from bridge.demo.accelerator import choose_accelerator
from bridge.demo.qemu import GuestConfig, VhostUserDisk
from bridge.demo.virtual_machine import VirtualMachine, open_guest
from bridge.errors import ConfigError

KERNEL = Path("/opt/guest/kernel")
INITRD = Path("/opt/guest/initrd")
SOCKET_FOLDER = Path("/sockets")

_NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_SHOW_EVERY_S = 0.2


def main() -> None:
    limit_s = integer("GUEST_LIMIT", 600)
    with tempfile.TemporaryDirectory() as folder:
        try:
            passed = trio.run(run_guest, Path(folder), limit_s)
        except* ConfigError as group:
            raise SettingError(str(group.exceptions[0])) from None
    sys.exit(0 if passed else 1)


async def run_guest(folder: Path, limit_s: int) -> bool:
    """Boot and show the console; return whether the guest printed PASS. Raises ConfigError."""
    accelerator = choice("GUEST_ACCELERATOR", "auto", ("auto", "kvm", "tcg"))
    if accelerator == "auto":
        accelerator = await choose_accelerator(KERNEL, INITRD, folder)
    config = guest_config(accelerator)
    print(f"guest: starting, {accelerator}, disk {config.disks[0].socket}", flush=True)
    async with open_guest(config, folder / "console") as guest:
        with (
            trio.open_signal_receiver(signal.SIGUSR1) as signals,
            trio.move_on_after(limit_s) as scope,
        ):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(type_at_signals, guest, signals)
                await show_console(guest)
                nursery.cancel_scope.cancel()
    if scope.cancelled_caught:
        print(f"guest: not finished after {limit_s} s", flush=True)
        return False
    if not guest.report.passed:
        print(f"guest: {guest.report.reason}", flush=True)
    return guest.report.passed


def guest_config(accelerator: str) -> GuestConfig:
    """The virtual machine. Raises SettingError."""
    volume = text("NBD_VOLUME", "disk", pattern=_NAME_PATTERN, hint="letters, digits and _ . + -")
    words: dict[str, str | int] = {
        "guest_script": text("GUEST_SCRIPT", "use", pattern="[a-z_]{1,40}", hint="a script's name"),
        "guest_seconds": integer("GUEST_SECONDS", 10),
        "guest_mib": integer("GUEST_MIB", 4),
        "guest_files": integer("GUEST_FILES", 8),
    }
    return GuestConfig(
        # QEMU connects again every second, so that the guest survives a restart of the bridge.
        disks=[VhostUserDisk(SOCKET_FOLDER / f"{volume}.sock", reconnect_ms=1000)],
        kernel=KERNEL,
        initrd=INITRD,
        words=words,
        accelerator=accelerator,
        memory_mib=integer("GUEST_MEMORY_MIB", 256),
    )


async def type_at_signals(guest: VirtualMachine, signals: AsyncIterator[int]) -> None:
    """Type a line at the console for each SIGUSR1: it ends the writing of `use`."""
    async for _ in signals:
        await guest.send_line()


async def show_console(guest: VirtualMachine) -> None:
    """Copy the console's lines to standard output until the guest has ended."""
    shown = 0
    while True:
        ended = guest.ended
        for line in guest.lines[shown:]:
            print(line, flush=True)
        shown = len(guest.lines)
        if ended:
            return
        await trio.sleep(_SHOW_EVERY_S)


if __name__ == "__main__":
    os.environ.setdefault("HOME", "/tmp")
    run("guest", main)

"""How long a guest under load waits while its bridge is replaced: `./run bench pause`.

An emulated guest reads and writes all the time, and says for how long its disk has finished
nothing, at most: in two seconds in which nothing happens, during `nbd-bridge upgrade`, and during a
stop and a new start, as by `systemctl restart`. With this machine's QEMU and with QEMU 10; without
a cache, and with a write-back cache, of which a stop brings everything to the server first. QEMU
connects again after 1 s (7.2 can do no less) or 0.1 s. Under emulation the guest itself takes a
core; its clock's steps are 10 ms.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import trio

from bridge.demo.initramfs import build_initramfs
from bridge.demo.kernel import find_kernel
from bridge.demo.qemu import GuestConfig, VhostUserDisk, find_qemu, qemu_version
from bridge.demo.servers import ServerProcess, bridge_command, start_server
from bridge.demo.virtual_machine import VirtualMachine, open_guest
from tests.processes import bridge_argv
from tests.qemu.backends import make_image, nbdkit_on
from tests.qemu.conftest import TEST_SCRIPTS
from tests.qemu.newer_qemu import newer_qemu

_LIMIT_S = 60.0
_QUIET_S = 2.0
_AFTER_S = 0.5
"""What happens after the bridge has said that it serves belongs to the pause."""
_RECONNECT_MS = 100


class Disk:
    """A guest's disk, its bridge, and what the guest says of it."""

    def __init__(
        self, command: Sequence[str], bridge: ServerProcess, guest: VirtualMachine, folder: Path
    ) -> None:
        self.bridge = bridge
        self._guest = guest
        self._command = command
        self._folder = folder
        self._marks = 0

    async def gap_s(self) -> float:
        """The longest time since the last call in which the disk finished nothing."""
        self._marks += 1
        await self._guest.send_line(f"........:mark{self._marks}")
        line = await self._guest.wait_for(f"GAP mark{self._marks} ")
        return int(line.split()[-1]) / 100

    async def idle_gap_s(self) -> float:
        """The same while nothing happens to the bridge."""
        await self.gap_s()
        await trio.sleep(_QUIET_S)
        return await self.gap_s()

    async def upgrade(self) -> tuple[float, float]:
        """Gap during an upgrade; what the bridge itself says of that."""
        await self.gap_s()
        argv = bridge_argv("upgrade", str(self._folder / "disk.api"), "--json")
        done = await trio.run_process(
            argv, capture_stdout=True, capture_stderr=True, check=False, stdin=b""
        )
        if done.returncode:
            raise SystemExit(done.stderr.decode())
        await trio.sleep(_AFTER_S)
        return await self.gap_s(), float(json.loads(done.stdout)["took_over_after_s"])

    async def restart(self) -> float:
        """Gap during a stop in order and a new start."""
        await self.gap_s()
        await self.bridge.stop()
        self.bridge = await start(self._command, self._folder)
        # QEMU takes its time to connect again: until the guest goes on.
        await trio.sleep(2 * _AFTER_S)
        gap_s = await self.gap_s()
        await trio.sleep(_AFTER_S)
        return max(gap_s, await self.gap_s())


async def start(command: Sequence[str], folder: Path) -> ServerProcess:
    """A bridge for `folder/disk.sock`."""
    return await start_server("bridge", command, folder / "disk.sock", folder / "bridge.log")


async def measure(config: GuestConfig, folder: Path, mode: str, rounds: int) -> list[str]:
    """The rows of one QEMU and one cache mode."""
    found: dict[str, list[float]] = {"nothing": [], "upgrade": [], "said": [], "restart": []}
    async with nbdkit_on(make_image(folder, 128), folder) as uri:
        command = bridge_command(uri, folder / "disk.sock")
        command += ["--api", str(folder / "disk.api"), "--cache-mode", mode]
        command += ["--cache-size", "64M", "--cache-dir", str(folder)]
        bridge = await start(command, folder)
        with trio.fail_after(_LIMIT_S * (rounds + 1)):
            async with open_guest(config, folder / "guest.log") as guest:
                disk = Disk(command, bridge, guest, folder)
                try:
                    await guest.wait_for("boot_ms")
                    for _ in range(rounds):
                        found["nothing"].append(await disk.idle_gap_s())
                        gap_s, said_s = await disk.upgrade()
                        found["upgrade"].append(gap_s)
                        found["said"].append(said_s)
                        found["restart"].append(await disk.restart())
                    await guest.send_line("........:stop")
                    report = await guest.wait()
                finally:
                    await disk.bridge.kill()
        if not report.passed:
            raise SystemExit(f"the guest saw an error: {report.reason}")
    return [
        f"{name}: median {statistics.median(times):.2f} s, longest {max(times):.2f} s"
        for name, times in found.items()
    ]


async def run(rounds: int, only: str) -> None:
    """Measure and print."""
    kernel = find_kernel()
    initrd = build_initramfs(kernel, sorted(TEST_SCRIPTS.glob("*.sh")))
    for qemu in ([find_qemu()], newer_qemu()):
        major, minor = qemu_version(qemu)
        for mode in ("off", "writeback"):
            name = f"QEMU {major}.{minor}, cache {mode}"
            if only not in name:
                continue
            with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as place:
                folder = Path(place)
                shutil.copy(kernel.image, folder / "kernel")
                (folder / "initrd").write_bytes(initrd)
                config = GuestConfig(
                    disks=[VhostUserDisk(folder / "disk.sock", reconnect_ms=_RECONNECT_MS)],
                    kernel=folder / "kernel",
                    initrd=folder / "initrd",
                    words={"guest_script": "pause"},
                    qemu=qemu,
                )
                for row in await measure(config, folder, mode, rounds):
                    print(f"{name:26} | {row}", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="./run bench pause", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="of each QEMU and cache mode")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    arguments = parser.parse_args()
    trio.run(run, arguments.rounds, arguments.only)

"""Whose front-ends a disk may have besides our own: libblkio's, and QEMU's with a Linux guest."""

from __future__ import annotations

import platform
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from bridge.demo.initramfs import build_initramfs
from bridge.demo.kernel import find_kernel
from bridge.demo.qemu import GuestConfig, VhostUserDisk, command_line, find_qemu, qemu_version
from bridge.errors import ConfigError
from tests.peers import PeersMissing
from tests.peers import setup as setup_peers
from tests.qemu.qmp import open_qmp
from tests.tools import need, peer
from tests.torture.clients import Client

LIBBLKIO = "libblkio"
LINUX = "a Linux guest"

_HERE = Path(__file__).parent
_ROOT = _HERE.parents[1]
_WHAT_BLKIO_NEEDS = (
    "bridge/units.py",
    "tests/torture/content.py",
    "tests/torture/blkio_client.py",
)
_RECONNECT_MS = 100
_SURE_TO_RECONNECT = (9, 0)
"""An older QEMU gives up if its back-end dies during the first message of a reconnect."""


def missing(client: str) -> str:
    """Why this machine cannot have disks of `client`; "" if it can. May install what is needed."""
    try:
        if client == LIBBLKIO:
            setup_peers()
        elif client == LINUX:
            find_qemu()
            find_kernel()
            if platform.machine() != "x86_64":
                return "no second serial port is known for this machine's architecture"
            if shutil.which("cc") is None:
                return "there is no C compiler"
    except (PeersMissing, ConfigError) as error:
        return str(error)
    return ""


class BlkioClient(Client):
    """libblkio, from the chroot with newer peers. It does not reconnect to a new bridge."""

    def __init__(self, disk: int, log: Path, vhost: Path, folder: Path, queues: int) -> None:
        """`folder`: below /tmp, the chroot's own."""
        super().__init__(disk, log)
        self._arguments = [str(vhost), str(disk), str(queues)]
        self._modules = folder / "modules"
        for name in _WHAT_BLKIO_NEEDS:
            target = self._modules / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(_ROOT / name, target)

    def _launch(self, fd: int) -> list[str]:
        program = ["python3", "-m", "tests.torture.blkio_client", str(fd), *self._arguments]
        return peer("env", f"PYTHONPATH={self._modules}", *program)


@dataclass(frozen=True)
class Machine:
    """What a Linux guest is made of."""

    qemu: str
    version: tuple[int, int]
    kernel: Path
    initrd: Path

    @property
    def sure_to_reconnect(self) -> bool:
        """A back-end may die while QEMU reconnects to it."""
        return self.version >= _SURE_TO_RECONNECT


def build_machine(folder: Path) -> Machine:
    """Compile the agent and put it into an initrd in `folder`. Raises ConfigError."""
    agent = folder / "guest_agent"
    command = ["cc", "-static", "-O1", "-pthread", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(agent), str(_HERE / "guest_agent.c")], check=True)
    kernel = find_kernel()
    initrd = folder / "initrd"
    initrd.write_bytes(build_initramfs(kernel, [_HERE / "guest_agent.sh", agent]))
    qemu = need("qemu-system-x86_64")
    return Machine(qemu, qemu_version([qemu]), kernel.image, initrd)


class LinuxGuest(Client):
    """Linux in QEMU, whose agent makes the requests; QEMU reconnects to a new bridge."""

    def __init__(self, disk: int, log: Path, vhost: Path, machine: Machine, queues: int) -> None:
        super().__init__(disk, log)
        self._machine = machine
        self._monitor = machine.initrd.with_name("qmp")
        self._config = GuestConfig(
            qemu=[machine.qemu],
            disks=[VhostUserDisk(vhost, num_queues=queues, reconnect_ms=_RECONNECT_MS)],
            kernel=machine.kernel,
            initrd=machine.initrd,
            words={"guest_script": "guest_agent", "guest_number": disk},
            cpus=queues,
            qmp_socket=self._monitor,
        )
        self._is_paused = False

    def _launch(self, fd: int) -> list[str]:
        self._monitor.unlink(missing_ok=True)
        port = ["-chardev", f"socket,id=agent,fd={fd}", "-serial", "chardev:agent"]
        return [*command_line(self._config, self._machine.version), *port]

    async def stop(self) -> None:
        """QEMU stops the guest and its rings."""
        self._is_paused = True
        async with open_qmp(self._monitor) as qmp:
            await qmp.execute("stop")

    async def reconnect(self) -> None:
        """Go on after `stop`. Raises Violation without one: QEMU has ended."""
        if not self._is_paused:
            await super().reconnect()
        async with open_qmp(self._monitor) as qmp:
            await qmp.execute("cont")
        self._is_paused = False

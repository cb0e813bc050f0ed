"""A virtual machine outside the containers: QEMU on the host, as another user, on the socket."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import trio

from bridge.demo.initramfs import build_initramfs
from bridge.demo.kernel import find_kernel
from bridge.demo.qemu import GuestConfig, VhostUserDisk, find_qemu
from bridge.demo.virtual_machine import run_guest
from bridge.errors import ConfigError
from tests.docker.command import Failed, find
from tests.docker.compose import Compose

QEMU_UID = 64055
"""Debian's libvirt runs QEMU as this user."""
_LIMIT_S = 180.0
_BOOT_LIMIT_S = 400.0


def run_host_vm(compose: Compose, say: Callable[[str], None]) -> None:
    """The bridge in its container, QEMU beside it: a guest makes a file system. Raises Failed."""
    if os.geteuid() != 0:
        say("skipped  a machine on the host: QEMU as another user needs root")
        return
    # In /tmp: a unix socket's path has at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="nbdhost-", dir="/tmp"))
    try:
        sockets = folder / "sockets"
        sockets.mkdir(mode=0o700)
        os.chown(sockets, QEMU_UID, -1)
        compose.up(
            "storage", "bridge", BRIDGE_SOCKETS=str(sockets), BRIDGE_UID=str(QEMU_UID)
        )  # fmt: skip
        compose.wait_health("bridge", "healthy", _LIMIT_S)
        _boot(folder, sockets / "disk.sock", say)
        compose.down(volumes=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _boot(folder: Path, socket: Path, say: Callable[[str], None]) -> None:
    try:
        kernel = find_kernel()
        image, initrd = folder / "kernel", folder / "initrd"
        shutil.copyfile(kernel.image, image)
        initrd.write_bytes(build_initramfs(kernel))
        other_user = [find("setpriv") or "setpriv", f"--reuid={QEMU_UID}", f"--regid={QEMU_UID}",
                      "--clear-groups", find_qemu()]  # fmt: skip
        folder.chmod(0o755)
        config = GuestConfig(
            disks=[VhostUserDisk(socket, reconnect_ms=1000)],
            kernel=image,
            initrd=initrd,
            qemu=other_user,
            words={"guest_script": "filesystem", "guest_mib": 16},
        )
        log = folder / "console"
        report = trio.run(lambda: run_guest(config, log, time_limit_s=_BOOT_LIMIT_S))
    except ConfigError as error:
        raise Failed(f"a machine on the host cannot be tried: {error}") from None
    if not report.passed:
        raise Failed(f"the machine on the host failed: {report.reason}")
    say(f"host     QEMU on the host, user {QEMU_UID}: PASS after {report.elapsed_s:.1f} s")

"""A newer QEMU than this host has, from the chroot with newer peers."""

from __future__ import annotations

import fcntl
import subprocess

from tests.peers import ROOT
from tests.tools import missing, peer

PROGRAM = "qemu-system-x86_64"


def newer_qemu() -> list[str]:
    """The command that runs it; files have the same names there only below /tmp."""
    command = peer(PROGRAM)
    try:
        with open(f"{ROOT}.qemu-lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (ROOT / "usr/bin" / PROGRAM).exists():
                subprocess.run(
                    peer(
                        "env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "install", "-qy",
                        "--no-install-recommends", "qemu-system-x86",
                    ),
                    check=True, capture_output=True,
                )  # fmt: skip
    except subprocess.CalledProcessError as error:
        missing(f"no newer QEMU: {error}")
    return command

"""Helpers that more than one folder of tests uses."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from typing import NoReturn

import pytest
import trio

from bridge.cli.wording import explain
from bridge.errors import BridgeError
from tests.peers import PeersMissing, peer_command

HUNG_S = 60.0
"""Nothing that a test waits for takes this long, on the busiest machine: it hangs."""


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that has no event of its own."""
    with trio.fail_after(HUNG_S):
        while not condition():
            await trio.sleep(0.001)


_MARKER_OF = {
    "nbdkit": "nbdkit",
    "nbdinfo": "nbdkit",
    "nbdcopy": "nbdkit",
    "nbdfuse": "nbdkit",
    "nbd-server": "nbdkit",
    "curl": "nbdkit",
    "e2fsck": "qemu",
    "mke2fs": "qemu",
    "busybox": "qemu",
    "dpkg-deb": "qemu",
    "mcopy": "qemu",
    "mkfs.vfat": "qemu",
    "qemu-img": "qemu",
    "qemu-io": "qemu",
    "qemu-nbd": "qemu",
    "qemu-storage-daemon": "qemu",
    "qemu-system-x86_64": "qemu",
    "openssl": "openssl",
    "prometheus": "prometheus",
    "promtool": "prometheus",
    "chromium": "chromium",
    "systemd-analyze": "systemd",
    "systemd-sysusers": "systemd",
    "systemd-tmpfiles": "systemd",
}

allowed: set[str] | None = None
"""The markers of the running test; None outside of tests (the benchmarks)."""


def need(name: str) -> str:
    """The path of the external tool `name`. Fails the test if it is not there, or if the test is
    not marked as one that needs it."""
    if (marker := _MARKER_OF.get(name)) is not None:
        require(marker)
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if found is None:
        missing(f"{name} is not installed")
    return found


def require(marker: str) -> None:
    """Fail a test that is not marked with `marker`: it would be run where it cannot."""
    if allowed is not None and marker not in allowed:
        pytest.fail(f"this test needs the marker '{marker}': see tests/tiers.py")


def peer(*argv: str) -> list[str]:
    """The command line that runs `argv` among the newer peers: see tests/peers.py."""
    require("peers")
    try:
        return peer_command(*argv)
    except PeersMissing as error:
        missing(str(error))


def missing(reason: str) -> NoReturn:
    """What a test needs is not there. It fails: a test that is skipped protects nothing."""
    pytest.fail(f"{reason}; './run test' installs it, './run test --fast' does without")


def told(pattern: str) -> Callable[[BridgeError], bool]:
    """For `pytest.raises(…, check=…)`: what the operator is told of the error has `pattern`."""

    def check(error: BridgeError) -> bool:
        return re.search(pattern, explain(error)) is not None

    return check

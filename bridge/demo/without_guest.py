"""The demo's stand-in for a virtual machine: our own vhost-user front-end plays the guest."""

from __future__ import annotations

from pathlib import Path

from bridge.demo.report import GuestReport
from bridge.errors import ConfigError


async def run_without_guest(socket_path: Path, total_mib: int = 200) -> GuestReport:
    """Write, flush, discard and verify through the bridge's socket, as a guest's driver would.

    The report has the keys of the real guest's, where they apply.
    """
    raise ConfigError(
        "this version has no built-in front-end yet: install the package qemu-system-x86"
    )

"""What this host and this installation are, and what the kernel allows."""

from __future__ import annotations

from pathlib import Path
from typing import Final

UNIX_PATH_MAX_BYTES: Final = 107
"""unix(7): `sun_path` has 108, the last of which is a NUL."""

PLUGIN: Final = Path(__file__).resolve().parents[1] / "nbd_plugin" / "plugin.py"
"""The nbdkit plugin of this installation, which may lack it."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> bytes:
    """16 bytes that change with every boot of the host (random(4))."""
    return bytes.fromhex(_BOOT_ID.read_text(encoding="ascii").strip().replace("-", ""))

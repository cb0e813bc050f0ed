"""The files that make bridges services of a host: systemd's units, their user, QEMU's description.

They are data of this package (`bridge/share`), with two words to be replaced: where the program and
the plugin are.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Final

from bridge.errors import BridgeError, ConfigError
from bridge.host import PLUGIN

SHARE: Final = Path(__file__).resolve().parents[1] / "share"

_PLACES: Final = {
    "systemd": ("etc/systemd/system", "usr/lib/systemd/system"),
    "sysusers.d": ("etc/sysusers.d", "usr/lib/sysusers.d"),
    "tmpfiles.d": ("etc/tmpfiles.d", "usr/lib/tmpfiles.d"),
    "qemu": ("etc/qemu/vhost-user", "usr/share/qemu/vhost-user"),
    "etc": ("etc/nbd-bridge", "usr/share/doc/nbd-bridge/examples"),
}
"""Folder of `SHARE` → where an administrator has its files, and where a distribution's package."""

_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")
"""What the units hide from their processes (ProtectHome, PrivateTmp)."""


def program() -> Path:
    """The `nbd-bridge` command of this installation. Raises ConfigError."""
    beside = Path(sys.executable).with_name("nbd-bridge")
    found = str(beside) if beside.is_file() else shutil.which("nbd-bridge")
    if found is None:
        raise ConfigError("the command nbd-bridge is not found: say where it is")
    return Path(os.path.abspath(found))  # Links stay: what they name may be replaced.


def is_hidden(path: Path) -> bool:
    """The units could not run it there."""
    return str(path).startswith(tuple(f"{each}/" for each in _HIDDEN))


def install(root: Path, *, vendor: bool, program: Path, plugin: Path = PLUGIN) -> list[Path]:
    """Write the files below `root`; return what was written. `vendor`: where a package has them.

    Existing files are replaced: they are made from this installation. Raises BridgeError.
    """
    words = {"@PROGRAM@": str(program), "@PLUGIN@": str(plugin)}
    written = []
    try:
        for folder, places in _PLACES.items():
            target = root / places[vendor]
            target.mkdir(parents=True, exist_ok=True)
            for each in sorted((SHARE / folder).iterdir()):
                text = each.read_text(encoding="utf-8")
                for word, value in words.items():
                    text = text.replace(word, value)
                _replace(target / each.name, text)
                written.append(target / each.name)
    except OSError as error:
        raise BridgeError(f"{error.filename}: {error.strerror}") from None
    return written


def _replace(path: Path, text: str) -> None:
    """A reader sees the old text or the new one."""
    made = path.with_name(f".{path.name}.new")
    made.write_text(text, encoding="utf-8")
    made.chmod(0o644)
    made.replace(path)

"""Volume names, and what an export's name may say beyond the volume's.

    VOLUME                     the volume
    VOLUME@SNAPSHOT            a snapshot, read-only
    VOLUME@readonly            the volume, read-only, also while a session writes it
    VOLUME@session=TOKEN       a connection of the session TOKEN
    VOLUME@session=TOKEN,connection=N
                               its connection number N: a new one replaces the old one
    VOLUME@session=TOKEN,client=ID
                               a session of the client ID: it replaces that client's older one

An empty VOLUME means the default volume.
"""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass

from nbd_plugin.errors import PluginError

MAX_NAME_CHARS = 128

# No separator of paths, no leading dot (hidden files, "..") or dash (options), nothing that a
# shell, a log line or an NBD URI would have to quote.
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
_TOKEN = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_VALUES = {"session": _TOKEN, "client": _TOKEN, "connection": re.compile(r"[0-9]{1,4}")}


@dataclass(frozen=True)
class ExportName:
    """An export name taken apart. `volume` includes the snapshot, if any."""

    volume: str
    read_only: bool = False
    session: str | None = None
    connection: int | None = None
    client: str | None = None


def is_volume_name(name: str) -> bool:
    """Whether this is a legal volume name, `VOLUME` or `VOLUME@SNAPSHOT`."""
    volume, at, snapshot = name.partition("@")
    if _NAME.fullmatch(volume) is None:
        return False
    return not at or (_NAME.fullmatch(snapshot) is not None and snapshot != "readonly")


def check_volume_name(name: str, *, snapshots: bool = True) -> str:
    """Return the name, or raise PluginError (EINVAL) that quotes it."""
    if not is_volume_name(name) or ("@" in name and not snapshots):
        raise PluginError(
            f"volume name {name[:MAX_NAME_CHARS]!r} is not allowed: letters, digits and _ . + -, "
            f"first a letter, digit or _, at most {MAX_NAME_CHARS} characters",
            errno.EINVAL,
        )
    return name


def parse_export_name_untrusted(name: str) -> ExportName:
    """Take apart the name that a client sent. Raises PluginError (EINVAL)."""
    volume, at, suffix = name.partition("@")
    if volume:
        check_volume_name(volume)
    if not at:
        return ExportName(volume)
    if suffix == "readonly":
        return ExportName(volume, read_only=True)
    if "=" not in suffix:
        return ExportName(check_volume_name(name), read_only=True)
    return _with_session(volume, suffix, shown=repr(name[:300]))


def _with_session(volume: str, suffix: str, *, shown: str) -> ExportName:
    values: dict[str, str] = {}
    for item in suffix.split(","):
        key, _, value = item.partition("=")
        pattern = _VALUES.get(key)
        if pattern is None or key in values or pattern.fullmatch(value) is None:
            raise PluginError(f"export name {shown}: {item[:100]!r} is not understood")
        values[key] = value
    if "session" not in values:
        raise PluginError(f"export name {shown} has no session=")
    return ExportName(
        volume,
        session=values["session"],
        connection=int(values["connection"]) if "connection" in values else None,
        client=values.get("client"),
    )

"""The text of an error for the operator: what is wrong, and what to do about it.

All sentences that name a command or an option are here. The code that raises an error chooses one
with a `Remedy`, or with an error class of its own.
"""

from __future__ import annotations

from bridge.app.settings import ServeSettings
from bridge.app.settings_model import declared
from bridge.cache.file.layout import CacheSizeFault
from bridge.errors import (
    BridgeError,
    ChangedMeanwhile,
    RangeBeyondDisk,
    Remedy,
    SettingFault,
    SettingName,
)
from bridge.units import size_text

_GIVE_UP = "to give up what it holds: nbd-bridge cache drop --discard-dirty {path}"
_DROP = "give them up with 'nbd-bridge cache drop --discard-dirty {path}'"

_REMEDIES = {
    Remedy.OTHER_FILE_SYSTEM: ": choose a directory on another file system with --cache-dir, or "
    "use --cache-mode off",
    Remedy.OTHER_DIRECTORY: "; choose another with --cache-dir, or use --cache-mode off",
    Remedy.MAKE_DIRECTORY: "; create it or choose another with --cache-dir, or use "
    "--cache-mode off",
    Remedy.NAME_DIRECTORY: ": choose a directory with --cache-dir, or serve with --cache-mode off",
    Remedy.PROTECT_DIRECTORY: ": run 'chmod go-w {path}', or choose another with --cache-dir",
    Remedy.SMALLER_CACHE: "; make room or choose a smaller --cache-size",
    Remedy.NO_CACHE: ": use --cache-mode off",
    Remedy.REMOVE_FILE: "; remove it with rm if you mean it",
    Remedy.OTHER_FILE: "; choose another file or to start anew: nbd-bridge cache drop {path}",
    Remedy.START_ANEW: "; to start anew: nbd-bridge cache drop {path}",
    Remedy.GIVE_UP: f"; {_GIVE_UP}",
    Remedy.BRING_INTACT: "; to write what is intact to the server: nbd-bridge cache flush "
    f"--skip-damaged {{path}}; {_GIVE_UP}",
    Remedy.GROW_BACK: f"; grow the export back, or, {_GIVE_UP}",
    Remedy.FLUSH_FIRST: ": run 'nbd-bridge cache flush {path}' first",
    Remedy.FLUSH_OR_DROP: ": run 'nbd-bridge cache flush {path}' first, or add --discard-dirty",
    Remedy.BRING_INTACT_OR_DROP: ": run 'nbd-bridge cache flush --skip-damaged {path}' first, or "
    "add --discard-dirty",
    Remedy.DROP_UNSEEN: ": add --discard-dirty to drop it all the same",
    Remedy.FLUSH_OR_GIVE_UP: f": run 'nbd-bridge cache flush {{path}}' first, or {_DROP}",
    Remedy.FORCE_OR_GIVE_UP: f": run 'nbd-bridge cache flush --force {{path}}' first, or {_DROP}",
    Remedy.FORCE_IF_UNREADABLE: "; if reads of the export fail for good, run 'nbd-bridge cache "
    "flush --force {path}'",
    Remedy.LOOK_AGAIN: ": check it with 'nbd-bridge cache show {path}', and try again",
    Remedy.MOVED: "; if that export moved there, add --moved",
    Remedy.GO_ON_HERE_OR_FLUSH: "; start the guest here again, or stop this bridge and run "
    "'nbd-bridge cache flush {path}' before it starts elsewhere",
    Remedy.FLUSH_BEFORE_ELSEWHERE: ": before the guest starts elsewhere, run 'nbd-bridge cache "
    "flush {path}'",
    Remedy.NAME_BRIDGE: "; give this one another name with --name",
    Remedy.PLACE_CONTROL: "; say where it is to be with --api PATH, or use --api off",
    Remedy.LIST_BRIDGES: " ('nbd-bridge list' shows those that run)",
    Remedy.EXPECT_READ_ONLY: "; give --read-only if that is what you want",
    Remedy.LIST_EXPORTS: " (nbd-bridge info --list)",
    Remedy.NAME_CA: " (if its CA is one of your own, give that with --tls-ca)",
    Remedy.GIVE_CERTIFICATE: ": give --tls-cert and --tls-key",
    Remedy.CERTIFICATE_ACCEPTED: ": does it accept the certificate (--tls-cert)?",
    Remedy.PERHAPS_GIVE_CERTIFICATE: ": if it wants a certificate of its client, give --tls-cert "
    "and --tls-key",
    Remedy.CERTIFICATE_INSTEAD: "; identify the client by a TLS certificate (--tls-cert) instead",
}
"""The text that follows an error's own, with its punctuation."""


def explain(what: BridgeError | Remedy) -> str:
    """One line for the operator: what is wrong, and what to do about it."""
    if isinstance(what, Remedy):
        return _remedy(what, "")
    match what:
        case CacheSizeFault():
            text = _cache_size(what)
        case ChangedMeanwhile(change=change, kept=kept):
            text = f"{change} (--force writes over that); {kept}"
        case RangeBeyondDisk(offset=offset, length=length, disk_bytes=disk_bytes):
            text = f"--range {offset}:{length}: the disk has only {disk_bytes} bytes"
        case SettingFault():
            text = "".join(map(_part, what.parts))
        case _:
            text = str(what)
    after = "" if what.remedy is None else _remedy(what.remedy, what.path)
    return text + after


def duration(seconds: float) -> str:
    """For a reader, such as 12 s, 5 min or 3 days."""
    for unit_s, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit_s:
            return f"{seconds / unit_s:.0f} {name}"
    return f"{seconds:.0f} s"


def time_text(seconds: float) -> str:
    """A short time for a reader, such as 50 µs, 1.5 ms or 2 s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _remedy(remedy: Remedy, path: str) -> str:
    return _REMEDIES[remedy].replace("{path}", path)  # not `format`: a path may have braces, too


def _part(part: str | SettingName) -> str:
    return _option(part.field) if isinstance(part, SettingName) else part


def _option(field: str) -> str:
    """The option whose field has that name."""
    return next(each.setting.option for each in declared(ServeSettings) if each.field == field)


def _cache_size(fault: CacheSizeFault) -> str:
    wanted, limit = size_text(fault.wanted_bytes), size_text(fault.limit_bytes)
    if fault.too_small:
        block = size_text(fault.block_bytes)
        return f"--cache-size {wanted} is below the minimum of {limit} for blocks of {block}"
    return (
        f"--cache-size {wanted} is above the maximum of {limit}: choose a smaller --cache-size, or "
        "--cache-mode off"
    )

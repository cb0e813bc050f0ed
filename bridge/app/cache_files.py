"""All cache files of this user: what each holds, who uses it, and whether its disk still exists.

Nothing is changed here, and no lock is held for longer than a look takes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Final

import trio

from bridge.api.client import ask
from bridge.api.places import SUFFIX, control_sockets
from bridge.app.cache_flush import uri_of
from bridge.app.cache_names import default_directory, notes_directory
from bridge.cache.file.inspect import Fault, show
from bridge.cache.file.layout import FileHeader
from bridge.cache.file.location import noted, peek
from bridge.cache.file.opening import Unusable
from bridge.errors import BridgeError, ConfigError, ExportUnknown, InUse, TlsWanted
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.inspection import inspect
from bridge.server.uri import NbdUri

_SERVERS_AT_ONCE: Final = 8
_STATUS_S: Final = 5.0
"""For what a bridge says of its own cache."""


class State(StrEnum):
    """What stands in the way of removing a cache file, if anything does."""

    CLEAN = "clean"
    DIRTY = "dirty"
    """It holds data that the server lacks."""
    IN_USE = "in use"
    STALE = "stale"
    """The host went down while it was in use: the next bridge discards what it holds."""
    DAMAGED = "damaged"
    """What it holds that the server lacks cannot be said for certain."""


class DiskState(StrEnum):
    """What the server says about the disk of a cache file."""

    THERE = "there"
    GONE = "gone"
    """It knows no export of this name, or has another volume under it."""
    REFUSED = "refused"
    UNREACHABLE = "unreachable"


@dataclass(frozen=True, kw_only=True)
class CacheEntry:
    """One cache file."""

    path: str
    state: State
    server: str = ""
    export: str = ""
    disk_bytes: int = 0
    file_bytes: int
    """What it takes of the file system."""
    dirty_bytes: int | None = None
    """None: that cannot be told."""
    used_s: float
    """Seconds of the epoch: when it was last opened or closed by a bridge, or filled."""
    used_ns: int
    """The same as the file system has it."""
    problem: str = ""
    owner_pid: int | None = None
    """The process that uses it, as far as this user may see that."""
    bridge: str = ""
    """That bridge's name, if it has a control socket."""
    disk: DiskState | None = None
    """None: the server was not asked."""
    disk_reason: str = ""
    """The server's words, or why there are none."""

    def age_s(self, now_s: float | None = None) -> float:
        """How long it has not been used."""
        return max(0.0, (time.time() if now_s is None else now_s) - self.used_s)


def cache_files(directories: Sequence[str] = ()) -> list[CacheEntry]:
    """The cache files in `directories`; without any, those in the default one and those that
    bridges noted there because they are elsewhere.

    Leaves out what is no cache file and what belongs to another user. Raises ConfigError for a
    directory that cannot be read.
    """
    if directories:
        paths = [path for each in directories for path in _listed(Path(each))]
    else:
        chosen = default_directory()
        paths = _listed(chosen) if chosen.is_dir() else []
        if (notes := notes_directory()) is not None:
            paths += noted(notes)
    entries = [_look(path) for path in sorted(set(map(_real_place, paths)))]
    return _with_owners([each for each in entries if each is not None])


def _listed(directory: Path) -> list[str]:
    try:
        return [str(each) for each in directory.iterdir() if each.suffix == ".cache"]
    except OSError as error:
        raise ConfigError(f"cache directory {directory}: {error.strerror}") from None


def _real_place(path: str) -> str:
    """The path without links but for its last name: what is a link there is no cache file."""
    return os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))


def _look(path: str) -> CacheEntry | None:
    """The entry of one file; None: it is gone, no cache file, or not this user's."""
    try:
        status = os.stat(path, follow_symlinks=False)
    except OSError:
        return None
    if status.st_uid != os.geteuid():
        return None
    entry = CacheEntry(
        path=path,
        state=State.DAMAGED,
        file_bytes=status.st_blocks * 512,
        used_s=status.st_mtime,
        used_ns=status.st_mtime_ns,
    )
    header = peek(path)
    if header is not None:
        entry = _named(entry, header)
    try:
        summary = show(path)
    except InUse:
        return replace(entry, state=State.IN_USE)
    except Unusable as error:
        return replace(entry, problem=error.fault)
    except ConfigError as error:
        return None if header is None else replace(entry, problem=str(error))
    dirty_bytes = summary.dirty_bytes
    if summary.fault is Fault.CRASHED:
        state, dirty_bytes = State.STALE, 0
    elif summary.fault is Fault.DAMAGED:
        state = State.DAMAGED
    else:
        state = State.DIRTY if dirty_bytes else State.CLEAN
    problem = "its index is damaged" if state is State.DAMAGED else ""
    return replace(entry, state=state, dirty_bytes=dirty_bytes, problem=problem)


def _named(entry: CacheEntry, header: FileHeader) -> CacheEntry:
    return replace(
        entry,
        server=header.uri,
        export=header.export,
        disk_bytes=header.geometry.disk_bytes,
    )


# Who uses them.


def _with_owners(entries: list[CacheEntry]) -> list[CacheEntry]:
    if not any(each.state is State.IN_USE for each in entries):
        return entries
    bridges = _bridges_by_cache()
    return [
        _with_owner(each, *bridges.get(each.path, ("", None)))
        if each.state is State.IN_USE
        else each
        for each in entries
    ]


def _with_owner(entry: CacheEntry, bridge: str, dirty_bytes: int | None) -> CacheEntry:
    return replace(entry, owner_pid=owner_of(entry.path), bridge=bridge, dirty_bytes=dirty_bytes)


def _bridges_by_cache() -> dict[str, tuple[str, int | None]]:
    """Path of a cache file in use → its bridge's name, and how much of it is dirty."""
    found: dict[str, tuple[str, int | None]] = {}
    for path in control_sockets():
        with suppress(BridgeError):
            cache = ask(path, "GET", "/status", timeout_s=_STATUS_S).get("cache")
            if cache:
                name = path.name.removesuffix(SUFFIX)
                found[os.path.realpath(cache["path"])] = (name, cache["dirty_bytes"])
    return found


def owner_of(path: str) -> int | None:
    """The process that has the file at `path` locked; None: none, or not for this user to see."""
    try:
        wanted = os.stat(path)
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        fields = line.split()
        # "1: FLOCK ADVISORY WRITE 4711 00:2f:1234 0 EOF"; a lock that is waited for has "->". Its
        # device is not always what stat(2) says, so the process is asked for the file itself.
        if len(fields) < 6 or fields[1] != "FLOCK" or not fields[4].isdigit():
            continue
        if fields[5].rpartition(":")[2] == str(wanted.st_ino) and _has_open(fields[4], wanted):
            return int(fields[4])
    return None


def _has_open(pid: str, wanted: os.stat_result) -> bool:
    with suppress(OSError):
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                if os.path.samestat(each.stat(), wanted):
                    return True
    return False


# Whether their disks still exist.


async def ask_servers(
    entries: Sequence[CacheEntry],
    options: ClientOptions,
    explain: Callable[[BridgeError], str] = str,
) -> list[CacheEntry]:
    """The same entries with what their servers say; of those in use, nothing is asked.

    A cache file does not tell whether its server has TLS: with `options` for that, each has to.
    `explain`: an error in words.
    """
    asked: dict[str, tuple[DiskState, str]] = {}
    limit = trio.CapacityLimiter(_SERVERS_AT_ONCE)

    async def one(entry: CacheEntry) -> None:
        async with limit:
            asked[entry.path] = await _disk_of(entry, options, explain)

    async with trio.open_nursery() as nursery:
        for each in entries:
            if each.state is not State.IN_USE and each.server:
                nursery.start_soon(one, each)
    return [
        replace(each, disk=asked[each.path][0], disk_reason=asked[each.path][1])
        if each.path in asked
        else each
        for each in entries
    ]


async def _disk_of(
    entry: CacheEntry, options: ClientOptions, explain: Callable[[BridgeError], str]
) -> tuple[DiskState, str]:
    header = peek(entry.path)
    try:
        if header is None:
            raise ConfigError("the file is gone")
        export = await _export_of(uri_of(entry.path), options)
    except ExportUnknown as error:
        return DiskState.GONE, explain(error)
    except ConfigError as error:
        return DiskState.REFUSED, explain(error)
    except BridgeError as error:
        return DiskState.UNREACHABLE, explain(error)
    if header.export_identity and export.identity and header.export_identity != export.identity:
        return DiskState.GONE, "the server has another volume of this name"
    return DiskState.THERE, ""


async def _export_of(uri: NbdUri, options: ClientOptions) -> Export:
    """With TLS if `options` have files for that: nobody on the way can say then that a disk is
    gone. Else in clear, and with TLS if the server does not go on without it. Raises BridgeError.
    """
    over_tls = replace(uri, tls=True)
    if options.tls_ca_file or options.tls_certificate_file:
        return await inspect(over_tls, options)
    try:
        return await inspect(uri, options)
    except TlsWanted:
        return await inspect(over_tls, options)

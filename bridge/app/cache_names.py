"""Where the cache file of an export is, what it is called, and which others may be its."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import structlog
import trio

from bridge.cache.file import location
from bridge.cache.file.inspect import drop
from bridge.cache.file.layout import Identity
from bridge.cache.file.location import Found, Wanted
from bridge.errors import ConfigError, Remedy
from bridge.server.export import Export
from bridge.server.uri import NbdUri
from bridge.server.volume_words import VolumeName

_log = structlog.get_logger(__name__)


def default_directory() -> Path:
    """Where cache files go when nothing else is said: of the service that a manager has made it for
    (systemd.exec(5), CacheDirectory=), of the system for root, else the user's.

    Raises ConfigError for a user who has no home directory.
    """
    if given := os.environ.get("CACHE_DIRECTORY", "").partition(":")[0]:
        return Path(given)
    if os.geteuid() == 0:
        return Path("/var/cache/nbd-bridge")
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nbd-bridge"
    except RuntimeError:
        raise ConfigError(
            f"user {os.geteuid()} has no home directory for the cache",
            remedy=Remedy.NAME_DIRECTORY,
        ) from None


def cache_path(uri: NbdUri, directory: str | None) -> Path:
    """Where the cache file of the export at `uri` is, if there is one."""
    chosen = default_directory() if directory is None else Path(directory)
    identity = cache_identity(uri)
    readable = re.sub(r"[^A-Za-z0-9.-]+", "-", f"{identity.uri}-{identity.export}").strip("-.")
    return chosen / f"{readable[-80:]}-{identity.digest.hex()[:12]}.cache"


def make_default_directory() -> None:
    """Raises ConfigError if it cannot be made."""
    chosen = default_directory()
    try:
        chosen.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache directory {chosen} cannot be made ({error.strerror})",
            remedy=Remedy.OTHER_DIRECTORY,
        ) from None


def cache_identity(uri: NbdUri) -> Identity:
    """What a cache file must belong to, to be used for `uri`: the server and the export.

    Our plugin's `@session=…` is not part of that: the next session of a volume finds its cache.
    """
    return Identity(uri=uri.server, export=VolumeName(uri.export_name).without_session)


def wanted_cache(uri: NbdUri, export: Export | None) -> Wanted:
    """What a cache file must be like to belong to `export`; None: as far as the URI tells."""
    identity = cache_identity(uri)
    names = {identity.export}
    if export is None:
        return Wanted(identity, frozenset(names), b"", 0)
    if export.canonical_name:
        names.add(VolumeName(export.canonical_name).without_session)
    return Wanted(identity, frozenset(names), export.identity, export.usable_bytes)


def notes_directory() -> Path | None:
    """Where cache files in other directories are noted; None: there is no such place."""
    try:
        return default_directory()
    except (ConfigError, RuntimeError):  # No home directory.
        return None


def passed_over(uri: NbdUri, found: Found) -> ConfigError:
    """For the operator: another cache file, perhaps of this disk, holds data the server lacks."""
    which = "belongs to" if found.owned else "may belong to"
    return ConfigError(
        f"cache file {found.path} {which} the export {uri.text} and holds {found.dirty_bytes} "
        "bytes that the server lacks",
        remedy=Remedy.FLUSH_OR_GIVE_UP,
        path=found.path,
    )


def _remove(files: list[Found]) -> None:
    """Remove cache files that hold nothing that the server lacks."""
    for each in files:
        with suppress(ConfigError):
            drop(each.path)
            _log.warning(
                "a cache file of the same export under another spelling is removed", path=each.path
            )


async def find_cache(uri: NbdUri, directory: str | None, export: Export) -> list[Found]:
    """The cache files of this export in its directory. Raises ConfigError if there are others
    that could be its, with dirty data."""
    chosen = cache_path(uri, directory).parent
    default = notes_directory() or chosen
    here, elsewhere = await trio.to_thread.run_sync(
        location.find,
        wanted_cache(uri, export),
        chosen,
        default,
        location.resolve_host,
        abandon_on_cancel=True,
    )
    for found in (*here, *elsewhere):
        if found.dirty_bytes and (not found.owned or found in elsewhere):
            raise passed_over(uri, found)
    return here


async def locate_cache(uri: NbdUri, directory: str | None, export: Export) -> str:
    """The path of this export's cache file, which may have been made for another spelling of
    its URI. Raises ConfigError."""
    own = str(cache_path(uri, directory))
    found = await find_cache(uri, directory, export)
    mine = {each.path: each for each in found if each.owned}
    dirty = [each for each in mine.values() if each.dirty_bytes]
    if len(dirty) > 1:
        raise passed_over(uri, dirty[1])
    used = [path for path, each in mine.items() if each.in_use]
    for path in (*(each.path for each in dirty), *used, own, *mine):
        if path in mine:
            break
    else:
        path = own
    if export.sessions is None:
        # The server could not tell the next user of those files that this one wrote.
        others = [each for each in found if each.path != path and not each.in_use]
        _remove([each for each in others if each.same_server])
    return path

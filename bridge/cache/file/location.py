"""Which cache file belongs to an export: by its volume's identity where the server gives one, else
by the server's address, however that is spelled, and the export's name.

A cache file that was passed over because the operator spelled the same disk differently would let
the guest see old blocks, and its dirty data would be lost or overwrite newer data. So the
headers of all cache files in the directory are read, and of those that were left dirty elsewhere:
a file in a directory of the operator's choice is noted in the default one while it is in use
(`note`), as a symbolic link.
"""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from bridge.cache.file.inspect import show
from bridge.cache.file.layout import (
    HEADER_AREA_BYTES,
    FileHeader,
    Identity,
    parse_header_untrusted,
)
from bridge.errors import ConfigError, InUse
from bridge.server.uri import canonical_server

_NOTES = "elsewhere"
"""Beside the cache files of the default directory: links to those in other directories."""

Resolve = Callable[[str], frozenset[str] | None]
"""The addresses of a host, None if that cannot be told."""


@dataclass(frozen=True)
class Wanted:
    """The export that is to be served, as far as it tells cache files apart."""

    identity: Identity
    names: frozenset[str]
    """What the server calls it: as it was asked for, and as the server says."""
    volume: bytes
    """The identity that the server gives it, b"" if none."""
    disk_bytes: int

    def owns(self, header: FileHeader) -> bool:
        """The file with this header belongs to this export."""
        if self.volume and header.export_identity:
            # A clone of a volume may have its identity, under another name.
            return self.volume == header.export_identity and self._may_be_named(header)
        return self.is_spelled_so(header)

    def is_spelled_so(self, header: FileHeader) -> bool:
        """The file was made for this server and this name, in whatever spelling."""
        if header.digest in {Identity(self.identity.uri, name).digest for name in self.names}:
            return True
        return is_whole(header) and self.is_of(header) and header.export in self.names

    def is_of(self, header: FileHeader) -> bool:
        """The file was made for this server, in whatever spelling."""
        return canonical_server(header.uri) == canonical_server(self.identity.uri)

    def may_own(self, header: FileHeader, resolve: Resolve) -> bool:
        """It could belong to this export, under another name or address, as far as is known."""
        if self.volume and header.export_identity:
            return self.volume == header.export_identity
        return (
            header.geometry.disk_bytes <= self.disk_bytes
            and self._may_be_named(header)
            and _may_be_one(header.uri, self.identity.uri, resolve)
        )

    def _may_be_named(self, header: FileHeader) -> bool:
        """One of the names is the same, or one is that of the default export."""
        return not header.export or "" in self.names or header.export in self.names


def is_whole(header: FileHeader) -> bool:
    """The header has all of the address and the name, not only their beginning."""
    return header.digest == Identity(header.uri, header.export).digest


@dataclass(frozen=True)
class Found:
    """A cache file that belongs to the export, or could."""

    path: str
    dirty_bytes: int
    """What the server lacks of it; 1 or more if that cannot be counted."""
    owned: bool
    same_server: bool
    in_use: bool = False
    """By another process, and spelled like the export: nothing else is known of it."""


def find(
    wanted: Wanted, directory: Path, default_directory: Path, resolve: Resolve
) -> tuple[list[Found], list[Found]]:
    """The files in `directory`, and those elsewhere, that could be this export's."""
    here = [
        found
        for path in sorted(_listed(directory))
        if (found := _look(path, wanted, resolve)) is not None
    ]
    seen = {os.path.realpath(found.path) for found in here}
    elsewhere = []
    paths = [*noted(default_directory)]
    if not _is_same(directory, default_directory):
        paths += _listed(default_directory)
    for path in sorted({os.path.realpath(path) for path in paths} - seen):
        if _is_same(Path(path).parent, directory):
            continue
        if (found := _look(path, wanted, resolve)) is not None:
            elsewhere.append(found)
    return here, elsewhere


def _listed(directory: Path) -> Iterator[str]:
    try:
        names = os.listdir(directory)
    except OSError:
        return
    for name in names:
        if name.endswith(".cache"):
            yield str(directory / name)


def _is_same(one: Path, other: Path) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def _look(path: str, wanted: Wanted, resolve: Resolve) -> Found | None:
    header = peek(path)
    if header is None:
        return None
    owned = wanted.owns(header)
    if not owned and not wanted.may_own(header, resolve):
        return None
    try:
        summary = show(path)
    except InUse:
        # Another bridge looks after what it holds.
        return Found(path, 0, True, True, in_use=True) if wanted.is_spelled_so(header) else None
    except ConfigError:
        return None
    dirty = summary.dirty_bytes
    if summary.damaged_slots:
        dirty = dirty or 1
    elif not summary.usable:
        dirty = 0
    return Found(path, dirty, owned, wanted.is_of(header))


def peek(path: str) -> FileHeader | None:
    """The header of a cache file of this user's, without a lock; None for everything else."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return None
        return parse_header_untrusted(os.pread(fd, HEADER_AREA_BYTES, 0))
    except (OSError, ConfigError):
        return None
    finally:
        os.close(fd)


def note(path: str, default_directory: Path) -> None:
    """Let every later start know of the cache file at `path`, whatever directory it looks in.

    If that directory cannot be written to, nothing is noted, and the disk is served all the same.
    """
    path = os.path.realpath(path)
    if _is_same(Path(path).parent, default_directory):
        return
    with suppress(OSError):
        notes = default_directory / _NOTES
        notes.mkdir(mode=0o700, parents=True, exist_ok=True)
        for link in notes.iterdir():
            if not link.exists():
                link.unlink()
        with suppress(FileExistsError):
            (notes / _note_name(path)).symlink_to(path)


def forget(path: str, default_directory: Path) -> None:
    """Nothing of the cache file at `path` is missing on the server."""
    with suppress(OSError):
        (default_directory / _NOTES / _note_name(os.path.realpath(path))).unlink()


def noted(default_directory: Path) -> list[str]:
    """The cache files that `note` was told of, as far as this user noted them."""
    notes = default_directory / _NOTES
    found = []
    with suppress(OSError):
        for link in notes.iterdir():
            with suppress(OSError):
                if link.lstat().st_uid == os.geteuid():
                    found.append(os.readlink(link))
    return found


def _note_name(path: str) -> str:
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:32]


def _may_be_one(one: str, other: str, resolve: Resolve) -> bool:
    """Two server addresses, as headers have them, may lead to one server."""
    one, other = canonical_server(one), canonical_server(other)
    if one == other:
        return True
    if one.startswith("/") or other.startswith("/"):
        return False
    (one, _, one_port), (other, _, other_port) = one.rpartition(":"), other.rpartition(":")
    if one_port != other_port:
        return False
    addresses, others = resolve(one.strip("[]")), resolve(other.strip("[]"))
    if addresses is None or others is None:
        return True
    return bool(addresses & others) or (_has_local(addresses) and _has_local(others))


def resolve_host(host: str) -> frozenset[str] | None:
    """The addresses of `host`, None if the name cannot be resolved now."""
    try:
        return frozenset(str(each[4][0]) for each in socket.getaddrinfo(host, None))
    except (OSError, UnicodeError):
        return None


def _has_local(addresses: frozenset[str]) -> bool:
    """One of `addresses` is this machine's own."""
    return any(map(_is_local, addresses))


def _is_local(address: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        return error.errno == errno.EADDRINUSE
    return True

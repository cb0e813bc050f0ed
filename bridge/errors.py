"""The error classes of the bridge: the class says who is to blame, which decides what happens next.

An error's text says what is wrong. What an operator can do about it is data: a `Remedy` and a path.
Only the command line knows its commands and options, and turns a remedy into a sentence
(`bridge.cli.wording`).
"""

from __future__ import annotations

import errno as _errno
import os
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

E = TypeVar("E", bound="BridgeError")


class Remedy(Enum):
    """What an operator can do. `path`: that of the error."""

    # Where a cache is, and how large.
    OTHER_FILE_SYSTEM = auto()
    """Have the cache on another file system, or none."""
    OTHER_DIRECTORY = auto()
    """Have it in another directory, or none."""
    MAKE_DIRECTORY = auto()
    """Make the directory, or choose another, or none."""
    NAME_DIRECTORY = auto()
    """Say where the cache is to be: there is no directory by default."""
    PROTECT_DIRECTORY = auto()
    """Take the write permission for the directory `path` from other users."""
    SMALLER_CACHE = auto()
    """Make room, or have a smaller cache."""
    NO_CACHE = auto()
    """Serve without a cache."""
    # What a cache file holds.
    REMOVE_FILE = auto()
    """The operator has to remove `path`, which is not a cache file."""
    OTHER_FILE = auto()
    """Use another file, or drop this one."""
    START_ANEW = auto()
    """Drop the cache, which is of no use."""
    GIVE_UP = auto()
    """Drop the cache with its dirty data."""
    BRING_INTACT = auto()
    """Flush the part that is not damaged, or drop all."""
    GROW_BACK = auto()
    """Give the export the size that it had, or drop the cache."""
    FLUSH_FIRST = auto()
    """Flush the cache to the server."""
    FLUSH_OR_DROP = auto()
    """Flush the cache, or drop it (for the command that drops)."""
    BRING_INTACT_OR_DROP = auto()
    """Flush the part that is not damaged, or drop all (for the command that drops)."""
    DROP_UNSEEN = auto()
    """Drop it without knowing its content (for the command that drops)."""
    FLUSH_OR_GIVE_UP = auto()
    """Flush the cache, or drop it with its dirty data."""
    FORCE_OR_GIVE_UP = auto()
    """Flush it over another host's data, or drop it with its dirty data."""
    FORCE_IF_UNREADABLE = auto()
    """Flush it without a comparison, if the export cannot be read for good."""
    LOOK_AGAIN = auto()
    """Look at the file again, and try again."""
    MOVED = auto()
    """Say that the export has moved, if it has."""
    # Before a guest starts elsewhere.
    GO_ON_HERE_OR_FLUSH = auto()
    """Start the guest here again, or flush the cache first."""
    FLUSH_BEFORE_ELSEWHERE = auto()
    """Flush the cache first."""
    # The control socket.
    NAME_BRIDGE = auto()
    """Give this bridge a name of its own."""
    PLACE_CONTROL = auto()
    """Say where the control socket is to be, or that there is none."""
    LIST_BRIDGES = auto()
    """Look at the list of those that run."""
    # The rest.
    EXPECT_READ_ONLY = auto()
    """Say that the disk is to be read-only."""
    LIST_EXPORTS = auto()
    """Look at the server's list."""
    NAME_CA = auto()
    """Give the CA's certificate, if it is one of the operator's own."""
    GIVE_CERTIFICATE = auto()
    """Give a certificate and its key."""
    CERTIFICATE_ACCEPTED = auto()
    """See whether the server accepts the certificate."""
    PERHAPS_GIVE_CERTIFICATE = auto()
    """Give a certificate, if the server wants one."""
    CERTIFICATE_INSTEAD = auto()
    """Use a certificate in place of a user's name."""


class BridgeError(Exception):
    """Base of every error that the bridge raises on purpose; its text is for the operator."""

    exit_status = 1

    def __init__(self, text: str = "", *, remedy: Remedy | None = None, path: str = "") -> None:
        super().__init__(text)
        self.remedy = remedy
        self.path = path

    def within(self, kind: type[E], before: str = "") -> E:
        """The same as an error of another kind, with `before` in front of its text."""
        return kind(f"{before}{self}", remedy=self.remedy, path=self.path)


class ConfigError(BridgeError):
    """The operator asked for something impossible: exit status 2, one line, no traceback."""

    exit_status = 2


@dataclass(frozen=True)
class SettingName:
    """A setting within the text of an error, by the name that it has in the program."""

    field: str

    def __str__(self) -> str:
        return self.field


class SettingFault(ConfigError):
    """Settings that are wrong. `parts`: the error's text, with names of settings in it."""

    def __init__(self, *parts: str | SettingName) -> None:
        super().__init__("".join(map(str, parts)))
        self.parts = parts


class ChangedMeanwhile(BridgeError):
    """A flush ended early because another host wrote the export. `change` describes that, `kept`
    says where the remaining data is."""

    def __init__(self, change: str, kept: str) -> None:
        super().__init__(f"{change}; {kept}")
        self.change = change
        self.kept = kept


class RangeBeyondDisk(ConfigError):
    """A range to read begins beyond the end of the disk. All in bytes."""

    def __init__(self, offset: int, length: int, disk_bytes: int) -> None:
        super().__init__(f"range {offset}:{length}: the disk has only {disk_bytes} bytes")
        self.offset = offset
        self.length = length
        self.disk_bytes = disk_bytes


class InUse(ConfigError):
    """Another process uses the file or socket that this one needs."""


class UsedMeanwhile(ConfigError):
    """A cache file is not as it was when it was chosen."""


class ExportUnknown(ConfigError):
    """The server says that there is no export of this name."""


class TlsWanted(ConfigError):
    """The server does not go on without TLS."""


class ProtocolError(BridgeError):
    """A peer broke a MUST of its protocol.

    NBD: the client closes the connection and reconnects. vhost-user: the session ends. Virtqueue:
    that queue stops, other queues go on.
    """


class NoMemory(ProtocolError):
    """A front-end starts a ring but has not shared any memory."""


class ConnectionLost(BridgeError):
    """The peer hung up or cannot be reached; trying again may help."""


class LeftBehind(BridgeError):
    """The guest has stopped, and the server, where the next host looks, lacks some of its data."""


class CertificateWanted(ConnectionLost):
    """The server hung up without a reason where it might have wanted a certificate."""

    exit_status = 2


class RequestError(BridgeError):
    """One request failed with an errno; all others go on."""

    def __init__(self, errno: int, message: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(message or f"{name}: {os.strerror(errno)}")
        self.errno = errno

"""The error classes of the bridge: whose fault it is decides what happens next.

An error's text says what is the case. What an operator can do about it is data, a `Remedy` and the
path that it is about: only the command line knows its own commands and options, and says them
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
    """Let nobody else write the directory `path`."""
    SMALLER_CACHE = auto()
    """Make room, or have a smaller cache."""
    NO_CACHE = auto()
    """Serve without a cache."""
    # What a cache file holds.
    REMOVE_FILE = auto()
    """The operator has to remove `path`, which is no cache file."""
    OTHER_FILE = auto()
    """Use another file, or drop this one."""
    START_ANEW = auto()
    """Drop the cache, which is of no use."""
    GIVE_UP = auto()
    """Drop the cache with what is dirty in it."""
    BRING_INTACT = auto()
    """Flush what is not damaged, or drop all."""
    GROW_BACK = auto()
    """Give the export the size that it had, or drop the cache."""
    FLUSH_FIRST = auto()
    """Flush the cache to the server."""
    FLUSH_OR_DROP = auto()
    """The same, or drop it (asked by the command that drops)."""
    BRING_INTACT_OR_DROP = auto()
    """Flush what is not damaged, or drop all (asked by the same)."""
    DROP_UNSEEN = auto()
    """Drop it without knowing what it holds (asked by the same)."""
    FLUSH_OR_GIVE_UP = auto()
    """Flush the cache, or drop it with what is dirty in it."""
    FORCE_OR_GIVE_UP = auto()
    """Flush it over what somebody else wrote, or drop it with what is dirty in it."""
    FORCE_IF_UNREADABLE = auto()
    """Flush it without a comparison, if the export cannot be read for good."""
    LOOK_AGAIN = auto()
    """Look at what it is now, and try again."""
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
    """The operator asked for something that cannot be: exit status 2, one line, no traceback."""

    exit_status = 2


@dataclass(frozen=True)
class SettingName:
    """A setting within the text of an error, by the name that it has in the program."""

    field: str

    def __str__(self) -> str:
        return self.field


class SettingFault(ConfigError):
    """What is wrong with settings, in `parts` of text and the names of settings between them."""

    def __init__(self, *parts: str | SettingName) -> None:
        super().__init__("".join(map(str, parts)))
        self.parts = parts


class ChangedMeanwhile(BridgeError):
    """A flush has ended early, since somebody else wrote the export: `change` says what was seen,
    `kept` where the rest is."""

    def __init__(self, change: str, kept: str) -> None:
        super().__init__(f"{change}; {kept}")
        self.change = change
        self.kept = kept


class RangeBeyondDisk(ConfigError):
    """A range that is to be read begins behind the end of the disk. All in bytes."""

    def __init__(self, offset: int, length: int, disk_bytes: int) -> None:
        super().__init__(f"range {offset}:{length}: the disk has only {disk_bytes} bytes")
        self.offset = offset
        self.length = length
        self.disk_bytes = disk_bytes


class InUse(ConfigError):
    """Another process has it."""


class ProtocolError(BridgeError):
    """A peer broke a MUST of its protocol.

    NBD: drop the connection and reconnect. vhost-user: close the session. Virtqueue: stop that
    queue. Everything else lives on.
    """


class NoMemory(ProtocolError):
    """A front-end starts a ring, and has shared no memory at all."""


class ConnectionLost(BridgeError):
    """The other side went away; trying again may help."""


class LeftBehind(BridgeError):
    """The guest has stopped, and not everything that it wrote is where the next host will look."""


class CertificateWanted(ConnectionLost):
    """The other side went away without a word where it could have wanted a certificate."""

    exit_status = 2


class RequestError(BridgeError):
    """One request failed with an errno; all else lives."""

    def __init__(self, errno: int, message: str = "") -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(message or f"{name}: {os.strerror(errno)}")
        self.errno = errno

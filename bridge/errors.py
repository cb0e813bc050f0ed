"""The error classes of the bridge: whose fault it is decides what happens next."""

from __future__ import annotations

import errno as _errno
import os


class BridgeError(Exception):
    """Base of every error that the bridge raises on purpose; its text is for the operator."""

    exit_status = 1


class ConfigError(BridgeError):
    """The operator asked for something that cannot be: exit status 2, one line, no traceback."""

    exit_status = 2


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

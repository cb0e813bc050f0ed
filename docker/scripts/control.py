"""The bridge's control socket in its container: where it is, and one look at it.

The default directory, so that `nbd-bridge status` in the container needs no arguments.
"""

from __future__ import annotations

import json
import re
import socket

FOLDER = "/run/nbd-bridge"
_LIMIT_S = 4.0
_ANSWER_BYTES = 1 << 16


class NoAnswer(Exception):
    """The bridge could not be asked; the text says why, in one line."""


def bridge_name(volume: str) -> str:
    """What the bridge of `volume` is called. A volume's name may have a + and be longer."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", volume)[:64]


def socket_path(volume: str) -> str:
    """The control socket of the bridge of `volume`."""
    return f"{FOLDER}/{bridge_name(volume)}.api"


def readiness(path: str) -> tuple[bool, str]:
    """Whether the bridge at control socket `path` has its server, and else the reason.

    HTTP by hand: this runs every few seconds, and http.client takes as long to import as Python
    to start. Raises NoAnswer.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_LIMIT_S)
            connection.connect(path)
            connection.sendall(b"GET /ready HTTP/1.1\r\nHost: nbd\r\nConnection: close\r\n\r\n")
            answer = _read_all(connection)
    except OSError as error:
        raise NoAnswer(f"the control socket {path}: {error.strerror or error}") from None
    try:
        said = json.loads(answer.partition(b"\r\n\r\n")[2])
        return bool(said["ready"]), str(said["reason"])
    except (ValueError, KeyError, TypeError):
        raise NoAnswer(f"the control socket {path} answers {answer[:60]!r}") from None


def _read_all(connection: socket.socket) -> bytes:
    """All until the peer closes; no more than an answer can have."""
    found = b""
    while len(found) < _ANSWER_BYTES and (data := connection.recv(4096)):
        found += data
    return found

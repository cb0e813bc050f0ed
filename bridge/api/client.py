"""The other end of the control socket, for the commands: one request, one answer, no event loop."""

from __future__ import annotations

import http.client
import json
import os
import socket
from pathlib import Path
from typing import Any, Final

from bridge.api.places import SUFFIX, SYSTEM_DIRECTORY, peer_of
from bridge.errors import BridgeError, ConfigError, ConnectionLost

_ANSWER_MAX_BYTES: Final = 4 << 20


class _UnixConnection(http.client.HTTPConnection):
    """`http.client` on a unix socket."""

    def __init__(self, path: Path, timeout_s: float) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """Connect; raises OSError, and BridgeError for a process that is not to be believed."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.settimeout(self.timeout)
        try:
            sock.connect(os.fspath(self._path))
            pid, uid = peer_of(sock)
            believed = (0, os.geteuid(), _owner_of_system_directory(self._path))
            if os.geteuid() and uid not in believed:
                raise BridgeError(
                    f"{self._path}: process {pid} of user {uid} listens there, which is "
                    "neither this user, nor root, nor that of the directory"
                )
        except BaseException:
            sock.close()
            raise
        self.sock = sock


def _owner_of_system_directory(path: Path) -> int:
    """Only that user and root can have made a socket there; root (0) for any other place."""
    if path.parent != SYSTEM_DIRECTORY:
        return 0
    status = path.parent.stat(follow_symlinks=False)
    return 0 if status.st_mode & 0o022 else status.st_uid


def ask(
    path: Path, method: str, target: str, body: dict[str, Any] | None = None, *, timeout_s: float
) -> dict[str, Any]:
    """The JSON object that the bridge at `path` answers.

    Raises ConfigError if it says that the request was wrong or there is no bridge, ConnectionLost
    if it does not answer, else BridgeError; each with one line for the operator.
    """
    status, data = _asked(path, method, target, body, timeout_s)
    return _answer(_name(path), status, data)


def read(path: Path, target: str, *, timeout_s: float) -> bytes:
    """What the bridge at `path` answers to a GET. Raises as `ask` does."""
    status, data = _asked(path, "GET", target, None, timeout_s)
    if status != http.client.OK:
        raise BridgeError(f"bridge {_name(path)} answered with HTTP status {status}")
    return data


def said(data: bytes) -> dict[str, Any] | None:
    """The JSON object that an answer is; None: it is none."""
    try:
        answer = json.loads(data)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


def _name(path: Path) -> str:
    return path.name.removesuffix(SUFFIX)


def _asked(
    path: Path, method: str, target: str, body: dict[str, Any] | None, timeout_s: float
) -> tuple[int, bytes]:
    """HTTP status and body."""
    connection = _UnixConnection(path, timeout_s)
    name = _name(path)
    try:
        headers = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            method, target, None if body is None else json.dumps(body), headers=headers
        )
        response = connection.getresponse()
        return response.status, response.read(_ANSWER_MAX_BYTES)
    except (FileNotFoundError, ConnectionRefusedError):
        raise ConfigError(f"bridge {name} is not running: nothing listens at {path}") from None
    except PermissionError:
        raise ConfigError(
            f"{path}: no permission: be root, or the user or in the group of the bridge"
        ) from None
    except (TimeoutError, BlockingIOError):  # The latter: so many wait there already.
        raise ConnectionLost(f"bridge {name} did not answer within {timeout_s:g} s") from None
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionLost(f"bridge {name}: {error or type(error).__name__}") from None
    finally:
        connection.close()


def _answer(name: str, status: int, data: bytes) -> dict[str, Any]:
    answer = said(data)
    if answer is None:
        raise BridgeError(f"bridge {name} answered something that is not a JSON object")
    if status < http.client.BAD_REQUEST:
        return answer
    why = answer.get("error") or answer.get("reason") or f"HTTP status {status}"
    text = f"{name}: {why}"
    if status in (http.client.BAD_REQUEST, http.client.NOT_FOUND):
        raise ConfigError(text)
    raise BridgeError(text)

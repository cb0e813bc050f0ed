"""What a service manager such as systemd is told: sd_notify(3), and a file with our number.

Datagrams on the socket that NOTIFY_SOCKET names. Nothing here can fail a disk: without a manager,
or with one that does not listen, nothing happens.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import trio

from bridge.errors import ConfigError

_STATUS_S: Final = 5.0
"""How often the status is looked at; it is sent when it has changed."""
_AGAIN_S: Final = 0.05
"""A manager that has much to read, at the boot of a host, must not miss that the disk is there."""


def notify(*assignments: str) -> bool:
    """Send `KEY=value` lines to the manager, if there is one, without waiting.

    False: it has too much to read at the moment.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return True
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto("\n".join(assignments).encode(), socket.MSG_DONTWAIT, address)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def waiting(status: str) -> None:
    """The start takes long, for this reason."""
    notify(f"STATUS={status}")


def still_starting(status: str, limit_s: float) -> None:
    """The start goes on, for `limit_s` from now at most."""
    notify(f"EXTEND_TIMEOUT_USEC={round(limit_s * 1e6)}", f"STATUS={status}")


def stopping(limit_s: float) -> None:
    """The process is on its way to its end, which may take `limit_s`."""
    notify(
        "STOPPING=1",
        f"EXTEND_TIMEOUT_USEC={round(limit_s * 1e6)}",
        "STATUS=stopping: bringing everything to the server",
    )


async def ready(status: str) -> None:
    """Whatever is served can be had from now on; return when that has been said."""
    while not notify("READY=1", f"MAINPID={os.getpid()}", f"STATUS={status}"):  # noqa: ASYNC110
        await trio.sleep(_AGAIN_S)


async def run(status: Callable[[], str]) -> None:
    """Say that the disk is served, then what its state is and that the loop is alive, until
    cancelled."""
    said = status()
    await ready(said)
    if "NOTIFY_SOCKET" not in os.environ:
        return
    watchdog_s = _watchdog_s()
    while True:
        if watchdog_s:
            notify("WATCHDOG=1")
        now = status()
        if now != said and notify(f"STATUS={now}"):
            said = now
        await trio.sleep(min(_STATUS_S, watchdog_s / 2) if watchdog_s else _STATUS_S)


def _watchdog_s() -> float:
    """How long the manager waits for a sign of life, sd_watchdog_enabled(3); 0.0: it does not."""
    text = os.environ.get("WATCHDOG_USEC", "")
    for_us = os.environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
    return int(text) / 1e6 if for_us and text.isascii() and text.isdecimal() else 0.0


@contextlib.contextmanager
def pid_file(path: str | None) -> Iterator[None]:
    """Our number stands in the file at `path` meanwhile. Raises ConfigError."""
    if path is None:
        yield
        return
    file = Path(path)
    made = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        made.write_text(f"{os.getpid()}\n", encoding="ascii")
        made.replace(file)  # A reader sees the whole number or none.
    except OSError as error:
        with contextlib.suppress(OSError):
            made.unlink()
        raise ConfigError(f"cannot write the pid file {path}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError, ValueError):
            if int(file.read_text(encoding="ascii")) == os.getpid():
                file.unlink()

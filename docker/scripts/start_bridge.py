"""The bridge container's first process: settings, then `nbd-bridge serve`.

Every setting is an environment variable of docker/README.md's table.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from urllib.parse import quote, urlsplit

from control import bridge_name
from environment import SettingError, choice, integer, number, run, size, switch, text
from supervise import supervise

SOCKET_FOLDER = Path("/sockets")
CONTROL_FOLDER = Path("/run/nbd-bridge")
CACHE_FOLDER = Path("/var/cache/nbd-bridge")
CERTIFICATES = Path("/certificates/client")

_NAME_PATTERN = r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}"
_FEATURES = r"(-[a-z0-9_-]+(,-[a-z0-9_-]+)*)?"
_NAME_HINT = "letters, digits and _ . + -"


def main() -> None:
    command = ["nbd-bridge", "serve", server_uri(), *options()]
    supervise(command)


def volume_name() -> str:
    """The volume's name, which the socket also has. Raises SettingError."""
    return text("NBD_VOLUME", "disk", pattern=_NAME_PATTERN, hint=_NAME_HINT)


def socket_path() -> Path:
    """The socket to which the virtual machine connects. Raises SettingError."""
    return SOCKET_FOLDER / f"{volume_name()}.sock"


def server_uri() -> str:
    """NBD_URI, or the URI of the storage service's volume with the certificates that it made.

    Raises SettingError.
    """
    if uri := text("NBD_URI", ""):
        if urlsplit(uri).scheme not in ("nbd", "nbds", "nbd+unix", "nbds+unix"):
            raise SettingError(f"NBD_URI={uri[:200]!r} does not start with nbd:// or nbds://")
        return uri
    if not switch("NBD_TLS", "on"):
        return f"nbd://storage/{volume_name()}"
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        if not os.access(CERTIFICATES / name, os.R_OK):
            raise SettingError(
                f"{CERTIFICATES / name} cannot be read by user {os.getuid()}, group {os.getgid()}: "
                "the storage makes it at its first start, or mount your own"
            )
    return f"nbds://storage/{volume_name()}?tls-certificates={quote(str(CERTIFICATES))}"


def options() -> list[str]:
    """The options of `nbd-bridge serve`. Raises SettingError."""
    check_folder(SOCKET_FOLDER)
    check_folder(CONTROL_FOLDER)
    chosen = [
        f"--socket-path={socket_path()}",
        f"--name={bridge_name(volume_name())}",
        f"--num-queues={integer('BRIDGE_NUM_QUEUES', 1)}",
        "--block-size=" + choice("BRIDGE_BLOCK_SIZE", "512", ("512", "1024", "2048", "4096")),
        "--flush-interval=" + number("BRIDGE_FLUSH_INTERVAL", "60"),
        "--poll-us=" + number("BRIDGE_POLL_US", "32"),
        f"--connections={integer('BRIDGE_CONNECTIONS', 1)}",
        "--stop-timeout=" + number("BRIDGE_STOP_TIMEOUT", "20"),
        "--reconnect-timeout=" + number("BRIDGE_RECONNECT_TIMEOUT", "0"),
        "--log-level=" + choice("BRIDGE_LOG_LEVEL", "info", ("debug", "info", "warning", "error")),
        "--log-format=" + choice("BRIDGE_LOG_FORMAT", "text", ("text", "json")),
    ]
    if serial := text("BRIDGE_SERIAL", "", pattern=r"[!-~]{0,20}", hint="at most 20 characters"):
        chosen.append(f"--serial={serial}")
    if features := text(
        "BRIDGE_FEATURES", "", pattern="(-[a-z-]+(,-[a-z-]+)*)?", hint="-mq,-discard"
    ):
        chosen.append(f"--features={features}")
    if switch("BRIDGE_READ_ONLY", "off"):
        chosen.append("--read-only")
    return chosen + cache_options()


def cache_options() -> list[str]:
    """The local cache's options. Raises SettingError."""
    mode = choice("BRIDGE_CACHE_MODE", "writeback", ("off", "writethrough", "writeback"))
    if mode == "off":
        return ["--cache-mode=off"]
    check_folder(CACHE_FOLDER)
    return [
        f"--cache-mode={mode}",
        f"--cache-dir={CACHE_FOLDER}",
        "--cache-size=" + size("BRIDGE_CACHE_SIZE", "1G"),
    ]


def check_folder(folder: Path) -> None:
    """Raise SettingError, with the remedy, unless we may make files in `folder`."""
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        if not folder.is_dir():
            raise SettingError(f"{folder} is not there: mount a volume at it")
        owner = folder.stat().st_uid
        raise SettingError(
            f"{folder} belongs to user {owner}, user {os.getuid()} cannot write it: "
            f"chown {os.getuid()} it, or set BRIDGE_UID={owner}"
        )


if __name__ == "__main__":
    sys.stderr.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    run("bridge", main)

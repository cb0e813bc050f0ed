"""The bridge's health: it listens for the virtual machine and is connected to its server.

The kernel's tables of this container's sockets say both. Connecting to the vhost-user socket would
take the place of a virtual machine, and asking the bridge would cost it time. Prints one line;
exit status 0 or 1.
"""

from __future__ import annotations

import os
import sys

_ACCEPTING = "00010000"
"""The flag __SO_ACCEPTCON in /proc/net/unix: a process listens here (proc(5))."""
_ESTABLISHED = "01"
_DEFAULT_PORT = 10809


def is_listening(table: str, path: str) -> bool:
    """Whether /proc/net/unix, the text `table`, has a listening socket at `path`."""
    rows = (line.split() for line in table.splitlines()[1:])
    return any(len(row) == 8 and row[3] == _ACCEPTING and row[7] == path for row in rows)


def is_connected(table: str, port: int) -> bool:
    """Whether /proc/net/tcp or tcp6 has an established connection to a remote `port`."""
    rows = (line.split() for line in table.splitlines()[1:])
    return any(
        len(row) > 3 and row[3] == _ESTABLISHED and int(row[2].rpartition(":")[2], 16) == port
        for row in rows
    )


def server_port(uri: str) -> int | None:
    """The TCP port of the server at `uri`; None when it is on a unix socket."""
    if "+unix:" in uri.split("/", 1)[0]:
        return None
    from urllib.parse import urlsplit

    return urlsplit(uri).port or _DEFAULT_PORT


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""


def main() -> None:
    path = f"/run/nbd-bridge/{os.environ.get('NBD_VOLUME') or 'disk'}.sock"
    uri = os.environ.get("NBD_URI") or ""
    port = server_port(uri) if uri else _DEFAULT_PORT
    if not is_listening(_read("/proc/net/unix"), path):
        print(f"bridge is unhealthy: it does not listen on {path}")
        sys.exit(1)
    tables = "/proc/net/tcp", "/proc/net/tcp6"
    if port is not None and not any(is_connected(_read(table), port) for table in tables):
        print(f"bridge is unhealthy: it listens, but has no connection to port {port}")
        sys.exit(1)
    print("listening and connected")


if __name__ == "__main__":
    main()

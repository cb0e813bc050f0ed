"""TCP ports for servers that cannot choose one themselves."""

from __future__ import annotations

import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 10_000
_HIGHEST = 65_535


def free_port() -> int:
    """A port that nobody listens on, and that no outgoing connection is given meanwhile.

    One that the kernel chose could go to any connection on this machine before the server starts.
    """
    first, last = map(int, _EPHEMERAL.read_text().split())
    ports = [*range(_LOWEST, first), *range(last + 1, _HIGHEST + 1)]
    dice = random.SystemRandom()  # two runs with the same seed must not choose the same
    while True:
        port = dice.choice(ports or range(_LOWEST, _HIGHEST + 1))
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port

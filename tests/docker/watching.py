"""A bridge in its container, looked at: its status, its health, its metrics on the network."""

from __future__ import annotations

import json
from collections.abc import Callable

from tests.docker.command import Failed
from tests.docker.compose import Compose

Say = Callable[[str], None]

_FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())
"""


def check_status(compose: Compose, say: Say) -> None:
    """`docker exec bridge nbd-bridge status` tells how the disk is. Raises Failed."""
    bridge = compose.container("bridge")
    text = compose.engine("exec", bridge, "nbd-bridge", "status")
    if "safe to reboot this host: yes" not in text:
        raise Failed(f"`nbd-bridge status` in the container says\n{text}")
    found = json.loads(compose.engine("exec", bridge, "nbd-bridge", "status", "disk", "--json"))
    if found["server"]["state"] != "connected":
        raise Failed(f"the bridge's status is {found}")
    health = compose.inspect("bridge")["State"]["Health"]["Log"][-1]["Output"]
    if "has its server" not in health:
        raise Failed(f"the bridge's health check says {health!r}")
    say(f"status   {text.splitlines()[-1]}; health check: {health.strip()}")


def check_metrics(compose: Compose, say: Say) -> None:
    """The exporter has the bridge's metrics, for other services of the project. Raises Failed."""
    compose.up("exporter")
    wanted = 'nbd_bridge_up{disk="disk"} 1'
    # As Prometheus would from its container: by the service's name.
    fetch = ["exec", compose.container("storage"), "python3", "-c", _FETCH]
    compose.wait_log("exporter", "are shown at", 120)
    text = compose.engine(*fetch, "http://exporter:9809/metrics")
    if wanted not in text or "nbd_bridge_cache_size_bytes" not in text:
        raise Failed(f"the exporter has not {wanted}:\n{text[:1500]}")
    compose.compose("stop", "-t", "10", "exporter")
    say(f"metrics  {len(text.splitlines())} lines at exporter:9809")

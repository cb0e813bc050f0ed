"""The commands in docs/containers.md, as they are printed: status, metrics, a backup."""

from __future__ import annotations

import json
import shlex
import tempfile
from collections.abc import Callable
from pathlib import Path

from bridge.demo.image import check_filesystem
from tests.docker.command import Failed, run
from tests.docker.compose import Compose
from tests.document_blocks import blocks_of

Say = Callable[[str], None]

_DOCUMENT = Path("docs/containers.md")
_MARK = "tried: tests/docker/watching.py"
_LIMIT_S = 400.0
_AS_PRINTED = """
docker() {{
    if [ "$1" != compose ]; then command {docker} "$@"; return; fi
    shift
    local words=()
    for word; do
        words+=("$word")
        if [ "$word" = exec ]; then words+=(-T); fi  # There is no terminal here.
    done
    {compose} "${{words[@]}}"
}}
"""
"""`docker compose` may be docker-compose here."""
_FETCH = """
import sys, urllib.request
print(urllib.request.urlopen(sys.argv[1], timeout=60).read().decode())
"""


def check_status(compose: Compose, say: Say) -> None:
    """`nbd-bridge status` in the container tells how the disk is. Raises Failed."""
    text = _run_block(compose, "exec bridge nbd-bridge status", compose.folder.parent)
    answer = next((line for line in text.splitlines() if "safe to reboot" in line), "")
    if answer != "safe to reboot this host: yes":
        raise Failed(f"the printed commands say\n{text}")
    bridge = compose.container("bridge")
    found = json.loads(compose.engine("exec", bridge, "nbd-bridge", "status", "disk", "--json"))
    if found["server"]["state"] != "connected":
        raise Failed(f"the bridge's status is {found}")
    health = compose.inspect("bridge")["State"]["Health"]["Log"][-1]["Output"]
    if "has its server" not in health:
        raise Failed(f"the bridge's health check says {health!r}")
    say(f"status   {answer}; health check: {health.strip()}")


def check_metrics(compose: Compose, say: Say) -> None:
    """The exporter has the bridge's metrics, for other services of the project. Raises Failed."""
    _run_block(compose, "--profile metrics", compose.folder.parent)
    wanted = 'nbd_bridge_up{disk="disk"} 1'
    # As Prometheus would from its container: by the service's name.
    fetch = ["exec", compose.container("storage"), "python3", "-c", _FETCH]
    compose.wait_log("exporter", "are shown at", 120)
    text = compose.engine(*fetch, "http://exporter:9809/metrics")
    if wanted not in text or "nbd_bridge_cache_size_bytes" not in text:
        raise Failed(f"the exporter has not {wanted}:\n{text[:1500]}")
    compose.compose("stop", "-t", "10", "exporter")
    say(f"metrics  {len(text.splitlines())} lines at exporter:9809")


def check_backup(compose: Compose, say: Say) -> None:
    """A copy of the stopped volume is a clean disk; it is stopped afterwards. Raises Failed."""
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-backup-") as temporary:
        folder = Path(temporary)
        (folder / "docker").symlink_to(compose.folder)
        _run_block(compose, "docker cp", folder)
        if complaint := check_filesystem(folder / "disk.img"):
            raise Failed(f"the backup's file system is damaged: {complaint}")
    say("backup   file system clean")


def _run_block(compose: Compose, text: str, folder: Path) -> str:
    """Run the block of the document that has `text`, in `folder`; its output. Raises Failed."""
    found = [each for each in blocks_of(_DOCUMENT) if each.mark == _MARK and text in each.text]
    if len(found) != 1:
        raise Failed(f"{_DOCUMENT} has {len(found)} blocks with {text!r}")
    functions = _AS_PRINTED.format(
        docker=shlex.join([compose.docker, "-H", compose.address]),
        compose=shlex.join(compose.command),
    )
    environment = {**compose.environment(), "COMPOSE_PROJECT_NAME": compose.name}
    script = f"set -eu\n{functions}\n{found[0].text}"
    return run("bash", "-c", script, limit_s=_LIMIT_S, env=environment, folder=folder).stdout

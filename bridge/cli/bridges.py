"""`nbd-bridge list`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bridge.cli.control import LOOK_S, as_json, command
from bridge.cli.output import one_line_errors, print_line
from bridge.errors import BridgeError
from bridge.units import size_text

_AT_ONCE = 16
_HEAD = ("NAME", "GUEST", "SERVER", "SIZE", "CACHE", "DIRTY", "HITS", "SAFE", "URI")


@command("list", "nbd-bridge list\nnbd-bridge list --json | jq -r '.[].bridge.name'")
@as_json
@one_line_errors
def list_(as_json: bool) -> None:
    """Print all bridges of this host, one a line.

    SAFE says whether everything that the guest wrote is on the server.
    """
    from concurrent.futures import ThreadPoolExecutor

    from bridge.api.places import control_sockets

    paths = control_sockets()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = list(pool.map(_look, paths))
    if as_json:
        print_line(json.dumps(found, indent=2))
        return
    rows = [_HEAD, *(map(_row, found))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    for row in rows:
        line = "  ".join(f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        print_line(line.rstrip())


def _look(path: Path) -> dict[str, Any]:
    """The status of the bridge at `path`, or why there is none."""
    from bridge.api.client import ask
    from bridge.api.places import SUFFIX

    try:
        return ask(path, "GET", "/status", timeout_s=LOOK_S)
    except BridgeError as error:
        return {"bridge": {"name": path.name.removesuffix(SUFFIX)}, "error": str(error)}


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    name = found["bridge"]["name"]
    if "error" in found:
        return (name, *["-"] * (len(_HEAD) - 2), found["error"])
    cache = found["cache"]
    hits = None if cache is None else cache["hit_ratio"]
    return (
        name,
        found["guest"]["state"],
        found["server"]["state"],
        size_text(found["guest"]["size_bytes"]),
        "off" if cache is None else cache["mode"],
        "-" if cache is None else size_text(cache["dirty_bytes"]),
        "-" if hits is None else f"{hits:.1%}",
        "yes" if found["safe_to_reboot"]["safe"] else "no",
        found["server"]["uri"],
    )

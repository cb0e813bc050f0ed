"""`nbd-bridge list`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bridge.api.places import control_sockets
from bridge.app.command_settings import StatusSettings
from bridge.cli import common
from bridge.cli.control import look_at_all
from bridge.units import size_text

_AT_ONCE = 16
_HEAD = ("NAME", "GUEST", "SERVER", "SIZE", "CACHE", "DIRTY", "HITS", "SAFE", "URI")


@common.command("list", StatusSettings, example="nbd-bridge list")
def command(settings: StatusSettings) -> None:
    """Print all bridges of this host, one a line.

    SAFE says whether everything that the guest wrote is on the server.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        found = look_at_all(control_sockets(), pool)
    if settings.output.as_json:
        common.print_result(json.dumps(found, indent=2))
        return
    if not found:
        common.print_result("no bridge is running that this user may ask")
        return
    common.print_result(common.columns([_HEAD, *map(_row, found)]))


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

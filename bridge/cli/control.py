"""What the commands share that speak to running bridges.

NAME is what `nbd-bridge list` shows, or the path of a control socket.
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click

from bridge.api.client import ask
from bridge.api.places import SUFFIX, control_sockets, socket_of
from bridge.cli.common import print_result
from bridge.errors import BridgeError


def _names(context: click.Context, parameter: click.Parameter, beginning: str) -> list[str]:
    """The bridges of this host, for a shell's completion."""
    names = (path.name.removesuffix(SUFFIX) for path in control_sockets())
    return [name for name in names if name.startswith(beginning)]


name_argument = click.argument("name", shell_complete=_names)
"""The bridge that a command is about."""
optional_name_argument = click.argument("name", required=False, shell_complete=_names)

LOOK_S = 5.0
"""For an answer to what a bridge knows by itself."""


def act(name: str, target: str, body: dict[str, Any], *, timeout_s: float = 0.0) -> dict[str, Any]:
    """What bridge `name` answers to a POST that may take `timeout_s`. Raises BridgeError."""
    return ask(socket_of(name), "POST", target, body, timeout_s=timeout_s + LOOK_S)


def look_at_all(paths: list[Path], pool: ThreadPoolExecutor) -> list[dict[str, Any]]:
    """The status of the bridge at each of `paths`, or its name and why there is none."""
    return list(pool.map(_look, paths))


def _look(path: Path) -> dict[str, Any]:
    try:
        return ask(path, "GET", "/status", timeout_s=LOOK_S)
    except BridgeError as error:
        return {"bridge": {"name": path.name.removesuffix(SUFFIX)}, "error": str(error)}


def show(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print one or the other."""
    print_result(json.dumps(answer, indent=2) if as_json else text)

"""What the commands share that speak to running bridges."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import click

from bridge.cli.output import print_line
from bridge.cli.parameters import Finite, option

LOOK_S = 5.0
"""For an answer to what a bridge knows by itself."""

F = TypeVar("F", bound=Callable[..., Any])

NAME_HELP = "NAME is what `nbd-bridge list` shows, or the path of a control socket."

as_json = option("--json", "as_json", is_flag=True, help="Print JSON.")
timeout = option(
    "--timeout",
    "timeout_s",
    type=Finite(0, 3600),
    default=60.0,
    show_default=True,
    help="Seconds that this may take.",
)


def command(name: str, examples: str) -> Callable[[Callable[..., None]], click.Command]:
    """A command whose help ends with `examples`, one a line."""
    lines = "".join(f"\n  {each}" for each in examples.splitlines())
    return click.command(name, epilog=f"\b\nExamples:{lines}")


def act(
    name: str, method: str, target: str, body: dict[str, Any], *, timeout_s: float = LOOK_S
) -> dict[str, Any]:
    """What bridge `name` answers to this. Raises BridgeError."""
    from bridge.api.client import ask
    from bridge.api.places import socket_of

    return ask(socket_of(name), method, target, body, timeout_s=timeout_s + LOOK_S)


def show(answer: dict[str, Any], text: str, *, as_json: bool) -> None:
    """Print one or the other."""
    print_line(json.dumps(answer, indent=2) if as_json else text)

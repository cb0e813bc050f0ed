"""`nbd-bridge set`."""

from __future__ import annotations

from typing import Any

import click

from bridge.app.logs import LEVELS
from bridge.cache.cache_options import WRITEBACK, WRITETHROUGH
from bridge.cli.control import NAME_HELP, act, as_json, command, show
from bridge.cli.output import one_line_errors
from bridge.cli.parameters import Finite, option


@command(
    "set",
    "nbd-bridge set vm0 --cache-mode writethrough\n"
    "nbd-bridge set vm0 --log-level debug --slow-ms 100",
)
@click.argument("name")
@option("--cache-mode", type=click.Choice([WRITETHROUGH, WRITEBACK]))
@option("--flush-interval", "flush_interval_s", type=Finite(0), help="See `serve`.")
@option("--drain-timeout", "drain_timeout_s", type=Finite(0), help="See `serve`.")
@option("--slow-ms", type=Finite(0), help="See `serve`.")
@option("--log-level", type=click.Choice(LEVELS))
@as_json
@one_line_errors
def set_(name: str, as_json: bool, **wanted: Any) -> None:
    """Change settings of bridge NAME until it ends, and print all that can be changed."""
    body = {key: value for key, value in wanted.items() if value is not None}
    answer = act(name, "POST", "/settings", body)
    width = max(map(len, answer))
    text = "\n".join(f"{key:{width}}  {value}" for key, value in answer.items())
    show(answer, text, as_json=as_json)


assert set_.help is not None
set_.help += f" {NAME_HELP}"

"""`nbd-bridge flush`."""

from __future__ import annotations

import click

from bridge.cli.control import NAME_HELP, act, as_json, command, show, timeout
from bridge.cli.output import one_line_errors


@command("flush", "nbd-bridge flush vm0\nnbd-bridge flush vm0 --timeout 600")
@click.argument("name")
@timeout
@as_json
@one_line_errors
def flush(name: str, timeout_s: float, as_json: bool) -> None:
    """Bring everything that bridge NAME holds to the server, durable.

    The guest goes on meanwhile, and what is cached stays.
    """
    answer = act(name, "POST", "/flush", {"timeout_s": timeout_s}, timeout_s=timeout_s)
    show(answer, f"flushed in {answer['seconds']:.1f} s", as_json=as_json)


assert flush.help is not None
flush.help += f" {NAME_HELP}"

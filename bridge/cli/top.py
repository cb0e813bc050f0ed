"""`nbd-bridge top`."""

from __future__ import annotations

import click

from bridge.api.places import socket_of
from bridge.app.command_settings import TopSettings
from bridge.cli import common


@common.command("top", TopSettings, example="nbd-bridge top vm0")
@click.argument("name", required=False)
def command(settings: TopSettings, name: str | None) -> None:
    """Watch bridge NAME, or all bridges of this host, until q or Ctrl-C is pressed.

    Without a terminal, one table is printed, as with --once. Latencies are those of a sample.
    NAME is what `list` shows, or the path of a control socket.
    """
    from bridge.cli.top_loop import run  # It imports curses, which not every Python has.

    run(settings.view, socket_of(name) if name else None)

"""`nbd-bridge stop`."""

from __future__ import annotations

import click

from bridge.cli.control import NAME_HELP, act, as_json, command, show, timeout
from bridge.cli.output import one_line_errors
from bridge.cli.parameters import option


@command("stop", "nbd-bridge stop vm0 --when-clean\nnbd-bridge stop vm0 --when-clean --timeout 600")
@click.argument("name")
@option("--when-clean", is_flag=True, help="Only once everything is on the server.")
@option("--even-with-guest", is_flag=True, help="Also while a guest uses the disk: it will hang.")
@timeout
@as_json
@one_line_errors
def stop(
    name: str, when_clean: bool, even_with_guest: bool, timeout_s: float, as_json: bool
) -> None:
    """End bridge NAME, as SIGTERM does; refused while a guest uses the disk.

    With --when-clean, what is dirty is flushed first, and the bridge goes on if that fails or takes
    too long.
    """
    body = {
        "when_clean": when_clean,
        "even_with_guest": even_with_guest,
        "timeout_s": timeout_s,
    }
    answer = act(name, "POST", "/stop", body, timeout_s=timeout_s)
    show(answer, "stopping", as_json=as_json)


assert stop.help is not None
stop.help += f" {NAME_HELP}"

"""`nbd-bridge resize`."""

from __future__ import annotations

import click

from bridge.cli.control import NAME_HELP, act, as_json, command, show, timeout
from bridge.cli.output import one_line_errors
from bridge.units import size_text


@command("resize", "nbd-bridge resize vm0")
@click.argument("name")
@timeout
@as_json
@one_line_errors
def resize(name: str, timeout_s: float, as_json: bool) -> None:
    """Have bridge NAME ask the server for the export's size again.

    Make the export larger first, at the server. The guest then sees the new size; a disk cannot
    shrink under a guest.
    """
    answer = act(name, "POST", "/resize", {"timeout_s": timeout_s}, timeout_s=timeout_s)
    size = size_text(answer["size_bytes"])
    text = f"the disk has {size} now" if answer["changed"] else f"the disk has {size}, as before"
    show(answer, text, as_json=as_json)


assert resize.help is not None
resize.help += f" {NAME_HELP}"

"""`nbd-bridge resize`."""

from __future__ import annotations

from bridge.app.command_settings import ActionSettings
from bridge.cli import common
from bridge.cli.control import act, name_argument, show
from bridge.units import size_text


@common.command("resize", ActionSettings, example="nbd-bridge resize vm0")
@name_argument
def command(settings: ActionSettings, name: str) -> None:
    """Have bridge NAME ask the server for the export's size again.

    Make the export larger first, at the server. The guest then sees the new size; a disk cannot
    shrink under a guest. NAME is what `list` shows, or the path of a control socket.
    """
    timeout_s = settings.action.timeout_s
    answer = act(name, "/resize", {"timeout_s": timeout_s}, timeout_s=timeout_s)
    size = size_text(answer["size_bytes"])
    text = f"the disk has {size} now" if answer["changed"] else f"the disk has {size}, as before"
    show(answer, text, as_json=settings.output.as_json)

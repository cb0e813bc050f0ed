"""`nbd-bridge set`."""

from __future__ import annotations

from dataclasses import asdict

from bridge.app.command_settings import SetSettings
from bridge.cli import common
from bridge.cli.control import act, name_argument, show


@common.command("set", SetSettings, example="nbd-bridge set vm0 --cache-mode writethrough")
@name_argument
def command(settings: SetSettings, name: str) -> None:
    """Change settings of bridge NAME until it ends, and print all that can be changed.

    NAME is what `list` shows, or the path of a control socket.
    """
    wanted = {key: value for key, value in asdict(settings.changes).items() if value is not None}
    answer = act(name, "/settings", wanted)
    lines = {key: str(value) for key, value in answer.items()}
    show(answer, common.table(lines), as_json=settings.output.as_json)

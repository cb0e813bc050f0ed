"""`nbd-bridge stop`."""

from __future__ import annotations

from dataclasses import asdict

from bridge.app.command_settings import StopSettings
from bridge.cli import common
from bridge.cli.control import act, name_argument, show


@common.command("stop", StopSettings, example="nbd-bridge stop vm0 --when-clean --timeout 600")
@name_argument
def command(settings: StopSettings, name: str) -> None:
    """End bridge NAME, as SIGTERM does; refused while a guest uses the disk.

    With --when-clean, what is dirty is flushed first, and the bridge goes on if that fails or takes
    too long. NAME is what `list` shows, or the path of a control socket.
    """
    action = settings.action
    answer = act(name, "/stop", asdict(action), timeout_s=action.timeout_s)
    show(answer, "stopping", as_json=settings.output.as_json)

"""`nbd-bridge flush`."""

from __future__ import annotations

from bridge.app.command_settings import ActionSettings
from bridge.cli import common
from bridge.cli.control import act, name_argument, show


@common.command("flush", ActionSettings, example="nbd-bridge flush vm0 --timeout 600")
@name_argument
def command(settings: ActionSettings, name: str) -> None:
    """Bring everything that bridge NAME holds to the server, durable.

    The guest goes on meanwhile, and what is cached stays. NAME is what `list` shows, or the path
    of a control socket.
    """
    timeout_s = settings.action.timeout_s
    answer = act(name, "/flush", {"timeout_s": timeout_s}, timeout_s=timeout_s)
    show(answer, f"flushed in {answer['seconds']:.1f} s", as_json=settings.output.as_json)

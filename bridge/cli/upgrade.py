"""`nbd-bridge upgrade`."""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any

from bridge.api.client import ask
from bridge.api.places import socket_of
from bridge.app.command_settings import UpgradeSettings
from bridge.cli import common
from bridge.cli.control import LOOK_S, name_argument, show
from bridge.errors import BridgeError, ConnectionLost

_AGAIN_S = 0.05


@common.command("upgrade", UpgradeSettings, example="nbd-bridge upgrade vm0")
@name_argument
def command(settings: UpgradeSettings, name: str) -> None:
    """Have the installed version, and the present configuration, take over bridge NAME.

    The guest waits for a moment and sees no error; its front-end stays connected. If the new
    version or the configuration cannot be used, the bridge goes on as it was.
    """
    path, limit_s = socket_of(name), settings.action.timeout_s
    before = ask(path, "GET", "/status", timeout_s=LOOK_S)["bridge"]
    deadline_s = time.monotonic() + limit_s
    with suppress(ConnectionLost):  # That is how it takes over. A refusal is another class.
        ask(path, "POST", "/upgrade", {}, timeout_s=limit_s)
    while time.monotonic() < deadline_s:
        found = _look(lambda: ask(path, "GET", "/status", timeout_s=LOOK_S))
        if found is not None and found["bridge"]["started_s"] != before["started_s"]:
            waited_s = found["bridge"]["took_over_after_s"]
            text = f"version {found['bridge']['version']} serves the disk"
            if waited_s is not None:
                text += f"; the guest has waited for {waited_s:.2f} s"
            show(found["bridge"], text, as_json=settings.output.as_json)
            return
        time.sleep(_AGAIN_S)
    raise BridgeError(f"{name}: no other program serves the disk after {limit_s:g} s: see its log")


def _look(call: Any) -> dict[str, Any] | None:
    """The status; None: nothing answers at the moment."""
    try:
        found: dict[str, Any] = call()
    except BridgeError:
        return None
    return found

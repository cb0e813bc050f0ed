"""`nbd-bridge plugin-path`."""

from __future__ import annotations

from bridge.app.command_settings import PluginPathSettings
from bridge.cli import common
from bridge.errors import BridgeError
from bridge.host import PLUGIN


@common.command(
    "plugin-path",
    PluginPathSettings,
    example="nbdkit -U /run/vm0.nbd python $(nbd-bridge plugin-path) file=/srv/vm0.img size=10G",
)
def command(settings: PluginPathSettings) -> None:
    """Print where the nbdkit plugin is, which serves files, memory or Ceph."""
    if not PLUGIN.is_file():
        raise BridgeError(f"this installation has no nbdkit plugin: there is no {PLUGIN}")
    common.print_result(str(PLUGIN))

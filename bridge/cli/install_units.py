"""`nbd-bridge install-units`."""

from __future__ import annotations

from pathlib import Path

from bridge.app import unit_files
from bridge.app.command_settings import InstallUnitsSettings
from bridge.cli import common
from bridge.errors import ConfigError
from bridge.host import PLUGIN

_NEXT = """\
next:  systemd-sysusers && systemd-tmpfiles --create && systemctl daemon-reload
then:  write /etc/nbd-bridge/NAME.toml (vm0.toml.example is there), and
       systemctl enable --now nbd-bridge@NAME"""


@common.command(
    "install-units",
    InstallUnitsSettings,
    example="nbd-bridge install-units --root /tmp/look-at-them",
)
def command(settings: InstallUnitsSettings) -> None:
    """Make bridges services of this host: systemd's units, their user, examples.

    Writes the template units nbd-bridge@.service, nbd-bridge@.socket and
    nbd-bridge-nbdkit@.service, nbd-bridge-exporter.service, files for sysusers.d and tmpfiles.d,
    QEMU's vhost-user description and examples. What is there from another version is replaced.
    Nothing is started.
    """
    choices = settings.units
    program = Path(choices.program) if choices.program else unit_files.program()
    if unit_files.is_hidden(program):
        raise ConfigError(
            f"{program} is where the units may not read, which hide home directories: install "
            "nbd-bridge elsewhere (python3 -m venv /opt/nbd-bridge), or name another with --program"
        )
    plugin = Path(choices.plugin) if choices.plugin else PLUGIN
    root = Path(choices.root)
    written = unit_files.install(root, vendor=choices.vendor, program=program, plugin=plugin)
    for path in written:
        common.print_result(str(path))
    if not choices.vendor and root == Path("/"):
        common.print_result(_NEXT)

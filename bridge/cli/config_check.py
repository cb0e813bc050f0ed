"""`nbd-bridge config check`."""

from __future__ import annotations

import sys

import click

from bridge.app.command_settings import ConfigCheckSettings
from bridge.cli import common, config_file
from bridge.cli.config import faults_of
from bridge.errors import ConfigError


@common.command("check", ConfigCheckSettings, example="nbd-bridge config check vm0")
@click.argument("names", metavar="[NAME|FILE]...", nargs=-1)
def command(settings: ConfigCheckSettings, names: tuple[str, ...]) -> None:
    """Say what is wrong in configuration files, with the line and what is allowed.

    Without a NAME: in all of /etc/nbd-bridge. The exit status is 2 if anything is wrong.
    """
    paths = [config_file.find(each) for each in names] or config_file.all_files()
    if not paths:
        raise ConfigError(f"there is no configuration file in {config_file.DIRECTORY}")
    wrong = False
    for path in paths:
        faults = faults_of(path)
        wrong = wrong or bool(faults)
        for fault in faults:
            common.complain(fault)
        if not faults:
            common.print_result(f"{path}: good")
    if wrong:
        sys.exit(ConfigError.exit_status)

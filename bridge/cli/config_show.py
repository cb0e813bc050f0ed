"""`nbd-bridge config show`."""

from __future__ import annotations

import json

import click

from bridge.app.command_settings import ConfigShowSettings
from bridge.cli import common, config_file
from bridge.cli.config import Shown, shown


@common.command("show", ConfigShowSettings, example="nbd-bridge config show vm0 --json")
@click.argument("name", metavar="NAME|FILE")
def command(settings: ConfigShowSettings, name: str) -> None:
    """Print every option as `serve --config NAME` would have it, and where that comes from."""
    rows = shown(config_file.find(name))
    if settings.output.as_json:
        found = {each.option: {"value": each.value, "from": each.source} for each in rows}
        common.print_result(json.dumps(found, indent=2))
        return
    common.print_result(common.table({each.option: _text(each) for each in rows}))


def _text(row: Shown) -> str:
    value = "-" if row.value is None or row.value == "" else json.dumps(row.value)
    return f"{value}  ({row.source})"

"""`nbd-bridge cache drop`."""

from __future__ import annotations

import click

from bridge.app.command_settings import CacheDropSettings
from bridge.cache.file.inspect import drop
from bridge.cli import common


@common.command("drop", CacheDropSettings, example="nbd-bridge cache drop FILE")
@click.argument("file")
def command(settings: CacheDropSettings, file: str) -> None:
    """Remove cache FILE."""
    drop(file, discard_dirty=settings.cache.discard_dirty)

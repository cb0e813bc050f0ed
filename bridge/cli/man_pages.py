"""`nbd-bridge man-pages`."""

from __future__ import annotations

from pathlib import Path

import click

from bridge.app.command_settings import ManPagesSettings
from bridge.cli import common
from bridge.cli.man import pages
from bridge.errors import BridgeError


@common.command(
    "man-pages", ManPagesSettings, example="nbd-bridge man-pages /usr/local/share/man/man1"
)
@click.argument("directory")
def command(settings: ManPagesSettings, directory: str) -> None:
    """Write the manual pages of all commands to DIRECTORY."""
    group = click.get_current_context().find_root().command
    assert isinstance(group, click.Group)
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in pages(group):
            (folder / name).write_text(text, encoding="utf-8")
            common.print_result(str(folder / name))
    except OSError as error:
        raise BridgeError(f"{error.filename}: {error.strerror}") from None

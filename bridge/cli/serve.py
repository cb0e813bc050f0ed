"""`nbd-bridge serve`."""

from __future__ import annotations

import click
import trio

from bridge.app import logs
from bridge.app.serve import serve_disk
from bridge.app.settings import ServeSettings
from bridge.cli import common
from bridge.cli.wording import explain
from bridge.errors import ConfigError


@common.command(
    "serve",
    ServeSettings,
    example="nbd-bridge serve nbd://storage/vm0 --socket-path /run/vm0.sock --cache-size 20G",
)
@click.argument("uri")
@common.capabilities_option
def command(settings: ServeSettings, uri: str) -> None:
    """Serve the export at URI as a vhost-user-blk disk.

    URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds:// and nbds+unix://
    with TLS.
    """
    logging = settings.logging
    logs.configure(level=logging.level, format_=logging.format, explain=explain)
    if (settings.disk.socket_path is None) == (settings.disk.fd is None):
        raise ConfigError("give either --socket-path or --fd")
    trio.run(serve_disk, uri, settings)

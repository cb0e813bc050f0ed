"""`nbd-bridge cache flush`."""

from __future__ import annotations

import json
from functools import partial

import click

from bridge.app import logs
from bridge.app.cache_flush import flush_file
from bridge.app.command_settings import CacheFlushSettings
from bridge.app.settings import client_options
from bridge.app.signals import run_until_signal
from bridge.cli import common
from bridge.cli.wording import explain


@common.command("flush", CacheFlushSettings, example="nbd-bridge cache flush FILE")
@click.argument("file")
@click.argument("uri", required=False)
def command(settings: CacheFlushSettings, file: str, uri: str | None) -> None:
    """Write to the server the data that only cache FILE has.

    Give URI if the server requires TLS, or has moved.
    """
    logs.configure(level="warning", format_="text", explain=explain)
    chosen = settings.cache
    flushed = run_until_signal(
        partial(
            flush_file,
            file,
            uri,
            moved=chosen.moved,
            timeout_s=chosen.timeout_s,
            force=chosen.force,
            skip_damaged=chosen.skip_damaged,
            client=client_options(settings.server, settings.tls),
        )
    )
    answer = json.dumps({"flushed_bytes": flushed})
    text = f"{flushed} bytes written to the server and flushed"
    common.print_result(answer if settings.output.as_json else text)

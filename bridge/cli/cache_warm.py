"""`nbd-bridge cache warm`."""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from functools import partial
from typing import Any

import click

from bridge.app import logs
from bridge.app.cache_warm import warm
from bridge.app.command_settings import CacheWarmSettings
from bridge.app.settings import client_options
from bridge.app.signals import run_until_signal
from bridge.cli import common
from bridge.cli.wording import explain


@common.command(
    "warm",
    CacheWarmSettings,
    example="nbd-bridge cache warm nbd://storage/vm0 --cache-size 20G --range 0:1G",
)
@click.argument("uri")
def command(settings: CacheWarmSettings, uri: str) -> None:
    """Fill the cache of the export at URI.

    Reads as much as the cache has room for, and leaves out holes. Give `serve` the same
    --cache-size and --cache-dir, so that it uses this cache.
    """
    logs.configure(level="warning", format_="text", explain=explain)
    chosen = settings.cache
    with ExitStack() as at_last:
        bar: Any = None

        def progress(done_bytes: int, total_bytes: int) -> None:
            # Only once there is progress: an error before that is one line, without a bar.
            nonlocal bar
            if bar is None:
                new = click.progressbar(length=total_bytes, label="warming", file=sys.stderr)
                bar = at_last.enter_context(new)
            bar.update(done_bytes - bar.pos)

        warmed = run_until_signal(
            partial(
                warm,
                uri,
                cache_bytes=chosen.cache_bytes,
                directory=chosen.directory,
                ranges=chosen.ranges,
                timeout_s=chosen.timeout_s,
                progress=progress,
                client=client_options(settings.server, settings.tls),
            )
        )
    answer = json.dumps({"warmed_bytes": warmed})
    common.print_result(answer if settings.output.as_json else f"{warmed} bytes are in the cache")

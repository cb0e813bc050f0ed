"""`nbd-bridge cache prune`."""

from __future__ import annotations

import json
import time
from functools import partial

import click

from bridge.app import logs
from bridge.app.cache_files import ask_servers, cache_files
from bridge.app.cache_prune import Pruned, PruneRules, prune
from bridge.app.command_settings import CachePruneSettings
from bridge.app.settings import client_options
from bridge.app.signals import run_until_signal
from bridge.cache.file.layout import printable
from bridge.cli import common
from bridge.cli.cache_list import json_of
from bridge.cli.wording import explain
from bridge.errors import ConfigError
from bridge.units import size_text

_DAY_S = 86400


@common.command(
    "prune", CachePruneSettings, example="nbd-bridge cache prune --gone --older-than 90 --dry-run"
)
@click.argument("directory", nargs=-1)
def command(settings: CachePruneSettings, directory: tuple[str, ...]) -> None:
    """Remove cache files of disks that are gone, or that were not used for long.

    Looks where `cache list` looks. What a bridge uses stays, and so does what holds data that the
    server lacks. A disk is gone when its server answers and does not have it; a server that cannot
    be reached says nothing.
    """
    logs.configure(level="warning", format_="text", explain=explain)
    chosen = settings.cache
    if not chosen.gone and chosen.older_than_days is None:
        raise ConfigError("say what is to be removed: --gone, --older-than DAYS, or both")
    entries = cache_files(directory)
    if chosen.gone:
        client = client_options(settings.server, settings.tls)
        entries = run_until_signal(partial(ask_servers, entries, client, explain))
    rules = PruneRules(
        gone=chosen.gone,
        unused_s=None if chosen.older_than_days is None else chosen.older_than_days * _DAY_S,
        discard_dirty=chosen.discard_dirty,
    )
    results = prune(entries, rules, now_s=time.time(), dry_run=chosen.dry_run)
    if settings.output.as_json:
        common.print_result(
            json.dumps([_json_of(each, chosen.dry_run) for each in results], indent=2)
        )
    else:
        common.print_result(_text_of(results, dry_run=chosen.dry_run))


def _json_of(result: Pruned, dry_run: bool) -> dict[str, object]:
    return json_of(result.entry) | {
        "reason": result.reason,
        "kept": result.kept,
        "removed": not result.kept and not dry_run,
    }


def _text_of(results: list[Pruned], *, dry_run: bool) -> str:
    done = "would be removed" if dry_run else "removed"
    lines = [
        f"{printable(each.entry.path)}: "
        + (f"left alone, {each.kept}" if each.kept else f"{done}, {each.reason}")
        for each in results
    ]
    removed = [each.entry.file_bytes for each in results if not each.kept]
    return "\n".join([*lines, f"files {done}: {len(removed)}, {size_text(sum(removed))}"])

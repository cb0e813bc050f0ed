"""`nbd-bridge cache list`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial

import click

from bridge.app import logs
from bridge.app.cache_files import CacheEntry, DiskState, State, ask_servers, cache_files
from bridge.app.command_settings import CacheListSettings
from bridge.app.settings import client_options
from bridge.app.signals import run_until_signal
from bridge.cache.file.layout import printable
from bridge.cli import common
from bridge.cli.wording import duration, explain
from bridge.units import size_text

_HEAD = ("LAST USE", "SIZE", "DIRTY", "STATE", "EXPORT", "SERVER", "FILE")


@common.command("list", CacheListSettings, example="nbd-bridge cache list --check-servers")
@click.argument("directory", nargs=-1)
def command(settings: CacheListSettings, directory: tuple[str, ...]) -> None:
    """Print all cache files, one a line.

    Looks in each DIRECTORY; without one, in the default directory and at the files that bridges of
    this user have elsewhere.
    """
    logs.configure(level="warning", format_="text", explain=explain)
    entries = cache_files(directory)
    if settings.output.check_servers:
        client = client_options(settings.server, settings.tls)
        entries = run_until_signal(partial(ask_servers, entries, client, explain))
    if settings.output.as_json:
        common.print_result(json.dumps([json_of(each) for each in entries], indent=2))
    elif entries:
        head = (*_HEAD[:-1], "DISK", _HEAD[-1]) if settings.output.check_servers else _HEAD
        common.print_result(common.columns([head, *(_row(each, len(head)) for each in entries)]))
        for line in _reasons(entries):
            common.print_result(line)
    else:
        common.print_result("there are no cache files")


def _reasons(entries: list[CacheEntry]) -> list[str]:
    """Why servers did not say whether their disks exist: each server and reason once."""
    return list(
        dict.fromkeys(
            f"{printable(each.server)}: {each.disk}: {each.disk_reason}"
            for each in entries
            if each.disk in (DiskState.REFUSED, DiskState.UNREACHABLE)
        )
    )


def json_of(entry: CacheEntry) -> dict[str, object]:
    """The entry for a program."""
    found = asdict(entry)
    del found["used_ns"]
    return found


def _row(entry: CacheEntry, width: int) -> tuple[str, ...]:
    dirty = "-" if entry.dirty_bytes is None else size_text(entry.dirty_bytes)
    row: tuple[str, ...] = (
        f"{duration(entry.age_s())} ago",
        size_text(entry.file_bytes),
        dirty,
        state_text(entry),
        printable(entry.export) or "(default)",
        printable(entry.server) or "-",
    )
    if width > len(row) + 1:
        row += (entry.disk or "-",)
    return (*row, printable(entry.path))


def state_text(entry: CacheEntry) -> str:
    """Its state, and for one in use: by whom."""
    if entry.state is not State.IN_USE or not (entry.bridge or entry.owner_pid):
        return entry.state
    return f"in use by {entry.bridge or f'process {entry.owner_pid}'}"

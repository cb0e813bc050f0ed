"""`nbd-bridge cache show`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime

import click

from bridge.app.command_settings import CacheShowSettings
from bridge.cache.file.inspect import Fault, Summary, show
from bridge.cache.file.layout import printable
from bridge.cli import common
from bridge.units import size_text


@common.command("show", CacheShowSettings, example="nbd-bridge cache show --json FILE")
@click.argument("file")
def command(settings: CacheShowSettings, file: str) -> None:
    """Print what cache FILE holds."""
    summary = show(file)
    common.print_result(json_of(summary) if settings.output.as_json else text_of(summary))


_FAULTS = {
    Fault.CRASHED: "the host went down without a clean shutdown: the content will be discarded",
    Fault.DAMAGED: "the index is damaged: 'nbd-bridge cache flush --skip-damaged' writes the rest "
    "to the server",
}


def json_of(summary: Summary) -> str:
    """The summary for a program."""
    fault = "" if summary.fault is None else _FAULTS[summary.fault]
    return json.dumps(asdict(summary) | {"usable": summary.usable, "fault": fault}, indent=2)


def text_of(summary: Summary) -> str:
    """The summary as lines of text."""
    lines = {
        "file": summary.path,
        "server": printable(summary.uri),
        "export": printable(summary.export) or "(default)",
        "disk": size_text(summary.disk_bytes),
        "cache": f"{size_text(summary.cache_bytes)}, {size_text(summary.valid_bytes)} of it used",
        "not on the server": size_text(summary.dirty_bytes),
        "damaged": f"{summary.damaged_slots} granules, not counted in the other lines",
        "blocks": f"{size_text(summary.block_bytes)} in granules of "
        f"{size_text(summary.granule_bytes)}",
        "last shutdown": "clean" if summary.clean_shutdown else "not clean",
        "frozen": "yes: the guest stopped before all of its data was on the server",
        "usable": "yes" if summary.fault is None else f"no: {_FAULTS[summary.fault]}",
        "export generation": str(summary.export_generation or "-"),
        "created": _moment(summary.created_s),
    }
    if not summary.frozen:
        del lines["frozen"]
    if not summary.damaged_slots:
        del lines["damaged"]
    return common.table(lines)


def _moment(time_s: int) -> str:
    """A time of a file's header, in which anything may stand."""
    try:
        return f"{datetime.fromtimestamp(time_s, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return "-"

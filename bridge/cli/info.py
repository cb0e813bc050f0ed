"""`nbd-bridge info`: prints what a server says about an export, as text or JSON."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import click

from bridge.app import logs
from bridge.app.command_settings import InfoSettings
from bridge.app.info import ListedExport, inspect_uri, list_uri
from bridge.app.settings import client_options
from bridge.app.signals import run_until_signal
from bridge.cli import common
from bridge.cli.wording import explain
from bridge.units import size_text


@common.command("info", InfoSettings, example="nbd-bridge info --json nbd://storage/vm0")
@click.argument("uri")
def command(settings: InfoSettings, uri: str) -> None:
    """Print what the server at URI offers."""
    logs.configure(level="warning", format_="text", explain=explain)
    client = client_options(settings.server, settings.tls)
    as_json = settings.output.as_json
    if settings.output.as_list:
        exports = run_until_signal(partial(list_uri, uri, client))
        common.print_result(json.dumps(exports, indent=2) if as_json else list_text(exports))
        return
    export = run_until_signal(partial(inspect_uri, uri, client))
    common.print_result(json.dumps(export, indent=2) if as_json else export_text(export))


def list_text(exports: list[ListedExport]) -> str:
    """One line for each export."""
    names = [each["export"] or "(default)" for each in exports]
    width = max(map(len, names), default=0)
    lines = [
        f"{name:{width}}  {each['description']}".rstrip()
        for name, each in zip(names, exports, strict=True)
    ]
    return "\n".join(lines) or "the server lists no exports"


def export_text(export: dict[str, Any]) -> str:
    """The result of `inspect_uri` as lines of text."""
    sizes = export["block_sizes_bytes"]
    origin = "" if sizes["named_by_server"] else " (not named by the server)"
    return common.table(
        {
            "export": export["export"] or "(default)",
            "description": export["description"] or "-",
            "size": f"{export['size_bytes']} bytes ({size_text(export['size_bytes'])})",
            "access": "read-only" if export["read_only"] else "read-write",
            "flags": " ".join(export["flags"]).lower() or "-",
            "block sizes": f"minimum {sizes['minimum']}, preferred {sizes['preferred']}, "
            f"maximum payload {sizes['maximum_payload']}{origin}",
            "replies": "extended"
            if export["extended_headers"]
            else "structured"
            if export["structured_replies"]
            else "simple",
            "TLS": "yes" if export["tls"] else "no",
            "contexts": " ".join(export["contexts"]) or "-",
        }
    )

"""Asks a server what it offers: one export, or the list of all."""

from __future__ import annotations

from typing import Any, TypedDict

from bridge.server.client import inspect, list_exports
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri


class ListedExport(TypedDict):
    """An export of a server's list."""

    export: str
    description: str


async def list_uri(uri: str, options: ClientOptions) -> list[ListedExport]:
    """The exports of the server at `uri`. Raises ConfigError, ConnectionLost or ProtocolError."""
    return [
        {"export": each.name, "description": each.description}
        for each in await list_exports(parse_uri(uri), options)
    ]


async def inspect_uri(uri: str, options: ClientOptions) -> dict[str, Any]:
    """Ask the server about the export at `uri`; return its answers, for JSON.

    Raises ConfigError, ConnectionLost or ProtocolError.
    """
    export = await inspect(parse_uri(uri), options)
    return {
        "uri": uri,
        "export": export.name,
        "description": export.description,
        "size_bytes": export.size_bytes,
        "read_only": export.read_only,
        "flags": sorted(flag.name for flag in export.flags if flag.name is not None),
        "block_sizes_bytes": {
            "minimum": export.min_block_bytes,
            "preferred": export.preferred_block_bytes,
            "maximum_payload": export.max_payload_bytes,
            "named_by_server": export.has_block_sizes,
        },
        "structured_replies": export.structured,
        "extended_headers": export.extended,
        "tls": export.tls,
        "contexts": sorted(export.contexts),
    }

"""`nbd-bridge info`: what a server says about an export, for people and for programs."""

from __future__ import annotations

from typing import Any

from bridge.server.client import inspect, list_exports
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri
from bridge.units import size_text


async def list_uri(uri: str, options: ClientOptions) -> list[dict[str, str]]:
    """The exports of the server at `uri`. Raises ConfigError, ConnectionLost or ProtocolError."""
    return [
        {"export": each.name, "description": each.description}
        for each in await list_exports(parse_uri(uri), options)
    ]


def describe_list(exports: list[dict[str, str]]) -> str:
    """The same as lines of text."""
    names = [each["export"] or "(default)" for each in exports]
    width = max(map(len, names), default=0)
    lines = [
        f"{name:{width}}  {each['description']}".rstrip()
        for name, each in zip(names, exports, strict=True)
    ]
    return "\n".join(lines) or "the server lists no exports"


async def inspect_uri(uri: str, options: ClientOptions) -> dict[str, Any]:
    """Ask the server at `uri`. Raises ConfigError, ConnectionLost or ProtocolError."""
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


def describe(export: dict[str, Any]) -> str:
    """The same as lines of text."""
    sizes = export["block_sizes_bytes"]
    origin = "" if sizes["named_by_server"] else " (not named by the server)"
    lines = {
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
    width = max(map(len, lines))
    return "\n".join(f"{key:{width}}  {value}" for key, value in lines.items())

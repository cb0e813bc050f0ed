"""What a server offers, asked without using an export: its list, and one export's properties."""

from __future__ import annotations

import trio

from bridge.errors import BridgeError, ConfigError, ConnectionLost, ProtocolError
from bridge.server.client_options import ClientOptions
from bridge.server.connecting import Negotiated, Silent, leave, negotiate
from bridge.server.export import Export
from bridge.server.handshake_options import ExportListEntry, Goal
from bridge.server.uri import NbdUri
from bridge.server.volume_words import VolumeDescription, VolumeName


async def list_exports(uri: NbdUri, options: ClientOptions | None = None) -> list[ExportListEntry]:
    """The exports that the server names.

    Raises ConfigError, ConnectionLost or ProtocolError with one line for the operator.
    """
    negotiated = await negotiate(uri, options or ClientOptions(), Goal.LIST)
    await leave(negotiated)
    return negotiated.handshake.exports


async def inspect(uri: NbdUri, options: ClientOptions | None = None) -> Export:
    """What the server offers, without using the export.

    Takes `options.connect_timeout_s`; twice that where the server hesitates to give the export.
    Raises ConfigError, ConnectionLost or ProtocolError with one line for the operator.
    """
    options = options or ClientOptions()
    try:
        negotiated = await negotiate(uri, options, Goal.INFO)
    except (ConfigError, ConnectionLost) as error:
        if isinstance(error, Silent) and not error.about_export:
            raise
        found = None
        with trio.move_on_after(options.connect_timeout_s):
            found = await _in_use(uri, options)
        if found is None:
            raise
        negotiated = found
    await leave(negotiated)
    if not negotiated.export.size_bytes:
        # nbd-server 3.24 answers INFO with a size of 0, and knows better when it is to GO.
        negotiated = await negotiate(uri, options, Goal.GO)
        await leave(negotiated)
    return negotiated.export


async def _in_use(uri: NbdUri, options: ClientOptions) -> Negotiated | None:
    """Our plugin, and the volume is in use? It may be looked at read-only all the same."""
    if not await _has_sessions(uri, options):
        return None
    try:
        name = VolumeName(uri.export_name).for_reader()
        return await negotiate(uri, options, Goal.INFO, export_name=name)
    except BridgeError:
        return None


async def _has_sessions(uri: NbdUri, options: ClientOptions) -> bool:
    """The server is our plugin and has that export, says its list."""
    try:
        return VolumeName(uri.export_name).is_plain and await is_listed_by_our_plugin(
            uri, options, uri.export_name
        )
    except BridgeError:
        return False


async def is_listed_by_our_plugin(uri: NbdUri, options: ClientOptions, volume: str) -> bool:
    """The same; a server that does not list is not ours. Raises ConnectionLost."""
    try:
        listed = await list_exports(uri, options)
    except (ConfigError, ProtocolError):
        return False
    return any(
        VolumeDescription(each.description).is_ours and each.name == (volume or each.name)
        for each in listed
    )

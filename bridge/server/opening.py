"""The opening of a client's connections: several where the server allows it, named for our plugin.

Our plugin admits connections that name one session together, and one that names its client replaces
what that client has left behind. The description of the export, which comes with the first
connection, says that it is our plugin. The client leaves that connection then, and uses the names
from there on.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Sequence

import structlog
import trio

from bridge.errors import BridgeError, ConfigError, ConnectionLost
from bridge.server.client_options import ClientOptions
from bridge.server.connecting import Negotiated, leave, negotiate
from bridge.server.export import Export
from bridge.server.inspection import is_listed_by_our_plugin
from bridge.server.uri import NbdUri
from bridge.server.volume_words import VolumeName
from bridge.spec.nbd import NAME_MAX_BYTES, TransmissionFlags

_log = structlog.get_logger(__name__)


class Opening:
    """What is known of a server's names, from one opening of connections to the next."""

    def __init__(self, uri: NbdUri, options: ClientOptions) -> None:
        self._uri = uri
        self.options = options
        """May be replaced; what it says counts from the next opening on."""
        self._name = VolumeName(uri.export_name)
        self.client_id = self._name.client or secrets.token_hex(8)
        """Our name towards our plugin, which tells by it which client wrote a volume last."""
        self._attempts = 0
        self._takes_names = False
        self._plain_next = False
        self._names_refused = False
        self._reads_only: bool | None = None
        """Whether the server has a name for readers of the export; None: it was not asked."""

    async def open(self, *, just_one: Callable[[], bool]) -> list[Negotiated]:
        """The connections of one generation, at least one.

        `just_one`: asked when the first one is there, whether it is enough (the client was closed
        meanwhile). Raises ConfigError, ConnectionLost or ProtocolError.
        """
        if self.options.read_only and self._reads_only is None:
            await self._ask_for_readers_name()
        named = self._takes_names and not self._plain_next
        token = secrets.token_hex(8) if named else None
        self._attempts += 1
        first = await self._first(token)
        if just_one():
            return [first]
        announced = first.export.volume.is_fenced
        is_plain = VolumeName(first.export.name).may_name_reader
        if announced and self.options.read_only and is_plain:
            # Our plugin, which did not say so when it was asked: let go of the volume at once.
            await leave(first)
            self._reads_only = True
            return await self.open(just_one=just_one)
        announced = announced and self._name.may_name_client and not self._reads_only
        if announced and token is None and not self._names_refused:
            await leave(first)
            return await self._open_with_names(just_one)
        if self.options.connections == 1:
            return [first]
        if not first.export.can_multi_conn:
            _log.warning("the server does not allow several connections: using one")
            return [first]
        return await self._with_others(first, token)

    async def _first(self, token: str | None) -> Negotiated:
        try:
            first = await self._negotiate(token, 1)
        except ConfigError:
            # Perhaps another server took the place of our plugin: try without the names.
            self._plain_next = self._takes_names and not self._plain_next
            self._reads_only = None
            raise
        self._plain_next = False
        return first

    async def _open_with_names(self, just_one: Callable[[], bool]) -> list[Negotiated]:
        """Our plugin: connections that name one session are admitted together, and one that
        names its client replaces what that client has left behind."""
        self._takes_names = True
        try:
            return await self.open(just_one=just_one)
        except ConfigError:
            if self._names_refused:
                raise
            # Announced, but refused: never again.
            self._names_refused = True
            self._takes_names = False
            return await self.open(just_one=just_one)

    async def _with_others(self, first: Negotiated, token: str | None) -> list[Negotiated]:
        """As many connections as are wanted, or as the server lets us have."""
        found = [first]

        async def another(number: int) -> None:
            try:
                found.append(await self._negotiate(token, number))
            except BridgeError as error:
                _log.warning("an additional connection failed: going on without", error=error)

        try:
            async with trio.open_nursery() as nursery:
                for number in range(2, self.options.connections + 1):
                    nursery.start_soon(another, number)
        except BaseException:
            for each in found:
                each.close()
            raise
        if difference := _difference([each.export for each in found]):
            for each in found:
                await leave(each)
            raise ConnectionLost(f"{self._uri.server}: connections differ in {difference}")
        return found

    async def _negotiate(self, token: str | None, number: int) -> Negotiated:
        name = self._name_to_send(token, number)
        return await negotiate(self._uri, self.options, export_name=name)

    async def _ask_for_readers_name(self) -> None:
        """Our plugin gives a volume to one writer at a time, and to any number of readers beside
        it; these say so in the name, since NBD has no other way. So it must be known whether the
        server is our plugin before the export is opened. A server that hangs up is asked again the
        next time."""
        if not self._name.may_name_reader:
            self._reads_only = False
            return
        with contextlib.suppress(ConnectionLost):
            volume = self._name.without_session
            self._reads_only = await is_listed_by_our_plugin(self._uri, self.options, volume)

    def _name_to_send(self, token: str | None, number: int) -> str:
        """The name of the export for connection `number` of the session `token`."""
        if self._reads_only:
            return self._name.for_reader()  # A reader is in no session.
        if token is None:
            return self._name.text
        # In a session that is shared, what an earlier attempt has left there is another client's.
        client = f"{self.client_id}.{self._attempts}" if self._name.is_shared else self.client_id
        named = self._name.for_connection(token, client=client, number=number)
        # A server may refuse a name that is longer than the protocol's limit.
        return named if len(named.encode()) <= NAME_MAX_BYTES else self._name.text


def _difference(exports: Sequence[Export]) -> str:
    """What shows that the connections do not lead to one export at one time; "" if nothing does.
    (Raises nothing: numbers that cannot be were refused in the handshake.)

    The first may be lost while the others are made. Of our plugin's those are in the next session
    then, and between two sessions another host may have written; or they lead to a server that has
    lost what the first one's had.
    """
    sizes = {each.size_bytes for each in exports}
    if len(sizes) > 1:
        return f"size: {sorted(sizes)}"
    # (What the first one takes is sent on all of them: one that is only read would fail writes.)
    if len({_what_it_takes(each) for each in exports}) > 1:
        return "what may be asked of them"
    if len({each.volume.instance for each in exports}) > 1:
        return "the server's instance"
    sessions = {each.sessions[0] for each in exports if each.sessions and not each.read_only}
    if len(sessions) > 1:
        return f"session: {sorted(sessions)}"
    return ""


def _what_it_takes(export: Export) -> tuple[TransmissionFlags, int, int, bool]:
    blocks = export.min_block_bytes, export.max_payload_bytes
    return export.flags, *blocks, export.extended

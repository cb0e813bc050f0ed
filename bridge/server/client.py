"""The NBD client: a submitted request gets done, also when the server goes away and comes back.

This is the edge around `link`: it connects, watches the clock, and gives the link its
connections. It never gives up reconnecting; see `link` for what happens to requests meanwhile.

Connections. One by default: a Python process is not held up by one fast connection, and several
cost a system call each and the ordering of overlapping writes (nbdkit memory, unix socket, 4 KiB,
depth 32: reads alike, writes 75,000 per second with one and 48,000 with four). Several pay where
the server bounds the requests in flight of one connection (nbdkit: its threads, 16) and each takes
long (1 ms: 14,000 reads per second with one, 24,500 with four), or where one TCP stream does not
fill the network. They are used only if the server says that a flush on one covers them all
(CAN_MULTI_CONN).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, Protocol

import structlog
import trio

from bridge.datapath.loop import Loop
from bridge.datapath.request import Request
from bridge.datapath.rows import Rows, sent_at
from bridge.errors import BridgeError, ConnectionLost
from bridge.server import link
from bridge.server.client_options import ClientOptions
from bridge.server.connecting import Negotiated, leave
from bridge.server.connection import Connection
from bridge.server.export import Export
from bridge.server.link import Link, Phase
from bridge.server.opening import Opening
from bridge.server.outage import Outages
from bridge.server.tls_connection import kind_for
from bridge.server.uri import NbdUri

_log = structlog.get_logger(__name__)

_TICK_S: Final = 1.0
_IDLE_TICK_S: Final = 5.0
"""While nothing is in flight. Ten idle disks would use 0.3 % of a core with the other one."""
_DRAIN_S: Final = 2.0
"""How long the other connections may take to answer when one is lost."""


class Above(link.Above, Protocol):
    """The layer above a client."""

    async def examine(self, export: Export, submit: Callable[[Request], None]) -> str:
        """A server has come back, and nothing else was sent to it: why it must not be used, "" if
        it may. Reads that are given to `submit` go to that server."""

    def disconnected(self) -> None:
        """The connections are lost: until `reconnected`, it is open what becomes of anything that
        was not flushed."""


class Client:
    """One export. `submit`, `export` and `generation` are the link's."""

    def __init__(
        self,
        uri: NbdUri,
        loop: Loop,
        options: ClientOptions | None = None,
        *,
        above: Above | None = None,
    ) -> None:
        self.uri = uri
        self.options = options or ClientOptions()
        self.link = Link(self.options, loop.turn, above=above)
        loop.turn.add_stage(self.link)
        self.submit: Callable[[Request], None] = self.link.submit
        """Start a request: never raises, never blocks. One call, no wrapper: it is hot."""
        self.reconnects_total = 0
        self._above = above
        self._loop = loop
        self._connections: list[Connection] = []
        self.rows = Rows(loop.engine)
        """The guest's requests in flight that were sent in the usual way."""
        self._commands_before = 0
        """How many commands there were before the present connections."""
        self._broken = trio.Event()
        self._watch_now = trio.Event()
        """Something has begun that ends by the clock."""
        self._run_scope = trio.CancelScope()
        self._closing = False
        self._wanted = trio.Event()
        """Set, but for the time between `leave` and `come_back`."""
        self._wanted.set()
        self._reconnecting = trio.CancelScope()
        self._opening = Opening(uri, self.options)
        self.outages = Outages(uri.server)

    @property
    def client_id(self) -> str:
        """Our name towards our plugin, which tells by it which client wrote a volume last."""
        return self._opening.client_id

    @property
    def export(self) -> Export:
        """What the server offers. Only after `connect`."""
        return self.link.export

    @property
    def generation(self) -> int:
        """The number of the present set of connections, from 1."""
        return self.link.generation

    @property
    def connected(self) -> bool:
        """Connections are up and commands are sent."""
        return self.link.phase is Phase.UP

    @property
    def in_flight(self) -> int:
        """How many commands are not finished."""
        return self.link.in_flight

    @property
    def keeps_unflushed(self) -> bool:
        """The layer above sends unflushed writes again when it is told of a new connection."""
        return self.link.keeps_unflushed

    @keeps_unflushed.setter
    def keeps_unflushed(self, keeps: bool) -> None:
        self.link.keeps_unflushed = keeps

    def expect_stale_writes(self) -> None:
        """A process before this one, which is gone, may have left changes at the server.

        Unless the server has a fence, changes wait for `options.stale_write_grace_s` from now on.
        Only after `connect`.
        """
        self.link.expect_stale_writes(trio.current_time())
        self._watch_now.set()
        self._loop.turn.end()

    @property
    def may_leave_writes(self) -> bool:
        """The process after this one has to expect stale writes. Also after `close`."""
        return self.link.may_leave_writes

    def anew(self) -> Client:
        """Another client, which was never connected, in place of this one, which is closed. Our
        plugin takes it for the same one, and lets it in where this one has left a session behind.
        """
        client = Client(self.uri, self._loop, self.options, above=self._above)
        client._opening = self._opening
        return client

    async def connect(self) -> Export:
        """Connect for the first time, within `options.connect_timeout_s`.

        Raises ConfigError, ConnectionLost or ProtocolError with one line for the operator.
        """
        await self._establish()
        return self.export

    async def run(self) -> None:
        """Look after the connections until cancelled or closed: reconnect whenever they break."""
        with self._run_scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch)
                while True:
                    await self._broken.wait()
                    await self._give_up_connections()
                    await self._wanted.wait()
                    with trio.CancelScope() as self._reconnecting:
                        await self._reconnect()

    async def close(self, timeout_s: float | None = None) -> None:
        """Let commands in flight be answered, send DISC, close. The rest then fails with EIO.

        Takes at most `timeout_s` (None: `options.close_timeout_s`); when cancelled the
        connections are closed at once.
        """
        timeout_s = self.options.close_timeout_s if timeout_s is None else timeout_s
        self._closing = True
        self._run_scope.cancel()
        self.link.leaving()
        try:
            await self._hang_up(timeout_s)
        finally:
            self.link.closed(self._take_unanswered())
            self._loop.turn.end()
            self._loop.turn.remove_stage(self.link)

    def abandon(self) -> None:
        """See `Link.abandon`."""
        self.link.abandon()
        self._loop.turn.end()

    def silence(self) -> None:
        """Nothing of abandoned requests leaves this process from here on: a connection that has
        some of it to send is given up."""
        for connection in self._connections:
            if connection.alive and connection.has_unsent and connection.abandon():
                connection.fail(
                    ConnectionLost("given up: the guest has stopped with writes half sent")
                )

    @property
    def is_wanted(self) -> bool:
        """False between `leave` and `come_back`."""
        return self._wanted.is_set()

    async def leave(self, timeout_s: float, errno: int) -> None:
        """Hang up, and stay away until `come_back`. Commands without an answer within `timeout_s`
        fail with `errno`, and so do those that wait; later ones wait for the return."""
        if not self._wanted.is_set():
            return
        self._wanted = trio.Event()
        self._reconnecting.cancel()
        self.link.leaving()
        try:
            await self._hang_up(timeout_s)
        finally:
            for connection in self._connections:
                connection.close()
            self.link.fail_pending(trio.current_time(), self._take_unanswered(), errno)
            self._loop.turn.end()
            self._broken.set()

    def come_back(self) -> None:
        """The end of `leave`: connect again."""
        if not self._wanted.is_set():
            self.link.wait_anew(trio.current_time())
            self._wanted.set()
            self._watch_now.set()

    def renew(self) -> bool:
        """Replace the connections in order: the server may have something new to say of the export.
        Commands in flight are answered before, those that come wait for the new connections.

        False, and nothing is done, where that could lose something acknowledged, for all that can
        be told: see `Link.can_be_moved`.
        """
        if not (self.connected and self.link.can_be_moved):
            return False
        self.link.leaving()
        self._broken.set()
        self._watch_now.set()
        return True

    def use(self, options: ClientOptions) -> None:
        """From now on; only times and the number of connections may differ. That number is had
        from the next time on that they are made: see `renew`."""
        self.options = self._opening.options = options
        self._watch_now.set()
        self.link.use(options)

    # Connections.

    async def _establish(self) -> None:
        """Open the connections of a new generation and hand them to the link."""
        negotiated = await self._opening.open(just_one=lambda: self.link.phase is Phase.CLOSED)
        export = replace(negotiated[0].export, name=self.uri.export_name)
        reason = self.link.refusal(export)
        if reason is not None:
            for each in negotiated:
                await leave(each)
            raise ConnectionLost(f"{self.uri.server}: {reason}")
        if not self._wanted.is_set():
            for each in negotiated:
                each.close()
            raise ConnectionLost("the connection is no longer wanted")
        self._broken = trio.Event()
        generation = self.link.generation + 1
        connections = self._connections_over(negotiated, generation)
        if generation > 1 and self._above is not None:
            await self._examine(self._above, export, connections)
        self._connections = connections
        self._commands_before = self.rows.commands
        self.link.established(trio.current_time(), export, connections)
        self._loop.turn.end()

    def _connections_over(self, negotiated: list[Negotiated], generation: int) -> list[Connection]:
        """Raises ConnectionLost, and closes all of them, if one cannot be used."""
        connections: list[Connection] = []
        try:
            for each in negotiated:
                connection = kind_for(each.sock)(
                    each, self._loop, lost=self._lost, generation=generation, rows=self.rows
                )
                connections.append(connection)
        except OSError as error:
            # The system has no room to watch one more socket, or for its buffer.
            for connection in connections:
                connection.close()
            for each in negotiated:
                each.close()
            reason = f"cannot use the connection: {error.strerror or error}"
            raise ConnectionLost(f"{self.uri.server}: {reason}") from None
        if not all(connection.alive for connection in connections):
            for connection in connections:
                connection.close()
            raise ConnectionLost(f"{self.uri.server}: the server sent data before it was asked")
        return connections

    async def _examine(self, above: Above, export: Export, connections: list[Connection]) -> None:
        """Raises ConnectionLost, and closes `connections`, if the server is not to be used."""
        reason = "the connection was lost again"
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_when, self._broken, nursery.cancel_scope)
                reason = await above.examine(export, connections[0].send)
                nursery.cancel_scope.cancel()
            if not self._wanted.is_set():
                reason = "the connection is no longer wanted"
            if reason:
                raise ConnectionLost(f"{self.uri.server}: {reason}")
        except BaseException:
            with trio.CancelScope(shield=True):
                for each in connections:
                    await each.hang_up(min(_DRAIN_S, self.options.close_timeout_s))
            raise

    def _lost(self, connection: Connection, error: BridgeError) -> None:
        """A connection broke, or the server wants to be left."""
        is_first = not self._broken.is_set()
        if is_first:
            self.outages.begin(trio.current_time(), error)
        self.link.leaving()
        self._broken.set()
        self._watch_now.set()
        if is_first and self._above is not None:
            self._above.disconnected()

    async def _give_up_connections(self) -> None:
        """Let the other connections finish, then take the unanswered commands."""
        await self._hang_up(min(_DRAIN_S, self.options.close_timeout_s))
        if self.link.phase not in (Phase.UP, Phase.LEAVING):
            return
        # The end of a unix socket means that the server, on this machine, is through with it.
        ended = self.uri.socket_path is not None and all(
            connection.peer_closed for connection in self._connections
        )
        blamed = min(
            (each.blamed for each in self._connections if each.blamed is not None),
            key=sent_at,
            default=None,
        )
        unanswered = self._take_unanswered()
        self.outages.lost(len(unanswered))
        self.link.lost(
            trio.current_time(),
            unanswered,
            stale_possible=not ended,
            answered=self.rows.some_answered(self._commands_before, unanswered),
            blamed=blamed,
        )
        self._loop.turn.end()

    async def _hang_up(self, timeout_s: float) -> None:
        async with trio.open_nursery() as nursery:
            for connection in self._connections:
                if connection.alive:
                    nursery.start_soon(connection.hang_up, timeout_s)

    def _take_unanswered(self) -> list[Request]:
        unanswered: list[Request] = []
        for connection in self._connections:
            unanswered += connection.transmission.unanswered()
            connection.blamed = None
        unanswered.sort(key=sent_at)
        return unanswered

    async def _reconnect(self) -> None:
        while True:
            await trio.sleep(self.link.next_delay_s())
            try:
                await self._establish()
            except BridgeError as error:
                if self.outages.failed(error):
                    _log.warning("cannot reconnect yet", reason=error)
                continue
            except Exception as error:
                # A bug of ours must not take the disk away: it may be gone with what the server
                # says next time.
                if self.outages.failed(error):
                    _log.error("cannot reconnect yet: internal error", exc_info=error)
                if self.link.phase is not Phase.UP:
                    continue
                for connection in self._connections:
                    connection.close()
                self._broken.set()
                return
            self.reconnects_total += 1
            self.outages.end(trio.current_time(), self.generation)
            return

    async def _watch(self) -> None:
        """Deadlines of the link, and silent servers."""
        while True:
            if not self._wanted.is_set():
                await self._wanted.wait()
            options = self.options
            timeouts_s = (options.request_timeout_s, options.reconnect_timeout_s)
            tick_s = min(_IDLE_TICK_S, *(each / 4 for each in timeouts_s if each), _IDLE_TICK_S)
            now = trio.current_time()
            self.link.tick(now)
            self.outages.remind(now)
            self._loop.turn.end()
            if options.request_timeout_s:
                for connection in self._connections:
                    if connection.alive and connection.stalled(now, options.request_timeout_s):
                        connection.fail(
                            ConnectionLost(
                                f"no answer to a request for {options.request_timeout_s:g} s"
                            )
                        )
            deadline = self.link.next_deadline_s()
            self._watch_now = trio.Event()
            if deadline is not None:
                tick_s = min(tick_s, max(deadline - now, 0.001))
            elif not self.connected or self.in_flight:
                tick_s = min(tick_s, _TICK_S)
            with trio.move_on_after(tick_s):
                await self._watch_now.wait()


async def _cancel_when(event: trio.Event, scope: trio.CancelScope) -> None:
    await event.wait()
    scope.cancel()

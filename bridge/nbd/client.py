"""The NBD client: `submit(request)` and it gets done, whatever the server does meanwhile."""

from __future__ import annotations

import errno
from collections.abc import Callable
from itertools import count
from typing import Final

import trio

from bridge.errors import BridgeError, ConfigError, ConnectionLost
from bridge.loop import Loop
from bridge.nbd.connection import Connection, Negotiated, leave, negotiate
from bridge.nbd.export import Export
from bridge.nbd.handshake import Goal, Listed
from bridge.nbd.options import ClientOptions
from bridge.nbd.split import Limits, Split
from bridge.nbd.uri import NbdUri
from bridge.request import BLOCK_STATUS, DISCARD, FLUSH, PREFETCH, READ, WRITE, Request

_SECTOR_BYTES: Final = 512


class Client:
    """One export behind `submit`."""

    def __init__(self, uri: NbdUri, loop: Loop, options: ClientOptions | None = None) -> None:
        self.uri = uri
        self.options = options or ClientOptions()
        self.generation = 0
        self.keeps_unflushed = False
        self.on_reconnect: Callable[[], None] = _nothing
        self.on_export_changed: Callable[[Export], None] = _nothing_changed
        self._loop = loop
        self._export: Export | None = None
        self._connection: Connection | None = None
        self._cookies = count(1)
        self._size_bytes = 0
        self._max_read = 0
        self._max_write = 0
        self._align_mask = 0

    @property
    def export(self) -> Export:
        """What the server offers. Only after `connect`."""
        assert self._export is not None
        return self._export

    async def connect(self) -> Export:
        """Connect for the first time.

        Raises ConfigError, ConnectionLost or ProtocolError with one line for the operator.
        """
        negotiated = await negotiate(self.uri, self.options)
        self._use(negotiated)
        return self.export

    def _use(self, negotiated: Negotiated) -> None:
        export = self._export = negotiated.export
        self.generation += 1
        self._limits = Limits(export)
        self._size_bytes = export.usable_bytes
        self._max_read = export.max_payload_bytes
        self._max_write = (
            0 if export.read_only or self.options.read_only else export.max_payload_bytes
        )
        self._align_mask = export.min_block_bytes - 1
        self._connection = Connection(
            negotiated,
            self._loop,
            lost=self._lost,
            generation=self.generation,
            cookies=self._cookies,
        )
        self._send = self._connection.send

    def submit(self, request: Request) -> None:
        """Start `request`. Never raises, never blocks; may finish it at once."""
        op = request.op
        length = request.length
        offset = request.offset
        if (
            op <= 1
            and 0 < length <= (self._max_write if op else self._max_read)
            and 0 <= offset <= self._size_bytes - length
            and not (offset | length) & self._align_mask
            and not request.flags
        ):
            self._send(request)
        else:
            self._submit_slow(request)

    def _submit_slow(self, request: Request) -> None:
        export = self.export
        op = request.op
        if op == FLUSH:
            if export.can_flush:
                self._send(request)
            else:
                request.finish(0)
            return
        error = self._refuse(request)
        if error is not None:
            request.finish(error)
            return
        Split(request, export, self._limits, self._send).start()

    def _refuse(self, request: Request) -> int | None:
        """The errno of a request that cannot be sent, 0 if nothing is to be done, else None."""
        export = self.export
        op = request.op
        if request.offset < 0 or not 0 <= request.length <= self._size_bytes - request.offset:
            return errno.EINVAL
        if op not in (READ, PREFETCH, BLOCK_STATUS) and self._max_write == 0:
            return errno.EPERM
        if request.length == 0:
            return 0
        if op == DISCARD and not export.can_trim:
            return 0
        if op == PREFETCH and not export.can_cache:
            return 0
        if op == BLOCK_STATUS and not export.can_block_status:
            return errno.EOPNOTSUPP
        if op in (READ, WRITE) and (request.offset | request.length) & self._align_mask:
            return errno.EINVAL
        return None

    @property
    def in_flight(self) -> int:
        """How many requests are not finished."""
        return len(self._connection.transmission.pending) if self._connection is not None else 0

    def fail_pending(self, errno: int) -> None:
        """Finish every unfinished request with `errno`, at once; their buffers are left alone."""
        if self._connection is not None:
            for request in self._connection.transmission.unanswered():
                request.finish(errno)
            self._connection.fail(ConnectionLost("given up: requests took too long"))

    async def run(self) -> None:
        """Look after the connection for ever."""
        await trio.sleep_forever()

    def _lost(self, connection: Connection, error: BridgeError) -> None:
        for request in connection.transmission.unanswered():
            request.finish(errno.EIO)

    async def close(self) -> None:
        """Drain, say DISC, close."""
        if self._connection is not None:
            await self._connection.hang_up(self.options.close_timeout_s)


async def list_exports(uri: NbdUri, options: ClientOptions | None = None) -> list[Listed]:
    """The exports that the server names.

    Raises ConfigError, ConnectionLost or ProtocolError with one line for the operator.
    """
    negotiated = await negotiate(uri, options or ClientOptions(), Goal.LIST)
    await leave(negotiated)
    return negotiated.handshake.exports


async def inspect(uri: NbdUri, options: ClientOptions | None = None) -> Export:
    """What the server offers, without using the export.

    Raises ConfigError, ConnectionLost or ProtocolError with one line for the operator.
    """
    negotiated = await negotiate(uri, options or ClientOptions(), Goal.INFO)
    await leave(negotiated)
    return negotiated.export


def _nothing() -> None:
    """No hook."""


def _nothing_changed(export: Export) -> None:
    """No hook."""


__all__ = ["Client", "ConfigError", "inspect", "list_exports"]

"""What is usual, without a server's process: a channel that is answered in memory, and a cache that
has everything at hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bridge.datapath.cells import (
    LONG_BYTES,
    MAX_READ_BYTES,
    MAX_WRITE_BYTES,
    RESIDENT_CELLS,
    SIZE_BYTES,
    WHOLE_READ_BYTES,
    WHOLE_WRITE_BYTES,
    Outlet,
    Resident,
    Route,
    cells,
)
from bridge.datapath.engine import PURE_ENGINE, Engine
from bridge.datapath.lanes import SMALL_BYTES, WHOLE_BYTES
from bridge.datapath.request import Request
from bridge.datapath.rows import FromCache, Rows, ToServer
from bridge.datapath.turn import Turn
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.export import Export
from bridge.server.transmission import Transmission
from bridge.spec import nbd as p


class Loopback:
    """A target whose commands are executed on `data` at the end of a turn, and answered then, or
    (`late`) in another order: half of them then, half a turn later."""

    def __init__(
        self, turn: Turn, data: Any, *, late: bool = False, engine: Engine = PURE_ENGINE
    ) -> None:
        self._turn = turn
        self._data = data
        self._late = late
        self.rows = Rows(engine)
        self.transmission = Transmission(
            Export("", len(data), DEFAULT_FLAGS, structured=True), turn, rows=self.rows
        )
        self.route = Route()
        self.route.lead((Outlet(self.transmission, self._flush_later, None),))
        self.route.cells[MAX_READ_BYTES] = LONG_BYTES - 1
        self.route.cells[MAX_WRITE_BYTES] = SMALL_BYTES
        self.route.cells[WHOLE_READ_BYTES] = self.route.cells[WHOLE_WRITE_BYTES] = WHOLE_BYTES
        self.route.cells[SIZE_BYTES] = len(data)
        self._flushing = False
        self._replies: list[bytes] = []

    @property
    def usual(self) -> ToServer:
        """For the rings."""
        return ToServer(self.route, self.rows, lambda: None)

    def submit(self, request: Request) -> None:
        """See `Target`."""
        self.transmission.start(request)
        self._flush_later()

    def _flush_later(self) -> None:
        if not self._flushing:
            self._flushing = True
            self._turn.at_end(self._flush)

    def _flush(self) -> None:
        self._flushing = False
        sent = b"".join(self.transmission.output)
        self.transmission.output = []
        at = 0
        while at < len(sent):
            _, _, kind, cookie, offset, length = p.REQUEST.unpack_from(sent, at)
            at += 28
            reply = p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie)
            if kind == p.CMD_WRITE:
                self._data[offset : offset + length] = sent[at : at + length]
                at += length
            elif kind == p.CMD_READ:
                kind = p.REPLY_TYPE_OFFSET_DATA
                reply = p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, 1, kind, cookie, length + 8)
                reply += p.U64.pack(offset) + self._data[offset : offset + length]
            self._replies.append(reply)
        self._answer()

    def _answer(self) -> None:
        replies = self._replies
        if self._late:
            half = -(-len(replies) // 2)
            replies, self._replies = replies[half - 1 :: -1], replies[half:]
        else:
            self._replies = []
        self.receive(b"".join(replies))
        if self._replies:
            self._turn.next_turn(self._answer)

    def receive(self, data: bytes) -> None:
        """Bytes from the server."""
        while data:
            buffer = self.transmission.next_buffers()[0]
            piece = data[: len(buffer)]
            buffer[: len(piece)] = piece
            self.transmission.bytes_received(len(piece))
            data = data[len(piece) :]


def at_hand(data: Any, open_blocks: Callable[[int, int], bool] = lambda slot, bits: False) -> Any:
    """A cache that has all of `data`, at most 16 MiB of it, in its place."""
    granules = len(data) >> 16
    resident = Resident()
    resident.native = None
    resident.granule_shift, resident.block_shift = 16, 12
    resident.bucket_mask = 255
    resident.head = memoryview(bytearray(4 * 256)).cast("I")
    resident.granule_of = memoryview(bytearray(4 * 256)).cast("I")
    resident.ready = memoryview(bytearray(2 * 256)).cast("H")
    resident.open = memoryview(bytearray(2 * 256)).cast("H")
    for granule in range(granules):
        resident.head[granule] = resident.granule_of[granule] = granule
        resident.ready[granule] = resident.open[granule] = 0xFFFF
    resident.data = memoryview(data)
    resident.touched = bytearray(256)
    resident.up = bytes((1, 2, 3, 3))
    resident.cells = cells(RESIDENT_CELLS)
    resident.state = memoryview(bytearray(8 * 256)).cast("Q")
    resident.sent = memoryview(bytearray(2 * 256)).cast("H")
    resident.covered = memoryview(bytearray(2 * 256)).cast("H")
    resident.queued = bytearray(256)
    resident.ring = memoryview(bytearray(4 * 256)).cast("I")
    resident.may_open = lambda: False
    resident.open_blocks = open_blocks
    resident.store = lambda offset, length, buffers: False
    return resident


def hits_of(data: Any) -> FromCache:
    """For the rings: everything is a hit."""
    return FromCache(at_hand(data), lambda reads, writes: None, lambda: None)

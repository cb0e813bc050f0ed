"""The client's side of the transmission phase, without I/O (NBD "Transmission").

Theory. Requests go in with `start` and wait in `pending` (cookie → request, in the order they
were sent) until their reply has come; then they are put on the turn's list of what has finished,
exactly once. Headers and payload views gather in `output`; the owner sends them in one system
call.

A guest's request that was sent in the usual way is a row, not in `pending` (see `datapath.rows`),
and its usual reply is taken by `usual.answers`. Code that looks at what is unanswered, and the
parser when a reply is not usual, first turns all rows into requests.

Received bytes go where `next_buffers` says: normally into a staging buffer, where one system
call may bring many replies; `bytes_received` parses them and copies payloads out. A payload of
which more than `DIRECT_MIN_BYTES` are still to come is received straight into the request's
buffers, with the staging buffer behind it for what follows. While such long reads are pending
the staging buffer offers only `STAGING_LONG_BYTES`, so that little of a payload lands there.

Three reply formats, fixed by the handshake: simple replies; simple and structured ones (a READ is
always answered in chunks); extended ones only. An exception of class ProtocolError leaves the
machine dead; what is in `pending` then was not answered. A request that the server refuses
because it is shutting down counts as unanswered too: it stays in `refused`.

This is the hot path: about 2 µs per 4 KiB read. Local names, no slices that are not needed.
"""

from __future__ import annotations

import errno
import mmap
from struct import Struct
from typing import Final

from bridge.datapath.buffers import scatter, slices, zero
from bridge.datapath.cells import (
    CHANNEL_CELLS,
    DIRECT,
    DIRECT_LEFT,
    FLUSHED,
    LARGE_BYTES,
    LONG_BYTES,
    LONG_READS,
    ROW_COOKIE,
    ROWS,
    UNFLUSHED,
    Cells,
    Channel,
    cells,
    sequence_of,
)
from bridge.datapath.merged import Merged, each_of, members_of
from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    MAY_UNMAP,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.rows import Rows, in_order
from bridge.datapath.turn import Turn
from bridge.errors import ProtocolError
from bridge.server.chunks import (
    Assembly,
    StatusRequest,
    parse_error,
    parse_extents,
    parse_hole,
)
from bridge.server.export import Export
from bridge.spec import nbd as p

DIRECT_MIN_BYTES: Final = LONG_BYTES
STAGING_BYTES: Final = 256 << 10
STAGING_LONG_BYTES: Final = 16 << 10
_IOV_MAX: Final = 1000
"""Buffers per system call; the system takes 1024."""
_PAYLOAD_MAX_BYTES: Final = (16 << 20) + 8
"""Longest chunk without data that is believed: a million extents."""

COMMANDS: Final = (
    p.CMD_READ,
    p.CMD_WRITE,
    p.CMD_FLUSH,
    p.CMD_TRIM,
    p.CMD_WRITE_ZEROES,
    p.CMD_CACHE,
    p.CMD_BLOCK_STATUS,
)
"""NBD command of each `request.op`."""

_CHANGING: Final = (WRITE, WRITE_ZEROES)

_pack_request = p.REQUEST.pack
_pack_extended = p.EXTENDED_REQUEST.pack
_unpack_simple = p.SIMPLE_REPLY.unpack_from
_unpack_chunk = p.CHUNK.unpack_from
_unpack_data_chunk = Struct(">IHHQIQ").unpack_from
_unpack_extended = p.EXTENDED_CHUNK.unpack_from
_unpack_offset = p.U64.unpack_from

_SIMPLE = p.SIMPLE_REPLY_MAGIC
_STRUCTURED = p.STRUCTURED_REPLY_MAGIC
_EXTENDED = p.EXTENDED_REPLY_MAGIC


class Transmission(Channel):
    """One connection after its handshake. See the module's text."""

    __slots__ = (
        "_after_direct",
        "_answers",
        "_assemblies",
        "_context_id",
        "_direct_left",
        "_end",
        "_extended",
        "_merged",
        "_rows",
        "_sequence",
        "_staging",
        "_start",
        "_turn",
        "direct",
        "generation",
        "pending",
        "received_bytes",
        "refused",
        "sent_before_replies",
    )

    def __init__(
        self,
        export: Export,
        turn: Turn,
        *,
        generation: int = 1,
        rows: Rows | None = None,
    ) -> None:
        """`rows`: the guest's requests that are sent in the usual way, on all connections."""
        self._turn = turn
        self.pending: dict[int, Request] = {}
        self.cells = cells(CHANNEL_CELLS)
        self._rows = rows if rows is not None else Rows()
        self._answers = self._rows.engine.answers  # bound once
        self._sequence = self._rows.cells
        self.native = None
        self.number = self._rows.join(self, self)
        self.is_closed = False
        self.output = []
        self.has_payload = False
        self.held = []
        self.sending = False
        self.spans = None
        self.early = []
        self._merged = False
        """A merged command may be among what is not finished, beside rows."""
        self.refused: list[Request] = []
        """Refused with ESHUTDOWN: to be sent again elsewhere."""
        self.generation = generation
        self.received_bytes = 0
        self.sent_before_replies = 0
        """Commands from this number on were sent after the last replies had been read."""
        self.structured = export.structured
        self._extended = export.extended
        self._context_id = next(iter(export.contexts.values()), -1)
        # Whole pages of its own: what is received into the heap's takes up to a quarter longer
        # (1 MiB reads, measured), wherever the heap happens to begin.
        self._staging = mmap.mmap(-1, STAGING_BYTES)
        self.staging = memoryview(self._staging)
        self._start = 0
        self._end = 0
        self.direct: list[memoryview] = []
        """Not empty: a payload is being received into a request's buffers; use `next_buffers`."""
        self._direct_left = 0
        self._after_direct: tuple[int, int, int, bytearray | None] = (0, 0, 0, None)
        """Cookie, chunk flags, chunk type, and where a chunk without data is collected."""
        self._assemblies: dict[int, Assembly] = {}

    @property
    def unflushed(self) -> int:
        """WRITE and WRITE_ZEROES answered on this connection, those with FUA left out. What is in
        `early` counts when it has been told of: a flush that fails before tells nothing of it."""
        unflushed = self.cells[UNFLUSHED]
        for each in self.early:
            if not (each.error or each.flags & 1):
                unflushed -= len(members_of(each))
        return unflushed

    @property
    def long_reads(self) -> int:
        """Reads in flight that are long enough to come in many pieces."""
        return self.cells[LONG_READS]

    @property
    def in_flight(self) -> int:
        """Commands that are not finished, and requests in merged ones."""
        found = self.cells[ROWS] + len(self.pending) + len(self.refused) + len(self.early)
        if self._merged:
            unfinished = (*self.pending.values(), *self.refused, *self.early)
            more = sum(len(members_of(each)) - 1 for each in unfinished)
            self._merged = more > 0
            found += more
        return found

    @property
    def oldest(self) -> int:
        """The cookie of what was sent first of all that has no answer, rows as well; 0: nothing."""
        found = (self._rows.oldest(self), next(iter(self.pending), 0))
        return min(filter(None, found), key=sequence_of, default=0)

    @property
    def takes_rows(self) -> bool:
        """The replies may be usual ones (see `usual`)."""
        return not self._extended

    def is_one_of_several(self, spans: Cells[int]) -> None:
        """See channels.Channel."""
        self.spans = spans
        self.native = None

    def adopt_all(self) -> None:
        """From here on all that has no answer is in `pending`."""
        self._rows.adopt_all()

    def adopted(self, requests: list[Request]) -> None:
        """See rows.PendingOwner."""
        everything = in_order([*self.pending.values(), *requests])
        self.pending.clear()
        self.pending.update((request.cookie, request) for request in everything)
        self.cells[LARGE_BYTES] = 0
        for request in requests:
            if isinstance(request, Merged):
                self._merged = True
                if request.op == READ and request.length >= DIRECT_MIN_BYTES:
                    self.cells[LONG_READS] += 1  # (As rows their replies are taken whole.)
        if self.cells[DIRECT_LEFT]:
            self._take_over_direct()

    def _take_over_direct(self) -> None:
        """Compiled turns were amid a payload, which goes straight into a guest's memory."""
        cells = self.cells
        cookie, left = cells[DIRECT], cells[DIRECT_LEFT]
        cells[DIRECT] = cells[DIRECT_LEFT] = 0
        request = self.pending[cookie]
        if self.structured:
            assembly = self._assemblies[cookie] = Assembly(request)
            assembly.cover(request.offset, request.length)
        self.direct = slices(request.buffers, request.length - left, left)
        self._direct_left = left
        self._after_direct = (cookie, p.REPLY_FLAG_DONE, p.REPLY_TYPE_OFFSET_DATA, None)
        self._start = self._end = 0

    def retire(self) -> None:
        """The connection has ended: nothing more is usual here."""
        self._rows.part(self)
        self.is_closed = True

    # Sending.

    def start(self, request: Request) -> None:
        """Put one command into the output. The request must suit the export."""
        op = request.op
        sequence = self._sequence
        cookie = request.cookie = sequence[0]
        sequence[0] = cookie + 1
        self.pending[cookie] = request
        if self._extended:
            self._start_extended(request, cookie)
        elif op == READ:
            length = request.length
            if length >= DIRECT_MIN_BYTES:
                self.cells[LONG_READS] += 1
            self.output.append(_pack_request(0x25609513, 0, 0, cookie, request.offset, length))
        elif op == WRITE:
            output = self.output
            self.has_payload = True
            output.append(
                _pack_request(
                    0x25609513, request.flags & 1, 1, cookie, request.offset, request.length
                )
            )
            output += request.buffers
        else:
            self.output.append(
                _pack_request(
                    p.REQUEST_MAGIC,
                    command_flags(op, request.flags),
                    COMMANDS[op],
                    cookie,
                    request.offset,
                    request.length,
                )
            )

    def _start_extended(self, request: Request, cookie: int) -> None:
        op = request.op
        flags = command_flags(op, request.flags)
        if op == WRITE:
            flags |= p.CMD_FLAG_PAYLOAD_LEN
        elif op == READ and request.length >= DIRECT_MIN_BYTES:
            self.cells[LONG_READS] += 1
        self.output.append(
            _pack_extended(
                p.EXTENDED_REQUEST_MAGIC,
                flags,
                COMMANDS[op],
                cookie,
                request.offset,
                request.length,
            )
        )
        if op == WRITE:
            self.has_payload = True
            self.output += request.buffers

    def send_held(self) -> None:
        """Put a FLUSH that was taken into the output."""
        self._rows.send_held(self)

    def disconnect(self) -> None:
        """Put the farewell into the output; nothing may follow it. No reply, so no cookie."""
        if self._extended:
            farewell = _pack_extended(p.EXTENDED_REQUEST_MAGIC, 0, p.CMD_DISC, 0, 0, 0)
        else:
            farewell = _pack_request(p.REQUEST_MAGIC, 0, p.CMD_DISC, 0, 0, 0)
        self.output.append(farewell)

    def unanswered(self) -> list[Request]:
        """Take every request without an answer, in the order they were sent. Those of a merged
        command are none any more."""
        self.adopt_all()
        found = each_of(in_order([*self.refused, *self.pending.values()]))
        self.refused.clear()
        self.pending.clear()
        self._assemblies.clear()
        self.output = []  # Views of the requests' memory: they must not outlive them here.
        self.held = []
        self.direct = []
        return found

    def first_unanswered(self) -> Request | None:
        """What was sent first of all that is pending, by itself or with others: the server may have
        hung up for it."""
        self.adopt_all()
        first = next(iter(self.pending.values()), None)
        if isinstance(first, Merged):
            self._rows.merging_did_not_pay()
            first = first.members[0]
        return first

    def abandon(self) -> list[Request]:
        """The commands without an answer that are of abandoned requests.

        Their payload lands nowhere from here on. What is still to be sent is copied, all of it:
        the frames have to become whole, and their bytes do not say which command they are of.
        """
        self.adopt_all()
        waiting = (*self.refused, *self.early, *self.pending.values())
        found = [request for request in waiting if request.is_abandoned]
        reads = [request.length for request in found if request.op == READ]
        scratch = memoryview(bytearray(max(reads, default=0)))
        for request in found:
            request.buffers = [scratch[: request.length]] if request.op == READ else []
        cookie, _, _, store = self._after_direct
        if self.direct and store is None and self.pending[cookie].is_abandoned:
            self.direct = [scratch[: self._direct_left]]
        if found:
            self.output = [bytes(piece) for piece in self.output]
        return found

    # Receiving.

    @property
    def received(self) -> tuple[int, int] | None:
        """Where in the staging buffer what was received begins and ends; None: what comes next goes
        elsewhere, or something is not usual."""
        if self.direct or self.early or self.output:
            return None
        return self._start, self._end

    def turned(self, start: int, end: int, received: int) -> None:
        """The compiled engine has received so much, and taken all before `start`."""
        self.received_bytes += received
        self._start, self._end = start, end

    def next_buffer(self) -> memoryview:
        """Where the next bytes go, while not `direct`."""
        start, end = self._start, self._end
        if start:
            if start == end:
                start = end = 0
            else:
                staging = self._staging
                left = end - start
                # Little is left over, as a rule a part of one reply.
                staging[:left] = staging[start:end]
                start, end = 0, left
            self._start, self._end = start, end
        if self.cells[LONG_READS]:
            return self.staging[end : end + STAGING_LONG_BYTES]
        return self.staging[end:] if end else self.staging

    def next_buffers(self) -> list[memoryview]:
        """Where the next bytes go: for recvmsg_into."""
        direct = self.direct
        if not direct:
            return [self.next_buffer()]
        if len(direct) > _IOV_MAX:
            return direct[:_IOV_MAX]
        return [*direct, self.staging[:STAGING_LONG_BYTES]]

    def bytes_received(self, n_bytes: int) -> None:
        """`n_bytes` were received into the buffers last offered; complete what they complete.

        Raises ProtocolError when the server broke a rule; the machine is dead then.
        """
        self.received_bytes += n_bytes
        self.sent_before_replies = self._sequence[0]
        if self.direct:
            n_bytes = self._direct_received(n_bytes)
            if self.direct:
                return
            self._start = 0
            self._end = n_bytes
        else:
            self._end += n_bytes
        if self._extended:
            self._parse_extended()
            return
        more = True
        while more:
            if self.cells[ROWS] and not self.sending:
                rows = self._rows
                unflushed = self.cells[UNFLUSHED]
                self._start, waits = self._answers(self, rows, self._start, self._end)
                if self.cells[UNFLUSHED] != unflushed:
                    self._turn.wanted = True  # The stages that count them are to look.
                if self.cells[FLUSHED] and rows.flushes is not None:
                    rows.flushes.answered(self)
                if rows.touched:
                    rows.publish_touched()
                if waits or self._end - self._start < 16:
                    return
            more = self._parse_structured() if self.structured else self._parse_simple()

    def _request_of(self, magic: int, cookie: int) -> Request:
        """The request of a reply that is not among those `pending`: of a row, whose reply is not
        usual. Raises ProtocolError if no command in flight has the cookie."""
        self.adopt_all()
        request = self.pending.get(cookie)
        if request is None:
            raise self._bad_reply(magic, cookie)
        if isinstance(request, Merged) and not self.sending:
            self._rows.merging_did_not_pay()  # (While it is sending, no reply is usual.)
        return request

    def _parse_simple(self) -> bool:
        """True: it goes on with the reply to a row, which may be usual again.

        The first two cases stand here only for speed (the cache's own reads and writes).
        """
        finished = self._turn.finished
        staging = self._staging
        view = self.staging
        pending = self.pending
        first = start = self._start
        end = self._end
        while end - start >= 16:
            magic, error, cookie = _unpack_simple(staging, start)
            request = pending.get(cookie)
            if request is None:
                if cookie & ROW_COOKIE and start != first:
                    self._start = start
                    return True
                request = self._request_of(magic, cookie)
            if magic != 0x67446698:
                raise self._bad_reply(magic, cookie)
            if request.op == 0 and not error:  # READ
                length = request.length
                stop = start + 16 + length
                if stop > end:
                    if stop - end >= 32768 or length >= 65536:
                        self._go_direct(request, cookie, 0, length, start + 16, end)
                        self._start = self._end = 0
                        return False
                    break
                buffers = request.buffers
                if len(buffers) == 1:
                    buffers[0][:] = view[start + 16 : stop]
                else:
                    scatter(buffers, 0, view[start + 16 : stop])
                start = stop
                del pending[cookie]
                if length >= 32768:
                    self.cells[LONG_READS] -= 1
                request.generation = self.generation
                request.error = 0
                finished.append(request)
            elif request.op == 1 and not (error or self.sending):  # WRITE
                start += 16
                del pending[cookie]
                if not request.flags & 1:
                    self.cells[UNFLUSHED] += len(members_of(request)) if self._merged else 1
                request.generation = self.generation
                request.error = 0
                finished.append(request)
            else:
                start += 16
                self._answered(request, error)
        self._start = start
        self._end = end
        return False

    def _parse_structured(self) -> bool:
        """See `_parse_simple`."""
        finished = self._turn.finished
        staging = self._staging
        view = self.staging
        pending = self.pending
        first = start = self._start
        end = self._end
        while end - start >= 16:
            if end - start >= 28:
                # One look at the fields of both kinds of reply; the two usual cases first.
                magic, flags, kind, cookie, length, offset = _unpack_data_chunk(staging, start)
                request = pending.get(cookie)
                if request is None:
                    if cookie & ROW_COOKIE and start != first:
                        self._start = start
                        return True
                    request = self._request_of(magic, cookie)
                if magic == 0x668E33EF:
                    stop = start + 20 + length
                    if (
                        kind == 1
                        and flags & 1
                        and stop <= end
                        and length == request.length + 8
                        and request.op == 0
                        and offset == request.offset
                        and cookie not in self._assemblies
                    ):
                        # A whole read in one chunk, all of it here.
                        buffers = request.buffers
                        if len(buffers) == 1:
                            buffers[0][:] = view[start + 28 : stop]
                        else:
                            scatter(buffers, 0, view[start + 28 : stop])
                        start = stop
                        del pending[cookie]
                        if length >= 32776:
                            self.cells[LONG_READS] -= 1
                        request.generation = self.generation
                        request.error = 0
                        finished.append(request)
                        continue
                elif (
                    magic == 0x67446698 and request.op == 1 and not (flags or kind or self.sending)
                ):
                    # A write is done.
                    start += 16
                    del pending[cookie]
                    if not request.flags & 1:
                        self.cells[UNFLUSHED] += len(members_of(request)) if self._merged else 1
                    request.generation = self.generation
                    request.error = 0
                    finished.append(request)
                    continue
            self._start = start
            if not self._reply():
                return False
            start = self._start
            end = self._end
        self._start = start
        self._end = end
        return False

    def _reply(self) -> bool:
        """Take the simple reply or chunk at the start of the staging buffer, of any kind.

        False if more bytes are needed.
        """
        start = self._start
        magic, error, cookie = _unpack_simple(self._staging, start)
        request = self.pending.get(cookie) or self._request_of(magic, cookie)
        if magic not in (_STRUCTURED, _SIMPLE):
            raise self._bad_reply(magic, cookie)
        if magic == _SIMPLE:
            if request.op == READ or request.op == BLOCK_STATUS:
                raise ProtocolError("server sent a simple reply to a command with payload")
            self._start = start + 16
            self._answered(request, error)
            return True
        if self._end - start < 20:
            return False
        _, flags, kind, _, length = _unpack_chunk(self._staging, start)
        return self._chunk(request, flags, kind, length, 20)

    def _parse_extended(self) -> None:
        finished = self._turn.finished
        staging = self._staging
        pending = self.pending
        while self._end - self._start >= 32:
            start = self._start
            magic, flags, kind, cookie, offset, length = _unpack_extended(staging, start)
            request = pending.get(cookie)
            if magic != 0x6E8A278C or request is None:
                raise self._bad_reply(magic, cookie)
            if offset != request.offset:
                raise ProtocolError(
                    f"server answered for offset {offset}, request asked at {request.offset}"
                )
            stop = start + 32 + length
            if (
                kind == 1
                and flags & 1
                and stop <= self._end
                and length == request.length + 8
                and request.op == 0
                and _unpack_offset(staging, start + 32)[0] == offset
                and cookie not in self._assemblies
            ):
                # A whole read in one chunk, all of it here: the usual case.
                scatter(request.buffers, 0, self.staging[start + 40 : stop])
                self._start = stop
                del pending[cookie]
                if length >= 32776:
                    self.cells[LONG_READS] -= 1
                request.generation = self.generation
                request.error = 0
                finished.append(request)
            elif not self._chunk(request, flags, kind, length, 32):
                return

    def _chunk(
        self, request: Request, flags: int, kind: int, length: int, header_bytes: int
    ) -> bool:
        """Take the chunk at the start of the staging buffer; False if more bytes are needed."""
        start, end = self._start, self._end
        payload = start + header_bytes
        if kind == p.REPLY_TYPE_OFFSET_DATA:
            if length <= 8:
                raise ProtocolError(f"data chunk of {length} bytes: 9 at least")
            if request.op != READ:
                raise ProtocolError("server sent data to a command that reads none")
            if end - payload < 8:
                return False
            (offset,) = _unpack_offset(self._staging, payload)
            return self._data_chunk(request, flags, offset, length - 8, payload + 8)
        if length > _PAYLOAD_MAX_BYTES:
            raise ProtocolError(f"chunk of type {kind} with {length} bytes of payload")
        if payload + length > end:
            if length > STAGING_LONG_BYTES // 2:
                self._collect(request, flags, kind, length, payload)
            return False
        self._start = payload + length
        self._other_chunk(request, flags, kind, self.staging[payload : payload + length])
        return True

    def _data_chunk(
        self, request: Request, flags: int, offset: int, length: int, payload: int
    ) -> bool:
        end = self._end
        cookie = request.cookie
        missing = payload + length - end
        if 0 < missing < DIRECT_MIN_BYTES and length < DIRECT_MIN_BYTES:
            return False
        assembly = self._assemblies.get(cookie)
        if assembly is None:
            assembly = self._assemblies[cookie] = Assembly(request)
        assembly.cover(offset, length)
        skip = offset - request.offset
        if missing > 0:
            self._go_direct(request, cookie, skip, length, payload, end, flags)
            self._start = self._end = 0
            return False
        scatter(request.buffers, skip, self.staging[payload : payload + length])
        self._start = payload + length
        if flags & p.REPLY_FLAG_DONE:
            self._done(request)
        return True

    def _go_direct(
        self,
        request: Request,
        cookie: int,
        skip: int,
        length: int,
        start: int,
        end: int,
        flags: int = 1,
    ) -> None:
        """Copy out what is there of a payload; the rest is received where it belongs."""
        here = end - start
        buffers = request.buffers
        if here:
            scatter(buffers, skip, self.staging[start:end])
        self.direct = slices(buffers, skip + here, length - here)
        self._direct_left = length - here
        self._after_direct = (cookie, flags, p.REPLY_TYPE_OFFSET_DATA, None)

    def _collect(self, request: Request, flags: int, kind: int, length: int, start: int) -> None:
        """Receive a long chunk without data into memory of its own."""
        store = bytearray(length)
        here = self._end - start
        store[:here] = self.staging[start : self._end]
        self._start = self._end = 0
        self.direct = [memoryview(store)[here:]]
        self._direct_left = length - here
        self._after_direct = (request.cookie, flags, kind, store)

    def _direct_received(self, n_bytes: int) -> int:
        """Account for bytes in the direct buffers; the number that went past them."""
        left = self._direct_left
        if n_bytes < left:
            self._direct_left = left - n_bytes
            self.direct = slices(self.direct, n_bytes, left - n_bytes)
            return 0
        self.direct = []
        cookie, flags, kind, store = self._after_direct
        request = self.pending[cookie]
        if store is not None:
            self._start = self._end = 0
            self._other_chunk(request, flags, kind, memoryview(store))
        elif not (self.structured or self._extended):
            self._answered(request, 0)
        elif flags & p.REPLY_FLAG_DONE:
            self._done(request)
        return n_bytes - left

    def _other_chunk(self, request: Request, flags: int, kind: int, payload: memoryview) -> None:
        """A chunk without data, complete."""
        done = flags & p.REPLY_FLAG_DONE
        if kind == p.REPLY_TYPE_NONE:
            if payload or not done:
                raise ProtocolError(f"empty chunk with {len(payload)} bytes, flags {flags:#x}")
            self._done(request)
            return
        assembly = self._assemblies.get(request.cookie)
        if assembly is None:
            assembly = self._assemblies[request.cookie] = Assembly(request)
        if kind == p.REPLY_TYPE_OFFSET_HOLE:
            if request.op != READ:
                raise ProtocolError("server sent a hole to a command that reads nothing")
            offset, length = parse_hole(payload)
            assembly.cover(offset, length)
            zero(request.buffers, offset - request.offset, length)
        elif kind & p.REPLY_TYPE_ERROR_BIT:
            assembly.error = assembly.error or parse_error(kind, payload, request)
        elif kind == (
            p.REPLY_TYPE_BLOCK_STATUS_EXT if self._extended else p.REPLY_TYPE_BLOCK_STATUS
        ):
            self._block_status(request, kind, payload, assembly)
        else:
            raise ProtocolError(f"unknown chunk type {kind}")
        if done:
            self._done(request)

    def _block_status(
        self, request: Request, kind: int, payload: memoryview, assembly: Assembly
    ) -> None:
        if not isinstance(request, StatusRequest):
            raise ProtocolError("server sent block status to another command")
        extents = parse_extents(kind, payload, request, self._context_id)
        if extents is None:
            raise ProtocolError("server sent block status of a context that was not selected")
        if assembly.status_seen:
            raise ProtocolError("server sent block status of one context twice")
        assembly.status_seen = True
        request.extents = extents

    # Completing.

    def _done(self, request: Request) -> None:
        """The last chunk of a reply has come."""
        assembly = self._assemblies.pop(request.cookie, None)
        error = assembly.error if assembly is not None else 0
        if not error:
            if request.op == READ and (assembly is None or not assembly.complete):
                raise ProtocolError(
                    f"server sent less than the {request.length} bytes that the request asked"
                )
            if request.op == BLOCK_STATUS and (assembly is None or not assembly.status_seen):
                raise ProtocolError("server ended a block status without any")
        self._complete(request, error)

    def _answered(self, request: Request, error: int) -> None:
        """A simple reply without payload has come, or its payload is complete."""
        self._complete(request, p.ERRNO_OF_ERROR.get(error, errno.EINVAL) if error else 0)

    def _complete(self, request: Request, error: int) -> None:
        op = request.op
        del self.pending[request.cookie]
        if op == READ:
            if request.length >= DIRECT_MIN_BYTES:
                self.cells[LONG_READS] -= 1
        elif error == 0 and op in _CHANGING and not request.flags & 1:
            self.cells[UNFLUSHED] += len(members_of(request)) if self._merged else 1
        if error == errno.ESHUTDOWN:
            self.refused.append(request)
            self._turn.want()  # A flush may have waited for it (see `flushes`).
            return
        request.generation = self.generation
        if op == WRITE and self.sending:
            # Part of its payload may not have been sent: the owner looks.
            request.error = error
            self.early.append(request)
        else:
            self._turn.finish(request, error)

    def _bad_reply(self, magic: int, cookie: int) -> ProtocolError:
        allowed = (
            (_EXTENDED,)
            if self._extended
            else (_SIMPLE, _STRUCTURED)
            if self.structured
            else (_SIMPLE,)
        )
        if magic not in allowed:
            return ProtocolError(f"bad magic {magic:#x} in a reply")
        return ProtocolError(f"reply to cookie {cookie}, which no command in flight has")


def command_flags(op: int, flags: int) -> int:
    """The command flags of a request: FUA where it is allowed, NO_HOLE for allocated zeroes."""
    if op in (WRITE, DISCARD):
        return flags & p.CMD_FLAG_FUA
    if op == WRITE_ZEROES:
        return flags & p.CMD_FLAG_FUA | (0 if flags & MAY_UNMAP else p.CMD_FLAG_NO_HOLE)
    return 0

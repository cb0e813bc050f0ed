"""virtio-blk requests: from a descriptor chain to an operation on the disk and its status.

virtio 1.3 §5.2.6. A request is a readable header (type, priority, sector), data, and a status
byte, which is the last byte of the chain's writable part; nothing is assumed about where one
descriptor ends and the next begins (§2.7.4.1). Every request gets exactly one status, and the
used length never claims a byte that was not written (§2.7.8.2).
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from errno import EOPNOTSUPP
from typing import Any, Protocol

from bridge.request import (
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
    Target,
)
from bridge.virtio.blk_config import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    MAX_DISCARD_SECTORS,
    MAX_DISCARD_SEGMENTS,
    SECTOR_BYTES,
    BlkConfig,
)
from bridge.virtio.chain import Chain

T_IN = 0
T_OUT = 1
T_FLUSH = 4
T_GET_ID = 8
T_DISCARD = 11
T_WRITE_ZEROES = 13

S_OK = 0
S_IOERR = 1
S_UNSUPP = 2

ID_BYTES = 20

_HEADER_BYTES = 16
_unpack_header = struct.Struct("<I4xQ").unpack_from
_SEGMENT = struct.Struct("<QII")
_FLAG_UNMAP = 1


class UsedRing(Protocol):
    """Where a finished chain goes: the queue it came from."""

    def complete(self, head: int, length: int) -> None:
        """Chain `head` is finished, `length` bytes of it were written."""


class BlkRequest(Request):
    """A guest's request on its way: a `Request` that knows its chain and its status byte."""

    __slots__ = ("head", "ring", "status", "used_bytes")

    ring: UsedRing
    head: int
    status: memoryview
    """The one byte that gets the status."""
    used_bytes: int
    """The used length if the request succeeds."""


class BlkEngine:
    """Executes virtio-blk requests on a `Target`. One engine serves every queue of a disk."""

    def __init__(
        self,
        config: BlkConfig,
        target: Target,
        *,
        serial: str,
        fault: Callable[[str], None],
    ) -> None:
        """`serial`: what GET_ID answers, at most 20 bytes. `fault(kind)` is told what a guest did
        wrong, so that it is counted and logged once per kind."""
        self.config = config
        self._submit = target.submit
        self._serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._fault = fault
        self._features = 0
        self._write_flags = 0
        self.geometry_changed()

    def geometry_changed(self) -> None:
        """The disk below has another size."""
        self._capacity_sectors = self.config.geometry.capacity_sectors
        self._read_only = self.config.geometry.read_only

    def negotiated(self, features: int) -> None:
        """The driver accepted `features`."""
        self._features = features
        self.config.negotiated(features)
        self.writeback_changed()

    def writeback_changed(self) -> None:
        """Decide whether a completed write has to be durable (virtio 1.3 §5.2.6.2).

        It has to with CONFIG_WCE and `writeback` 0, and when the driver knows neither FLUSH nor
        CONFIG_WCE: such a driver cannot ask for durability later.
        """
        if self._features & F_CONFIG_WCE:
            durable = not self.config.writeback
        else:
            durable = not self._features & F_FLUSH
        self._write_flags = FUA if durable else 0

    def start(self, ring: UsedRing, chain: Chain) -> None:
        """Execute the request in `chain`; `ring.complete` is called when it is finished."""
        head, readable, writable, fault = chain
        if not writable:
            self._fault(fault or "a request without a status byte")
            ring.complete(head, 0)
            return
        # The usual framing first: a header descriptor, data, a status descriptor.
        status = writable.pop()
        if len(status) != 1:
            writable.append(status[:-1])
            status = status[-1:]
        if fault is not None:
            self._refuse(ring, head, status, S_IOERR, fault)
            return
        if readable and len(readable[0]) == _HEADER_BYTES:
            type_, sector = _unpack_header(readable[0])
            del readable[0]
        else:
            header = _take(readable, _HEADER_BYTES)
            if header is None:
                self._refuse(ring, head, status, S_IOERR, "a request without a whole header")
                return
            type_, sector = _unpack_header(header)
        request = BlkRequest(READ, 0, 0, writable, self._finish)
        request.ring = ring
        request.head = head
        request.status = status
        if type_ == T_IN:
            self._data(request, READ, sector, writable, readable)
        elif type_ == T_OUT:
            self._data(request, WRITE, sector, readable, writable)
        elif type_ == T_FLUSH:
            self._flush(request)
        elif type_ == T_GET_ID:
            self._get_id(request, writable)
        elif type_ == T_DISCARD and self._features & F_DISCARD:
            self._ranges(request, DISCARD, readable)
        elif type_ == T_WRITE_ZEROES and self._features & F_WRITE_ZEROES:
            self._ranges(request, WRITE_ZEROES, readable)
        else:
            self._refuse(ring, head, status, S_UNSUPP, f"request type {type_:#x}")

    def _data(
        self,
        request: BlkRequest,
        op: int,
        sector: int,
        buffers: list[memoryview],
        wrong_way: list[memoryview],
    ) -> None:
        """IN and OUT (§5.2.6): `buffers` is the data, `wrong_way` must be empty."""
        length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
        # In sectors against the capacity first: the guest's 64 bits times 512 mean what they say.
        count = length // SECTOR_BYTES
        if (
            sector > self._capacity_sectors - count
            or length % SECTOR_BYTES
            or wrong_way
            or (op == WRITE and self._read_only)
        ):
            if wrong_way:
                problem = "data that points the wrong way"
            elif length % SECTOR_BYTES:
                problem = "data that is no whole number of sectors"
            elif op == WRITE and self._read_only:
                problem = "a write to a read-only disk"
            else:
                problem = "a request past the end of the disk"
            self._refuse(request.ring, request.head, request.status, S_IOERR, problem)
            return
        request.op = op
        request.offset = sector * SECTOR_BYTES
        request.length = length
        request.buffers = buffers
        if op == READ:
            request.used_bytes = length + 1
        else:
            request.used_bytes = 1
            request.flags = self._write_flags
        if length:
            self._submit(request)
        else:
            request.finish(0)

    def _flush(self, request: BlkRequest) -> None:
        """FLUSH: the sector and any data are the driver's mistake, and harmless."""
        if not self.config.geometry.can_flush:
            self._refuse(
                request.ring, request.head, request.status, S_UNSUPP, "a flush that was not offered"
            )
            return
        request.op = FLUSH
        request.buffers = []
        request.used_bytes = 1
        self._submit(request)

    def _get_id(self, request: BlkRequest, writable: list[memoryview]) -> None:
        """GET_ID: the serial, NUL-padded to 20 bytes, or as much as there is room for."""
        rest = self._serial
        written = 0
        for view in writable:
            part = rest[: len(view)]
            view[: len(part)] = part
            rest = rest[len(part) :]
            written += len(part)
        room = sum(map(len, writable))
        # The status byte follows the data; between a short serial and it nothing was written.
        request.used_bytes = written + 1 if written == room else written
        request.finish(0)

    def _ranges(self, request: BlkRequest, op: int, readable: list[memoryview]) -> None:
        """DISCARD and WRITE_ZEROES: every segment is checked before any is executed."""
        segments = b"".join(readable) if sum(map(len, readable)) <= _MAX_RANGES_BYTES else b""
        status, problem, parts = self._check_ranges(op, segments)
        if status != S_OK:
            self._refuse(request.ring, request.head, request.status, status, problem)
            return
        request.op = op
        request.buffers = []
        request.used_bytes = 1
        request.flags = self._write_flags
        parts = [part for part in parts if part[1]]
        if not parts:
            request.finish(0)
        elif len(parts) == 1:
            request.offset, request.length, flags = parts[0]
            request.flags |= flags
            self._submit(request)
        else:
            _Segments(request, len(parts)).submit(self._submit, parts)

    def _check_ranges(
        self, op: int, segments: bytes
    ) -> tuple[int, str, list[tuple[int, int, int]]]:
        """The status for `struct virtio_blk_discard_write_zeroes[]`, why, and the byte ranges."""
        if self._read_only:
            return S_IOERR, "a discard or write-zeroes to a read-only disk", []
        if not segments or len(segments) % _SEGMENT.size:
            return S_IOERR, "a discard or write-zeroes without whole segments", []
        if len(segments) > MAX_DISCARD_SEGMENTS * _SEGMENT.size:
            return S_UNSUPP, "more discard or write-zeroes segments than offered", []
        parts = []
        for sector, count, flags in _SEGMENT.iter_unpack(segments):
            if flags & ~_FLAG_UNMAP or (flags and op == DISCARD):
                return S_UNSUPP, "an unknown discard or write-zeroes flag", []
            if sector > self._capacity_sectors - count or count > MAX_DISCARD_SECTORS:
                return S_IOERR, "a discard or write-zeroes past the end of the disk", []
            parts.append((sector * SECTOR_BYTES, count * SECTOR_BYTES, MAY_UNMAP if flags else 0))
        return S_OK, "", parts

    def _refuse(
        self, ring: UsedRing, head: int, status: memoryview, value: int, problem: str
    ) -> None:
        """Answer a request that reached no disk. The data before the status was not written."""
        self._fault(problem)
        status[0] = value
        ring.complete(head, 0)

    def _finish(self, request: BlkRequest) -> None:
        """The disk is done with `request`: tell the guest."""
        error = request.error
        if not error:
            request.status[0] = S_OK
            request.ring.complete(request.head, request.used_bytes)
            return
        request.status[0] = S_UNSUPP if error == EOPNOTSUPP else S_IOERR
        request.ring.complete(request.head, 0 if request.op == READ else 1)


_MAX_RANGES_BYTES = 4096
"""Far above what 32 segments need; a guest's 4 GiB of them are not joined."""


class _Segments:
    """A discard or write-zeroes of several segments: the request is done when all are."""

    __slots__ = ("_error", "_left", "_request")

    def __init__(self, request: BlkRequest, count: int) -> None:
        self._request = request
        self._left = count
        self._error = 0

    def submit(self, submit: Callable[[Request], None], parts: list[tuple[int, int, int]]) -> None:
        """Start every part; the first error wins."""
        flags = self._request.flags
        op = self._request.op
        for offset, length, part_flags in parts:
            submit(Request(op, offset, length, [], self._done, flags | part_flags))

    def _done(self, part: Any) -> None:
        self._error = self._error or part.error
        self._left -= 1
        if not self._left:
            self._request.finish(self._error)


def _take(views: list[memoryview], count: int) -> bytes | None:
    """The first `count` bytes of `views`, which keeps the rest; None if there are fewer."""
    taken = b""
    while len(taken) < count:
        if not views:
            return None
        first = views.pop(0)
        wanted = count - len(taken)
        taken += first[:wanted]
        if len(first) > wanted:
            views.insert(0, first[wanted:])
    return taken

"""Putting a READ together from chunks, and reading the other chunks' payloads.

Source: NBD "Structured reply chunk message". The chunks of a READ may come in any order and must
not overlap; together they cover the request, unless one of them is an error.
"""

from __future__ import annotations

from bisect import bisect_right
from struct import Struct

from bridge.datapath.request import Request
from bridge.errors import ProtocolError
from bridge.spec import nbd as p

_INTERVALS_MAX = 4096
"""Gaps that a reply may have at any time: an honest server answers in a few long pieces."""

_ERROR = Struct(">IH")
_HOLE = Struct(">QI")
_EXTENT = Struct(">II")
_EXTENT_EXT = Struct(">QQ")


class StatusRequest(Request):
    """A BLOCK_STATUS request; `extents` are (length in bytes, flags) from `offset` on.

    The extents may cover less than was asked, and never more (NBD "Block status chunk").
    """

    __slots__ = ("extents",)

    extents: list[tuple[int, int]]


class Assembly:
    """The part that has arrived of one request that is answered in several chunks."""

    __slots__ = ("_request", "_starts", "_stops", "error", "status_seen")

    def __init__(self, request: Request) -> None:
        self._request = request
        self._starts: list[int] = []
        self._stops: list[int] = []
        self.error = 0
        self.status_seen = False

    def cover(self, offset: int, length: int) -> None:
        """Content for `length` bytes at `offset` (of the export) comes.

        Raises ProtocolError when it is outside the request or was there already.
        """
        request = self._request
        stop = offset + length
        if offset < request.offset or stop > request.offset + request.length:
            raise ProtocolError(
                f"server sent {length} bytes at {offset}, request asked {request.length} "
                f"at {request.offset}"
            )
        starts, stops = self._starts, self._stops
        index = bisect_right(starts, offset)
        if (index and stops[index - 1] > offset) or (index < len(starts) and starts[index] < stop):
            raise ProtocolError(f"server sent bytes at {offset} of a read twice")
        joins_left = index > 0 and stops[index - 1] == offset
        joins_right = index < len(starts) and starts[index] == stop
        if joins_left and joins_right:
            stops[index - 1] = stops.pop(index)
            del starts[index]
        elif joins_left:
            stops[index - 1] = stop
        elif joins_right:
            starts[index] = offset
        else:
            if len(starts) >= _INTERVALS_MAX:
                raise ProtocolError(f"server sent a read in more than {_INTERVALS_MAX} pieces")
            starts.insert(index, offset)
            stops.insert(index, stop)

    @property
    def complete(self) -> bool:
        """Every byte of the request has come."""
        request = self._request
        return self._starts == [request.offset] and self._stops == [request.offset + request.length]


def parse_hole(payload: memoryview) -> tuple[int, int]:
    """OFFSET_HOLE: offset and length, in bytes of the export. Raises ProtocolError."""
    if len(payload) != _HOLE.size:
        raise ProtocolError(f"hole chunk of {len(payload)} bytes: it has {_HOLE.size}")
    offset, length = _HOLE.unpack(payload)
    if not length:
        raise ProtocolError("hole of no bytes")
    return offset, length


def parse_error(kind: int, payload: memoryview, request: Request) -> int:
    """The errno of an error chunk of `kind`: ERROR, ERROR_OFFSET, or one that we do not know.

    Raises ProtocolError for lengths that do not fit, no error, or an offset outside the request.
    """
    if len(payload) < _ERROR.size:
        raise ProtocolError(f"error chunk of {len(payload)} bytes: 6 at least")
    error, message_bytes = _ERROR.unpack_from(payload)
    rest = len(payload) - _ERROR.size - message_bytes
    if rest < 0:
        raise ProtocolError(f"error message of {message_bytes} bytes in {len(payload)}")
    if not error:
        raise ProtocolError("error chunk without an error")
    if kind == p.REPLY_TYPE_ERROR_OFFSET:
        if rest != 8:
            raise ProtocolError(f"{rest} bytes of offset in an error chunk: 8 expected")
        (offset,) = p.U64.unpack_from(payload, _ERROR.size + message_bytes)
        if not request.offset <= offset < request.offset + request.length:
            raise ProtocolError(
                f"error at {offset}, request asked {request.length} at {request.offset}"
            )
    elif kind == p.REPLY_TYPE_ERROR and rest:
        raise ProtocolError(f"{rest} bytes after the message of an error chunk")
    return p.ERRNO_OF_ERROR.get(error, 22)


def parse_extents(
    kind: int, payload: memoryview, request: Request, context_id: int
) -> list[tuple[int, int]] | None:
    """BLOCK_STATUS(_EXT): (length in bytes, flags) from the request's offset on, cut to the
    request; None if the chunk is not of the metadata context `context_id`.

    Servers send tails that overrun the request (qemu-nbd 3.1); only the last extent may. Raises
    ProtocolError for others, for extents of no bytes and for lengths that do not fit.
    """
    if kind == p.REPLY_TYPE_BLOCK_STATUS_EXT:
        if len(payload) < 8 + _EXTENT_EXT.size or (len(payload) - 8) % _EXTENT_EXT.size:
            raise ProtocolError(f"extended block status of {len(payload)} bytes")
        found_id, count = Struct(">II").unpack_from(payload)
        if count != (len(payload) - 8) // _EXTENT_EXT.size:
            raise ProtocolError(f"block status names {count} extents in {len(payload)} bytes")
        pairs = _EXTENT_EXT.iter_unpack(payload[8:])
    else:
        if len(payload) < 4 + _EXTENT.size or (len(payload) - 4) % _EXTENT.size:
            raise ProtocolError(f"block status of {len(payload)} bytes")
        (found_id,) = p.U32.unpack_from(payload)
        pairs = _EXTENT.iter_unpack(payload[4:])
    left = request.length
    extents: list[tuple[int, int]] = []
    for length, flags in pairs:
        if not length:
            raise ProtocolError("extent of no bytes")
        if left <= 0:
            raise ProtocolError("extents after the end of the request")
        extents.append((min(length, left), flags))
        left -= length
    return extents if found_id == context_id else None

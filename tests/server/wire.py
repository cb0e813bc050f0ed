"""Replies as bytes, and a transmission machine that is fed with them."""

from __future__ import annotations

from bridge.datapath.request import BLOCK_STATUS, Request
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.chunks import StatusRequest
from bridge.server.export import Export
from bridge.server.transmission import Transmission
from bridge.spec import nbd as p
from tests.turns import deliver, turn

DONE = p.REPLY_FLAG_DONE
CONTEXT = 5


def machine(kind: str) -> Transmission:
    """A machine for "simple", "structured" or "extended" replies on an export of 1 GiB."""
    return Transmission(
        Export(
            "",
            1 << 30,
            DEFAULT_FLAGS,
            structured=kind != "simple",
            extended=kind == "extended",
            contexts={} if kind == "simple" else {p.BASE_ALLOCATION: CONTEXT},
        ),
        turn(),
    )


class Asked:
    """A started request that counts how often it was finished."""

    def __init__(
        self, transmission: Transmission, op: int, offset: int = 0, length: int = 0, flags: int = 0
    ) -> None:
        self.data = bytearray(b"\xee" * length if op in (0, 1) else b"")
        self.finished = 0
        buffers = [memoryview(self.data)] if op in (0, 1) else []
        kind = StatusRequest if op == BLOCK_STATUS else Request
        self.request = kind(op, offset, length, buffers, self._done, flags)
        transmission.start(self.request)

    def _done(self, request: Request) -> None:
        self.finished += 1

    @property
    def cookie(self) -> int:
        return self.request.cookie

    @property
    def error(self) -> int | None:
        return self.request.error if self.finished else None


def feed(transmission: Transmission, data: bytes, step: int = 1 << 30) -> None:
    """Receive `data`, at most `step` bytes per system call."""
    position = 0
    while position < len(data):
        buffers = transmission.next_buffers()
        assert sum(map(len, buffers)) > 0
        left = min(step, len(data) - position)
        received = 0
        for buffer in buffers:
            part = data[position + received : position + min(left, received + len(buffer))]
            buffer[: len(part)] = part
            received += len(part)
        position += received
        try:
            transmission.bytes_received(received)
        finally:
            deliver()  # also what came before bytes that are not a reply


def simple(asked: Asked, error: int = 0, data: bytes = b"") -> bytes:
    return p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, error, asked.cookie) + data


def chunk(asked: Asked, flags: int, kind: int, payload: bytes = b"") -> bytes:
    header = p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, flags, kind, asked.cookie, len(payload))
    return header + payload


def extended(
    asked: Asked, flags: int, kind: int, payload: bytes = b"", offset: int | None = None
) -> bytes:
    offset = asked.request.offset if offset is None else offset
    return (
        p.EXTENDED_CHUNK.pack(
            p.EXTENDED_REPLY_MAGIC, flags, kind, asked.cookie, offset, len(payload)
        )
        + payload
    )


def data_payload(offset: int, data: bytes) -> bytes:
    return p.U64.pack(offset) + data


def hole_payload(offset: int, length: int) -> bytes:
    return p.U64.pack(offset) + p.U32.pack(length)


def error_payload(error: int, text: bytes = b"", offset: int | None = None) -> bytes:
    payload = p.U32.pack(error) + p.U16.pack(len(text)) + text
    return payload if offset is None else payload + p.U64.pack(offset)


def status_payload(*extents: tuple[int, int], context: int = CONTEXT) -> bytes:
    return p.U32.pack(context) + b"".join(p.U32.pack(a) + p.U32.pack(b) for a, b in extents)


def status_ext_payload(*extents: tuple[int, int], context: int = CONTEXT) -> bytes:
    head = p.U32.pack(context) + p.U32.pack(len(extents))
    return head + b"".join(p.U64.pack(a) + p.U64.pack(b) for a, b in extents)

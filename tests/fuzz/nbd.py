"""An NBD server that says anything: in the handshake, and as replies to commands."""

from __future__ import annotations

from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    FLUSH,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from bridge.errors import BridgeError, ProtocolError
from bridge.server.handshake import Handshake, State
from bridge.server.handshake_options import Goal, HandshakeOptions
from bridge.spec import nbd as p
from tests.fuzz.dice import BytesRandom
from tests.fuzz.target import check_line, chunks
from tests.server import wire
from tests.server.test_streams import check_each_is_resolved_once, play_stream
from tests.server.wire import Asked, feed, machine
from tests.turns import deliver

_SAYS_AT_MOST_BYTES = 1 << 14
"""Of a client in a handshake, whatever the server answers."""
_DISK_BYTES = 1 << 30
_KINDS = ("simple", "structured", "extended")
_OPS = (READ, READ, READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES, PREFETCH, BLOCK_STATUS)
_LENGTHS = (512, 1024, 4096, 33_000, 65536, 300_000)
_CHUNKS = (
    *(p.REPLY_TYPE_NONE, p.REPLY_TYPE_OFFSET_DATA, p.REPLY_TYPE_OFFSET_HOLE),
    *(
        p.REPLY_TYPE_BLOCK_STATUS,
        p.REPLY_TYPE_BLOCK_STATUS_EXT,
        p.REPLY_TYPE_ERROR,
        p.REPLY_TYPE_ERROR_OFFSET,
    ),
)


def streams(data: bytes) -> str:
    """A server that keeps to the rules but in some places, by the choices of `test_streams`."""
    return play_stream(BytesRandom(data))


def handshake(data: bytes) -> str:
    """A handshake with these bytes, after one that says what for: it ends, or wants more."""
    how = data[0] if data else 0
    client = Handshake(
        HandshakeOptions(
            export_name="vm0" if how & 1 else "",
            list_if_refused=bool(how & 2),
            goal=(Goal.GO, Goal.INFO, Goal.LIST, Goal.GO)[how >> 2 & 3],
            tls=how & 0x70 == 0x70,
            extended=not how & 0x80,
        )
    )
    said = 0
    try:
        for piece in chunks(data[1:], (how >> 4 & 3) * 7 or 1 << 16):
            client.receive(piece)
            said += len(client.data_to_send())
            if client.state is State.WANTS_TLS:
                client.tls_started()
            if client.state is not State.TALKING:
                break
        error: BridgeError | None = None
        if client.state is State.TALKING:
            error = client.receive_eof()
    except BridgeError as problem:
        error = problem
        assert client.state is State.FAILED
    said += len(client.data_to_send())
    assert said <= _SAYS_AT_MOST_BYTES, said
    if error is not None:
        check_line(str(error))
        return type(error).__name__
    if client.export is not None:
        _check_export(client)
    return "done"


def _check_export(client: Handshake) -> None:
    export = client.export
    assert export is not None
    assert 0 <= export.usable_bytes <= export.size_bytes < 1 << 63
    assert 1 <= export.min_block_bytes <= 65536
    assert export.max_payload_bytes >= max(512, export.min_block_bytes)
    assert export.structured or not export.extended
    assert not export.can_block_status or export.structured


def replies(data: bytes) -> str:
    """Replies to a few commands, of parts that are right, wrong, or any bytes."""
    random = BytesRandom(data)
    kind = random.choice(_KINDS)
    transmission = machine(kind)
    asked = []
    for _ in range(1 + random.randrange(8)):
        op = random.choice(_OPS)
        if op == BLOCK_STATUS and kind == "simple":
            op = READ
        length = 0 if op == FLUSH else random.choice(_LENGTHS)
        asked.append(Asked(transmission, op, random.randrange(4) * 4096 if length else 0, length))
    outcome = "open"
    try:
        while random.left:
            feed(
                transmission, _part(random, kind, random.choice(asked)), 1 + random.randrange(5000)
            )
    except ProtocolError as error:
        check_line(str(error))
        outcome = "refused"
    if random.getrandbits(1) and outcome == "open":
        for each in asked:
            each.request.is_abandoned = each is asked[0]
        transmission.abandon()
    deliver()
    check_each_is_resolved_once(asked, transmission.unanswered())
    return "answered" if all(each.finished for each in asked) else outcome


def _part(random: BytesRandom, kind: str, asked: Asked) -> bytes:
    """A reply to `asked`, a chunk of one, or bytes of no shape."""
    what = random.randrange(8)
    if what == 0:
        return random.rest()[:40] if random.getrandbits(1) else random.randbytes(16)
    error = random.choice((0, 0, 0, 5, 28, 108, 1 << 31))
    if what <= 2 and kind != "extended":
        is_read = asked.request.op == READ
        return wire.simple(asked, error, _content(random, asked) if is_read and not error else b"")
    flags = p.REPLY_FLAG_DONE if random.getrandbits(1) else 0
    make = wire.extended if kind == "extended" else wire.chunk
    chunk = random.choice(_CHUNKS) if what < 7 else random.getrandbits(16)
    return make(asked, flags, chunk, _payload(random, chunk, asked))


def _content(random: BytesRandom, asked: Asked) -> bytes:
    length = asked.request.length if random.randrange(8) else random.randrange(70_000)
    return bytes([random.getrandbits(8)]) * length


def _payload(random: BytesRandom, chunk: int, asked: Asked) -> bytes:
    offset = asked.request.offset
    if not random.randrange(4):
        offset += random.randrange(1 << 16)
    length = asked.request.length if random.randrange(4) else random.randrange(1 << 17)
    if chunk == p.REPLY_TYPE_OFFSET_DATA:
        return wire.data_payload(offset, b"d" * length)
    if chunk == p.REPLY_TYPE_OFFSET_HOLE:
        return wire.hole_payload(offset, length)
    if chunk in (p.REPLY_TYPE_ERROR, p.REPLY_TYPE_ERROR_OFFSET):
        at = offset if chunk == p.REPLY_TYPE_ERROR_OFFSET else None
        return wire.error_payload(random.choice((5, 28, 108, 0)), random.randbytes(3), at)
    extents = [(length, random.getrandbits(2)) for _ in range(random.randrange(4))]
    if chunk == p.REPLY_TYPE_BLOCK_STATUS:
        return wire.status_payload(*extents)
    if chunk == p.REPLY_TYPE_BLOCK_STATUS_EXT:
        return wire.status_ext_payload(*extents)
    return random.randbytes(random.randrange(20))

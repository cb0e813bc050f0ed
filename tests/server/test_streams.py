"""Generated server streams: valid, mutated, cut, in any pieces, through the client's cores.

What must hold for every one: it ends, memory is bounded, the only exception is a BridgeError, and
every request is resolved exactly once: answered, or still unanswered when the stream ends. CI runs
a few thousand; the campaign is `python -m tests.server.test_streams 100000 [first seed]`.
"""

from __future__ import annotations

import sys
import time
from random import Random

import pytest

from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    FLUSH,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.errors import BridgeError, ProtocolError
from bridge.peers.nbd_server_core import ServerCore
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_rules import Command
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS, ServerSettings
from bridge.server.handshake import Handshake, State
from bridge.server.handshake_options import HandshakeOptions
from bridge.server.transmission import Transmission
from bridge.spec import nbd as p
from tests.server.wire import Asked, feed
from tests.turns import turn

SIZE = 128 << 10
_CONTENT = Random(1).randbytes(30000 - 4096)
_MAGICS = (
    p.U32.pack(p.SIMPLE_REPLY_MAGIC),
    p.U32.pack(p.STRUCTURED_REPLY_MAGIC),
    p.U32.pack(p.EXTENDED_REPLY_MAGIC),
    p.U64.pack(p.OPTION_REPLY_MAGIC),
)


def draw_settings(random: Random) -> ServerSettings:
    def chance(percent: int) -> bool:
        return random.randrange(100) < percent

    return ServerSettings(
        flags=DEFAULT_FLAGS,
        description=random.choice(["", "a disk", "instance=1"]),
        fixed_newstyle=chance(95),
        no_zeroes=chance(80),
        oldstyle=chance(3),
        go=chance(80),
        structured=chance(70),
        extended=chance(40),
        block_sizes=random.choice([None, (1, 4096, 1 << 20), (512, 4096, 65536)]),
        read_chunk_bytes=random.choice([0, 0, 512, 1000, 40_000]),
        holes=chance(50),
    )


def mutate(random: Random, stream: bytes) -> bytes:
    """Leave a stream alone, or spoil it in one of many ways."""
    kind = random.randrange(10)
    if kind <= 2 or not stream:
        return stream
    data = bytearray(stream)
    where = random.randrange(len(data))
    if kind <= 4:
        for _ in range(random.randrange(1, 4)):
            data[random.randrange(len(data))] ^= 1 << random.randrange(8)
    elif kind == 5:
        del data[where:]
    elif kind == 6:
        del data[where : where + random.randrange(1, 40)]
    elif kind == 7:
        piece = data[where : where + random.randrange(1, 64)]
        data[where:where] = piece
    elif kind == 8:
        data[where : where + 4] = random.choice(
            [b"\xff" * 4, bytes(4), b"\0\0\0\1", b"\x7f\xff\xff\xff"]
        )
    else:
        data[where:where] = random.choice(_MAGICS) + random.randbytes(random.randrange(40))
    return bytes(data)


def pieces(random: Random, stream: bytes) -> list[bytes]:
    """The stream as it may come from a socket."""
    found = []
    position = 0
    # Byte by byte only where that does not take too long.
    longest = random.choice([1, 16, 100, 5000, 1 << 20] if len(stream) < 3000 else [5000, 1 << 20])
    while position < len(stream):
        size = longest - random.randrange(longest)
        found.append(stream[position : position + size])
        position += size
    return found


def shake_hands(random: Random, settings: ServerSettings) -> Handshake:
    """A handshake in which the server's side of the talk is spoilt now and then."""
    server = ServerCore({"": MemoryDisk(SIZE)}, settings)
    client = Handshake(HandshakeOptions())
    spoil = random.randrange(3) == 0
    for _ in range(40):
        said = server.data_to_send()
        if not said:
            break
        for piece in pieces(random, mutate(random, said) if spoil else said):
            if client.state is not State.TALKING:
                break
            client.receive(piece)
        try:
            server.receive(client.data_to_send())
        except ProtocolError:
            break  # The client was misled; the server hangs up.
    return client


def ask(random: Random, transmission: Transmission, block_status: bool) -> list[Asked]:
    ops = [READ, READ, READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES, PREFETCH]
    if block_status:
        ops.append(BLOCK_STATUS)
    found = []
    for _ in range(random.randrange(1, 12)):
        op = random.choice(ops)
        length = random.choice([512, 1024, 4096, 33_000, 65536])
        offset = random.randrange(SIZE - length)
        found.append(
            Asked(transmission, op, 0 if op == FLUSH else offset, 0 if op == FLUSH else length)
        )
    return found


def answers(random: Random, server: ServerCore, commands: list[Command], disk: MemoryDisk) -> bytes:
    random.shuffle(commands)
    for command in commands:
        error = random.choice([0] * 9 + [5, 28, 108, 110])
        if command.kind == p.CMD_BLOCK_STATUS and not error:
            server.reply_extents(command, disk.extents(command.offset, command.length))
        else:
            data = disk.read(command.offset, command.length) if command.kind == p.CMD_READ else b""
            server.reply(command, error, data)
    return server.data_to_send()


def check_each_is_resolved_once(asked: list[Asked], unanswered: list[Request]) -> None:
    waiting = {id(request) for request in unanswered}
    assert len(waiting) == len(unanswered)
    for each in asked:
        resolved = each.finished + (id(each.request) in waiting)
        assert resolved == 1, f"{each.request} resolved {resolved} times"


def run_stream(seed: int) -> str:
    """One stream; what became of it."""
    try:
        return play_stream(Random(seed))
    except AssertionError as error:
        error.add_note(f"seed {seed}")
        raise


def play_stream(random: Random) -> str:
    """The stream that these choices make; what became of it."""
    settings = draw_settings(random)
    try:
        client = shake_hands(random, settings)
    except BridgeError:
        return "handshake refused"
    export = client.export
    if client.state is not State.DONE or export is None:
        return "handshake unfinished"
    disk = MemoryDisk(SIZE)
    disk.data[4096:30000] = _CONTENT
    # A server core that agreed to what this client believes was agreed to.
    server = ServerCore({"": disk}, ServerSettings(oldstyle=True))
    server.data_to_send()
    server._structured, server._extended = export.structured, export.extended
    server._settings = settings
    server.disk = disk
    transmission = Transmission(export, turn())
    asked = ask(random, transmission, export.can_block_status)
    commands = [command_of(each) for each in asked]
    stream = answers(random, server, commands, disk)
    spoilt = mutate(random, stream)
    outcome = "clean"
    try:
        for piece in pieces(random, spoilt):
            feed(transmission, piece)
    except ProtocolError:
        outcome = "refused"
    check_each_is_resolved_once(asked, transmission.unanswered())
    if outcome == "clean" and spoilt == stream:
        for each in asked:
            if each.request.op == READ and each.error == 0:
                request = each.request
                assert each.data == disk.read(request.offset, request.length)
    return outcome


def command_of(asked: Asked) -> Command:
    """The command as the server would have parsed it."""
    request = asked.request
    kinds = (
        p.CMD_READ,
        p.CMD_WRITE,
        p.CMD_FLUSH,
        p.CMD_TRIM,
        p.CMD_WRITE_ZEROES,
        p.CMD_CACHE,
        p.CMD_BLOCK_STATUS,
    )
    return Command(kinds[request.op], 0, request.cookie, request.offset, request.length)


@pytest.mark.parametrize("batch", range(8))
def test_generated_server_streams_resolve_every_request_exactly_once(batch: int) -> None:
    outcomes = {run_stream(batch * 1000 + seed) for seed in range(500)}
    assert {"clean", "refused", "handshake refused"} <= outcomes


def main(count: int, first: int) -> None:
    """The campaign."""
    started = time.monotonic()
    outcomes: dict[str, int] = {}
    for seed in range(first, first + count):
        try:
            outcome = run_stream(seed)
        except BaseException:
            print(f"seed {seed} failed", file=sys.stderr)
            raise
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
    print(f"{count} streams in {time.monotonic() - started:.0f} s: {outcomes}")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)

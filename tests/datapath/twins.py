"""Two whole data paths that a script drives alike: one with the usual case, one without it.

A `Twin` is everything from a guest's rings to a server's socket: one ring or two (with an in-flight
region or without one), the engine, the disk, perhaps a cache, the session, a connection over a
socket that takes as much as it is told to, and a server in memory. `Script` makes the steps of one
seed and takes them in both: chains of all kinds, hostile ones too, replies in any order and in any
pieces, early, false and missing ones, errors, lost connections that leave writes behind or not,
memory that is mapped anew, rings that pause, stop and go on. After every turn all that guest and
server can see is compared, and in the end no part may have a view of memory that was given up.

What is left open: the order of the used elements of one turn, cookies, and what is merged: a merged
command counts as those that it stands for, which are all answered at once, and not with an error.
(What becomes of that: `test_merged`. Where the socket does not take everything, nothing is merged.)

    python -m tests.datapath.twins --scripts 10000 --seed 1
"""

from __future__ import annotations

import argparse
import gc
import logging
import mmap
import os
import random
import re
import struct
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any

import structlog

from bridge.app.targets import CacheTarget
from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import Geometry, Identity, new_header
from bridge.datapath.cells import (
    ALONE,
    CHANGES,
    LONG_BYTES,
    MAX_HEADS,
    READ_BYTES,
    ROW,
    ROW_BYTES,
    WRITTEN_BYTES,
)
from bridge.datapath.disk import Disk
from bridge.datapath.engine import PURE_ENGINE, Engine
from bridge.datapath.loop import EPOLLIN, EPOLLOUT
from bridge.datapath.merged import Merged
from bridge.datapath.request import FLUSH, INTERNAL, READ, WRITE, Request
from bridge.datapath.rows import Rows, ToServer, Usual
from bridge.datapath.turn import Turn
from bridge.errors import BridgeError, ConnectionLost
from bridge.guest.ring import RunningRing
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.dirty_log import DirtyBitmap, DirtyLog
from bridge.guest.virtio.inflight import TrackedSplitQueue, queue_region_bytes
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.guest.virtio.queue import RingAreas
from bridge.guest.virtio.split_queue import SplitQueue, ring_sizes_bytes
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.channels import Phase
from bridge.server.client_options import ClientOptions
from bridge.server.connection import Connection
from bridge.server.export import Export
from bridge.server.link import Link
from bridge.spec import nbd as p

SIZE = 256
SLOTS = 20
STRIDE = 12
"""Chains of the script: the one in slot n has the head STRIDE * n, and the descriptors up to the
next one."""
SPARE = 6
"""Places for chains whose head is in flight already: what two of them write in one turn, to the
same memory, they may write in any order."""
DISK_BYTES = 1 << 20
LOW_BYTES = 1 << 17
HIGH = 1 << 32
ROOM_BYTES = 0x13000
TABLE_AT = 0x12000
"""Where in the room of a chain a long table of it is: after its data."""
LOW_ROOM_BYTES = 0x800
LOW_ROOMS = 0x10000
"""Where in low memory each chain has a little room, too: after the rings."""
HIGH_BYTES = (SLOTS + SPARE) * ROOM_BYTES
RING_BYTES = 0x8000
"""Where in low memory the next ring has the same."""
AVAIL, USED, TABLES, HEADERS, STATUSES = 0x1000, 0x2000, 0x3000, 0x6000, 0x7000
LOG_BYTES = 1 << 18
ONE_TURN_BYTES = 48 << 10
_descriptors = count(1 << 20)

Descriptor = tuple[int, int, int, int]
"""A descriptor: address, length, flags, and where in the chain the next one is."""


def cut(rng: random.Random, place: int, data: int, length: int) -> list[tuple[int, int]]:
    """`length` bytes from `data` on in one segment or several, some of them in low memory: where
    each is, and its length."""
    how = rng.random()
    if how < 0.6:
        return [(data, length)]
    if how < 0.7:
        ends = list(range(4096, length, 4096))
    else:
        count = rng.choice([1, 1, 2, 3, 9, 100, 126, 127, 128])
        ends = sorted(rng.sample(range(1, length), min(count, length - 1)))
    low, left = LOW_ROOMS + LOW_ROOM_BYTES * place, LOW_ROOM_BYTES - 64
    found = []
    for start, end in zip([0, *ends], [*ends, length], strict=True):
        n_bytes = end - start
        if n_bytes <= left and rng.random() < 0.15:
            left -= n_bytes
            found.append((low + left, n_bytes))
        else:
            found.append((data + start, n_bytes))
    return found


def shuffled(rng: random.Random, links: list[Descriptor]) -> list[Descriptor]:
    """The same chain, with its descriptors in another order, but for the first."""
    order = [0, *rng.sample(range(1, len(links)), len(links) - 1)]
    at = {link: index for index, link in enumerate(order)}
    return [(*links[link][:3], at.get(links[link][3], links[link][3])) for link in order]


class Sockets:
    """As much of a `Loop` as ring and connection see; the script makes its turns."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.callbacks: dict[int, tuple[Callable[[int], None], int]] = {}

    def add(self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN) -> None:
        self.callbacks[fd] = callback, events

    def modify(self, fd: int, events: int) -> None:
        self.callbacks[fd] = self.callbacks[fd][0], events

    def remove(self, fd: int) -> None:
        self.callbacks.pop(fd, None)

    def add_poller(self, poller: object) -> None: ...

    def remove_poller(self, poller: object) -> None: ...

    def linger(self) -> None: ...

    def wake(self) -> None: ...


class Socket:
    """Our end of a connection, in memory."""

    def __init__(self) -> None:
        self._fd = next(_descriptors)
        self.sent = bytearray()
        self.arrived = bytearray()
        self.room = 1 << 30
        """How much more it takes for now."""
        self.has_ended = False
        """The server has hung up."""

    def fileno(self) -> int:
        return self._fd

    def send(self, data: bytes | memoryview) -> int:
        if not self.room:
            raise BlockingIOError
        taken = data[: self.room]
        self.sent += taken
        self.room -= len(taken)
        return len(taken)

    def sendmsg(self, pieces: Sequence[bytes | memoryview]) -> int:
        return self.send(b"".join(pieces))

    def recv_into(self, buffer: memoryview) -> int:
        piece = self.arrived[: len(buffer)]
        if not piece and not self.has_ended:
            raise BlockingIOError
        del self.arrived[: len(piece)]
        buffer[: len(piece)] = piece
        return len(piece)

    def recvmsg_into(self, buffers: Sequence[memoryview]) -> tuple[int, None, None, None]:
        received = 0
        for buffer in buffers:
            if received and not self.arrived:
                break
            received += self.recv_into(buffer)
        return received, None, None, None

    def close(self) -> None: ...


class Answers:
    """How a server answers the commands that it has taken apart."""

    image: bytearray
    structured: bool
    commands: list[tuple[int, int, int, int, int, bytes]]
    """Kind, flags, cookie, offset, length and data of those without an answer."""
    outgoing: bytearray

    def answer(self, index: int, how: str, count: int = 1) -> list[int]:
        """Answer `count` commands from `index` on; the bytes are not sent yet. Those of one cookie
        get one answer. Their cookies."""
        index %= len(self.commands)
        taken = self.commands[index : index + count]
        del self.commands[index : index + count]
        if len({cookie for _, _, cookie, *_ in taken}) == 1:
            kind, _, cookie, offset, _, _ = taken[0]
            self._answer(kind, cookie, offset, sum(each[4] for each in taken), how)
        else:
            for kind, _, cookie, offset, length, _ in taken:
                self._answer(kind, cookie, offset, length, how)
        return [cookie for _, _, cookie, *_ in taken]

    def _answer(self, kind: int, cookie: int, offset: int, length: int, how: str) -> None:
        if how == "error" or how == "shutdown":
            self.outgoing += (
                p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 108 if how == "shutdown" else 5, cookie)
                if kind != p.CMD_READ or not self.structured
                else p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, 1, p.REPLY_TYPE_ERROR, cookie, 6)
                + struct.pack(">IH", 108 if how == "shutdown" else 5, 0)
            )
        elif kind != p.CMD_READ:
            self.outgoing += p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie)
        elif not self.structured:
            self.outgoing += p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, 0, cookie)
            self.outgoing += self.image[offset : offset + length]
        else:
            middle = length // 2 if how == "chunks" else length
            for start, stop, flags in ((0, middle, 0), (middle, length, 1)):
                if start == stop:
                    continue
                flags = int(stop == length)
                self.outgoing += p.CHUNK.pack(
                    p.STRUCTURED_REPLY_MAGIC,
                    *(flags, p.REPLY_TYPE_OFFSET_DATA, cookie, stop - start + 8),
                )
                self.outgoing += p.U64.pack(offset + start)
                self.outgoing += self.image[offset + start : offset + stop]


class Server(Answers):
    """Takes commands apart, and answers them when it is told to."""

    def __init__(self, structured: bool) -> None:
        self.image = bytearray(random.Random(1).randbytes(DISK_BYTES))
        self.structured = structured
        self.log: list[tuple[int, int, int, int, bytes]] = []
        self.commands: list[tuple[int, int, int, int, int, bytes]] = []
        self.unparsed = b""
        self.outgoing = bytearray()
        self.merged: dict[int, list[int]] = {}
        """See `note_merged`."""
        self.end = Socket()
        self.answered: list[int] = []
        """Cookies of this connection, some of whose commands have not come wholly."""
        self.early: set[int] = set()

    def connected(self, end: Socket) -> None:
        self.end = end
        self.commands.clear()
        self.unparsed = b""
        self.outgoing.clear()
        self.answered.clear()
        self.early.clear()

    def receive(self) -> None:
        self.unparsed += bytes(self.end.sent)
        self.end.sent.clear()
        while len(self.unparsed) >= 28:
            _, flags, kind, cookie, offset, length = p.REQUEST.unpack_from(self.unparsed)
            payload = length if kind == p.CMD_WRITE else 0
            if len(self.unparsed) < 28 + payload:
                break
            data = self.unparsed[28 : 28 + payload]
            self.unparsed = self.unparsed[28 + payload :]
            if kind == p.CMD_WRITE:
                self.image[offset : offset + length] = data
            if kind == p.CMD_WRITE_ZEROES or kind == p.CMD_TRIM:
                self.image[offset : offset + length] = bytes(length)
            members = members_of_command(self.merged, (kind, flags, cookie, offset, length, data))
            self.log += [(*each[:2], *each[3:]) for each in members]
            if cookie in self.early:
                continue
            self.commands += members

    def answer_early(self, error: int) -> None:
        """Answer a write of which only a part has come."""
        if len(self.unparsed) >= 28:
            _, _, kind, cookie, _, _ = p.REQUEST.unpack_from(self.unparsed)
            if kind == p.CMD_WRITE and cookie not in self.early:
                self.early.add(cookie)
                self.answered.append(cookie)
                self.outgoing += p.SIMPLE_REPLY.pack(p.SIMPLE_REPLY_MAGIC, error, cookie)

    def lie(self, what: str, number: int) -> None:
        """An answer that no command has."""
        simple = p.SIMPLE_REPLY.pack
        if what == "again" and self.answered:
            cookie = self.answered[number % len(self.answered)]
            self.outgoing += simple(p.SIMPLE_REPLY_MAGIC, 0, cookie)
        elif what == "unknown":
            self.outgoing += simple(p.SIMPLE_REPLY_MAGIC, 0, number & (1 << 64) - 1)
        elif what == "other" and self.commands:
            # Other bytes than were asked for.
            _, _, cookie, offset, length, _ = self.commands[number % len(self.commands)]
            offset += number % 3 * 512 - 512
            length += number % 5 * 512 - 1024
            self.outgoing += p.CHUNK.pack(
                p.STRUCTURED_REPLY_MAGIC,
                *(number & 1, p.REPLY_TYPE_OFFSET_DATA, cookie, max(length, 1) + 8),
            )
            self.outgoing += p.U64.pack(max(offset, 0)) + bytes(max(length, 1))

    def answer(self, index: int, how: str, count: int = 1) -> list[int]:
        """See `Answers`."""
        cookies = super().answer(index, how, count)
        self.answered += cookies
        return cookies

    def send(self, n_bytes: int) -> None:
        self.end.arrived += self.outgoing[:n_bytes]
        del self.outgoing[:n_bytes]


class _Negotiated:
    def __init__(self, sock: Socket, export: Export) -> None:
        self.sock = sock
        self.export = export
        self.handshake = self

    def trailing_data(self) -> bytes:
        return b""


class LinkTarget:
    """The session, as a disk or a cache sees it."""

    hits = None
    holds_writes = False
    size_bytes = DISK_BYTES
    min_block_bytes = 1
    can_flush = can_fua = can_trim = can_write_zeroes = True

    def __init__(self, session: Link, rows: Rows) -> None:
        self._session = session
        self._rows = rows
        self.submit = session.submit

    @property
    def in_flight(self) -> int:
        return self._session.in_flight

    @property
    def generation(self) -> int:
        return self._session.generation

    @property
    def gone(self) -> bool:
        return self._session.given_up

    def usual(self, wrote: Callable[[], None]) -> Usual:
        return ToServer(self._session.route, self._rows, wrote)


class GuestRing:
    """One of a guest's rings, and how the front-end keeps it."""

    def __init__(self, number: int) -> None:
        self.at = RING_BYTES * number
        self.region = memoryview(bytearray(queue_region_bytes(SIZE, packed=False)))
        self.base = 0
        self.seen_used = 0
        self.is_logged = False
        self.running: RunningRing | None = None
        self.queue: SplitQueue | None = None


class Twin:
    """See the module's text."""

    def __init__(
        self,
        *,
        usual: bool,
        slots: int,
        rings: int,
        tracked: bool,
        structured: bool,
        event_idx: bool,
        grace_s: float,
        engine: Engine = PURE_ENGINE,
    ) -> None:
        """`slots`: of the cache; 0: there is none."""
        self.loop: Any = Sockets()
        self.now = 0.0
        self.tracked, self.event_idx = tracked, event_idx
        self._low_fd, self._high_fd = os.memfd_create("low"), os.memfd_create("high")
        os.ftruncate(self._low_fd, LOW_BYTES)
        os.ftruncate(self._high_fd, HIGH_BYTES)
        self.given_up: list[mmap.mmap] = []
        """Mappings that no part may have views of in the end."""
        self.map()
        self.high[:] = random.Random(2).randbytes(HIGH_BYTES)
        self.log_bytes = memoryview(bytearray(LOG_BYTES))
        self.structured = structured
        self.server = Server(structured)
        self.rows = Rows(engine)
        options = ClientOptions(stale_write_grace_s=grace_s)
        self.session = Link(options, self.loop.turn, above=self, random=random.Random(3))
        self.loop.turn.add_stage(self.session)
        backend: Any = LinkTarget(self.session, self.rows)
        self.cache: Cache | None = None
        self.connect("")
        if slots:
            geometry = Geometry(DISK_BYTES, 4096, 65536, slots)
            header = new_header(geometry, Identity("nbd://twin", "x"), bytes(16), 0)
            self.image = bytearray(geometry.file_bytes)
            self.cache = Cache(
                *(MappedImage(self.image, header), backend, Options(readahead_bytes=0)),
                clock=lambda: self.now,
                turn=self.loop.turn,
            )
            self.loop.turn.add_stage(self.cache)
            self.session.keeps_unflushed = True
            backend = CacheTarget(self.cache, engine)
        self.disk = Disk(
            backend,
            turn=self.loop.turn,
            flush_interval_s=0 if slots else 60,
            now=lambda: self.now,
            usual=usual,
        )
        self.config = BlkConfig(DiskGeometry(DISK_BYTES), num_queues=1)
        self.faults: list[str] = []
        self.engine = BlkEngine(
            self.config,
            self.disk,
            hits=self.disk.hits,
            usual=self.disk.usual,
            serial="twin",
            fault=self.faults.append,
            turn=self.loop.turn,
            epoch=lambda: self.session.durability.epoch,
        )
        self.engine.negotiated(self.config.features())
        self.broken: list[str] = []
        self.rings = [GuestRing(number) for number in range(rings)]
        for number in range(rings):
            self.start(number)

    # The server's side.

    def reconnected(self) -> None:
        """See link.Above."""
        if self.cache is not None:
            self.cache.upstream_reconnected()

    def export_changed(self, export: Export) -> None:
        """See link.Above."""

    def connect(self, description: str) -> None:
        ours = Socket()
        self.server.connected(ours)
        flags = DEFAULT_FLAGS
        export = Export("", DISK_BYTES, flags, description, structured=self.structured)
        negotiated: Any = _Negotiated(ours, export)
        self.lost: list[str] = []
        self.connection = Connection(
            negotiated,
            self.loop,
            lost=self._lost,
            generation=self.session.generation + 1,
            rows=self.rows,
        )
        self.fd = ours.fileno()
        self.commands_before = self.rows.commands
        self.session.established(self.now, export, [self.connection])
        self.loop.turn.end()

    def _lost(self, connection: Connection, error: BridgeError) -> None:
        self.lost.append(str(error))
        self.session.leaving()

    def lose(self) -> None:
        self.connection.fail(ConnectionLost("as the script has it"))
        self.loop.turn.end()

    def settle_loss(self, *, stale: bool, description: str) -> None:
        """What the client does after a connection was lost, then a new one."""
        self.connection.close()
        unanswered = self.connection.transmission.unanswered()
        if self.session.phase in (Phase.UP, Phase.LEAVING):
            self.session.lost(
                *(self.now, unanswered),
                stale_possible=stale,
                answered=self.rows.some_answered(self.commands_before, unanswered),
                blamed=self.connection.blamed,
            )
        self.connection.blamed = None
        self.loop.turn.end()
        self.connect(description)

    # The guest's side.

    def map(self, *, more: bool = False) -> None:
        """Map the guest's memory, perhaps anew, and perhaps `more` than there was."""
        if self.given_up:
            self.low.release()
            self.high.release()
        mappings = [mmap.mmap(self._low_fd, LOW_BYTES), mmap.mmap(self._high_fd, HIGH_BYTES)]
        self.given_up += mappings
        # What the script looks at is another view than what the product has.
        self.low, self.high = map(memoryview, mappings)
        low, high = map(memoryview, mappings)
        regions = [Region(0, 0, low), Region(HIGH, HIGH, high)]
        if more:
            # The largest: it comes before the others where it is looked for.
            room = memoryview(mmap.mmap(-1, HIGH_BYTES + mmap.PAGESIZE))
            regions.append(Region(2 * HIGH, 2 * HIGH, room))
        self.memory = GuestMemory(regions)

    def areas(self, ring: GuestRing) -> RingAreas:
        """Of the memory as it is mapped now."""
        table, available, used = ring_sizes_bytes(SIZE)
        at = ring.at
        low = self.memory.regions[0].view
        return (
            low[at : at + table],
            low[at + AVAIL : at + AVAIL + available],
            low[at + USED : at + USED + used],
        )

    def start(self, number: int) -> None:
        """A ring on the memory as it is."""
        ring = self.rings[number]
        areas = self.areas(ring)
        values: dict[str, Any] = {"size": SIZE, "base": ring.base, "indirect": True}
        values["event_idx"] = self.event_idx
        if self.tracked:
            ring.queue = TrackedSplitQueue(
                *(self.memory, areas), **values, region=ring.region, n_entries=SIZE
            )
        else:
            ring.queue = SplitQueue(self.memory, areas, **values)
        ring.is_logged = False
        ring.running = RunningRing(
            *(self.loop, ring.queue, self.engine),
            **{"kick_fd": None, "call_fd": None, "error_fd": None},
            broken=self.broken.append,
        )

    def stop(self, number: int) -> None:
        """As a device does that has waited long enough."""
        running = self.rings[number].running
        assert running is not None
        running.pause()
        requests = running.unanswered()
        if not running.keeps_in_flight:
            running.fail(requests)
        self.engine.abandon(requests)
        self.session.abandon()
        self.rings[number].base = running.close(told=False)
        self.rings[number].running = self.rings[number].queue = None
        self.loop.turn.end()

    def turn(self) -> None:
        """One turn of the loop."""
        entry = self.loop.callbacks.get(self.fd)
        if entry is not None and self.connection.alive:
            callback, events = entry
            callback(events & EPOLLOUT | EPOLLIN)
        for ring in self.rings:
            if ring.running is not None:
                ring.running.poll()
        self.loop.turn.looked()
        self.loop.turn.end()
        while self.loop.turn.pending:
            self.loop.turn.end()
        note_merged(self.server.merged, self.rows, self.connection)

    def used(self, number: int) -> list[tuple[int, int]]:
        """What was used in a ring since the last look, in the order of heads."""
        ring = self.rings[number]
        area = self.low[ring.at + USED : ring.at + TABLES]
        halves, words = area.cast("H"), area[4 : 4 + 8 * SIZE].cast("I")
        found = []
        while ring.seen_used != halves[1]:
            at = ring.seen_used % SIZE * 2
            found.append((words[at], words[at + 1]))
            ring.seen_used = ring.seen_used + 1 & 0xFFFF
        return sorted(found)

    def seen(self) -> dict[str, Any]:
        """All that can be seen from outside, but for the used elements."""
        session, connection = self.session, self.connection
        running = [ring.running for ring in self.rings]
        durability = session.durability
        found: dict[str, Any] = {
            "high": bytes(self.high),
            "marked": bytes(self.log_bytes),
            "commands": len(self.server.log),
            "last commands": self.server.log[-64:],
            "image": bytes(self.server.image),
            "unflushed": connection.unflushed,
            "in flight there": connection.in_flight,
            "in flight": (session.in_flight, [each and each.in_flight for each in running]),
            "requests": [each and each.requests for each in running],
            "unsent": connection.has_unsent,
            "epoch": (durability.epoch, durability.sending_epoch, durability.unreported),
            "seen": durability.seen,
            "durable": (self.disk.is_durable, self.disk.flush_deadline_s, self.disk.unreported),
            "phase": (session.phase, session.resent_total, session.flushes_refused_total),
            "time": (session.next_deadline_s(), session.may_leave_writes),
            "lost": [re.sub("cookie [0-9]+", "cookie", error) for error in self.lost],
            "faults": self.faults,
            "bytes": (
                self.engine.request_bytes[READ] + self.engine.limits[READ_BYTES],
                self.engine.request_bytes[WRITE] + self.engine.limits[WRITTEN_BYTES],
            ),
            "long": connection.transmission.long_reads - long_merged(connection),
        }
        for number, ring in enumerate(self.rings):
            low = self.low[ring.at : ring.at + RING_BYTES]
            found[f"low of {number}"] = bytes(low[:USED]) + bytes(low[TABLES:])
            found[f"used index of {number}"] = bytes(low[USED : USED + 4])
            events = USED + 4 + 8 * SIZE
            found[f"used events of {number}"] = bytes(low[events : events + 2])
            if self.tracked:
                words = ring.region.cast("Q")
                found[f"tracked of {number}"] = [
                    (words[3 + 2 * head], ring.region[16 + 16 * head]) for head in range(SIZE)
                ]
                found[f"tracked index of {number}"] = ring.region.cast("H")[7]
        if self.cache is not None:
            found |= parts_of(self.cache, self.image)
        return found

    def log(self, number: int, on: bool) -> None:
        """The dirty log, on or off."""
        ring = self.rings[number]
        assert ring.running is not None
        ring.is_logged = on
        log = None
        if on:
            bitmap = DirtyBitmap(self.log_bytes)
            log = DirtyLog(bitmap, self.memory, [(ring.at + USED, 4 + 8 * SIZE)])
        ring.running.set_log(log)

    def move(self, *, anew: bool, more: bool) -> None:
        """The front-end tells of its memory again."""
        if anew:
            self.map(more=more)
        for number, ring in enumerate(self.rings):
            if ring.running is not None:
                gone = [each for each in self.memory.regions if each.guest_address == HIGH]
                ring.running.uses(gone)
                ring.running.move(self.memory, self.areas(ring))
                self.log(number, ring.is_logged)
        if anew and not any(ring.running and ring.running.unanswered() for ring in self.rings):
            self.check_given_up()

    def close(self) -> None:
        self.connection.close()
        os.close(self._low_fd)
        os.close(self._high_fd)

    def check_given_up(self) -> None:
        """No part has a view of memory that was mapped before: all that was the guest's is answered
        or abandoned, whatever the server still has to answer."""
        former = self.given_up[:-2]
        del self.given_up[:-2]
        if not former:
            return
        gc.collect()
        for mapping in former:
            try:
                mapping.close()
            except BufferError:
                raise AssertionError("there are views of memory that was given up") from None


Step = Callable[[Twin], None]
Command = tuple[int, int, int, int, int, bytes]
"""As the server has it: type, flags, cookie, offset, length, payload."""


def note_merged(found: dict[int, list[int]], rows: Rows, connection: Connection) -> None:
    """Add the merged commands in flight: cookie → lengths of the requests that they are for."""
    for queue in rows.queues:
        if queue is None:
            continue
        for cookie in queue.cookies:
            following = 1 + (cookie & MAX_HEADS - 1) if cookie else 0
            lengths = []
            while following:
                row = ROW.unpack_from(queue.rows, ROW_BYTES * (following - 1))
                lengths.append(row[3])
                following = row[10]
            if len(lengths) > 1:
                found.setdefault(cookie, lengths)
    for command in connection.transmission.pending.values():
        if isinstance(command, Merged):
            found[command.cookie] = [each.length for each in command.members]


def members_of_command(merged: dict[int, list[int]], command: Command) -> list[Command]:
    """The commands that the general path would have sent instead."""
    kind, flags, cookie, offset, length, data = command
    found, done = [], 0
    for n_bytes in merged.get(cookie, [length]):
        part = data[done : done + n_bytes]
        found.append((kind, flags, cookie, offset + done, n_bytes, part))
        done += n_bytes
    assert done == length, "a command of another length than what it is for"
    return found


def group_of(commands: list[Command], index: int) -> tuple[int, int]:
    """Where those with the cookie of the one at `index` begin, and how many there are."""
    cookies = [each[2] for each in commands]
    return cookies.index(cookies[index]), cookies.count(cookies[index])


def long_merged(connection: Connection) -> int:
    """Merged commands that are long reads only because they are merged."""
    pending = connection.transmission.pending.values()
    merged = (each for each in pending if isinstance(each, Merged) and each.op == READ)
    return sum(each.length >= LONG_BYTES for each in merged)


class Script:
    """The steps of one seed, taken in both twins."""

    def __init__(self, seed: int, engine: Engine = PURE_ENGINE) -> None:
        self.rng = rng = random.Random(seed)
        self.cuts = random.Random(seed + (1 << 40))
        """Of what chains are made."""
        self.flushing = self.cuts.random() < 0.5
        kind = {
            # With 3 of them granules share buckets, and come and go.
            "slots": rng.choice([3, 24]) if rng.random() < 0.4 else 0,
            "rings": rng.choice([1, 1, 2]),
            "grace_s": rng.choice([0, 5, 5]),
            "tracked": rng.random() < 0.6,
            "structured": rng.random() < 0.6,
            "event_idx": rng.random() < 0.7,
        }
        self.seed = seed
        self.hostile = rng.random() < 0.3
        self.calm = rng.random() < 0.6
        """Nearly everything is usual."""
        self.slow = rng.random() < 0.3
        """The connection does not take everything at once."""
        self.n_rings: int = kind["rings"]
        self.twins = [Twin(usual=usual, engine=engine, **kind) for usual in (True, False)]
        self.free = list(range(SLOTS))
        self.in_use = [0] * SLOTS
        """How many chains of a slot were not used yet."""
        self.whole = False
        """All of what the server has to send is sent at once."""
        self.ends = 0, 0
        """Type and end (a sector) of the last chain."""
        self.merging = not self.slow and self.cuts.random() < 0.6
        """Chains go on where others have ended, and are merged."""
        self.spare = list(range(SLOTS, SLOTS + SPARE))
        self.avail_index = [0] * self.n_rings
        self.steps = 0

    def run(self, steps: int) -> int:
        """Take some steps; how many chains went the usual way."""
        try:
            for self.steps in range(steps):
                self._step()
            self._finish()
            self._both(lambda twin: twin.move(anew=True, more=False))
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed}, step {self.steps}: {error}") from error
        finally:
            for twin in self.twins:
                twin.close()
        usual = self.twins[0].disk.usual
        assert usual is not None
        return usual.served

    def _both(self, step: Step) -> None:
        for twin in self.twins:
            step(twin)

    def _step(self) -> None:
        rng = self.rng
        for _ in range(rng.choice([0, 1, 1, 2, 6, 12])):
            self._add()
        # (The next unusual answer does not end it for the rest of the script.)
        self.twins[0].rows.cells[ALONE] = 0 if self.merging else 1 << 62
        self._server()
        if rng.random() < (0.02 if self.calm else 0.12):
            self._control()
        self._turn()

    def _turn(self) -> None:
        self._both(Twin.turn)
        one, other = self.twins
        for number in range(self.n_rings):
            used = one.used(number)
            assert used == other.used(number), "other elements were used"
            for head, _ in used:
                slot = head // STRIDE
                if head % STRIDE or slot >= SLOTS or slot % self.n_rings != number:
                    continue
                self.in_use[slot] -= 1
                if not self.in_use[slot]:
                    self.free.append(slot)
        self.free.sort()
        mine, theirs = one.seen(), other.seen()
        for name, value in mine.items():
            if value != theirs[name]:
                raise AssertionError(f"{name}: {difference(value, theirs[name])}")
        self._mend()

    def _mend(self) -> None:
        """A connection that was lost is replaced some time."""
        rng = self.rng
        connection = self.twins[0].connection
        if (not connection.alive or connection.leaving) and rng.random() < 0.5:
            self._replace()
        for number in range(self.n_rings):
            running = self.twins[0].rings[number].running
            if running is None and rng.random() < 0.5:
                self._both(lambda twin, number=number: twin.start(number))  # type: ignore[misc]
            if running is not None and running.is_broken and rng.random() < 0.5:
                self._both(lambda twin, number=number: twin.stop(number))  # type: ignore[misc]
                self._reset(number)

    def _replace(self) -> None:
        stale = self.rng.random() < 0.5
        fence = " session=yes" if self.rng.random() < 0.3 else ""
        instance = self.rng.choice(["", "instance=one", "instance=two"])
        description = f"nbd-bridge volume=x {instance}{fence}"
        self._both(lambda twin: twin.settle_loss(stale=stale, description=description))

    def _reset(self, number: int) -> None:
        """The driver begins anew: with an empty ring."""
        for twin in self.twins:
            ring = twin.rings[number]
            low = twin.low[ring.at : ring.at + RING_BYTES]
            low[:TABLES] = bytes(TABLES)
            ring.region[:] = bytes(len(ring.region))
            ring.base = ring.seen_used = 0
        self.avail_index[number] = 0
        for slot in range(number, SLOTS, self.n_rings):
            self.in_use[slot] = 0
        self.free = [slot for slot in range(SLOTS) if not self.in_use[slot]]

    def _add(self) -> None:
        """Make one chain available."""
        rng = self.rng
        if self.free and not (self.hostile and rng.random() < 0.02):
            slot = place = rng.choice(self.free)
            self.free.remove(slot)
        elif self.hostile and self.spare and (taken := self._taken()):
            slot = rng.choice(taken)
            place = self.spare.pop()
        else:
            return
        number = slot % self.n_rings
        head = STRIDE * slot
        if self.hostile and rng.random() < 0.005:
            # Into no other chain: two that write to the same place may do so in any order.
            head = rng.randrange(STRIDE * SLOTS, 1 << 16)
        else:
            self.in_use[slot] += 1
        at = RING_BYTES * number
        descriptors, header = self._chain(place, at)
        indirect = rng.random() < 0.6 or len(descriptors) > STRIDE
        if indirect and self.cuts.random() < 0.02:
            descriptors = shuffled(self.cuts, descriptors)
        index = self.avail_index[number]
        for twin in self.twins:
            low = twin.low[at : at + RING_BYTES]
            low[HEADERS + 16 * place : HEADERS + 16 * place + 16] = header
            low[STATUSES + place] = 0xEE
            table = b"".join(struct.pack("=QIHH", *each) for each in descriptors)
            if indirect:
                where, memory, base = TABLES + 0x100 * place, low, at
                if len(table) > 0x100:
                    where, memory, base = ROOM_BYTES * place + TABLE_AT, twin.high, HIGH
                memory[where : where + len(table)] = table
                table = struct.pack("=QIHH", base + where, len(table), 4, 0)
            else:
                table = b"".join(
                    struct.pack("=QIHH", *each[:3], STRIDE * slot + each[3]) for each in descriptors
                )
            first = 16 * STRIDE * slot
            low[first : first + len(table)] = table
            halves = low[AVAIL : AVAIL + 6 + 2 * SIZE].cast("H")
            halves[2 + index % SIZE] = head
            halves[1] = index + 1 & 0xFFFF
        self.avail_index[number] = index + 1 & 0xFFFF

    def _taken(self) -> list[int]:
        """Slots whose chains are in flight, so that the descriptors may be changed: chains that are
        still to be taken would become the same one twice, and write their status to one place."""
        found = []
        for slot in range(SLOTS):
            number = slot % self.n_rings
            queue = self.twins[0].rings[number].queue
            if queue is not None and queue.next_avail == self.avail_index[number]:
                found += [slot] if slot not in self.free else []
        return found

    def _chain(self, slot: int, at: int) -> tuple[list[Descriptor], bytes]:
        """Descriptors, with the number of the next one in the chain, and the header. `at`: of the
        ring."""
        rng = self.rng
        type_ = rng.choice([0, 1] if rng.random() < 0.9 or self.calm else [4, 8, 13])
        if self.flushing and self.cuts.random() < 0.2:
            type_ = 4
        length = rng.choice([512, 4096, 4096, 4096, 8192, 0x9000, 0x10000, 0x11000])
        if self.calm and rng.random() < 0.7:
            length = 4096
        sector = rng.randrange(DISK_BYTES // 4096) * 8
        if self.merging and type_ < 2 and self.cuts.random() < 0.6:
            type_, sector = self.ends
        self.ends = type_ & 1, sector + length // 512
        if rng.random() < (0.01 if self.calm else 0.1):
            sector = rng.choice([1, 2047, 2048, 1 << 55, (1 << 64) - 1, rng.randrange(2048)])
        data = HIGH + ROOM_BYTES * slot + rng.choice([0, 0, 512])
        if type_ == 13:
            where = data - HIGH
            for twin in self.twins:
                twin.high[where : where + 16] = struct.pack("<QII", sector, length // 512, 0)
            length = 16
        way = 0 if type_ in (1, 13) else 2
        chain = [(at + HEADERS + 16 * slot, 16, 1, 1)]
        if type_ == 4:
            chain.append((at + STATUSES + slot, 1, 2, 0))
        elif rng.random() < (0.02 if self.calm else 0.1):
            half = length // 2
            chain += [(data, half, 1 | way, 2), (data + half, length - half, 1 | way, 3)]
            chain.append((at + STATUSES + slot, 1, 2, 0))
        else:
            pieces = [(data, length)] if type_ > 1 else cut(self.cuts, slot, data, length)
            for address, n_bytes in pieces:
                chain.append((address, n_bytes, 1 | way, len(chain) + 1))
            chain.append((at + STATUSES + slot, 1, 2, 0))
        if self.hostile and rng.random() < 0.1:
            which = rng.randrange(len(chain))
            address, size, flags, following = chain[which]
            address = rng.choice([address, HIGH + HIGH_BYTES - 512, LOW_BYTES - 1, (1 << 64) - 1])
            size = rng.choice([size, 0, 1, 48, 0xFFFFFFFF])
            flags = rng.choice([flags, 0, 1, 2, 3, 4])
            if flags == 4:
                # Not what others write to: when in the turn it is read may be either way.
                address = rng.choice([HIGH + HIGH_BYTES - 512, (1 << 64) - 1])
            if which == 0 and flags & 2:
                size = min(size, 16)  # Not the headers of others: as with indirect ones.
            chain[which] = address, size, flags, rng.choice([following, 0, 2])
        return chain, struct.pack("<IIQ", type_, 0, sector)

    def _server(self) -> None:
        rng = self.rng
        room = rng.choice([0, 0, 10, 5000, 100_000]) if self.slow else 1 << 30
        self._both(lambda twin: setattr(twin.server.end, "room", room))
        if rng.random() < 0.85:
            self._both(lambda twin: twin.server.receive())
        if rng.random() < (0.02 if self.calm else 0.2):
            error = rng.choice([0, 0, 5, 108])
            self._both(lambda twin: twin.server.answer_early(error))
        commands = self.twins[0].server.commands
        assert len(commands) == len(self.twins[1].server.commands)
        for _ in range(rng.choice([0, 1, 3, len(commands), len(commands)])):
            if not commands:
                break
            index = rng.randrange(len(commands)) if rng.random() < 0.5 else 0
            index, count = group_of(commands, index)
            if (count > 1 or self.whole) and self._waits_for_turn():
                break
            odd = rng.random() * (4 if self.calm else 1)
            how = "error" if odd < 0.02 else "chunks" if odd < 0.06 else "whole"
            if 0.998 < odd < 1:
                how = "shutdown"
            if commands[index][3] + commands[index][4] > DISK_BYTES:
                how = "error"
            if count > 1:
                self.whole = True
                if how == "error":  # Its members would be sent once more: see `test_merged`.
                    how = "chunks"
            self._both(
                lambda twin, index=index, how=how, count=count: twin.server.answer(  # type: ignore[misc]
                    index, how, count
                )
            )
        if rng.random() < 0.003:
            self._both(lambda twin: twin.server.outgoing.extend(b"nonsense" * 4))
        if self.hostile and rng.random() < 0.06:
            what = rng.choice(["again", "unknown", "other"])
            if len({each[2] for each in commands}) < len(commands):
                what = "unknown"  # What is right for one is not for all of a command.
            which = rng.choice([1 << 63 | rng.randrange(1 << 24), rng.randrange(1 << 64)])
            self._both(lambda twin: twin.server.lie(what, which))
        n_bytes = rng.choice([0, 7, 1000, 5000, 40_000, 1 << 30, 1 << 30, 1 << 30])
        if self.whole:  # An answer for several is not cut: else some would have come, and some not.
            n_bytes = 1 << 30
        self.whole = False
        self._both(lambda twin: twin.server.send(n_bytes))

    def _waits_for_turn(self) -> bool:
        """What is answered for several at once has to be received in one turn, by both."""
        one = self.twins[0].server
        return len(one.outgoing) + len(one.end.arrived) > ONE_TURN_BYTES

    def _control(self) -> None:
        rng = self.rng
        what = rng.choice(
            [
                *("lose", "stop", "log", "pause", "memory", "write through", "look", "time"),
                *("resize", "end"),
            ]
        )
        number = rng.randrange(self.n_rings)
        ring = self.twins[0].rings[number].running
        if what == "lose" and self.twins[0].connection.alive:
            self._both(Twin.lose)
        elif what == "end":
            self._both(lambda twin: setattr(twin.server.end, "has_ended", True))
        elif what == "write through":
            on = rng.random() < 0.7
            self._both(lambda twin: _write_through(twin, on))
        elif what == "look":
            self._both(lambda twin: look(twin))
        elif what == "time":
            seconds = rng.choice([0.5, 5.0, 61.0])
            self._both(lambda twin: pass_time(twin, seconds))
        elif what == "resize":
            size = rng.choice([DISK_BYTES, DISK_BYTES, DISK_BYTES // 2])
            self._both(lambda twin: resize(twin, size))
        elif what == "memory":
            anew, more = rng.random() < 0.7, rng.random() < 0.5
            self._both(lambda twin: twin.move(anew=anew, more=more))
        elif ring is None:
            return
        elif what == "stop":
            # (See `socket_twins`.)
            if not self.twins[0].tracked or max(self.in_use) < 2:
                self._both(lambda twin: twin.stop(number))
        elif what == "log":
            on = rng.random() < 0.5
            self._both(lambda twin: twin.log(number, on))
        else:
            on = rng.random() < 0.5
            self._both(lambda twin: _pause(twin, number, on))

    def _finish(self) -> None:
        """Everything is answered in the end."""
        for number in range(self.n_rings):
            self._both(lambda twin, number=number: _pause(twin, number, False))  # type: ignore[misc]
        for turns in range(500):
            if turns > 10 and not any(
                ring.running and ring.running.in_flight
                for twin in self.twins
                for ring in twin.rings
            ):
                break
            if not self.twins[0].connection.alive or self.twins[0].connection.leaving:
                self._replace()
            for number in range(self.n_rings):
                if self.twins[0].rings[number].running is None:
                    self._both(lambda twin, number=number: twin.start(number))  # type: ignore[misc]
            self._both(lambda twin: setattr(twin.server.end, "room", 1 << 30))
            self._both(lambda twin: twin.server.receive())
            while (commands := self.twins[0].server.commands) and not self._waits_for_turn():
                _, count = group_of(commands, 0)
                self._both(lambda twin, count=count: twin.server.answer(0, "whole", count))  # type: ignore[misc]
            self._both(lambda twin: twin.server.send(1 << 30))
            self._both(lambda twin: pass_time(twin, 1.0))
            self._turn()
        for twin in self.twins:
            for ring in twin.rings:
                running = ring.running
                if running is not None and not running.is_broken:
                    assert not running.in_flight, f"{running.in_flight} never answered"


def pass_time(twin: Twin, seconds: float) -> None:
    twin.now += seconds
    twin.session.tick(twin.now)
    if twin.cache is not None:
        twin.cache.tick(twin.now)
    twin.loop.turn.end()


def _write_through(twin: Twin, writeback: bool) -> None:
    was = twin.config.writeback
    twin.config.write(32, bytes([writeback]))
    twin.engine.writeback_changed()
    if was and not writeback:
        twin.disk.submit(Request(FLUSH, 0, 0, [], lambda flush: None, INTERNAL))
        twin.loop.turn.want()


def look(twin: Twin) -> None:
    """What a watchdog does, and who has to see all requests."""
    if twin.connection.alive:
        assert not twin.connection.stalled(0.0, 60.0)
        assert len(twin.connection.changes()) <= SLOTS + 64


def _pause(twin: Twin, number: int, on: bool) -> None:
    running = twin.rings[number].running
    if running is not None and on:
        running.pause()
    elif running is not None:
        running.unpause()


def resize(twin: Twin, size_bytes: int) -> None:
    twin.config.resize(size_bytes)
    twin.engine.geometry_changed()


def parts_of(cache: Cache, image: Any) -> dict[str, Any]:
    """What both twins' caches have to have alike; `image` is the cache file."""
    index, ring = cache.index, cache._writeback.ring
    arrays = index.ready, index.open, index.sent, index.inflight, index.covered
    counts = index.cells[:]
    counts[CHANGES] = 0  # A write that had to wait may have opened its blocks twice.
    return {
        "cache": bytes(image),
        "blocks": [bytes(each) for each in (*arrays, ring.slots, ring.queued)],
        "counts": repr((counts, ring._marks, ring._marked_s, vars(cache.stats))),
    }


def difference(one: Any, other: Any) -> str:
    """For bytes, where it begins."""
    if isinstance(one, bytes):
        at = next(at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1])
        return f"from {at:#x} on {one[at : at + 16]!r}, elsewhere {other[at : at + 16]!r}"
    return f"{one!r:.400}, elsewhere {other!r:.400}"


def main() -> None:
    """Many scripts, until one fails."""
    parser = argparse.ArgumentParser(prog="python -m tests.datapath.twins", description=__doc__)
    parser.add_argument("--scripts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--steps", type=int, default=60, help="turns of each, and some to end it")
    arguments = parser.parse_args()
    Turn.checks_stages = True
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    served = adopted = merged = 0
    for seed in range(arguments.seed, arguments.seed + arguments.scripts):
        script = Script(seed)
        served += script.run(arguments.steps)
        adopted += script.twins[0].rows.adopted_total
        merged += script.twins[0].rows.merged_total
    print(
        f"{arguments.scripts} scripts: {served} chains the usual way, {merged} of them merged, "
        f"{adopted} rows adopted"
    )


if __name__ == "__main__":
    main()

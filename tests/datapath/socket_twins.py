"""`twins`, over real sockets, with compiled turns: these make system calls.

Two whole data paths that a script drives alike: one with the usual case, one without it.

A `Twin` is everything from a guest's ring to a server's socket: a ring (with an in-flight region or
without one), the engine, the disk, perhaps a cache, the session, a connection over a socket pair,
and a server in memory. `Script` makes the steps of one seed and takes them in both: chains of all
kinds, hostile ones too, replies in any order and in any pieces, errors, lost connections, rings
that pause, stop and go on. After every turn all that anybody outside can see is compared.

What is left open: the order of the used elements of one turn, and cookies.

    python -m tests.datapath.socket_twins --scripts 10000 --seed 1
"""

from __future__ import annotations

import argparse
import logging
import mmap
import random
import select
import socket
import struct
from collections.abc import Callable
from importlib import import_module
from typing import Any

import structlog

from bridge.app.targets import CacheTarget
from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import Geometry, Identity, new_header
from bridge.datapath.cells import ALONE
from bridge.datapath.disk import Disk
from bridge.datapath.engine import PURE_ENGINE, Engine, choose
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.datapath.loop import EPOLLIN, EPOLLOUT
from bridge.datapath.rows import Rows
from bridge.datapath.turn import Turn
from bridge.errors import BridgeError, ConnectionLost
from bridge.guest.ring import RunningRing
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.dirty_log import DirtyBitmap, DirtyLog
from bridge.guest.virtio.inflight import TrackedSplitQueue, queue_region_bytes
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.guest.virtio.split_queue import SplitQueue, ring_sizes_bytes
from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.channels import Phase
from bridge.server.client_options import ClientOptions
from bridge.server.connection import Connection
from bridge.server.export import Export
from bridge.server.link import Link
from bridge.spec import nbd as p
from tests.datapath.twins import (
    DISK_BYTES,
    HIGH,
    HIGH_BYTES,
    LOG_BYTES,
    LOW_BYTES,
    ONE_TURN_BYTES,
    ROOM_BYTES,
    SIZE,
    SLOTS,
    SPARE,
    STRIDE,
    TABLE_AT,
    Answers,
    Descriptor,
    LinkTarget,
    Step,
    cut,
    difference,
    group_of,
    long_merged,
    look,
    members_of_command,
    note_merged,
    parts_of,
    pass_time,
    resize,
    shuffled,
)

AVAIL, USED, TABLES, HEADERS, STATUSES = 0x1000, 0x2000, 0x3000, 0x6000, 0x7000


class Sockets:
    """As much of a `Loop` as ring and connection see; the script makes its turns."""

    def __init__(self) -> None:
        self.turn = Turn()
        self.callbacks: dict[int, tuple[Callable[[int], None], int]] = {}
        self.epoll = select.epoll()

    def add(self, fd: int, callback: Callable[[int], None], events: int = EPOLLIN) -> None:
        self.callbacks[fd] = callback, events
        self.epoll.register(fd, events)

    def modify(self, fd: int, events: int) -> None:
        self.callbacks[fd] = self.callbacks[fd][0], events
        self.epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        if self.callbacks.pop(fd, None) is not None:
            self.epoll.unregister(fd)

    def add_poller(self, poller: object) -> None: ...

    def remove_poller(self, poller: object) -> None: ...

    def linger(self) -> None: ...

    def wake(self) -> None: ...


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
        self.expands = True
        """Merged commands count as those that they stand for."""
        self.end: socket.socket | None = None

    def connected(self, end: socket.socket) -> None:
        self.end = end
        self.commands.clear()
        self.unparsed = b""
        self.outgoing.clear()

    def receive(self) -> None:
        assert self.end is not None
        try:
            while data := self.end.recv(1 << 20):
                self.unparsed += data
        except (BlockingIOError, OSError):
            pass
        flushes: list[tuple[int, int, int, int, int, bytes]] = []
        while len(self.unparsed) >= 28:
            _, flags, kind, cookie, offset, length = p.REQUEST.unpack_from(self.unparsed)
            payload = length if kind == p.CMD_WRITE else 0
            if len(self.unparsed) < 28 + payload:
                break
            data = self.unparsed[28 : 28 + payload]
            self.unparsed = self.unparsed[28 + payload :]
            if kind == p.CMD_FLUSH:
                flushes.append((kind, flags, cookie, offset, length, data))
                continue
            if kind == p.CMD_WRITE:
                self.image[offset : offset + length] = data
            if kind == p.CMD_WRITE_ZEROES or kind == p.CMD_TRIM:
                self.image[offset : offset + length] = bytes(length)
            known = self.merged if self.expands else {}
            members = members_of_command(known, (kind, flags, cookie, offset, length, data))
            self.log += [(*each[:2], *each[3:]) for each in members]
            self.commands += members
        # A compiled turn sends a flush in its place, the general path after all else.
        self.commands += flushes
        self.log += [(*each[:2], *each[3:]) for each in flushes]

    def send(self, n_bytes: int) -> None:
        assert self.end is not None
        piece = self.outgoing[:n_bytes]
        try:
            sent = self.end.send(piece) if piece else 0
        except OSError:
            sent = 0
        del self.outgoing[:sent]


class _Negotiated:
    def __init__(self, sock: socket.socket, export: Export) -> None:
        self.sock = sock
        self.export = export
        self.handshake = self

    def trailing_data(self) -> bytes:
        return b""


class Twin:
    """See the module's text."""

    def __init__(
        self,
        *,
        usual: bool,
        slots: int,
        tracked: bool,
        structured: bool,
        event_idx: bool,
        engine: Engine = PURE_ENGINE,
        turns: bool = False,
    ) -> None:
        """`slots`: of the cache; 0: there is none. `turns`: whole turns are those of the compiled
        engine. They send in other pieces, so that sockets have to have room."""
        self.roomy = turns
        self.loop: Any = Sockets()
        self.compiled: Any = None
        if usual and turns:
            module = import_module("bridge.datapath.compiled")
            self.compiled = module.CompiledTurns(self.loop.turn, poll_max_s=0)
        self.now = 0.0
        self.tracked, self.event_idx = tracked, event_idx
        self.low = memoryview(mmap.mmap(-1, LOW_BYTES))
        self.high = memoryview(mmap.mmap(-1, HIGH_BYTES))
        self.high[:] = random.Random(2).randbytes(HIGH_BYTES)
        self.memory = GuestMemory([Region(0, 0, self.low), Region(HIGH, HIGH, self.high)])
        self.region = memoryview(bytearray(queue_region_bytes(SIZE, packed=False)))
        self.log_bytes = memoryview(bytearray(LOG_BYTES))
        self.export = Export("", DISK_BYTES, DEFAULT_FLAGS, structured=structured)
        self.server = Server(structured)
        self.rows = Rows(engine)
        self.session = Link(ClientOptions(), self.loop.turn, above=self, random=random.Random(3))
        self.loop.turn.add_stage(self.session)
        backend: Any = LinkTarget(self.session, self.rows)
        self.cache: Cache | None = None
        self.connect()
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
        self.base = 0
        self.seen_used = 0
        self.ring: RunningRing | None = None
        self.start()

    # The server's side.

    def reconnected(self) -> None:
        """See link.Above."""
        if self.cache is not None:
            self.cache.upstream_reconnected()

    def export_changed(self, export: Export) -> None:
        """See link.Above."""

    def connect(self) -> None:
        self.lost: list[str] = []
        self.connection, self.fd = self.connection_to(self.server)
        self.commands_before = self.rows.commands
        self.session.established(self.now, self.export, [self.connection])
        self.loop.turn.end()

    def connection_to(self, server: Server) -> tuple[Connection, int]:
        """A new one, and its descriptor."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        if self.roomy:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8 << 20)
        server.connected(theirs)
        negotiated: Any = _Negotiated(ours, self.export)
        connection = Connection(
            negotiated,
            self.loop,
            lost=self._lost,
            generation=self.session.generation + 1,
            rows=self.rows,
        )
        return connection, ours.fileno()

    def _lost(self, connection: Connection, error: BridgeError) -> None:
        self.lost.append(str(error))
        self.session.leaving()

    def lose(self) -> None:
        self.connection.fail(ConnectionLost("as the script has it"))
        self.loop.turn.end()

    def settle_loss(self) -> None:
        """What the client does after a connection was lost, then a new one."""
        self.connection.close()
        unanswered = self.connection.transmission.unanswered()
        if self.session.phase in (Phase.UP, Phase.LEAVING):
            answered = self.rows.some_answered(self.commands_before, unanswered)
            self.session.lost(self.now, unanswered, stale_possible=False, answered=answered)
        self.loop.turn.end()
        assert self.server.end is not None
        self.server.end.close()
        self.connect()

    # The guest's side.

    def start(self) -> None:
        """A ring on the memory as it is."""
        table, available, used = ring_sizes_bytes(SIZE)
        areas = (
            self.low[:table],
            self.low[AVAIL : AVAIL + available],
            self.low[USED : USED + used],
        )
        values: dict[str, Any] = {"size": SIZE, "base": self.base, "indirect": True}
        values["event_idx"] = self.event_idx
        queue: SplitQueue
        if self.tracked:
            queue = TrackedSplitQueue(
                *(self.memory, areas), **values, region=self.region, n_entries=SIZE
            )
        else:
            queue = SplitQueue(self.memory, areas, **values)
        self.queue = queue
        self.areas = areas
        self.ring = RunningRing(
            *(self.loop, queue, self.engine),
            **{"kick_fd": None, "call_fd": None, "error_fd": None},
            broken=self.broken.append,
        )

    def stop(self) -> None:
        """As a device does that has waited long enough."""
        ring = self.ring
        assert ring is not None
        ring.pause()
        requests = ring.unanswered()
        if not ring.keeps_in_flight:
            ring.fail(requests)
        self.engine.abandon(requests)
        self.session.abandon()
        self.base = ring.close(told=False)
        self.ring = None
        self.loop.turn.end()

    def turn(self) -> None:
        """Two turns of the loop. (The compiled engine takes another one for what it leaves.)"""
        for _ in range(2):
            if self.compiled is None or not self._compiled_turn():
                self._turn()
        note_merged(self.server.merged, self.rows, self.connection)

    def _compiled_turn(self) -> bool:
        """False if something is left to be done."""
        if self.cache is not None:
            # A request and a reply that come in one turn may be in either order: as in `_turn`.
            self._look_at_socket()
        if self.ring is None or self.loop.turn.pending:
            return False
        found = self.compiled.run(self.loop.epoll.fileno(), [self.ring], 0.0, worked=True)
        return found is not None and found.used_up and not self.loop.turn.pending

    def _look_at_socket(self) -> None:
        entry = self.loop.callbacks.get(self.fd)
        if entry is not None and self.connection.alive:
            callback, events = entry
            callback(events & EPOLLOUT | EPOLLIN)

    def _turn(self) -> None:
        if self.compiled is None or self.cache is None:
            self._look_at_socket()  # Else `_compiled_turn` has.
        if self.ring is not None:
            self.ring.poll()
        self.loop.turn.looked()
        self.loop.turn.end()
        while self.loop.turn.pending:
            self.loop.turn.end()

    def used(self) -> list[tuple[int, int]]:
        """What was used since the last look, in the order of heads."""
        halves = self.areas[2].cast("H")
        words = self.areas[2][4 : 4 + 8 * SIZE].cast("I")
        found = []
        while self.seen_used != halves[1]:
            at = self.seen_used % SIZE * 2
            found.append((words[at], words[at + 1]))
            self.seen_used = self.seen_used + 1 & 0xFFFF
        return sorted(found)

    def seen(self) -> dict[str, Any]:
        """All that can be seen from outside, but for the used elements."""
        ring, session, connection = self.ring, self.session, self.connection
        found: dict[str, Any] = {
            "low": bytes(self.low[:USED]) + bytes(self.low[TABLES:]),
            "high": bytes(self.high),
            "used index": bytes(self.low[USED : USED + 4]),
            "used events": bytes(self.low[USED + 4 + 8 * SIZE : USED + 6 + 8 * SIZE]),
            "marked": bytes(self.log_bytes),
            "commands": len(self.server.log),
            "last commands": self.server.log[-64:],
            "image": bytes(self.server.image),
            "unflushed": connection.unflushed,
            "in flight there": connection.in_flight,
            "in flight": (session.in_flight, ring and ring.in_flight, ring and ring.requests),
            "unsent": connection.has_unsent,
            "epoch": (session.durability.epoch, session.durability.unreported),
            "durable": (self.disk.is_durable, self.disk.flush_deadline_s, self.disk.unreported),
            "phase": (session.phase, session.resent_total, session.flushes_refused_total),
            "lost": list(self.lost),
            "faults": self.faults,
            "long": connection.transmission.long_reads - long_merged(connection),
        }
        if self.tracked:
            words = self.region.cast("Q")
            found["tracked"] = [
                (words[3 + 2 * head], self.region[16 + 16 * head]) for head in range(SIZE)
            ]
            found["tracked index"] = self.region.cast("H")[7]
        if self.cache is not None:
            found |= parts_of(self.cache, self.image)
        return found

    def log(self, on: bool) -> None:
        """The dirty log, on or off."""
        assert self.ring is not None
        log = None
        if on:
            bitmap = DirtyBitmap(self.log_bytes)
            log = DirtyLog(bitmap, self.memory, [(USED, 4 + 8 * SIZE)])
        self.ring.set_log(log)

    def close(self) -> None:
        self.connection.close()
        self.loop.epoll.close()
        if self.server.end is not None:
            self.server.end.close()


class Script:
    """The steps of one seed, taken in both twins."""

    def __init__(
        self,
        seed: int,
        engine: Engine = PURE_ENGINE,
        *,
        turns: bool = False,
        in_one_piece: bool = False,
    ) -> None:
        """`in_one_piece`: the data of reads and writes is."""
        self.rng = rng = random.Random(seed)
        self.cuts = random.Random(seed + (1 << 40))
        """Of what chains are made."""
        self.in_one_piece = in_one_piece
        self.flushing = not in_one_piece and self.cuts.random() < 0.5
        kind = {
            # With 3 of them granules share buckets, and come and go.
            "slots": rng.choice([3, 24]) if rng.random() < 0.4 else 0,
            "tracked": rng.random() < 0.6,
            "structured": rng.random() < 0.6,
            "event_idx": rng.random() < 0.7,
        }
        self.seed = seed
        self.hostile = rng.random() < 0.3
        self.calm = rng.random() < 0.6
        """Nearly everything is usual."""
        self.twins = [
            Twin(usual=usual, engine=engine, turns=turns, **kind) for usual in (True, False)
        ]
        self.free = list(range(SLOTS))
        self.in_use = [0] * SLOTS
        """How many chains of a slot were not used yet."""
        self.whole = False
        """All of what the server has to send is sent at once."""
        self.ends = 0, 0
        """Type and end (a sector) of the last chain."""
        self.merging = not in_one_piece and self.cuts.random() < 0.6
        """Chains go on where others have ended, and are merged."""
        self.spare = list(range(SLOTS, SLOTS + SPARE))
        self.avail_index = 0
        self.steps = 0

    def run(self, steps: int) -> int:
        """Take some steps; how many chains went the usual way."""
        try:
            for self.steps in range(steps):
                self._step()
            self._finish()
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
        used = one.used()
        assert used == other.used(), "other elements were used"
        for head, _ in used:
            slot = head // STRIDE
            if head % STRIDE == 0 and slot < SLOTS and self.in_use[slot]:
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
        connection = self.twins[0].connection
        if (not connection.alive or connection.leaving) and self.rng.random() < 0.5:
            self._both(Twin.settle_loss)
        if self.twins[0].ring is None and self.rng.random() < 0.5:
            self._both(Twin.start)
        ring = self.twins[0].ring
        if ring is not None and ring.is_broken and self.rng.random() < 0.5:
            self._both(Twin.stop)
            self._reset()

    def _reset(self) -> None:
        """The driver begins anew: with empty rings."""
        for twin in self.twins:
            twin.low[:USED] = bytes(USED)
            twin.low[USED:TABLES] = bytes(TABLES - USED)
            twin.region[:] = bytes(len(twin.region))
            twin.base = twin.seen_used = 0
        self.avail_index = 0
        self.free = list(range(SLOTS))
        self.in_use = [0] * SLOTS

    def _add(self) -> None:
        """Make one chain available."""
        rng = self.rng
        if self.free and not (self.hostile and rng.random() < 0.02):
            slot = place = rng.choice(self.free)
            self.free.remove(slot)
        elif (
            self.hostile
            and self.spare
            and len(self.free) < SLOTS
            # Else two chains that are to be taken would be the same one: see `twins`.
            and self.twins[0].queue.next_avail == self.avail_index
        ):
            slot = rng.choice([each for each in range(SLOTS) if each not in self.free])
            place = self.spare.pop()
        else:
            return
        head = STRIDE * slot
        if self.hostile and rng.random() < 0.005:
            head = rng.randrange(STRIDE * SLOTS, 1 << 16)
        else:
            self.in_use[slot] += 1
        descriptors, header = self._chain(place)
        indirect = rng.random() < 0.6 or len(descriptors) > STRIDE
        if indirect and not self.in_one_piece and self.cuts.random() < 0.02:
            descriptors = shuffled(self.cuts, descriptors)
        for twin in self.twins:
            twin.low[HEADERS + 16 * place : HEADERS + 16 * place + 16] = header
            twin.low[STATUSES + place] = 0xEE
            table = b"".join(struct.pack("=QIHH", *each) for each in descriptors)
            if indirect:
                at, memory, base = TABLES + 0x100 * place, twin.low, 0
                if len(table) > 0x100:
                    at, memory, base = ROOM_BYTES * place + TABLE_AT, twin.high, HIGH
                memory[at : at + len(table)] = table
                table = struct.pack("=QIHH", base + at, len(table), 4, 0)
            else:
                table = b"".join(
                    struct.pack("=QIHH", *each[:3], STRIDE * slot + each[3]) for each in descriptors
                )
            first = 16 * STRIDE * slot
            twin.low[first : first + len(table)] = table
            halves = twin.low[AVAIL : AVAIL + 6 + 2 * SIZE].cast("H")
            halves[2 + self.avail_index % SIZE] = head
            halves[1] = self.avail_index + 1 & 0xFFFF
        self.avail_index = self.avail_index + 1 & 0xFFFF

    def _chain(self, slot: int) -> tuple[list[Descriptor], bytes]:
        """Descriptors, with the number of the next one in the chain, and the header."""
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
        chain = [(HEADERS + 16 * slot, 16, 1, 1)]
        if type_ == 4:
            chain.append((STATUSES + slot, 1, 2, 0))
        elif rng.random() < (0.02 if self.calm else 0.1):
            half = length // 2
            chain += [(data, half, 1 | way, 2), (data + half, length - half, 1 | way, 3)]
            chain.append((STATUSES + slot, 1, 2, 0))
        else:
            whole = type_ > 1 or self.in_one_piece
            pieces = [(data, length)] if whole else cut(self.cuts, slot, data, length)
            for address, n_bytes in pieces:
                chain.append((address, n_bytes, 1 | way, len(chain) + 1))
            chain.append((STATUSES + slot, 1, 2, 0))
        if self.hostile and rng.random() < 0.1:
            at = rng.randrange(len(chain))
            address, size, flags, following = chain[at]
            address = rng.choice([address, HIGH + HIGH_BYTES - 512, LOW_BYTES - 1, (1 << 64) - 1])
            size = rng.choice([size, 0, 1, 48, 0xFFFFFFFF])
            flags = rng.choice([flags, 0, 1, 2, 3, 4])
            if flags == 4:
                # Not what others write to: when in the turn it is read may be either way.
                address = HIGH + HIGH_BYTES - 512
            if at == 0 and flags & 2:
                size = min(size, 16)  # Not the headers of others: as with indirect ones.
            chain[at] = address, size, flags, rng.choice([following, 0, 2])
        return chain, struct.pack("<IIQ", type_, 0, sector)

    def _server(self) -> None:
        rng = self.rng
        if rng.random() < 0.85:
            self._both(lambda twin: twin.server.receive())
        commands = self.twins[0].server.commands
        assert len(commands) == len(self.twins[1].server.commands)
        for _ in range(rng.choice([0, 1, 3, len(commands), len(commands)])):
            if not commands:
                break
            index = rng.randrange(len(commands)) if rng.random() < 0.5 else 0
            index, count = group_of(commands, index)
            if (count > 1 or self.whole) and len(self.twins[0].server.outgoing) > ONE_TURN_BYTES:
                break  # What is sent at once is to be received in one turn, by both.
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
        n_bytes = rng.choice([0, 7, 1000, 5000, 40_000, 1 << 30, 1 << 30, 1 << 30])
        if self.whole:  # An answer for several is not cut: else some would have come, and some not.
            n_bytes = 1 << 30
        self._both(lambda twin: twin.server.send(n_bytes))
        if self.whole:
            self._send_rest()
        self.whole = False

    def _send_rest(self) -> None:
        """What the sockets have not taken at once."""
        while any(twin.server.outgoing and twin.connection.alive for twin in self.twins):
            self._both(Twin.turn)
            self._both(lambda twin: twin.server.send(1 << 30))

    def _control(self) -> None:
        rng = self.rng
        what = rng.choice(
            ["lose", "stop", "log", "pause", "memory", "write through", "look", "time", "resize"]
        )
        ring = self.twins[0].ring
        if what == "lose" and self.twins[0].connection.alive:
            self._both(Twin.lose)
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
        elif ring is None:
            return
        elif what == "stop":
            # A region counts a head that is in flight twice once: with the index that follows from
            # that, the next ring would pop chains again beside those that it has recovered.
            if not self.twins[0].tracked or max(self.in_use) < 2:
                self._both(Twin.stop)
        elif what == "log":
            on = rng.random() < 0.5
            self._both(lambda twin: twin.log(on))
        elif what == "pause":
            on = rng.random() < 0.5
            self._both(lambda twin: _pause(twin, on))
        else:
            self._both(lambda twin: _move(twin))

    def _finish(self) -> None:
        """Everything is answered in the end."""
        self._both(lambda twin: _pause(twin, False) if twin.ring is not None else None)
        for number in range(500):
            if number > 10 and not any(twin.ring and twin.ring.in_flight for twin in self.twins):
                break
            if not self.twins[0].connection.alive or self.twins[0].connection.leaving:
                self._both(Twin.settle_loss)
            if self.twins[0].ring is None:
                self._both(Twin.start)
            self._both(lambda twin: twin.server.receive())
            while (commands := self.twins[0].server.commands) and len(
                self.twins[0].server.outgoing
            ) <= ONE_TURN_BYTES:
                _, count = group_of(commands, 0)
                self._both(lambda twin, count=count: twin.server.answer(0, "whole", count))  # type: ignore[misc]
            self._both(lambda twin: twin.server.send(1 << 30))
            self._send_rest()
            self._both(lambda twin: pass_time(twin, 1.0))
            self._turn()
        for twin in self.twins:
            if twin.ring is not None and not twin.ring.is_broken:
                assert not twin.ring.in_flight, f"{twin.ring.in_flight} never answered"


def _write_through(twin: Twin, writeback: bool) -> None:
    twin.config.write(32, bytes([writeback]))
    twin.engine.writeback_changed()


def _pause(twin: Twin, on: bool) -> None:
    assert twin.ring is not None
    if on:
        twin.ring.pause()
    else:
        twin.ring.unpause()


def _move(twin: Twin) -> None:
    assert twin.ring is not None
    gone = [region for region in twin.memory.regions if region.guest_address == HIGH]
    twin.ring.uses(gone)
    twin.ring.move(twin.memory, twin.areas)


def main() -> None:
    """Many scripts, until one fails."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.datapath.socket_twins", description=__doc__
    )
    parser.add_argument("--scripts", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    parser.add_argument("--steps", type=int, default=60, help="turns of each, and some to end it")
    parser.add_argument("--turns", action="store_true", help="with compiled turns")
    arguments = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    engine = choose(COMPILED if arguments.turns else PURE)
    served = adopted = merged = 0
    for seed in range(arguments.seed, arguments.seed + arguments.scripts):
        script = Script(seed, engine, turns=arguments.turns)
        served += script.run(arguments.steps)
        adopted += script.twins[0].rows.adopted_total
        merged += script.twins[0].rows.merged_total
    print(
        f"{arguments.scripts} scripts: {served} chains the usual way, {merged} of them merged, "
        f"{adopted} rows adopted"
    )


if __name__ == "__main__":
    main()

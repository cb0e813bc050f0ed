"""A simulated world around a cache: guest, server, time, faults; and the oracle.

Everything is decided by one `random.Random`, so a seed is a program. The oracle works on sectors
of 512 bytes; every sector that is written holds the number of its write, which only grows, so
what a read or the server's medium shows can be judged: is it new enough?

The server is as bad as NBD allows: it executes what is in flight in any order, replies in any
order, keeps what was not flushed in memory and loses any of it, sector by sector, at a power
loss; a flush covers only what it had replied to when the flush was submitted.
"""

from __future__ import annotations

import errno
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import Geometry, Identity, new_header
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.turn import Outcome
from tests.turns import deliver, forget, turn

SECTOR = 512
ZERO = bytes(SECTOR)
MAX_SECTORS = 400
"""Growth ends here."""

_OWN = b"!"
"""What the guest does with memory that it got back; no sector has it."""


class Killed(BaseException):
    """The process of the cache is gone, between two stores."""


def sector_bytes(number: int) -> bytes:
    """A sector that holds the write `number`."""
    return number.to_bytes(8, "little") * (SECTOR // 8)


class _HookedItems:
    """A view whose stores are counted, and may be the last."""

    def __init__(self, view: memoryview, stored: Callable[[], None]) -> None:
        self._view = view
        self._stored = stored

    def __getitem__(self, at: Any) -> Any:
        return self._view[at]

    def __setitem__(self, at: Any, value: Any) -> None:
        self._stored()
        self._view[at] = value

    def __len__(self) -> int:
        return len(self._view)


class _HookedData(_HookedItems):
    """The same for data: the store that is the last may be there in part."""

    def __init__(self, view: memoryview, stored: Callable[[], None], rng: random.Random) -> None:
        super().__init__(view, stored)
        self._rng = rng

    def __setitem__(self, at: Any, value: Any) -> None:
        try:
            self._stored()
        except Killed:
            # Whole sectors: the torn one belongs to a request that is executed again, and
            # the oracle can only read whole numbers.
            part = self._rng.randrange(len(value) // SECTOR + 1) * SECTOR
            self._view[at.start : at.start + part] = value[:part]
            raise
        self._view[at] = value


class TestImage(MappedImage):
    """A cache image in memory that can end at any store, and whose blocks can be cold."""

    __test__ = False

    def __init__(self, buffer: bytearray, header: Any, rng: random.Random) -> None:
        super().__init__(buffer, header)
        self.stores_left: int | None = None
        self.closed = False
        self.cold_ratio = 0.0
        self._rng = rng
        self._raw_data = self.data
        self.granule_of = _HookedItems(self.granule_of, self._stored)
        self.state = _HookedItems(self.state, self._stored)
        self.data = _HookedData(self.data, self._stored, rng)

    def _stored(self) -> None:
        assert not self.closed, "the file was changed after it was closed"
        if self.stores_left is not None:
            if not self.stores_left:
                raise Killed
            self.stores_left -= 1

    def resident(self, position: int, length: int) -> bool:
        return self._rng.random() >= self.cold_ratio


class LaterCold:
    """Cold reads that end when the world says so."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Callable[[], None], Outcome]] = []

    def run(self, job: Callable[[], None], outcome: Outcome) -> None:
        self.jobs.append((job, outcome))

    def finish_one(self, rng: random.Random) -> None:
        job, outcome = self.jobs.pop(rng.randrange(len(self.jobs)))
        job()
        turn().finish(outcome)


class Server:
    """The storage server with one connection; a `Upstream`."""

    def __init__(self, size_bytes: int, rng: random.Random, **can: bool) -> None:
        self.size_bytes = size_bytes
        self.min_block_bytes = 1
        self.can_fua = can.get("fua", True)
        self.can_flush = can.get("flush", True)
        self.can_trim = can.get("trim", True)
        self.can_write_zeroes = can.get("zeroes", True)
        self.generation = 1
        self.rng = rng
        count = size_bytes // SECTOR
        # Per sector: every content since the one that is certainly on the medium.
        self.history: list[list[bytes]] = [[ZERO] for _ in range(count)]
        self.replied_upto = [0] * count
        """Per sector: contents before this index of the history were replied to."""
        self.pending: list[_Command] = []
        self.commands = 0
        self.given_up = False
        """There is no connection, and none is waited for any more."""
        self.refuses = False
        """Everything has to end now; there will be a connection again."""

    @property
    def gone(self) -> bool:
        return self.given_up

    def submit(self, request: Request) -> None:
        if self.given_up or self.refuses:
            turn().finish(request, errno.EIO)
            return
        assert request.length > 0 or request.op == FLUSH
        assert request.offset >= 0
        assert request.offset + request.length <= self.size_bytes
        assert request.offset % SECTOR == 0
        assert request.length % SECTOR == 0
        assert not request.flags & FUA or self.can_fua
        assert sum(map(len, request.buffers)) == (
            request.length if request.op in (READ, WRITE) else 0
        )
        self.commands += 1
        first, end = request.offset // SECTOR, (request.offset + request.length) // SECTOR
        for other in self.pending:
            if request.op == WRITE and other.request.op in (WRITE, DISCARD, WRITE_ZEROES):
                assert other.end <= first or end <= other.first, "writes could pass each other"
        command = _Command(request, first, end)
        if request.op == FLUSH:
            command.floor = [upto - 1 for upto in self.replied_upto]
        self.pending.append(command)

    def execute(self, command: _Command) -> None:
        """Do what the command says; may happen twice, if the connection is lost meanwhile."""
        request = command.request
        command.executed = True
        if request.op == READ:
            data = b"".join(self.history[at][-1] for at in range(command.first, command.end))
            for buffer in request.buffers:
                buffer[:] = data[: len(buffer)]
                data = data[len(buffer) :]
        elif request.op == WRITE:
            data = b"".join(bytes(buffer) for buffer in request.buffers)
            for at in range(command.first, command.end):
                start = (at - command.first) * SECTOR
                self._put(at, data[start : start + SECTOR], request.flags)
        elif request.op == WRITE_ZEROES or (request.op == DISCARD and self.rng.random() < 0.5):
            for at in range(command.first, command.end):
                self._put(at, ZERO, request.flags)
        elif request.op == FLUSH:
            for at, floor in enumerate(command.floor):
                if floor > 0:
                    self._forget(at, floor)
                    for other in self.pending:
                        if other.floor:
                            other.floor[at] -= floor

    def _put(self, at: int, content: bytes, flags: int) -> None:
        self.history[at].append(content)
        if flags & FUA:
            gone = len(self.history[at]) - 1
            self._forget(at, gone)
            for other in self.pending:
                if other.floor:
                    other.floor[at] = max(0, other.floor[at] - gone)

    def _forget(self, at: int, count: int) -> None:
        del self.history[at][:count]
        self.replied_upto[at] = max(1, self.replied_upto[at] - count)

    def reply(self, command: _Command, error: int = 0) -> None:
        self.pending.remove(command)
        if not error and command.request.op in (WRITE, DISCARD, WRITE_ZEROES):
            for at in range(command.first, command.end):
                self.replied_upto[at] = len(self.history[at])
        command.request.generation = self.generation
        turn().finish(command.request, error)

    def cut(self) -> None:
        """The connection is lost; commands in flight may or may not have been executed."""
        for command in self.pending:
            if not command.executed and self.rng.random() < 0.5:
                self.execute(command)
            command.executed = False
        self.generation += 1

    def give_up(self) -> None:
        """The connection is lost, and no reconnect is tried: everything fails at once."""
        self.given_up = True
        self.fail_pending()
        turn().want()

    def fail_pending(self) -> None:
        """What is in flight fails; it may have been executed."""
        self.cut()
        while self.pending:
            turn().finish(self.pending.pop(0).request, errno.EIO)

    def lose_power(self) -> None:
        """Of what was not flushed, any may be gone."""
        if not self.can_flush:
            return  # Such a server says that it needs none.
        for at, contents in enumerate(self.history):
            self.history[at] = [self.rng.choice(contents)]
            self.replied_upto[at] = 1

    def fail_fsync(self) -> None:
        """A FLUSH or FUA failed: what was not durable may be gone, and no later error says so.

        That includes what was executed and is not replied to yet.
        """
        self.lose_power()
        for command in self.pending:
            if command.floor:
                command.floor = [0] * len(self.history)

    def grow(self, contents: list[bytes]) -> None:
        """These sectors more; they are on the medium already."""
        self.history += [[content] for content in contents]
        self.replied_upto += [1] * len(contents)
        self.size_bytes = len(self.history) * SECTOR
        for command in self.pending:
            if command.floor:
                command.floor += [0] * len(contents)

    def forget_client(self) -> None:
        """The client is gone for good."""
        self.cut()
        self.pending.clear()
        self.given_up = self.refuses = False

    def resend(self) -> None:
        """Commands that were not replied to come again, on the new connection."""
        for command in self.pending:
            if command.request.op == FLUSH:
                command.floor = [upto - 1 for upto in self.replied_upto]


class _Command:
    """One command in flight."""

    def __init__(self, request: Request, first: int, end: int) -> None:
        self.request = request
        self.first = first
        self.end = end
        self.executed = False
        self.floor: list[int] = []


class _GuestOp:
    """One request of the guest in flight."""

    def __init__(self, op: int, first: int, end: int, flags: int) -> None:
        self.op = op
        self.first = first
        self.end = end
        self.flags = flags
        self.number = 0
        self.buffers: list[memoryview] = []
        self.memory = bytearray()
        self.allowed: list[set[int] | None] = []
        self.completed_before: list[int] = []
        self.rivals: list[_GuestOp] = []
        """Writes that were in flight on the same sectors at the same time: no order."""


def _drawn_options(rng: random.Random, mode: str) -> Options:
    """Every limit small enough to be reached, now and then."""
    return Options(
        mode=mode,
        flush_interval_s=rng.choice((0, 5, 60)),
        writeback_age_s=rng.choice((1, 5)),
        dirty_background_ratio=rng.choice((0.1, 0.5)),
        dirty_flush_ratio=rng.choice((0.3, 0.9)),
        dirty_hard_ratio=rng.choice((0.5, 0.9, 1.0)),
        roomy_ratios=rng.choice((None, (0.5, 0.9, 1.0))),
        writeback_run_bytes=rng.choice((1024, 8192)),
        writeback_requests=rng.choice((1, 3, 32)),
        writeback_turn_requests=rng.choice((1, 2, 32)),
        writeback_loads=rng.choice((1, 32)),
        writeback_bytes=rng.choice((4096, 65536)),
        fua_granules=rng.choice((0, 2, 64)),
        fetch_run_bytes=rng.choice((1024, 8192)),
        fetch_bytes=rng.choice((8192, 65536)),
        readahead_bytes=rng.choice((0, 8192)),
        bypass_bytes=rng.choice((0, 2048)),
        bypass_after_bytes=rng.choice((0, 4096)),
        exclusive_run_bytes=rng.choice((4096, 65536)),
        zero_copy_bytes=rng.choice((0, 4096)),
        cold_bytes=rng.choice((1024, 65536)),
    )


class World:
    """Guest, cache and server; `step()` does one random thing."""

    def __init__(self, seed: int | str, **choices: Any) -> None:
        self.seed = seed
        rng = self.rng = random.Random(seed)
        self.now = 1000.0
        sectors = choices.pop("sectors", rng.choice((159, 160, 97)))
        self.sectors = sectors
        """What the guest knows of; the server may have more already."""
        self.server = Server(
            sectors * SECTOR,
            rng,
            fua=choices.pop("fua", rng.random() < 0.7),
            flush=choices.pop("flush", rng.random() < 0.9),
            trim=True,
            zeroes=rng.random() < 0.8,
        )
        if not self.server.can_flush:
            self.server.can_fua = False
        self.faults = choices.pop("faults", True)
        slots = choices.pop("slots", rng.choice((3, 4, 6, 12)))
        self.geometry = Geometry(sectors * SECTOR, 1024, 4096, slots)
        mode = choices.pop("mode", "writeback" if rng.random() < 0.75 else "writethrough")
        self.options = _drawn_options(rng, mode)
        assert not choices, choices
        self.cold_ratio = rng.choice((0.0, 0.3))
        self.guest: list[_GuestOp] = []
        self.number = 0
        # Per sector: the writes it may show now, None if it was discarded.
        self.possible: list[set[int] | None] = [{0} for _ in range(sectors)]
        self.zeroed_by: list[set[int]] = [set() for _ in range(sectors)]
        """Per sector: the write-zeroes of it, which the content alone does not tell apart."""
        self.settled = [False] * sectors
        """Per sector: the last writer died with its write in flight; what is read first stays."""
        self.unsure = [False] * sectors
        """Per sector: since it was written last it was discarded or zeroed, or the host was lost:
        a clean block and the server may rightly differ."""
        self.discarded_by = [0] * sectors
        """Per sector: the last discard; promises up to it are void."""
        self.completed = [0] * sectors
        """Per sector: the last write that completed."""
        self.durable = [0] * sectors
        """Per sector: the write that a flush promised."""
        self.returned: list[bytearray] = []
        """Memory of reads that were completed: it is the guest's own again."""
        self._new_image()
        self._start()

    # The process of the cache.

    def _new_image(self) -> None:
        identity = Identity("nbd://test", "")
        self.geometry = replace(self.geometry, disk_bytes=self.server.size_bytes)
        self.header = new_header(self.geometry, identity, bytes(16), 0)
        self.buffer = bytearray(self.geometry.file_bytes)

    def _start(self) -> None:
        self.turn = forget()
        self.cold = LaterCold()
        self.image = TestImage(self.buffer, self.header, self.rng)
        self.image.cold_ratio = self.cold_ratio
        self.cache = Cache(
            self.image,
            self.server,
            self.options,
            clock=lambda: self.now,
            turn=self.turn,
            cold=self.cold,
        )
        self.turn.add_stage(self.cache)
        self._resize()

    def _resize(self) -> None:
        cache = self.cache

        def done(outcome: Outcome) -> None:
            assert cache is self.cache, "a dead cache has grown"
            if not outcome.error:
                self.sectors = cache.size_bytes // SECTOR

        cache.resize(self.server.size_bytes, Outcome(done))

    def run_turn(self) -> None:
        """What was put off to the end of the turn happens."""
        self.turn.end()

    # The guest.

    def _free_range(self, most: int) -> tuple[int, int] | None:
        """Sectors that no write in flight touches; now and then any."""
        first = self.rng.randrange(self.sectors)
        end = min(self.sectors, first + self.rng.randint(1, most))
        if self.rng.random() < 0.05:
            return first, end
        for op in self.guest:
            if op.op in (WRITE, DISCARD, WRITE_ZEROES) and op.first < end and first < op.end:
                return None
        return first, end

    def _clean_range(self) -> tuple[int, int] | None:
        """Sectors of one cached block that is clean, and that no write in flight touches."""
        index, geometry = self.cache.index, self.geometry
        slot = self.rng.randrange(geometry.slots) + 1
        clean = index.valid(slot) & ~index.dirty(slot)
        if not clean:
            return None
        per_block = geometry.block_bytes // SECTOR
        block = self.rng.choice([each for each in range(16) if clean >> each & 1])
        first = index.granule_of[slot] * geometry.granule_bytes // SECTOR + block * per_block
        end = min(self.sectors, first + self.rng.randint(1, per_block))
        changing = (op for op in self.guest if op.op in (WRITE, DISCARD, WRITE_ZEROES))
        if first >= end or any(op.first < end and first < op.end for op in changing):
            return None
        return first, end

    def guest_write(self, op: int = WRITE, chosen: tuple[int, int] | None = None) -> None:
        chosen = chosen or self._free_range(24)
        if chosen is None:
            return
        first, end = chosen
        flags = FUA if self.rng.random() < 0.15 else 0
        if op == WRITE_ZEROES:
            flags |= MAY_UNMAP * self.rng.randrange(2)
        elif op == DISCARD:
            flags = 0
        guest = _GuestOp(op, first, end, flags)
        self.number += 1
        guest.number = self.number
        if op == WRITE:
            content = sector_bytes(self.number) * (end - first)
            guest.memory = bytearray(content)
            guest.buffers = self._split(guest.memory)
        for other in self.guest:
            if other.op in (WRITE, DISCARD, WRITE_ZEROES) and (
                other.first < end and first < other.end
            ):
                guest.rivals.append(other)
                other.rivals.append(guest)
        self._may_show(guest)
        self.guest.append(guest)
        self._submit(guest)

    def _may_show(self, guest: _GuestOp) -> None:
        """From now on, and in the reads in flight, its sectors may be as this change makes them."""
        op = guest.op
        for at in range(guest.first, guest.end):
            possible = self.possible[at]
            self.settled[at] = False
            self.unsure[at] |= op != WRITE
            if op == DISCARD:
                self.possible[at] = None
                self.discarded_by[at] = self.number
            elif possible is not None:
                self.possible[at] = possible | {self.number}
            if op == WRITE_ZEROES:
                self.zeroed_by[at].add(self.number)
            for other in self.guest:
                if other.op == READ and other.first <= at < other.end:
                    allowed = other.allowed[at - other.first]
                    if op == DISCARD or allowed is None:
                        other.allowed[at - other.first] = None
                    else:
                        allowed.add(self.number)

    def guest_read(self) -> None:
        first = self.rng.randrange(self.sectors)
        end = min(self.sectors, first + self.rng.randint(1, 24))
        guest = _GuestOp(READ, first, end, 0)
        guest.memory = bytearray(b"?" * ((end - first) * SECTOR))
        guest.buffers = self._split(guest.memory)
        guest.allowed = [
            None if (possible := self.possible[at]) is None else set(possible)
            for at in range(first, end)
        ]
        self.guest.append(guest)
        self._submit(guest)

    def guest_flush(self) -> None:
        guest = _GuestOp(FLUSH, 0, 0, 0)
        guest.completed_before = list(self.completed)
        self.guest.append(guest)
        self._submit(guest)

    def guest_prefetch(self) -> None:
        first = self.rng.randrange(self.sectors)
        guest = _GuestOp(PREFETCH, first, min(self.sectors, first + 30), 0)
        self.guest.append(guest)
        self._submit(guest)

    def _split(self, memory: bytearray) -> list[memoryview]:
        view = memoryview(memory)
        if self.rng.random() < 0.6:
            return [view]
        # A kill between two parts of one sector tears it (see `_HookedData`).
        unit = SECTOR if self.faults else 1
        cuts = sorted(self.rng.randrange(len(view) // unit + 1) * unit for _ in range(2))
        parts = [view[: cuts[0]], view[cuts[0] : cuts[1]], view[cuts[1] :]]
        return [part for part in parts if len(part)]

    def _submit(self, guest: _GuestOp) -> None:
        length = 0 if guest.op == FLUSH else (guest.end - guest.first) * SECTOR
        offset = guest.first * SECTOR
        cache = self.cache

        def done(request: Request) -> None:
            assert cache is self.cache, "a dead cache completed a request"
            self._done(guest, request.error)

        cache.submit(Request(guest.op, offset, length, guest.buffers, done, guest.flags))

    def _done(self, guest: _GuestOp, error: int) -> None:
        assert guest in self.guest, "completed twice"
        self.guest.remove(guest)
        if guest.op == READ:
            if not error:
                self._judge_read(guest)
            guest.memory[:] = _OWN * len(guest.memory)
            self.returned.append(guest.memory)
        elif guest.op == FLUSH:
            if not error:
                self._flushed(guest.completed_before)
        elif guest.op in (WRITE, WRITE_ZEROES):
            self._written(guest, error)
        elif guest.op == DISCARD and not error:
            for at in range(guest.first, guest.end):
                self.completed[at] = guest.number
        assert not error or self.faults

    def _written(self, guest: _GuestOp, error: int) -> None:
        guest.memory[:] = _OWN * len(guest.memory)  # The cache may not read it from here on.
        for at in range(guest.first, guest.end):
            rivals = [each for each in guest.rivals if each.first <= at < each.end]
            if error:
                continue  # Old or new from here on; `possible` has both.
            if any(each.op == DISCARD for each in rivals):
                continue
            self.possible[at] = {guest.number, *(each.number for each in rivals)}
            self.completed[at] = min(self.possible[at])
            self.unsure[at] &= guest.op != WRITE or bool(rivals)
        if not error and guest.flags & FUA and self.server.can_flush:
            for at in range(guest.first, guest.end):
                self.durable[at] = max(self.durable[at], self.completed[at])
            self.check_medium()

    def _number_of(self, at: int, content: bytes) -> int:
        """Which write `content` of sector `at` is."""
        number = int.from_bytes(content[:8], "little")
        assert content == sector_bytes(number), f"sector {at} is torn: {content[:16].hex()}"
        return number or max(self.zeroed_by[at], default=0)

    def _judge_read(self, guest: _GuestOp) -> None:
        for at in range(guest.first, guest.end):
            allowed = guest.allowed[at - guest.first]
            start = (at - guest.first) * SECTOR
            if allowed is None:
                continue
            content = bytes(guest.memory[start : start + SECTOR])
            number = int.from_bytes(content[:8], "little")
            assert content == sector_bytes(number), f"sector {at}: torn or never read"
            if not number:
                assert 0 in allowed or self.zeroed_by[at] & allowed, (at, allowed)
            else:
                assert number in allowed, f"sector {at}: read the write {number}, may be {allowed}"

    def _flushed(self, completed_before: list[int]) -> None:
        for at, number in enumerate(completed_before):
            if self.durable[at] < number and self.possible[at] is not None:
                self.durable[at] = number
        if self.server.can_flush:
            self.check_medium()

    def check_medium(self) -> None:
        """Whatever the server may lose now, what was promised is on the medium."""
        for at, promised in enumerate(self.durable):
            if promised <= self.discarded_by[at] or self.possible[at] is None:
                continue
            for content in self.server.history[at]:
                number = self._number_of(at, content)
                assert number >= promised, (
                    f"sector {at}: the write {promised} was flushed, "
                    f"the server may be left with {number}"
                )

    # Faults.

    def reconnect(self, *, power_loss: bool) -> None:
        deliver()
        self.server.cut()
        self.server.given_up = False
        if power_loss:
            self.server.lose_power()
        if self.rng.random() < 0.2:
            self.grow_server()
        if self.rng.random() < 0.5:
            self.server.resend()
            self.cache.upstream_reconnected()
        else:
            self.cache.upstream_reconnected()
            self.server.resend()
        self._resize()
        deliver()

    def give_up(self) -> None:
        """The server is away for too long."""
        deliver()
        self.server.give_up()
        deliver()

    def drop_clean(self) -> None:
        """Another host may have written the export."""
        deliver()
        self.cache.foreign.drop_clean()
        deliver()

    def grow(self) -> None:
        """The disk grows under whatever is going on, and perhaps again before that is done."""
        for _ in range(self.rng.choice((1, 1, 2))):
            self.grow_server()
            deliver()
            self._resize()
            deliver()

    def fail_everything(self) -> None:
        """The guest is stopped or leaves while the server is away: what is in flight ends now.

        Nothing that was waited for may come to the guest's memory afterwards.
        """
        self._begin_to_fail()
        self.reconnect(power_loss=self.rng.random() < 0.5)

    def _begin_to_fail(self) -> None:
        deliver()
        self.server.refuses = True
        self.cache.refuse(errno.EIO)
        self.server.fail_pending()
        deliver()
        if self.rng.random() < 0.5:
            # The cache's disk hangs as well. What has to be made durable waits for it, and has
            # nothing of the guest's memory.
            self._end_failing(lambda guest: guest.op in (READ, PREFETCH) or self._is_plain(guest))
        self._end_failing(lambda _: True, disk_works=True)
        self.cache.refuse(0)
        self.server.refuses = False
        deliver()

    def _is_plain(self, guest: _GuestOp) -> bool:
        """A write that is complete when it is in the cache."""
        return guest.op == WRITE and not guest.flags & FUA and self.options.mode == "writeback"

    def _end_failing(self, must: Callable[[_GuestOp], bool], *, disk_works: bool = False) -> None:
        """Whatever `must` end does so within a few turns."""
        left = len(self.guest)
        for _ in range(50):
            self.run_turn()
            left = sum(map(must, self.guest))
            if not left:
                break
            if disk_works and self.cold.jobs:
                self.cold.finish_one(self.rng)
        assert not left, f"{left} requests outlive their failing"

    def stop(self) -> None:
        """The process ends in order, at whatever it is: then it starts again."""
        self._begin_to_fail()
        if self.rng.random() < 0.8:
            self.reconnect(power_loss=False)
        completed = list(self.completed)
        answers: list[int] = []
        flush = Request(FLUSH, 0, 0, [], lambda request: answers.append(request.error))
        self.cache.submit(flush)
        for _ in range(self.rng.choice((0, 1, 5, 50))):
            self.run_turn()
            if self.cold.jobs and self.rng.random() < 0.5:
                self.cold.finish_one(self.rng)
            self.serve()
        deliver()
        self.server.give_up()  # It hangs up.
        deliver()
        if answers == [0]:
            self._flushed(completed)
        self.image.closed = True
        self.server.forget_client()
        self.header = self.image.header
        self._check_clean()
        self._start()

    def grow_server(self) -> None:
        """The server has more sectors from now on, and something is in them."""
        if self.server.size_bytes >= MAX_SECTORS * SECTOR:
            return
        count = self.rng.choice((1, 2, 5, 30))
        self.number += 1
        self.server.grow([sector_bytes(self.number)] * count)
        self.possible += [{self.number} for _ in range(count)]
        for each in (self.completed, self.durable):
            each += [self.number] * count
        self.zeroed_by += [set() for _ in range(count)]
        self.discarded_by += [0] * count
        self.settled += [False] * count
        self.unsure += [False] * count

    def kill(self) -> None:
        """kill -9 of the cache's process; it starts again and the guest submits again."""
        self.server.forget_client()
        self.header = self.image.header
        self._check_clean()
        self._start()
        if self.rng.random() < 0.3:
            self._guest_dies()
        for guest in list(self.guest):
            if guest in self.guest:
                self._submit(guest)

    def _check_clean(self) -> None:
        """What the file calls clean is what the server has: the order of stores was right."""
        image = MappedImage(self.buffer, self.header)
        per_block = self.geometry.block_bytes // SECTOR
        for slot in range(1, self.geometry.slots + 1):
            word, granule = image.state[slot], image.granule_of[slot]
            clean = word & ~(word >> 16) & 0xFFFF
            first = granule * self.geometry.granule_bytes // SECTOR
            for index in range(16 * per_block):
                at = first + index
                if not clean >> index // per_block & 1 or at >= self.sectors or self.unsure[at]:
                    continue
                start = slot * self.geometry.granule_bytes + index * SECTOR
                content = bytes(image.data[start : start + SECTOR])
                assert content in self.server.history[at], (
                    f"sector {at}: a clean block has {content[:8].hex()}, not the server's"
                )

    def _guest_dies(self) -> None:
        """What was in flight is not executed again: each sector is old or new, and stays so."""
        for guest in self.guest:
            if guest.op == WRITE:
                for at in range(guest.first, guest.end):
                    self.settled[at] = self.possible[at] is not None and not guest.rivals
        self.guest.clear()

    def lose_host(self) -> None:
        """The host loses power: cache file and guest are gone, the server may lose power too."""
        self.server.forget_client()
        if self.rng.random() < 0.5:
            self.server.lose_power()
        if self.server.can_flush:
            self.check_medium()
        self.guest.clear()
        for at, contents in enumerate(self.server.history):
            # Writes that were not flushed may be there, and may still be lost.
            self.possible[at] = {self._number_of(at, content) for content in contents}
            self.completed[at] = max(0, self.durable[at])
            self.settled[at] = False
            self.unsure[at] = True
        self._new_image()
        self._start()

    # Steps.

    def serve(self, *, error: int = 0) -> None:
        """The server replies to one command, or executes one without a reply."""
        if not self.server.pending:
            return
        command = self.rng.choice(self.server.pending)
        if error:
            if self.rng.random() < 0.5:
                self.server.execute(command)
            request = command.request
            if (request.op == FLUSH or request.flags & FUA) and self.rng.random() < 0.7:
                self.server.fail_fsync()
            self.server.reply(command, error)
            return
        if not command.executed:
            self.server.execute(command)
            if self.rng.random() < 0.3:
                return
        self.server.reply(command)

    def fail_to_flush(self) -> None:
        """The server cannot make something durable, amid whatever else it has executed by then and
        not replied to. That may be gone with it, and the replies come all the same."""
        pending = self.server.pending
        failing = [each for each in pending if each.request.op == FLUSH or each.request.flags & FUA]
        if not failing:
            self.serve(error=errno.EIO)
            return
        command = self.rng.choice(failing)
        for other in list(pending):
            if other is not command and not other.executed and self.rng.random() < 0.7:
                self.server.execute(other)
        self.server.fail_fsync()
        self.server.reply(command, errno.EIO)

    def tick(self, seconds: float) -> None:
        self.now += seconds
        due = self.cache.next_deadline()
        if due is not None and due <= self.now:
            deliver()
            self.cache.tick(self.now)
            deliver()

    def step(self) -> None:
        """One random thing happens."""
        rng = self.rng
        if self.faults and rng.random() < 0.03:
            self.image.stores_left = rng.randrange(12)
        try:
            self._step()
            if rng.random() < 0.7:
                self.run_turn()
        except Killed:
            self._kill()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed!r}: {error}") from error

    def kill_amid_write_of_clean_block(self) -> None:
        """What the file says of it and what it holds change one after the other."""
        if (chosen := self._clean_range()) is not None:
            self.image.stores_left = self.rng.randrange(3)
            self.guest_write(chosen=chosen)

    def _kill(self) -> None:
        try:
            self.kill()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed!r}: {error}") from error

    def _step(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.22:
            self.guest_write()
        elif kind < 0.40:
            self.guest_read()
        elif kind < 0.44:
            self.guest_flush()
        elif kind < 0.47:
            self.guest_write(DISCARD)
        elif kind < 0.50:
            self.guest_write(WRITE_ZEROES)
        elif kind < 0.52:
            self.guest_prefetch()
        elif kind < 0.57:
            self.tick(rng.choice((0.1, 1, 10, 100)))
        elif kind < 0.60 and self.cold.jobs:
            self.cold.finish_one(rng)
        elif kind < 0.66 and self.faults:
            self._fault()
        else:
            for _ in range(rng.choice((1, 1, 3, 10))):
                self.serve()

    def _fault(self) -> None:
        rng = self.rng
        kind = rng.random()
        if kind < 0.05:
            self.give_up()
        elif kind < 0.20:
            self.fail_to_flush()
        elif kind < 0.35:
            self.serve(error=rng.choice((errno.EIO, errno.ENOSPC)))
        elif kind < 0.53:
            self.reconnect(power_loss=False)
        elif kind < 0.71:
            self.reconnect(power_loss=True)
        elif kind < 0.76:
            self.kill()
        elif kind < 0.80:
            self.kill_amid_write_of_clean_block()
        elif kind < 0.85:
            self.lose_host()
        elif kind < 0.90:
            self.fail_everything()
        elif kind < 0.93:
            self.stop()
        elif kind < 0.96:
            self.grow()
        else:
            self.drop_clean()

    def settle(self) -> None:
        """No more faults: everything in flight completes, and all is what it should be."""
        try:
            self._settle()
        except AssertionError as error:
            raise AssertionError(f"seed {self.seed!r}: {error}") from error

    def _settle(self) -> None:
        self.image.stores_left = None
        if self.server.given_up:
            self.reconnect(power_loss=False)
        self._drain()
        assert not self.guest, f"{len(self.guest)} requests never completed"
        for first in range(0, self.sectors, 16):
            guest = _GuestOp(READ, first, min(self.sectors, first + 16), 0)
            guest.memory = bytearray((guest.end - first) * SECTOR)
            guest.buffers = [memoryview(guest.memory)]
            possible = self.possible[first : guest.end]
            guest.allowed = [None if each is None else set(each) for each in possible]
            self.guest.append(guest)
            self._submit(guest)
            self._drain()
        self.faults = False
        self.guest_flush()
        self._drain()
        assert not self.guest
        assert all(memory == _OWN * len(memory) for memory in self.returned), (
            "something was read into memory that was the guest's again"
        )
        index = self.cache.index
        assert index.dirty_blocks == index.dirty_slots == 0
        if not self.server.can_flush:
            return
        self.server.forget_client()
        self.server.lose_power()
        for at, possible in enumerate(self.possible):
            number = self._number_of(at, self.server.history[at][0])
            assert possible is None or number in possible, (
                f"sector {at}: the medium has {number}, must be {possible}"
            )
        self.check_index()

    def _drain(self) -> None:
        idle = 0
        for _ in range(20000):
            self.run_turn()
            if self.cold.jobs and (not self.server.pending or self.rng.random() < 0.3):
                self.cold.finish_one(self.rng)
            elif self.server.pending:
                self.serve()
                idle = 0
            elif not self.guest:
                return
            else:
                self.tick(40)
                idle += 1
                assert idle < 200, f"stuck with {len(self.guest)} requests"
        raise AssertionError("no end")

    def check_index(self) -> None:
        """The counters say what the arrays say."""
        index = self.cache.index
        used = [slot for slot in range(1, index.slots + 1) if index.state[slot]]
        assert index.used == len(used)
        assert index.valid_blocks == sum(index.valid(slot).bit_count() for slot in used)
        assert all(index.find(index.granule_of[slot]) == slot for slot in used)


def run(seed: int | str, steps: int = 120, **choices: Any) -> World:
    """One program: random steps, then everything must settle."""
    world = World(seed, **choices)
    for _ in range(steps):
        world.step()
    world.settle()
    return world

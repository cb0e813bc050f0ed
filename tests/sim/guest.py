"""The guest: its memory, its rings on both kinds of virtqueues, and its requests."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any

import trio

from bridge.guest.vhost_user.device_interface import MemoryRegion, RingSetup
from bridge.peers.packed_driver import PackedDriver, write_packed_chain
from bridge.peers.split_driver import Buffer, SplitDriver, write_chain
from bridge.spec.virtio_blk import S_OK, SEGMENT, T_DISCARD, T_FLUSH, T_IN, T_OUT, T_WRITE_ZEROES
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_WRITE
from tests.sim.medium import SECTOR, sector_bytes
from tests.sim.oracle import Change, Violation

if TYPE_CHECKING:
    from tests.sim.world import World

USER_BASE = 0x7F00_0000_0000
RING_SIZE = 32
RING_BYTES = 1024
SLOTS = 5
"""Requests of one queue at a time."""
MAX_SECTORS = 24
_TABLE = 16
_DATA = 512
_SLOT_BYTES = _DATA + MAX_SECTORS * SECTOR + 64
_STATUS = _DATA + MAX_SECTORS * SECTOR
UNANSWERED = 0xEE
OWN = b"!" * SECTOR
"""What the guest does with memory that it got back; no sector has it."""
NAMES = {
    T_IN: "read",
    T_OUT: "write",
    T_FLUSH: "flush",
    T_DISCARD: "discard",
    T_WRITE_ZEROES: "zero",
}


class Asked:
    """A request without an answer."""

    __slots__ = (
        *("began", "change", "count", "durable", "first", "kind", "queue", "slot", "toggles"),
        "token",
    )

    def __init__(
        self, kind: int, queue: int, slot: int, token: int, first: int, count: int
    ) -> None:
        self.kind = kind
        self.queue = queue
        self.slot = slot
        self.token = token
        self.first = first
        self.count = count
        self.began = 0
        self.change: Change | None = None
        self.durable = False
        """It is to be durable when it is answered, if the write cache is not toggled before."""
        self.toggles = 0

    def __repr__(self) -> str:
        what = "" if self.kind == T_FLUSH else f" {self.first}+{self.count}"
        number = f" = {self.change.first_number}" if self.change else ""
        return f"{NAMES[self.kind]} #{self.token}{what}{number} on queue {self.queue}"


class Queue:
    """One virtqueue, as its driver sees it."""

    def __init__(self, guest: Guest, index: int) -> None:
        self.index = index
        self.guest = guest
        self.at = index * RING_BYTES
        self.base = 0
        self.running = False
        """It should be: the guest has not stopped it."""
        self.begin_anew()

    def begin_anew(self) -> None:
        """The driver sets the ring up from nothing."""
        area = self.guest.memory[self.at : self.at + RING_BYTES]
        area[:] = bytes(RING_BYTES)
        kind = PackedDriver if self.guest.packed else SplitDriver
        self.driver: Any = kind(area, size=RING_SIZE, event_idx=self.guest.event_idx)
        self.base = self.driver.base
        self.driver.arm()
        self.slots = list(range(SLOTS))
        self.asked: dict[int, Asked] = {}

    def setup(self, kick_fd: int, call_fd: int) -> RingSetup:
        """How the front-end describes it."""
        at = USER_BASE + self.at
        driver = self.driver
        return RingSetup(
            size=RING_SIZE,
            desc_user_address=at,
            avail_user_address=at + driver.avail_offset,
            used_user_address=at + driver.used_offset,
            log_guest_address=None,
            base=self.base,
            kick_fd=kick_fd,
            call_fd=call_fd,
            error_fd=None,
        )


class Guest:
    """See the module's text."""

    def __init__(self, world: World) -> None:
        config = world.config
        self.world = world
        self.oracle = world.oracle
        self.packed = config.packed
        self.event_idx = config.event_idx
        self.size = config.queues * (RING_BYTES + SLOTS * _SLOT_BYTES)
        self.size = -(-self.size // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = os.memfd_create("sim-guest")
        os.ftruncate(self.fd, self.size)
        self.map = mmap.mmap(self.fd, self.size)
        self.memory = memoryview(self.map)
        self.queues = [Queue(self, index) for index in range(config.queues)]
        self.writes_are_durable = False
        """The device has been told that there is no write cache."""
        self.toggles = 0
        """How often the write cache was turned on or off."""
        self.features = 0
        self.sectors = world.medium.sectors
        self._token = 0
        self.counts = {"ok": 0, "failed": 0}
        self.asked_total = 0
        self.kick: Callable[[int], None] = lambda index: None
        self.answered = trio.Event()

    def close(self) -> None:
        self.queues.clear()
        os.close(self.fd)

    def region(self) -> MemoryRegion:
        return MemoryRegion(0, self.size, USER_BASE, 0, self.fd)

    @property
    def asked(self) -> list[Asked]:
        """Everything that has no answer, oldest first."""
        return sorted(
            (each for queue in self.queues for each in queue.asked.values()),
            key=lambda each: each.token,
        )

    # Requests.

    def _slot_at(self, queue: int, slot: int) -> int:
        return len(self.queues) * RING_BYTES + (queue * SLOTS + slot) * _SLOT_BYTES

    def submit(self, kind: int, first: int, count: int, queue: int, rng: Random) -> Asked | None:
        """Put a request into a ring and kick; None if there is no room."""
        ring = self.queues[queue]
        if not ring.slots:
            return None
        slot = ring.slots.pop(0)
        self._token += 1
        asked = Asked(kind, queue, slot, self._token, first, count)
        at = self._slot_at(queue, slot)
        memory = self.memory
        oracle = self.oracle
        sector = first if kind in (T_IN, T_OUT) else 0
        struct.pack_into("<IIQ", memory, at, kind, 0, sector)
        memory[at + _STATUS] = UNANSWERED
        data = at + _DATA
        buffers: list[Buffer] = [(at, 16, 0)]
        if kind == T_OUT:
            asked.change = oracle.begin(first, count)
            memory[data : data + count * SECTOR] = sector_bytes(asked.change.number) * count
        elif kind in (T_DISCARD, T_WRITE_ZEROES):
            discards = kind == T_DISCARD
            asked.change = oracle.begin(first, count, zeroes=not discards, anything=discards)
            memory[data : data + 16] = SEGMENT.pack(first, count, 0)
            buffers.append((data, 16, 0))
        asked.began = asked.change.began if asked.change else oracle.now()
        asked.durable = self.writes_are_durable and asked.change is not None
        asked.toggles = self.toggles
        if kind in (T_IN, T_OUT):
            buffers += self._pieces(data, count * SECTOR, DESC_WRITE * (kind == T_IN), rng)
        buffers.append((at + _STATUS, 1, DESC_WRITE))
        if self.world.config.indirect and rng.random() < 0.6:
            table = memory[at + _TABLE + 16 : at + _DATA]
            write = write_packed_chain if self.packed else write_chain
            buffers = [(at + _TABLE + 16, write(table, buffers), DESC_INDIRECT)]
        ring.driver.add(asked.token, buffers)
        ring.asked[asked.token] = asked
        self.asked_total += 1
        self.world.note("guest asks", request=asked)
        return asked

    def _pieces(self, at: int, length: int, flags: int, rng: Random) -> list[Buffer]:
        if rng.random() < 0.7 or length < 2:
            return [(at, length, flags)]
        cut = rng.randrange(1, length)
        return [(at, cut, flags), (at + cut, length - cut, flags)]

    def write_again(self, asked: Asked) -> None:
        """The same sectors at once, if there is room."""
        if asked.first + asked.count <= self.sectors:
            self.submit(T_OUT, asked.first, asked.count, asked.queue, self.world.rng)
            self.publish(asked.queue)

    def publish(self, queue: int) -> None:
        """Show the device what was added."""
        if self.queues[queue].driver.publish() and self.queues[queue].running:
            self.kick(queue)

    def look(self, queue: int) -> None:
        """The device has called: take what is answered."""
        ring = self.queues[queue]
        while True:
            for token, _ in ring.driver.poll():  # raises for what it was not given
                asked = ring.asked.pop(token, None)
                if asked is None:
                    raise Violation(f"request #{token} was answered twice")
                self._answered(asked)
            if not ring.driver.arm():
                return

    def _answered(self, asked: Asked) -> None:
        at = self._slot_at(asked.queue, asked.slot)
        status = self.memory[at + _STATUS]
        ok = status == S_OK
        if status == UNANSWERED:
            raise Violation(f"{asked} was completed without a status")
        self.world.note("guest is answered", request=asked, status="ok" if ok else status)
        self.counts["ok" if ok else "failed"] += 1
        if not ok:
            self.world.request_failed(asked)
        oracle = self.oracle
        data = at + _DATA
        if asked.kind == T_IN and ok:
            oracle.now()
            found = self.memory[data : data + asked.count * SECTOR]
            oracle.judge_read(asked.first, found, asked.began)
        elif asked.kind == T_FLUSH:
            if ok:
                oracle.flushed(asked.began)
            else:
                oracle.flush_failed()
        elif asked.change is not None:
            oracle.end(asked.change, done=ok)
            durable = asked.durable and asked.toggles == self.toggles
            if durable and ok and asked.kind != T_DISCARD:
                oracle.durable_at_once(asked.change, asked.first, asked.count)
        # It is the guest's own memory again.
        self.memory[data : data + MAX_SECTORS * SECTOR] = OWN * MAX_SECTORS
        self.memory[at + _STATUS] = ord("!")
        self.queues[asked.queue].slots.append(asked.slot)
        self.answered.set()
        if ok and asked.kind == T_OUT:
            self.world.written(asked)

    def check_own_memory(self) -> None:
        """Nothing was written into memory that no request uses."""
        for ring in self.queues:
            for slot in ring.slots:
                at = self._slot_at(ring.index, slot)
                if self.memory[at + _STATUS] not in (0, ord("!")):
                    raise Violation(f"the status of slot {slot} was written after its answer")
                data = self.memory[at + _DATA : at + _STATUS]
                if data[0] == ord("!") and bytes(data) != OWN * MAX_SECTORS:
                    raise Violation(f"the data of slot {slot} was written after its answer")

    # The guest's own life.

    def reset(self) -> None:
        """The guest starts anew: it knows of no request any more."""
        self.oracle.guest_forgets(each.change for each in self.asked if each.change is not None)
        for ring in self.queues:
            ring.begin_anew()
            for slot in ring.slots:
                at = self._slot_at(ring.index, slot)
                self.memory[at : at + _SLOT_BYTES] = bytes(_SLOT_BYTES)
        self.writes_are_durable = False

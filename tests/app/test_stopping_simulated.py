"""A guest that stops, starts, resets and writes at random, over a server that comes and goes.

Everything but the vhost-user session, drawn from a seed (which is in the message): every request is
answered once, every value that is read is explained, and an answered stop keeps its promise.
"""

from __future__ import annotations

import struct
from contextlib import suppress
from math import inf
from random import Random

import pytest
import trio
from trio.testing import MockClock

from bridge.cache.cache_options import OFF, WRITEBACK, WRITETHROUGH
from bridge.errors import LeftBehind
from bridge.spec import nbd as p
from bridge.spec.virtio_blk import S_OK, T_DISCARD, T_FLUSH, T_IN, T_OUT
from bridge.spec.virtqueue import F_RING_PACKED
from tests.app.test_stopping import (
    BLOCK,
    EIO,
    UNANSWERED,
    Bridge,
    World,
    _files_are_closed_at_once,  # noqa: F401
    settled,
    world,  # noqa: F401
)
from tests.guest.device_guest import RING_BYTES, PendingRequest

BLOCKS = 5
SECTORS = BLOCK // 512
SLOW_S = 40
"""Longer than a stop is waited for."""
GRACE_S = 95
"""Nothing that a lost connection has left comes later than this."""


class Written:
    """One write to one block. A write that failed is over, but perhaps not done."""

    def __init__(self, value: int, began: int) -> None:
        self.value = value
        self.began = began
        self.ended: float = inf
        self.done = False


class History:
    """What a block may hold: a regular register."""

    def __init__(self) -> None:
        first = Written(0, 0)
        first.ended, first.done = 0, True
        self.writes = [first]

    def allowed(self, since: int, until: int) -> set[int]:
        return {
            each.value
            for each in self.writes
            if each.began <= until
            and not any(w.done and w.began > each.ended and w.ended < since for w in self.writes)
        }


class Asked:
    """A request of the guest's that has no answer yet."""

    def __init__(
        self, ring: int, type_: int, first: int, count: int, began: int, written: list[Written]
    ) -> None:
        self.ring = ring
        self.type = type_
        self.first = first
        self.count = count
        self.began = began
        self.written = written
        self.pending: PendingRequest


class Guest:
    """A guest and its server's operator, both of which do things at random."""

    def __init__(self, seed: int, stage: World, bridge: Bridge) -> None:
        self.random = Random(seed)
        self.world = stage
        self.bridge = bridge
        self.keeps_in_flight = bool(self.random.randrange(4))
        self.running: set[int] = set()
        self.history = [History() for _ in range(BLOCKS)]
        self.asked: list[Asked] = []
        self.moment = 0
        self.values = 0
        self.requests = 0
        self.slow_until_s = 0.0

    # The guest.

    def submit(self) -> None:
        ring = self.random.choice(sorted(self.running))
        if sum(each.ring == ring for each in self.asked) >= 4 or self.requests >= 200:
            return  # as far as the descriptors and the memory go
        self.requests += 1
        self.moment += 1
        type_ = self.random.choice([T_IN, T_OUT, T_OUT, T_OUT, T_FLUSH, T_DISCARD])
        first = self.random.randrange(BLOCKS)
        count = self.random.randrange(1, min(4, BLOCKS - first) + 1)
        written = []
        out = b""
        for at in range(first, first + count if type_ in (T_OUT, T_DISCARD) else first):
            self.values += type_ == T_OUT
            write = Written(self.values if type_ == T_OUT else 0, self.moment)
            self.history[at].writes.append(write)
            written.append(write)
            out += struct.pack("<Q", write.value) * (BLOCK // 8)
        asked = Asked(ring, type_, first, count, self.moment, written)
        if type_ == T_DISCARD:
            out = struct.pack("<QII", first * SECTORS, count * SECTORS, 0)
        asked.pending = self.bridge.put(
            type_,
            first * SECTORS if type_ in (T_IN, T_OUT) else 0,
            out=out,
            room=count * BLOCK if type_ == T_IN else 0,
            index=ring,
        )
        self.asked.append(asked)

    def look(self) -> None:
        """See what was answered."""
        self.moment += 1
        for ring in self.bridge.guest.rings.values():
            ring.driver.poll()  # raises if something is answered twice
        for asked in list(self.asked):
            status = asked.pending.status
            if status == UNANSWERED:
                continue
            self.asked.remove(asked)
            for write in asked.written:
                write.ended = self.moment
                write.done = status == S_OK and asked.type == T_OUT
            if asked.type == T_IN and status == S_OK:
                self.check(asked.pending.data, asked.first, asked.began)
        self.moment += 1

    def check(self, data: bytes, first: int, since: int) -> None:
        for at in range(len(data) // BLOCK):
            (value,) = struct.unpack_from("<Q", data, at * BLOCK)
            assert value in self.history[first + at].allowed(since, self.moment), f"block {at}"

    def start(self, index: int) -> None:
        self.bridge.start(index)
        self.running.add(index)

    async def stop(self, index: int) -> None:
        ring = self.bridge.guest.rings[index]
        device = self.bridge.device._rings[index]
        self.running.discard(index)
        try:
            await self.bridge.stop(index)
        except LeftBehind:
            if not self.keeps_in_flight:
                ring.base = device._queue.close(told=False)  # the guest's driver knows
            return
        cache = self.bridge.storage._cache
        assert self.running or cache is None or not cache.index.dirty_slots

    async def reset(self) -> None:
        with suppress(LeftBehind):
            await self.bridge.device.reset()
        self.look()
        for asked in self.asked:
            for write in asked.written:
                write.ended = self.moment
        self.asked.clear()
        self.running.clear()
        guest = self.bridge.guest
        for index, ring in list(guest.rings.items()):
            ring.close()
            guest.memory[ring.at : ring.at + RING_BYTES] = bytes(RING_BYTES)
            guest.make_ring(index)
        features = guest.device.offered_features()
        guest.device.set_features(features if guest.packed else features & ~F_RING_PACKED)
        if self.keeps_in_flight:
            self.bridge.track()

    def cache_writes(self, yes: bool) -> None:
        self.bridge.device.write_config(32, bytes([yes]), migration=False)

    # The server.

    async def be_fast(self) -> None:
        """What it was asked when it was slow is done, so that nothing comes after a loss."""
        self.world.faults.delay_s = 0
        await trio.sleep_until(self.slow_until_s)

    async def lose_connections(self, *, for_long: bool) -> None:
        await self.be_fast()
        self.world.faults.stall = False
        self.world.faults.refuse_connections = for_long
        self.world.server.cut()

    # Both.

    async def do_something(self) -> None:
        faults = self.world.faults
        chance = self.random.randrange(100)
        if chance < 52 and self.running:
            self.submit()
        elif chance < 60:
            await trio.sleep(self.random.choice([0, 0.01, 0.5, 3]))
        elif chance < 66 and self.running:
            await self.stop(self.random.choice(sorted(self.running)))
        elif chance < 76 and len(self.running) < 2:
            self.start(min({0, 1} - self.running))
        elif chance < 80:
            await self.lose_connections(for_long=bool(self.random.randrange(2)))
        elif chance < 86:
            self.world.come_back()
        elif chance < 88:
            faults.delay_s = self.random.choice([0, 1, SLOW_S])
        elif chance < 90:
            faults.stall = True
        elif chance < 93:
            faults.errors = {p.CMD_FLUSH: EIO} if self.random.randrange(2) else {}
        elif chance < 96:
            faults.hangs_up_on = self.random.choice([None, p.CMD_TRIM, p.CMD_WRITE, p.CMD_FLUSH])
        elif chance < 98:
            self.cache_writes(bool(self.random.randrange(2)))
        elif chance < 99:
            await self.reset()
        if faults.delay_s:
            self.slow_until_s = trio.current_time() + 2 * SLOW_S
        await settled()
        self.look()

    async def live(self) -> None:
        bridge = self.bridge
        await bridge.stop()
        if self.keeps_in_flight:
            bridge.track()
        self.start(0)
        self.start(1)
        for _ in range(self.random.randrange(30, 90)):
            await self.do_something()
        self.world.faults.errors = {}
        self.world.faults.hangs_up_on = None
        await self.lose_connections(for_long=False)
        for index in {0, 1} - self.running:
            self.start(index)
        with trio.fail_after(2000):
            while self.asked:
                await trio.sleep(0.5)
                self.look()
        self.cache_writes(True)
        for _ in range(2):  # The first one may tell of a loss.
            flushed = await bridge.do(T_FLUSH)
        assert flushed == S_OK
        self.look()
        await self.stop(0)
        await self.stop(1)
        assert not self.running
        self.check(bytes(self.world.image.data[: BLOCKS * BLOCK]), 0, self.moment)
        changes = self.world.changes()
        await trio.sleep(300)
        assert self.world.changes() == changes
        link = bridge.storage.client.link
        assert not link.in_flight
        assert not link._changes._outlived
        assert not bridge.storage.departure._late
        assert not bridge.device._engine._unanswered


@pytest.mark.parametrize("batch", range(4))
async def test_simulated_guest_that_stops_and_starts_explains_every_value(
    batch: int,
    world: World,  # noqa: F811
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Two blocks are a large request that has a lane, and three are done in pieces.
    monkeypatch.setattr("bridge.guest.virtio.blk.SMALL_BYTES", BLOCK)
    monkeypatch.setattr("bridge.guest.virtio.blk.WHOLE_BYTES", 2 * BLOCK)
    monkeypatch.setattr("bridge.guest.virtio.blk_request.WHOLE_BYTES", 2 * BLOCK)
    monkeypatch.setattr("bridge.guest.virtio.blk_request.PIECE_BYTES", BLOCK)
    monkeypatch.setattr("bridge.datapath.lanes.TURN_BYTES", 4 * BLOCK)
    monkeypatch.setattr("bridge.datapath.lanes.IN_FLIGHT_BYTES", 16 * BLOCK)
    for seed in range(batch * 100, batch * 100 + 12):
        random = Random(seed)
        world.image.data[:] = bytes(len(world.image.data))
        world.server.commands = []
        for file in world.directory.glob("*.cache"):
            file.unlink()
        async with world.bridge(
            mode=random.choice([OFF, OFF, WRITEBACK, WRITETHROUGH]),
            packed=bool(random.randrange(2)),
            connections=random.choice([1, 1, 2]),
            stale_write_grace_s=GRACE_S,
        ) as bridge:
            try:
                await Guest(seed, world, bridge).live()
            except BaseException as error:
                error.add_note(f"seed {seed}")
                raise

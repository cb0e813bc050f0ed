"""What the oracle excuses, and that it excuses nothing beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.cache.cache_options import OFF
from tests.sim.config import Seed, script
from tests.sim.medium import SECTOR, Medium, sector_bytes
from tests.sim.oracle import Change, Oracle, Violation
from tests.sim.world import World


class Torn:
    """A sector in a cache: a write that is complete, and one that a kill has interrupted."""

    def __init__(self) -> None:
        self.medium = Medium(1, Random(1), lost=lambda at, numbers: None)
        self.oracle = Oracle(self.medium, has_cache=True)
        self.old = self.oracle.begin(0, 1)
        self.oracle.end(self.old, done=True)
        self.new = self.oracle.begin(0, 1)
        self.since = self.oracle.now()
        """When a read in flight beside it was asked for."""

    def mix(self, other: Change | None = None) -> bytes:
        """The first bytes of one write, and the last ones of another."""
        head, tail = sector_bytes((other or self.new).number), sector_bytes(self.old.number)
        return head[:100] + tail[100:]


def test_sector_that_is_torn_although_no_kill_interrupted_its_write_is_found() -> None:
    torn = Torn()
    with pytest.raises(Violation, match="nobody wrote"):
        torn.oracle.judge_read(0, torn.mix(), torn.since)


def test_sector_under_an_interrupted_write_is_old_new_or_of_both() -> None:
    torn = Torn()
    torn.oracle.interrupted([torn.new])
    for found in (torn.mix(), sector_bytes(torn.old.number), sector_bytes(torn.new.number)):
        torn.oracle.judge_read(0, found, torn.since)
    torn.oracle.end(torn.new, done=True)
    torn.oracle.judge_read(0, torn.mix(), torn.since)


def test_torn_sector_with_a_byte_of_neither_write_is_found() -> None:
    torn = Torn()
    torn.oracle.interrupted([torn.new])
    older = Change(77, 0, zeroes=False, anything=False)
    with pytest.raises(Violation, match="alone"):
        torn.oracle.judge_read(0, torn.mix(older), torn.since)


def test_sector_that_is_torn_after_its_write_was_executed_again_is_found() -> None:
    torn = Torn()
    torn.oracle.interrupted([torn.new])
    torn.oracle.end(torn.new, done=True)
    with pytest.raises(Violation, match="nobody wrote"):
        torn.oracle.judge_read(0, torn.mix(), torn.oracle.now())
    torn.medium.write(0, [-1], fua=True)
    with pytest.raises(Violation, match="nobody wrote"):
        torn.oracle.flushed(torn.oracle.now())


def test_write_that_was_answered_before_the_kill_was_not_interrupted() -> None:
    torn = Torn()
    torn.oracle.end(torn.new, done=True)
    torn.oracle.interrupted([torn.new])
    with pytest.raises(Violation, match="nobody wrote"):
        torn.oracle.judge_read(0, torn.mix(), torn.since)


def test_sectors_of_a_read_are_judged_one_by_one() -> None:
    medium = Medium(3, Random(1), lost=lambda at, numbers: None)
    oracle = Oracle(medium, has_cache=True)
    interrupted = oracle.begin(1, 1)
    oracle.interrupted([interrupted])
    mixed = sector_bytes(1)[:100] + bytes(SECTOR - 100)
    oracle.judge_read(0, bytes(SECTOR) + mixed + bytes(SECTOR), oracle.now())
    with pytest.raises(Violation, match="sector 2"):
        oracle.judge_read(0, bytes(SECTOR) + mixed + mixed, oracle.now())


class WrittenThrough:
    """Two writes of a sector, of which the server gets the second; then it, and the host, lose
    power. Without that it has zeroes."""

    def __init__(self, *, at_once: bool) -> None:
        self.medium = Medium(1, Random(1), lost=lambda at, numbers: None)
        self.oracle = Oracle(self.medium, has_cache=True)
        first = self.oracle.begin(0, 1)
        if not at_once:
            self.oracle.end(first, done=True)
        self.last = self.oracle.begin(0, 1)
        for each in (first, self.last) if at_once else (self.last,):
            self.oracle.end(each, done=True)

    def host_loses_power(self) -> None:
        self.oracle.host_lost([], written_through=True)


def test_write_whose_block_went_to_the_server_with_newer_data_is_lost_with_that() -> None:
    world = WrittenThrough(at_once=True)
    world.oracle.server_lost(0, [world.last.number])
    world.host_loses_power()


def test_write_that_was_complete_before_the_lost_one_began_is_missed() -> None:
    world = WrittenThrough(at_once=False)
    world.oracle.server_lost(0, [world.last.number])
    with pytest.raises(Violation, match="the server has"):
        world.host_loses_power()


def test_durable_write_is_missed_although_one_beside_it_is_lost() -> None:
    world = WrittenThrough(at_once=True)
    first = world.oracle.sectors[0][1]
    first.durable = True
    world.oracle.server_lost(0, [world.last.number])
    with pytest.raises(Violation, match="lost power"):
        world.host_loses_power()


@pytest.mark.parametrize("at_once", [False, True])
def test_writes_that_the_server_has_not_lost_are_missed_when_the_host_has(at_once: bool) -> None:
    with pytest.raises(Violation, match="the server has"):
        WrittenThrough(at_once=at_once).host_loses_power()


@contextmanager
def uncached(*, plugin: bool) -> Iterator[World]:
    """A world without a cache, in which a complete write is at the server, not flushed."""
    configs = ((number, script(Seed(number))[0]) for number in range(1000))
    number = next(
        number
        for number, config in configs
        if (config.mode, config.plugin, config.flushes) == (OFF, plugin, True)
        and config.keeps_in_flight
    )
    world = World(Seed(number))
    try:
        change = world.oracle.begin(0, 1)
        world.medium.write(0, [change.number], fua=False)
        world.oracle.end(change, done=True)
        yield world
    finally:
        world._give_back()


def lose_power(world: World) -> None:
    """The server has lost that write."""
    world.medium._rng = SimpleNamespace(randrange=lambda kinds: 0)  # type: ignore[assignment]
    assert world.medium.lose() == 1


def bridge_dies(world: World, *, alone_since: float) -> None:
    bridge: Any = SimpleNamespace(
        alone_since=alone_since, has_moved=False, storage=None, died_amid_copy=False
    )
    world.bridge = bridge
    world.bridge_died(bridge)


def test_loss_that_only_a_bridge_without_a_guest_heard_of_is_forgotten_with_it() -> None:
    with uncached(plugin=False) as world:
        began = world.oracle.now()
        lose_power(world)
        bridge_dies(world, alone_since=began)
        world.oracle.flushed(world.oracle.now())


@pytest.mark.parametrize(
    ("plugin", "has_guest", "lost_before"),
    [(False, True, False), (True, False, False), (False, False, True)],
    ids=["the guest is there", "the plugin says it again", "the bridge before it had left word"],
)
def test_loss_that_the_next_bridge_can_know_of_is_to_be_told(
    plugin: bool, has_guest: bool, lost_before: bool
) -> None:
    with uncached(plugin=plugin) as world:
        if lost_before:
            lose_power(world)
        began = world.oracle.now()
        if not lost_before:
            lose_power(world)
        bridge_dies(world, alone_since=inf if has_guest else began)
        with pytest.raises(Violation, match="a flush has succeeded"):
            world.oracle.flushed(world.oracle.now())

"""A cache file that is damaged while no bridge runs, or removed while one does (row 15 of
docs/durability.md), and the operator who saves what can be saved."""

from __future__ import annotations

import os
from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING

from bridge.cache.cache_options import OFF, WRITEBACK
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.inspect import drop
from bridge.cache.file.layout import HEADER_AREA_BYTES, parse_header_untrusted
from bridge.errors import ConfigError
from tests.sim.bridge import CacheFlush
from tests.sim.medium import SECTOR

if TYPE_CHECKING:
    from tests.sim.bridge import Bridge
    from tests.sim.world import World


def _may_happen(world: World) -> Bridge | None:
    """The bridge that has the file; None: there is none, or it may go on at another host."""
    bridge = world.bridge
    if world.config.mode == OFF or world.config.migrates or bridge is None or not bridge.serves:
        return None
    return None if bridge.gone.is_set() else bridge


async def damage(world: World, rng: Random) -> None:
    """The bridge ends somehow, and then a bit of its file's index is another."""
    bridge = _may_happen(world)
    if bridge is None:
        return

    async def flip(in_order: bool) -> None:
        for path in world.cache_files():
            if (sectors := _flip_a_bit(path, rng)) is not None:
                world.count("cache file damaged")
                world.damaged.update(sectors)

    world.before_next = flip
    _end(world, bridge, kills=rng.random() < 0.7)


async def remove(world: World, rng: Random) -> None:
    """The file of a bridge that runs is removed, and then the bridge ends: in order, after which
    nothing is missing, or by a kill, after which the guest has what the server has."""
    bridge = _may_happen(world)
    if bridge is None:
        return

    world.count("cache file removed")
    for path in world.cache_files():
        os.unlink(path)
    world.has_no_file = bridge
    _end(world, bridge, kills=rng.random() < 0.5)


def ended_without_file(world: World, *, in_order: bool) -> None:
    """That bridge is gone."""
    world.has_no_file = None
    if in_order:
        world.oracle.judge_whole_image("a bridge without its cache file has stopped in order")
    else:
        world.lose_what_is_under_way()  # (It may have been killed while it was stopping.)
    _begin_anew(world, written_through=world.config.mode != WRITEBACK)


def _end(world: World, bridge: Bridge, *, kills: bool) -> None:
    if kills:
        world.lose_what_is_under_way()
        bridge.kill()
    else:
        if not world.config.keeps_in_flight:
            world.excuse("any")
        world.excuse("flush")  # A stop that is given up during an outage.
        bridge.terminate()


def _flip_a_bit(path: str, rng: Random) -> range | None:
    """In the state of a slot that is used: the sectors that it held. None: none is used."""
    with open(path, "r+b") as file:
        whole = bytearray(file.read())
        try:
            header = parse_header_untrusted(bytes(whole[:HEADER_AREA_BYTES]))
        except ConfigError:
            return None
        if header is None:
            return None
        image, geometry = MappedImage(whole, header), header.geometry
        used = [slot for slot in range(1, geometry.slots + 1) if image.state[slot]]
        if not used:
            return None
        slot = rng.choice(used)
        at = geometry.states_offset + 8 * slot + rng.randrange(8)
        file.seek(at)
        file.write(bytes([whole[at] ^ 1 << rng.randrange(8)]))
        sectors = geometry.granule_bytes // SECTOR
        return range(image.granule_of[slot] * sectors, (image.granule_of[slot] + 1) * sectors)


async def save_intact(world: World, path: str) -> None:
    """A bridge has refused the file. An operator brings what is intact of it to the server, drops
    the rest, and boots the guest anew."""
    world.count("intact part saved")
    world.reset_guest()
    flush = CacheFlush(world, path, force=False, skip_damaged=True)
    await world.run_by_hand(flush)
    if flush.problem is None and not flush.dead:
        since = world.oracle.now()
        for at in set(range(len(world.oracle.sectors))) - world.damaged:
            world.oracle.judge_image(at, since, "promised", "what was intact has been saved")
    with suppress(FileNotFoundError):
        os.stat(path)
        drop(path, discard_dirty=True)
    _begin_anew(world, written_through=False)


def _begin_anew(world: World, *, written_through: bool) -> None:
    """A new guest finds what the server has. Of what the last process has left at a foreign server,
    nothing tells the next one: the operator waits until that is executed, and durable there. (If it
    were lost later, the next bridge would take that for another host's change, and hold back.)"""
    world.damaged.clear()
    world.reset_guest()
    if not world.config.plugin:
        if world.server is not None:
            world.server.forget_the_dead()
        world.medium.end_flush(world.medium.begin_flush(answered_only=False))
    came = [] if world.server is None else list(world.server.in_flight())
    world.oracle.host_lost(came, written_through=written_through)
    world.written_elsewhere = False

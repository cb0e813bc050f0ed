"""Live migration: the guest stops here, and goes on through another bridge, at another host.

Both bridges are in one session of the plugin, so that the target may connect before the source has
let go. The stop of the last ring is the promise: everything of the guest's is at the server,
durable, and nothing more comes from the source.
"""

from __future__ import annotations

import os
from random import Random
from typing import TYPE_CHECKING

import trio

from bridge.errors import LeftBehind
from tests.sim.bridge import Bridge, FrontEnd

if TYPE_CHECKING:
    from tests.sim.world import World

_PATIENCE_S = 15
"""How long the target may take to be up, before the source's guest is stopped."""
_PAGES_PER_BYTE = 8 * 4096


class HangsUp(LeftBehind):
    """The front-end hangs up by itself."""

    def __init__(self) -> None:
        super().__init__("the front-end hangs up")


async def migrate(world: World, rng: Random) -> None:
    """One migration, if there is a guest to migrate and the other host is free."""
    source = world.bridge
    if source is None or source.front_end is None or not source.front_end.connected:
        return
    if world.target is not None or any(not each.ended.is_set() for each in world.sources):
        return
    world.count("migration")
    other = 1 - source.host
    if rng.random() < 0.6:
        target = world.target = world.start_bridge(other)
        with trio.move_on_after(rng.choice((0, 1, _PATIENCE_S))):
            while not (target.serves or target.gone.is_set()):
                await world.timeline.sleep(0.2)
        if target.gone.is_set() and world.target is target:
            world.target = None
    front_end = source.front_end
    if source.gone.is_set() or world.bridge is not source or front_end is None:
        return
    front_end.want(lambda: _move(world, front_end, other))


async def _move(world: World, front_end: FrontEnd, other: int) -> None:
    """What the source's QEMU asks of its bridge, up to the answer that lets the guest go."""
    bridge, guest = front_end.bridge, world.guest
    size = guest.size // _PAGES_PER_BYTE + 64
    log = os.memfd_create("sim-log")
    try:
        os.ftruncate(log, size)
        front_end.device.set_log(log, 0, size)
    finally:
        os.close(log)
    front_end.device.set_logging(True)
    # As at any stop, see `Steps._stop_rings`.
    world.excuse("any" if not world.config.keeps_in_flight else "flush")
    running = list(front_end.rings)
    try:
        for index in running:
            guest.queues[index].running = False
            await front_end.stop(index)
            guest.look(index)
    except LeftBehind:
        front_end.check_alive()
        world.no_more_changes(bridge)
        world.count("migration is cancelled")
        raise
    if not running or (world.target is not None and world.target.gone.is_set()):
        front_end.device.set_logging(False)
        _resume(world, front_end, running)
        return
    world.note("the guest goes on at another host", host=other)
    world.no_more_changes(bridge)
    world.oracle.flushed(world.oracle.now())
    _leave(world, bridge, running, other)
    raise HangsUp


def _resume(world: World, front_end: FrontEnd, running: list[int]) -> None:
    """The guest goes on where it was."""
    for index in running:
        world.guest.queues[index].running = True
        front_end.start(index)


def _leave(world: World, bridge: Bridge, running: list[int], other: int) -> None:
    """The guest is not here any more; the next bridge gets it."""
    for index in running:
        queue = world.guest.queues[index]
        queue.driver.disarm()
        queue.running = True
    world.count("migrated")
    world.forget_region()
    world.write_cache_moves = True
    world.host = other
    bridge.has_moved = True
    world.sources = [each for each in world.sources if not each.ended.is_set()]
    world.sources.append(bridge)
    # An operator ends the source's bridge, or its host does.
    ends = world.rng.choice((bridge.terminate, bridge.terminate, bridge.kill))
    world.timeline.after(world.rng.choice((0.1, 5, 70, 1000)), ends)
    bridge.over.set()

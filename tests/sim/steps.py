"""The steps of a program: what the guest, the operators and the faults do."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING

from bridge.cache.cache_options import OFF, WRITEBACK
from bridge.errors import LeftBehind
from bridge.spec import nbd as p
from bridge.spec.virtio_blk import (
    F_DISCARD,
    F_WRITE_ZEROES,
    T_DISCARD,
    T_FLUSH,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from tests.sim import damage, host, migration
from tests.sim.bridge import WRITEBACK_AT
from tests.sim.guest import MAX_SECTORS

if TYPE_CHECKING:
    from tests.sim.bridge import FrontEnd
    from tests.sim.world import World

_NEEDS = {T_DISCARD: F_DISCARD, T_WRITE_ZEROES: F_WRITE_ZEROES}


class Steps:
    """Takes the steps in a world."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._hot: tuple[int, int] | None = None
        # Of the programs without a cache, where such requests are merged, every other one.
        self._asks_adjacent = world.config.mode == OFF and world.seed.number % 2 == 1

    async def take(self, name: str, rng: Random) -> None:
        """One step, with all its choices from `rng`."""
        await getattr(self, "_" + name.replace(" ", "_").replace("-", "_"))(rng)

    # The guest.

    def _range(self, rng: Random) -> tuple[int, int]:
        """Sectors, most often near those of before."""
        sectors = self.world.guest.sectors
        unit = max(1, self.world.config.min_block // 512) if rng.random() < 0.5 else 1
        if self._hot is not None and rng.random() < 0.6:
            first = max(0, min(sectors - 1, self._hot[0] + rng.randrange(-4, 5)))
        else:
            first = rng.randrange(sectors)
        first -= first % unit
        count = min(rng.choice((1, 2, 2, 4, 8, 8, MAX_SECTORS)), sectors - first)
        self._hot = first, count
        return first, count

    def _overlaps(self, first: int, count: int) -> bool:
        """With a change in flight: most guests do not do that."""
        return any(
            each.change is not None
            and each.first < first + count
            and first < each.first + each.count
            for each in self.world.guest.asked
        )

    def _ask(self, rng: Random, kinds: tuple[int, ...]) -> None:
        guest = self.world.guest
        kind = rng.choice(kinds)
        if kind in _NEEDS and not guest.features & _NEEDS[kind]:
            kind = T_OUT
        queue = rng.randrange(len(guest.queues))
        if kind == T_FLUSH:
            if self.world.can_flush:
                guest.submit(kind, 0, 0, queue, rng)
        else:
            first, count = self._range(rng)
            if kind == T_IN or rng.random() < 0.1 or not self._overlaps(first, count):
                guest.submit(kind, first, count, queue, rng)

    def _publish(self) -> None:
        world = self.world
        for queue in world.guest.queues:
            if world.rng.random() < 0.2:
                world.publish_later(queue.index)
            else:
                world.guest.publish(queue.index)

    async def _burst(self, rng: Random) -> None:
        for _ in range(rng.choice((1, 2, 4, 8))):
            self._ask(rng, (T_OUT, T_OUT, T_OUT, T_IN, T_IN))
            if rng.random() < 0.3:
                self._publish()
        if self._asks_adjacent and rng.random() < 0.6:
            self._ask_adjacent(rng, (T_OUT, T_OUT, T_IN))
        self._publish()

    def _ask_adjacent(self, rng: Random, kinds: tuple[int, ...]) -> None:
        """Requests each of which begins where the one before ends: they may be one command, where
        there is no cache."""
        guest = self.world.guest
        kind, queue = rng.choice(kinds), rng.randrange(len(guest.queues))
        first, _ = self._range(rng)
        for _ in range(rng.choice((2, 3, 5))):
            count = min(rng.choice((1, 2, 8)), guest.sectors - first)
            if count < 1 or (kind == T_OUT and self._overlaps(first, count)):
                return
            guest.submit(kind, first, count, queue, rng)
            first += count

    async def _mixed(self, rng: Random) -> None:
        for _ in range(rng.choice((1, 3, 6))):
            self._ask(rng, (T_OUT, T_IN, T_DISCARD, T_WRITE_ZEROES, T_FLUSH))
        self._publish()

    async def _flush(self, rng: Random) -> None:
        for _ in range(rng.choice((1, 1, 2))):
            self._ask(rng, (T_FLUSH,))
        self._publish()

    async def _wait(self, rng: Random) -> None:
        await self.world.timeline.sleep(rng.choice((0.1, 1, 6)))

    async def _wait_long(self, rng: Random) -> None:
        await self.world.timeline.sleep(rng.choice((30, 70, 200)))

    async def _reset(self, rng: Random) -> None:
        """The guest's driver resets the device, as at a reboot."""
        world = self.world
        front_end = self._front_end()
        if front_end is None:
            return
        world.count("reset")
        world.excuse("any")

        async def reset() -> None:
            # Whatever becomes of the bridge: the guest's driver has decided.
            world.resetting = True
            try:
                await front_end.device.reset()
            except LeftBehind:
                world.note("the reset leaves something behind")
            raise migration.HangsUp

        front_end.want(reset)

    async def _write_cache(self, rng: Random) -> None:
        world = self.world
        front_end = self._front_end()
        on = rng.random() < 0.5
        if front_end is None or not world.can_flush:
            return
        world.count("write cache toggled")
        world.guest.toggles += 1
        if on:
            world.guest.writes_are_durable = False

        async def write() -> None:
            front_end.device.write_config(WRITEBACK_AT, bytes([on]), migration=False)
            world.guest.writes_are_durable = not on

        front_end.want(write)

    # The front-end.

    def _front_end(self) -> FrontEnd | None:
        bridge = self.world.bridge
        if bridge is None or bridge.front_end is None or not bridge.front_end.connected:
            return None
        return bridge.front_end

    async def _front_end_leaves(self, rng: Random) -> None:
        front_end = self._front_end()
        if front_end is not None:
            self.world.count("front-end leaves")
            self._without_region()
            self.world.excuse("flush")  # As in `_stop_rings`.

            async def leave() -> None:
                raise migration.HangsUp

            front_end.want(leave)

    def _without_region(self) -> None:
        """Requests that are not answered in time fail when a ring stops."""
        if not self.world.config.keeps_in_flight:
            self.world.excuse("any")

    async def _stop_ring(self, rng: Random) -> None:
        self._stop_rings([rng.randrange(len(self.world.guest.queues))])

    async def _stop_all(self, rng: Random) -> None:
        self._stop_rings(list(range(len(self.world.guest.queues))))

    def _stop_rings(self, indexes: list[int]) -> None:
        world = self.world
        front_end = self._front_end()
        if front_end is None:
            return
        world.count("ring stops")
        self._without_region()
        # A stop that has to be given up during an outage fails the guest's next flush, also where
        # the cache has lost nothing.
        world.excuse("flush")

        async def stop() -> None:
            for index in indexes:
                if index in front_end.rings:
                    world.guest.queues[index].running = False
                    try:
                        await front_end.stop(index)
                    except LeftBehind:
                        front_end.check_alive()
                        world.no_more_changes(front_end.bridge)
                        raise
                    world.guest.look(index)
                    if not front_end.rings:
                        world.all_stopped(front_end.bridge)

        front_end.want(stop)

    async def _migrate(self, rng: Random) -> None:
        """The guest goes on at another host, through another bridge."""
        if self.world.config.migrates:
            await migration.migrate(self.world, rng)

    async def _start(self, rng: Random) -> None:
        for queue in self.world.guest.queues:
            if not queue.running and rng.random() < 0.8:
                self.world.restart_ring(queue.index)

    # The network.

    def _cut_some(self, rng: Random, *, all_of_them: bool) -> None:
        sockets = self.world.network.open_sockets()
        if not sockets:
            return
        self.world.count("connection cut")
        self._foreign_loss()
        for sock in sockets if all_of_them else [rng.choice(sockets)]:
            if rng.random() < 0.5 and sock.peer is not None:
                sock.peer.hang_up()  # type: ignore[attr-defined]
            else:
                sock.reset()

    def _foreign_loss(self) -> None:
        """A foreign server that is lost may have lost what it had not flushed, for all that can be
        known: the next flush fails."""
        world = self.world
        if not world.config.plugin and world.config.mode == OFF:
            world.excuse("flush")
        if world.config.reconnect_timeout_s:
            world.excuse("any")

    async def _cut(self, rng: Random) -> None:
        self._cut_some(rng, all_of_them=True)

    async def _cut_one(self, rng: Random) -> None:
        self._cut_some(rng, all_of_them=False)

    async def _silence(self, rng: Random) -> None:
        sockets = self.world.network.open_sockets()
        if sockets:
            self.world.count("silence")
            self._foreign_loss()
            for sock in sockets if rng.random() < 0.5 else [rng.choice(sockets)]:
                sock.fall_silent(rng.choice((1, 8, 100)))

    async def _refuse(self, rng: Random) -> None:
        await self._unreachable(rng, "refuses", "connects refused")

    async def _hang(self, rng: Random) -> None:
        await self._unreachable(rng, "hangs", "connects hang")

    async def _unreachable(self, rng: Random, how: str, fault: str) -> None:
        world = self.world
        world.count(fault)
        self._foreign_loss()
        setattr(world.network.line, how, True)
        if rng.random() < 0.7:
            self._cut_some(rng, all_of_them=True)
        world.timeline.after(
            rng.choice((0.5, 3, 20, 60)), lambda: setattr(world.network.line, how, False)
        )

    # The server.

    def _down(self, rng: Random) -> None:
        self.world.kill_server()
        self.world.timeline.after(rng.choice((0.01, 1, 5, 30)), self.world.start_server)

    async def _server_dies(self, rng: Random) -> None:
        if self.world.server is not None:
            self.world.count("server killed")
            self._foreign_loss()
            self._down(rng)

    async def _server_loses_power(self, rng: Random) -> None:
        world = self.world
        world.count("server loses power")
        self._foreign_loss()
        if world.config.mode == OFF:
            world.excuse("flush")
        self._down(rng)
        lost = world.medium.lose()
        world.note("server has lost", sectors=lost)
        world.volume.boot += 1
        if not world.config.plugin:
            world.power_lost()

    async def _power_lost_amid_writes(self, rng: Random) -> None:
        """Some of what a write is at the server is done, and some is not."""
        world = self.world
        for _ in range(rng.choice((1, 3))):
            self._ask(rng, (T_OUT,))
        self._publish()
        delay_s = world.config.service_s + world.network.line.most_s
        await world.timeline.sleep(rng.uniform(0, 4 * delay_s))
        await self._server_loses_power(rng)

    async def _cut_amid_writes(self, rng: Random) -> None:
        """A write is left behind perhaps, and the guest writes there again as soon as it can."""
        world = self.world
        first, count = self._range(rng)
        asked = world.guest.submit(T_OUT, first, count, 0, rng)
        self._publish()
        delay_s = world.config.service_s + world.network.line.most_s
        await world.timeline.sleep(rng.uniform(0, 2 * delay_s))
        self._cut_some(rng, all_of_them=True)
        for _ in range(40):
            await world.timeline.sleep(0.1)
            if asked not in world.guest.asked:
                break
        world.guest.submit(T_OUT, first, count, 0, rng)
        self._publish()

    async def _flush_fails_amid_writes(self, rng: Random) -> None:
        """What is in flight is executed before, and answered after."""
        self._ask(rng, (T_OUT,))
        self._publish()
        self.world.faults.failing_flushes = 1
        for kinds in ((T_FLUSH,), (T_OUT,), (T_OUT,)):
            self._ask(rng, kinds)
        self._publish()
        await self.world.timeline.sleep(rng.choice((0.01, 0.1, 1)))
        self._ask(rng, (T_FLUSH,))
        self._publish()

    async def _flush_fails(self, rng: Random) -> None:
        self.world.faults.failing_flushes = rng.choice((1, 1, 2))

    async def _no_space(self, rng: Random) -> None:
        self._for_a_while(rng, "no_space")
        if self._asks_adjacent:
            for _ in range(3):
                self._ask_adjacent(rng, (T_OUT,))
                self._publish()

    async def _stall(self, rng: Random) -> None:
        self.world.count("stall")
        if self.world.config.reconnect_timeout_s:
            self.world.excuse("any")
        self._foreign_loss()
        self._for_a_while(rng, "stalls")

    def _for_a_while(self, rng: Random, fault: str) -> None:
        faults = self.world.faults
        setattr(faults, fault, True)
        self.world.timeline.after(
            rng.choice((0.2, 2, 10, 80)), lambda: setattr(faults, fault, False)
        )

    async def _hang_up_on(self, rng: Random) -> None:
        faults = self.world.faults
        self.world.excuse("any")
        self._foreign_loss()
        faults.hangs_up_on = rng.choice((p.CMD_READ, p.CMD_WRITE, p.CMD_FLUSH, p.CMD_TRIM))

        def end() -> None:
            faults.hangs_up_on = None

        self.world.timeline.after(rng.choice((0.5, 4, 30)), end)

    async def _cache_disk_full(self, rng: Random) -> None:
        if self.world.config.mode != OFF:
            self._for_a_while(rng, "cache_disk_full")

    async def _resize(self, rng: Random) -> None:
        """The operator has the export's size looked at."""
        bridge = self.world.bridge
        if bridge is not None and self.world.bridge_serves and bridge.service is not None:
            # The connections are replaced.
            self._foreign_loss()
            bridge.service.resize()

    async def _grow(self, rng: Random) -> None:
        world = self.world
        if len(world.oracle.sectors) > 300:
            return
        world.count("grown")
        if not world.bridge_serves:
            # The cache file is of another size then, and is not used: what the guest had not
            # flushed may have been in it, for all that the next process knows.
            world.excuse("flush")
        unit = max(1, world.config.min_block // 512)
        count = unit * rng.choice((1, 2, 8, 30))
        numbers = []
        for _ in range(count):
            world.oracle.numbers += 1
            numbers.append(world.oracle.numbers)
        world.medium.grow(numbers)
        world.oracle.grow(numbers)
        if rng.random() < 0.7:
            self._cut_some(rng, all_of_them=True)

    # The bridge and its host.

    async def _kill(self, rng: Random) -> None:
        if self.world.bridge is not None:
            self.world.count("bridge killed")
            self.world.bridge.kill()

    async def _kill_at_line(self, rng: Random) -> None:
        bridge = self.world.bridge
        if bridge is None or bridge.gone.is_set():
            return
        self.world.count("bridge killed at a line")
        bridge.kill_after_lines(rng.choice((rng.randrange(60), rng.randrange(3000))) + 1)

        def kill() -> None:
            if not self.world.is_calm:
                bridge.kill()

        self.world.timeline.after(rng.choice((0.01, 3)), kill)
        for _ in range(rng.randrange(4)):
            self._ask(rng, (T_OUT, T_OUT, T_IN, T_FLUSH))
        self._publish()

    async def _terminate(self, rng: Random) -> None:
        world = self.world
        if world.bridge is not None:
            world.count("bridge terminated")
            self._without_region()
            world.excuse("flush")  # As in `_stop_rings`.
            world.bridge.terminate()

    async def _cache_flush(self, rng: Random) -> None:
        """The bridge ends somehow, and an operator brings to the server what it has left."""
        world = self.world
        if world.bridge is None or world.config.mode == OFF:
            return
        self._without_region()

        async def flush(in_order: bool) -> None:
            for path in world.cache_files():
                await world.flush_by_hand(path, force=False)

        world.before_next = flush
        if rng.random() < 0.7:
            world.bridge.kill()
        else:
            world.bridge.terminate()

    async def _other_host_writes(self, rng: Random) -> None:
        """While no bridge runs. It was stopped in order, so that nothing of ours is missing."""
        world = self.world
        if world.bridge is None or not world.bridge.serves:
            return
        self._without_region()
        first, count = self._range(rng)

        kills = world.config.mode == WRITEBACK and world.counts_writers and rng.random() < 0.4

        async def write(in_order: bool) -> None:
            await world.timeline.sleep(1)  # The server lets go of our session.
            if not world.counts_writers:
                # What a lost connection has left at the server is not kept from another host's
                # writes (docs/durability.md): the operator waits.
                await world.timeline.sleep(world.config.grace_s)
            if (in_order or kills) and world.server is not None:
                world.write_elsewhere(first, count)
                world.written_elsewhere = not in_order

        world.before_next = write
        if kills:
            world.bridge.kill()
        else:
            world.bridge.terminate()

    async def _other_host_takes_over(self, rng: Random) -> None:
        """Another host writes while our bridge runs, and has lost its connection."""
        world = self.world
        bridge = world.bridge
        if bridge is None or not world.bridge_serves or not world.counts_writers:
            return
        assert bridge.storage is not None
        cache, client = bridge.storage._cache, bridge.storage.client
        before = client.link.generation
        first, count = self._range(rng)
        self._cut_some(rng, all_of_them=True)
        world.network.line.refuses = True

        def write() -> None:
            world.network.line.refuses = world.is_calm
            is_idle = not world.guest.asked and (cache is None or not cache.index.dirty_slots)
            if is_idle and not world.is_calm and world.server is not None:
                world.write_elsewhere(first, count)
                world.written_elsewhere = world.written_elsewhere or cache is not None
                world.timeline.after(30, decide)
            world.network.line.refuses = False

        def decide() -> None:
            # A guest that wrote meanwhile is held back: the operator has to decide.
            if bridge is world.bridge and bridge.storage is not None:
                if client.connected and client.link.generation == before and not world.over:
                    world.timeline.after(30, decide)  # It has not noticed that it is cut off.
                elif client.connected:
                    world.written_elsewhere = False
                else:
                    world.excuse("any")
                    bridge.terminate()

        self._without_region()
        world.timeline.after(rng.choice((0.5, 3)), write)

    async def _host_loses_power(self, rng: Random) -> None:
        world = self.world
        world.count("host loses power")
        server_too = rng.random() < 0.4
        came: list[tuple[int, int]] = []
        if world.server is not None:
            came = list(world.server.in_flight())
            world.lose_what_is_under_way()
        for process in (world.bridge, world.target, *world.processes):
            if process is not None and process.directory == world.directory:
                process.kill()
        world.reset_guest()
        if server_too:
            world.kill_server()
            came = []
            world.timeline.after(2, world.start_server)
            world.volume.boot += 1
            world.medium.lose()
        came += host.lose_power(world)
        world.boot = (int.from_bytes(world.boot, "big") + 1).to_bytes(16, "big")
        world.oracle.host_lost(
            came, written_through=world.config.mode != WRITEBACK and not server_too
        )

    async def _cache_file_damaged(self, rng: Random) -> None:
        await damage.damage(self.world, rng)

    async def _cache_file_removed(self, rng: Random) -> None:
        await damage.remove(self.world, rng)

    async def _everything_at_once(self, rng: Random) -> None:
        actions: list[Callable[[Random], object]] = [
            *(self._cut, self._server_dies, self._server_loses_power, self._kill),
            *(self._flush_fails, self._burst, self._flush, self._refuse, self._mixed),
        ]
        for _ in range(rng.choice((2, 3))):
            await rng.choice(actions)(rng)  # type: ignore[misc]

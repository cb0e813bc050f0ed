"""The end of a program: faults stop, and everything is answered, durable, and as it should be."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from bridge.cache.cache_options import OFF
from bridge.cache.file.inspect import show
from bridge.spec.virtio_blk import T_FLUSH, T_IN
from tests.sim import bounds
from tests.sim.faults import Faults
from tests.sim.guest import MAX_SECTORS
from tests.sim.oracle import Violation

if TYPE_CHECKING:
    from tests.sim.bridge import Bridge
    from tests.sim.world import World

SETTLE_S = 3000.0
"""Once faults have stopped, everything is answered by then: a silent server is given up after ten
times the request timeout."""
_LOSES = ("server loses power", "flush fails at the server")
"""Faults with which the server's content may become an older one."""
_SOON_S = 0.9
"""For a read, with no fault, from a server and a network that are fast: below the timers that would
hide a lost kick."""


class Ending:
    """See the module's text."""

    def __init__(self, world: World) -> None:
        self.world = world

    async def settle(self) -> None:
        """No more faults: everything is answered, durable, and what it should be."""
        checks_bounds = self.world.seed.number % 8 == 0
        if checks_bounds and self.world.bridge is not None:
            bounds.check(self.world.bridge)
        self.world.note("faults end")
        self.world.is_calm = True
        self._calm()
        self.world.publish_late()
        await self._until_quiet()
        if checks_bounds and self.world.bridge is not None:
            bounds.check(self.world.bridge)
        await self._flush_and_read()
        await self._stop_in_order()

    async def _until_quiet(self) -> None:
        pause_s = 0.05
        with trio.move_on_after(SETTLE_S) as waiting:
            while not self._is_quiet():
                await self.world.timeline.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 20)
                self._keep_calm()
        if waiting.cancelled_caught:
            raise Violation(f"{SETTLE_S:.0f} s after the last fault: {self._what_is_left()}")

    def _calm(self) -> None:
        network = self.world.network
        self.world.faults = Faults()
        network.line.refuses = network.line.hangs = False
        for sock in (*network.open_sockets(), *network.sockets.values()):
            if sock.silent:
                # Also where the server has noticed the silence, and the bridge has not.
                sock.reset()
        self.world.start_server()
        self.world.bridge_may_run()
        for bridge in self.world.sources:
            bridge.terminate()

    def _keep_calm(self) -> None:
        """Things that only an operator, a front-end or a supervisor would do now."""
        for queue in self.world.guest.queues:
            if not queue.running:
                self.world.restart_ring(queue.index)
        bridge = self.world.bridge
        if bridge is None or bridge.began_to_stop or bridge.storage is None:
            return
        if "another host wrote" not in bridge.storage.client.outages.reason:
            return
        counts = self.world.counts
        if counts["migrated"]:
            # A flush failed at the server when the guest moved: in what is a new session then, the
            # bridge to which it moved cannot tell the one that it came from from other hosts
            # (docs/durability.md, row 12). The operator decides.
            self.world.count("held back after a migration")
            bridge.terminate()
        elif not self.world.config.plugin and any(counts[each] for each in _LOSES):
            # What a dead process had not flushed was read by the next one, and was lost then
            # ("What cannot be promised"). The operator decides.
            self.world.count("held back after a loss")
            bridge.terminate()

    def _is_quiet(self) -> bool:
        bridge = self.world.bridge
        if bridge is None or bridge.gone.is_set() or bridge.front_end is None:
            return False
        if not bridge.front_end.connected or bridge.began_to_stop:
            return False
        assert bridge.storage is not None
        if bridge.front_end.is_busy:
            return False
        running = len(bridge.front_end.rings) == len(self.world.guest.queues)
        return running and bridge.storage.client.connected and not self.world.guest.asked

    def _what_is_left(self) -> str:
        if asked := self.world.guest.asked:
            return f"without an answer are {asked[:8]}"
        bridge = self.world.bridge
        if bridge is None:
            return "no bridge runs"
        return "the bridge serves no guest"

    async def _ask(self, kind: int, first: int = 0, count: int = 0) -> int:
        """One request; how many have failed since."""
        guest = self.world.guest
        failed = guest.counts["failed"]
        asked = guest.submit(kind, first, count, 0, self.world.rng)
        if asked is None:
            raise AssertionError("no room for a request")
        began_s = trio.current_time()
        took_s = 0.0
        self.world.publish_later(0)
        with trio.move_on_after(SETTLE_S) as waiting:
            while guest.asked:
                guest.answered = trio.Event()
                await guest.answered.wait()
                if asked is not None and asked not in guest.asked:
                    # (A step may have had the guest ask for something else a moment ago.)
                    took_s, asked = trio.current_time() - began_s, None
        if waiting.cancelled_caught:
            raise Violation(f"no answer in {SETTLE_S:.0f} s: {guest.asked}")
        is_fast = self.world.config.service_s <= 0.01 and self.world.network.line.most_s <= 0.03
        if kind == T_IN and is_fast and took_s > _SOON_S:
            raise Violation(f"a read took {took_s:.1f} s of a server that takes none")
        return guest.counts["failed"] - failed

    async def _flush_and_read(self) -> None:
        if self.world.can_flush:
            # One may tell of a loss. One that was executed again does not count as having told, nor
            # does one beside which something was written, of which it cannot tell.
            failed = 0
            while failed < 3:
                written = self.world.oracle.numbers
                if not await self._ask(T_FLUSH):
                    break
                failed += self.world.oracle.numbers == written
            else:
                raise Violation("three flushes fail, long after the last fault")
        for first in range(0, self.world.guest.sectors, MAX_SECTORS):
            count = min(MAX_SECTORS, self.world.guest.sectors - first)
            if await self._ask(T_IN, first, count):
                raise Violation("a read fails, long after the last fault")
        self.world.guest.check_own_memory()

    async def _stop_in_order(self) -> None:
        bridge, lost_connection = await self._stop()
        if bridge.problem is not None and lost_connection and self._may_stop_too_early:
            self.world.count("stopped before a failed session was replaced")
            self.world.bridge_may_run()
            await self._until_quiet()
            bridge, _ = await self._stop()
        # A guest that cannot flush cannot be told of a loss either, not even of one that was none.
        if bridge.problem is not None and self.world.can_flush:
            raise Violation(f"the last stop failed: {bridge.problem}")
        self.world.over = True
        self.world._start_bridge.set()
        self.world.oracle.judge_whole_image("the bridge has stopped in order")
        if self.world.config.mode != OFF:
            for path in self.world.cache_files():
                if show(path).dirty_bytes:
                    raise Violation("a cache that was closed in order has dirty data")
        await self.world.timeline.sleep(60)
        self.world.oracle.judge_whole_image("a minute after the end")

    @property
    def _may_stop_too_early(self) -> bool:
        """What a guest that cannot flush has written is flushed by the stop, perhaps for the first
        time since the server has failed with it. The plugin ends its session then, and within the
        limit of the stop the next one may not be there. What is kept goes to the server at the next
        start (docs/durability.md, row 10)."""
        config = self.world.config
        return not self.world.can_flush and config.mode != OFF and config.flushes

    async def _stop(self) -> tuple[Bridge, bool]:
        """Stop the bridge; it, and whether it has lost its connection meanwhile."""
        # A stop may be shorter than a grace time.
        await self.world.timeline.sleep(2 * self.world.config.grace_s)
        bridge = self.world.bridge
        if bridge is None or bridge.storage is None:
            raise Violation("the bridge has ended although nothing is wrong")
        client = bridge.storage.client
        before = client.outages.total
        self.world.bridge_may_run(False)
        bridge.terminate()
        with trio.move_on_after(SETTLE_S) as waiting:
            for each in (*self.world.sources, bridge):
                await each.ended.wait()
        if waiting.cancelled_caught:
            raise Violation("the bridge does not end")
        return bridge, client.outages.total > before

"""One program: a guest, bridges, a network, a server, a host, operators, and what befalls them."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable
from math import inf
from pathlib import Path
from random import Random
from typing import Any

import trio

from bridge.app.settings import (
    CacheSettings,
    DiskSettings,
    LimitSettings,
    ServerSettings,
    ServeSettings,
)
from bridge.cache.cache_options import OFF
from bridge.cache.file.inspect import drop, show
from bridge.datapath.engine import PURE_ENGINE, choose
from bridge.errors import Remedy
from bridge.guest.device import BlkDevice
from bridge.spec.virtio_blk import T_FLUSH, T_IN
from tests.sim import host
from tests.sim.bridge import Bridge, CacheFlush
from tests.sim.config import Seed, script
from tests.sim.guest import MAX_SECTORS, Asked, Guest
from tests.sim.medium import Medium
from tests.sim.network import Network
from tests.sim.oracle import Oracle, Violation
from tests.sim.process import Process
from tests.sim.server import NbdServer
from tests.sim.steps import Steps
from tests.sim.timeline import Timeline
from tests.sim.volume import Volume

SETTLE_S = 3000.0
"""Once faults have stopped, everything is answered by then: a silent server is given up after ten
times the request timeout."""
_SOON_S = 0.5
"""For a read, with no fault, from a server and a network that are fast: below the timers that would
hide a lost kick."""
_UNDER_WAY_S = 3.0
"""A session that is left has that long to answer what is in flight."""
_ROOT = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"


class Faults:
    """What is wrong with the server now."""

    def __init__(self) -> None:
        self.stalls = False
        self.hangs_up_on: int | None = None
        self.no_space = False
        self.failing_flushes = 0


class World:
    """See the module's text."""

    def __init__(
        self, seed: Seed, *, tell: Callable[[float, str, dict[str, Any]], None] | None = None
    ) -> None:
        self.seed = seed
        self.config, self.script = script(seed)
        self.rng = Random(f"world {seed.number}")
        self.counts: Counter[str] = Counter()
        self._tell = tell
        self.timeline = Timeline()
        self.network = Network(self.timeline, self.rng)
        self.medium = Medium(self.config.sectors, self.rng, lost=self._server_lost)
        self.oracle = Oracle(self.medium, has_cache=self.config.mode != OFF)
        self.volume = Volume()
        self.faults = Faults()
        self.synced: dict[int, bytes] = {}
        self.boot = bytes(15) + b"\1"
        self.directory = f"{_ROOT}/nbd-bridge-sim-{os.getpid()}"
        shutil.rmtree(self.directory, ignore_errors=True)
        os.mkdir(self.directory, 0o700)
        self.default_directory = Path(self.directory) / "default"
        self.region: tuple[int, int] | None = None
        """Descriptor and size of the in-flight region that the front-end keeps."""
        self.guest = Guest(self)
        self.guest.kick = self._kick
        self.server: NbdServer | None = None
        self.bridge: Bridge | None = None
        self.processes: list[Process] = []
        """Those of operators."""
        self.before_next: Callable[[bool], Awaitable[None]] | None = None
        """What operators do before the bridge starts again. It is told whether the last one has
        stopped in order."""
        self.excuses: set[str] = set()
        """What has happened that may fail requests: `any` of them, or `flush`."""
        self.over = False
        self.is_calm = False
        """No fault happens any more."""
        self._late: list[int] = []
        self.quiet_from_s = inf
        """No change comes to the server from then on, until a ring starts."""
        self._to_notice = 0
        """The generation of connections whose end will tell the bridge of a loss of power."""
        self.resetting = False
        """The guest has begun to reset the device."""
        self.engine = choose() if self.config.compiled else PURE_ENGINE
        self.uri = "nbd://10.0.0.1/vm"
        self.settings = self._settings()
        self._start_bridge = trio.Event()
        self._connectable = trio.Event()
        self._connectable.set()
        self.states: set[str] = set()

    def _settings(self) -> ServeSettings:
        config = self.config
        return ServeSettings(
            disk=DiskSettings(
                socket_path="/sim/guest.sock", num_queues=config.queues, queue_size=32
            ),
            cache=CacheSettings(
                mode=config.mode,
                size_bytes=4 << 20,
                directory=self.directory,
                flush_interval_s=config.flush_interval_s,
            ),
            server=ServerSettings(
                connections=config.connections,
                request_timeout_s=config.request_timeout_s,
                reconnect_timeout_s=config.reconnect_timeout_s,
                stale_write_grace_s=config.grace_s,
            ),
            limits=LimitSettings(
                stop_timeout_s=config.stop_timeout_s, drain_timeout_s=config.drain_timeout_s
            ),
        )

    # What is told.

    def note(self, event: str, **fields: Any) -> None:
        """For the trace."""
        if self._tell is not None:
            self._tell(trio.current_time() - self._began_s, event, fields)

    def count(self, fault: str) -> None:
        """This fault has happened."""
        self.counts[fault] += 1
        self.note(fault)

    def excuse(self, *what: str) -> None:
        """Requests may fail from here on."""
        self.excuses.update(what)

    def request_failed(self, asked: Asked) -> None:
        """The guest was given an error: may that be?"""
        if "any" in self.excuses:
            return
        if "flush" in self.excuses and asked.kind != T_IN:
            return  # What has to be durable may be any change, and the cache may ask for it, too.
        if "write" in self.excuses and asked.kind != T_IN:
            return
        raise Violation(f"{asked} fails, and nothing has happened that may make it fail")

    def written(self, asked: Asked) -> None:
        """A write was answered. The guest often writes there again, which is what a write that was
        left behind somewhere may not survive."""
        if not self.is_calm and self.rng.random() < 0.15:
            delay_s = self.rng.choice((0.0, 0.001, 0.1))
            self.timeline.after(delay_s, lambda: self.guest.write_again(asked))

    # The server.

    def service_s(self) -> float:
        """From a command's arrival to its execution."""
        return self.rng.uniform(0, self.config.service_s) if self.config.service_s else 0.0

    def reply_s(self) -> float:
        """From there to its reply."""
        return self.service_s() if self.rng.random() < 0.5 else 0.0

    def check_space(self, kind: int) -> None:
        """Raises OSError if the storage is full."""
        if self.faults.no_space and self.rng.random() < 0.7:
            self.count("no space")
            self.excuse("write", "flush")
            raise OSError(28, "No space left on device")

    def fsync_fails(self) -> bool:
        """This flush fails."""
        if self.faults.failing_flushes:
            self.faults.failing_flushes -= 1
            return True
        return False

    def fsync_failed(self) -> None:
        """What was not durable may be gone; no later flush says so."""
        self.count("flush fails at the server")
        self.excuse("flush")
        if self.rng.random() < 0.8:
            self.medium.lose()

    def _server_lost(self, at: int, numbers: list[int]) -> None:
        self.oracle.server_lost(at, numbers)

    def start_server(self) -> None:
        """A new server process, if there is none."""
        if self.server is None:
            self.server = NbdServer(self)
            self.network.accept = self.server.accept
            self.note("server starts")

    def write_elsewhere(self, first: int, count: int) -> None:
        """Another host writes the volume, durable, and is through with it."""
        server = self.server
        assert server is not None
        change = self.oracle.begin(first, count)
        numbers = [change.number] * count
        failing, self.faults.failing_flushes = self.faults.failing_flushes, 0
        if server.service is None:
            self.medium.write(first, numbers, fua=True)
            # Nothing tells of it: the operator has to.
            for path in self.cache_files():
                drop(path)
        elif not server.write_elsewhere(first, numbers):
            self.oracle.end(change, done=False)
            self.faults.failing_flushes = failing
            return
        self.faults.failing_flushes = failing
        self.oracle.end(change, done=True)
        change.durable = True
        self.count("another host writes")
        self.note("another host has written", first=first, count=count, number=change.number)

    def kill_server(self) -> None:
        """kill -9 of the server's process."""
        if self.server is not None:
            self.server.die()
            self.server = None
            self.network.accept = None

    # The bridge.

    async def keep_bridge(self) -> None:
        """What starts the bridge, and starts it again whenever it has ended."""
        while not self.over:
            await self._start_bridge.wait()
            if self.over:
                return
            bridge = self.bridge = Bridge(self)
            self.quiet_from_s = inf  # It looks at what was left, and decides.
            self.note("bridge starts")
            self._nursery.start_soon(bridge.run)
            await bridge.gone.wait()
            if not bridge.dead:
                await bridge.ended.wait()
                self._bridge_ended()
            self.bridge = None
            problem = bridge.problem
            if problem is not None and problem.remedy is Remedy.FORCE_OR_GIVE_UP:
                # No other host wrote, which only the operator knows.
                await self.flush_by_hand(problem.path, force=True)
            before, self.before_next = self.before_next, None
            if before is not None and not self.is_calm:
                await before(problem is None and not bridge.dead)
            await trio.sleep(self.rng.choice((0.0, 0.1, 2.0)) + (problem is not None))

    def cache_files(self) -> list[str]:
        """Their paths."""
        names = sorted(os.listdir(self.directory))
        return [os.path.join(self.directory, name) for name in names if name.endswith(".cache")]

    async def flush_by_hand(self, path: str, *, force: bool) -> None:
        """An operator runs `nbd-bridge cache flush`."""
        self.count("cache flush by hand")
        flush = CacheFlush(self, path, force=force)
        self.processes.append(flush)
        self._nursery.start_soon(flush.run)
        await flush.gone.wait()
        self.processes.remove(flush)

    def bridge_may_run(self, yes: bool = True) -> None:
        """The operator's switch."""
        if yes:
            self._start_bridge.set()
        elif self._start_bridge.is_set():
            self._start_bridge = trio.Event()

    @property
    def bridge_serves(self) -> bool:
        """A bridge lives that has been connected to the server."""
        bridge = self.bridge
        return bridge is not None and bridge.serves and not bridge.gone.is_set()

    def power_lost(self) -> None:
        """A server that names no instance has lost power: does a bridge notice?"""
        bridge = self.bridge
        if bridge is None or not self.bridge_serves:
            self.oracle.loss_unnoticed()
        elif bridge.storage is not None and bridge.storage.client.connected:
            self._to_notice = bridge.storage.client.link.generation

    def bridge_died(self, bridge: Bridge) -> None:
        """It was killed."""
        client = None if bridge.storage is None else bridge.storage.client
        noticing, self._to_notice = self._to_notice, 0
        if client is not None and client.connected and client.link.generation == noticing:
            self.oracle.loss_unnoticed()  # before the end of the connection had come to it
        self._front_end_lost(killed=True)

    def _bridge_ended(self) -> None:
        """It has ended in order, or given up at its start."""
        assert self.bridge is not None
        self.note("bridge has ended")
        if not self.config.keeps_in_flight and self._can_flush:
            # No message tells the next process that there is to be no write cache.
            self.guest.toggles += 1
            self.guest.writes_are_durable = False
        if self.bridge.problem is not None and not self.config.keeps_in_flight:
            self.oracle.loss_unnoticed()  # The operator was told, and no process can know.
        self._front_end_lost(killed=False)

    def front_end_left(self) -> None:
        """The front-end hung up, or was hung up on, and connects again."""
        self._front_end_lost(killed=False)

    def _front_end_lost(self, *, killed: bool) -> None:
        for queue in self.guest.queues:
            queue.driver.disarm()
            self.guest.look(queue.index)
            queue.base = queue.driver.restore_base
        if self.resetting:
            self.reset_guest()
        elif not self.config.keeps_in_flight and killed:
            self.note("guest is reset: its requests are lost")
            self.reset_guest()

    def reset_guest(self) -> None:
        """The guest boots anew."""
        self.resetting = False
        self.guest.reset()
        if self.region is not None:
            os.close(self.region[0])
            self.region = None

    async def may_connect(self) -> None:
        """The front-end waits for this."""
        await self._connectable.wait()

    def guest_connects(self, device: BlkDevice) -> None:
        """A front-end talks to the device."""
        self.guest_sees_size(int.from_bytes(device.read_config(0, 8), "little"))
        if self.config.features_wanted != (1 << 64) - 1:
            self.guest.writes_are_durable = True

    def guest_sees_size(self, sectors: int) -> None:
        """The device has that many sectors."""
        self.guest.sectors = min(sectors, len(self.oracle.sectors))
        if sectors > len(self.oracle.sectors):
            raise Violation(f"the guest is told of {sectors} sectors: more than there are")

    def all_stopped(self, bridge: Bridge) -> None:
        """The stop of the last ring was answered, which is a promise to the next host."""
        self.no_more_changes()
        if self.config.mode != OFF and not bridge.began_to_stop:
            self.oracle.judge_whole_image("the stop of the last ring was answered")

    def no_more_changes(self) -> None:
        """The guest may go on elsewhere: but for what is under way, nothing of it is sent."""
        line = self.network.line
        self.quiet_from_s = trio.current_time() + _UNDER_WAY_S + 2 * line.most_s

    def change_comes(self) -> None:
        """The server gets a change from a bridge."""
        if trio.current_time() > self.quiet_from_s:
            raise Violation(
                "a change is sent although the guest has stopped, and may run elsewhere"
            )

    def publish_later(self, index: int) -> None:
        """The guest shows a chain just when the device has looked for the last time."""
        bridge = self.bridge
        if bridge is None or bridge.loop is None or bridge.gone.is_set():
            self.guest.publish(index)
        else:
            self._late.append(index)
            bridge.loop.notify()

    def publish_late(self) -> None:
        """The device has looked, and has not asked for kicks yet."""
        late, self._late = self._late, []
        for index in late:
            self.guest.publish(index)

    def _kick(self, index: int) -> None:
        bridge = self.bridge
        if bridge is not None and bridge.front_end is not None:
            front_end = bridge.front_end
            if self.rng.random() < 0.8:
                front_end.kick(index)
            else:
                self.timeline.after(0.0001, lambda: front_end.kick(index))

    # The program.

    async def _main(self) -> None:
        self._began_s = trio.current_time()
        self.note("program", seed=str(self.seed), config=str(self.config))
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.timeline.run)
            nursery.start_soon(self.keep_bridge)
            self.start_server()
            for queue in self.guest.queues:
                queue.running = True
            self._start_bridge.set()
            await trio.sleep(self.rng.choice((0, 1, 3)))
            steps = Steps(self)
            for number, name, own in self.script:
                rng = Random(own)
                self.note("step", number=number, name=name)
                await steps.take(name, rng)
                await trio.sleep(rng.choice((0, 0, 0.001, 0.02, 0.5, 3)))
                if self.server is not None and self.bridge is not None and self.bridge.loop:
                    self._check_bounds(self.bridge)
            await self._settle()
            nursery.cancel_scope.cancel()

    def _check_bounds(self, bridge: Bridge) -> None:
        self.guest.check_own_memory()

    def run(self) -> World:
        """Run the program. Raises Violation, or whatever else went wrong."""
        try:
            with host.running(self):
                trio.run(self._main, clock=self.timeline.clock)
        except BaseException as error:
            found = _first(error)
            if found is error:
                raise
            raise found from None
        finally:
            self._give_back()
        return self

    def _give_back(self) -> None:
        self.guest.close()
        if self.region is not None:
            os.close(self.region[0])
            self.region = None
        shutil.rmtree(self.directory, ignore_errors=True)

    # The end.

    async def _settle(self) -> None:
        """No more faults: everything is answered, durable, and what it should be."""
        self.note("faults end")
        self.is_calm = True
        self._calm()
        self.publish_late()
        pause_s = 0.05
        with trio.move_on_after(SETTLE_S) as waiting:
            while not self._is_quiet():
                await trio.sleep(pause_s)
                pause_s = min(pause_s * 1.5, 20)
                self._keep_calm()
        if waiting.cancelled_caught:
            raise Violation(f"{SETTLE_S:.0f} s after the last fault: {self._what_is_left()}")
        await self._flush_and_read()
        await self._stop_in_order()

    def _calm(self) -> None:
        network = self.network
        self.faults = Faults()
        network.line.refuses = network.line.hangs = False
        for sock in network.open_sockets():
            if sock.silent:
                sock.reset()
        self.start_server()
        self.bridge_may_run()
        self._connectable.set()

    def _keep_calm(self) -> None:
        """Things that only an operator, a front-end or a supervisor would do now."""
        for queue in self.guest.queues:
            if not queue.running:
                self._restart_ring(queue.index)

    def _restart_ring(self, index: int) -> None:
        queue = self.guest.queues[index]
        queue.running = True
        bridge = self.bridge
        front_end = None if bridge is None else bridge.front_end
        if front_end is not None and front_end.connected:

            async def start() -> None:
                if index not in front_end.rings:
                    front_end.start(index)

            front_end.want(start)

    def _is_quiet(self) -> bool:
        bridge = self.bridge
        if bridge is None or bridge.front_end is None or not bridge.front_end.connected:
            return False
        assert bridge.storage is not None
        if bridge.front_end.is_busy:
            return False
        running = len(bridge.front_end.rings) == len(self.guest.queues)
        return running and bridge.storage.client.connected and not self.guest.asked

    def _what_is_left(self) -> str:
        if asked := self.guest.asked:
            return f"without an answer are {asked[:8]}"
        bridge = self.bridge
        if bridge is None:
            return "no bridge runs"
        return "the bridge serves no guest"

    async def _ask(self, kind: int, first: int = 0, count: int = 0) -> int:
        """One request; how many have failed since."""
        guest = self.guest
        failed = guest.counts["failed"]
        if guest.submit(kind, first, count, 0, self.rng) is None:
            raise AssertionError("no room for a request")
        began_s = trio.current_time()
        self.publish_later(0)
        with trio.move_on_after(SETTLE_S) as waiting:
            while guest.asked:
                guest.answered = trio.Event()
                await guest.answered.wait()
        if waiting.cancelled_caught:
            raise Violation(f"no answer in {SETTLE_S:.0f} s: {guest.asked}")
        took_s = trio.current_time() - began_s
        is_fast = self.config.service_s <= 0.01 and self.network.line.most_s <= 0.03
        if kind == T_IN and is_fast and took_s > _SOON_S:
            raise Violation(f"a read took {took_s:.1f} s of a server that takes none")
        return guest.counts["failed"] - failed

    @property
    def _can_flush(self) -> bool:
        return self.config.features_wanted == (1 << 64) - 1

    async def _flush_and_read(self) -> None:
        if self._can_flush:
            # One may tell of a loss; one that was executed again does not count as having told.
            for _ in range(3):
                if not await self._ask(T_FLUSH):
                    break
            else:
                raise Violation("three flushes fail, long after the last fault")
        for first in range(0, self.guest.sectors, MAX_SECTORS):
            count = min(MAX_SECTORS, self.guest.sectors - first)
            if await self._ask(T_IN, first, count):
                raise Violation("a read fails, long after the last fault")
        self.guest.check_own_memory()

    async def _stop_in_order(self) -> None:
        bridge = self.bridge
        if bridge is None:
            raise Violation("the bridge has ended although nothing is wrong")
        self.bridge_may_run(False)
        bridge.terminate()
        with trio.move_on_after(SETTLE_S) as waiting:
            await bridge.ended.wait()
        if waiting.cancelled_caught:
            raise Violation("the bridge does not end")
        # A guest that cannot flush cannot be told of a loss either, not even of one that was none.
        if bridge.problem is not None and self._can_flush:
            raise Violation(f"the last stop failed: {bridge.problem}")
        self.over = True
        self._start_bridge.set()
        self.oracle.judge_whole_image("the bridge has stopped in order")
        if self.config.mode != OFF:
            for path in self.cache_files():
                if show(path).dirty_bytes:
                    raise Violation("a cache that was closed in order has dirty data")
        await trio.sleep(60)
        self.oracle.judge_whole_image("a minute after the end")


def _first(error: BaseException) -> BaseException:
    """The one error that matters of a group: a violation before everything else."""
    while isinstance(error, BaseExceptionGroup):
        ranked = sorted(error.exceptions, key=lambda each: not isinstance(_first(each), Violation))
        error = ranked[0]
    return error

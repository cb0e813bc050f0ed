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
from bridge.cache.file.inspect import drop
from bridge.datapath.engine import PURE_ENGINE, choose
from bridge.errors import Remedy
from bridge.guest.device import BlkDevice
from bridge.spec.virtio_blk import T_IN
from tests.sim import damage, host
from tests.sim.bridge import Bridge, CacheFlush
from tests.sim.config import Seed, script
from tests.sim.ending import Ending
from tests.sim.faults import Faults
from tests.sim.guest import Asked, Guest
from tests.sim.medium import Medium
from tests.sim.network import Network
from tests.sim.oracle import Change, Oracle, Violation
from tests.sim.process import CURRENT, Process, observing
from tests.sim.server import NbdServer
from tests.sim.steps import Steps
from tests.sim.timeline import Timeline
from tests.sim.volume import Volume

HOSTS = 2
"""Between which the guest migrates."""
_LONGEST_PAUSE_S = 16.0
"""Between two starts of a bridge, for its supervisor."""
_UNDER_WAY_S = 3.0
"""A session that is left has that long to answer what is in flight."""
_ROOT = "/dev/shm" if os.path.isdir("/dev/shm") else "/tmp"


class World:
    """See the module's text."""

    def __init__(
        self, seed: Seed, *, tell: Callable[[float, str, dict[str, Any]], None] | None = None
    ) -> None:
        self.seed = seed
        self.config, self.script = script(seed)
        self.rng = Random(f"world {seed.number}")
        self.own_rng = Random(f"slow {seed.number}")
        """For what has come later than the programs of this version: theirs goes on as it did."""
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
        self._root = f"{_ROOT}/nbd-bridge-sim-{os.getpid()}"
        shutil.rmtree(self._root, ignore_errors=True)
        os.mkdir(self._root, 0o700)
        for each in range(HOSTS):
            os.mkdir(self.directory_of(each), 0o700)
        self.host = 0
        """Where the guest is."""
        self.target: Bridge | None = None
        """The bridge that waits for it to come to another host."""
        self.sources: list[Bridge] = []
        """Those that it has left, and which run still."""
        self.written_elsewhere = False
        """Another host wrote while the cache had what the server lacked."""
        self.write_cache_moves = False
        """Its write cache is to be as it was, also where no in-flight region remembers that."""
        self.default_directory = Path(self._root) / "default"
        self.damaged: set[int] = set()
        """Sectors of the damaged part of a cache file."""
        self.has_no_file: Bridge | None = None
        """That bridge's was removed."""
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
        self._to_notice = 0
        """The generation of connections whose end will tell the bridge of a loss of power."""
        self._unaware: list[tuple[Change, set[Bridge]]] = []
        """What another host wrote, and the bridges that cannot know of it yet."""
        self.resetting = False
        """The guest has begun to reset the device."""
        self.engine = choose() if self.config.compiled else PURE_ENGINE
        self.uri = "nbd://10.0.0.1/vm" + "@session=moves" * self.config.migrates
        self._start_bridge = trio.Event()
        self.states: set[str] = set()

    def directory_of(self, host: int) -> str:
        """Where that host has its cache files."""
        return f"{self._root}/{host}"

    @property
    def directory(self) -> str:
        """That of the guest's host."""
        return self.directory_of(self.host)

    def settings_of(self, host: int) -> ServeSettings:
        """Those of a bridge there."""
        config = self.config
        return ServeSettings(
            disk=DiskSettings(
                socket_path="/sim/guest.sock",
                num_queues=config.queues,
                queue_size=32,
                read_only=config.read_only,
            ),
            cache=CacheSettings(
                mode=config.mode,
                size_bytes=4 << 20,
                directory=self.directory_of(host),
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
            with observing():
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
        if "any" in self.excuses or (self.config.read_only and asked.kind != T_IN):
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

    def check_cache_disk(self) -> None:
        """Raises OSError if the cache's file system, which copies on write, is full."""
        current = CURRENT.get(None)
        if self.faults.cache_disk_full and not (current is not None and current.dead):
            self.count("the cache's disk is full")
            self.excuse("write", "flush")
            raise OSError(28, "No space left on device")

    def fsync_fails(self) -> bool:
        """This flush fails."""
        if self.faults.failing_flushes:
            self.faults.failing_flushes -= 1
            return True
        return False

    def fsync_failed(self, *, heard: bool = True) -> None:
        """What was not durable may be gone; no later flush says so. `heard`: there is a connection
        for the answer."""
        self.count("flush fails at the server")
        self.excuse("flush")
        if self.rng.random() < 0.8:
            self.medium.lose()
        if not heard:
            self.oracle.loss_unnoticed()
        elif not self.config.plugin:
            self.power_lost()  # The answer may find no bridge, and the server says it once.

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
        if server.service is None or self.config.filtered:
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
        unaware = {each for each in (self.bridge, self.target) if each and not each.gone.is_set()}
        if unaware:
            change.known = inf
            self._unaware.append((change, unaware))
        self.count("another host writes")
        self.note("another host has written", first=first, count=count, number=change.number)

    def bridge_knows(self, bridge: Bridge) -> None:
        """It has a new connection, or is gone: its cache has nothing older than what another host
        has written."""
        for change, unaware in self._unaware:
            unaware.discard(bridge)
            if not unaware:
                change.known = self.oracle.now()
        self._unaware = [each for each in self._unaware if each[1]]

    @property
    def counts_writers(self) -> bool:
        """The server tells whether another host has written."""
        return self.config.plugin and not self.config.filtered and not self.config.read_only

    def kill_server(self) -> None:
        """kill -9 of the server's process."""
        if self.server is not None:
            self.server.die()
            self.server = None
            self.network.accept = None
            if self.config.filtered:
                self.count("a filter loses what it held")
                self.excuse("flush")
                self.medium.lose()

    # The bridge.

    async def keep_bridge(self) -> None:
        """What starts the bridge, and starts it again whenever it has ended: later each time if it
        finds no server."""
        pause_s = 1.0
        while not self.over:
            await self._start_bridge.wait()
            if self.over:
                return
            bridge = self.bridge = self._next_bridge()
            bridge.guest_comes()
            await bridge.over.wait()
            if bridge.has_moved:
                self.bridge = None
                continue
            if not bridge.dead:
                await bridge.ended.wait()
                self._bridge_ended()
            self.bridge = None
            problem = bridge.problem
            if problem is not None and problem.remedy is Remedy.FORCE_OR_GIVE_UP:
                if self.written_elsewhere:
                    self._give_up(problem.path)
                else:
                    # No other host wrote, which only the operator knows.
                    await self.flush_by_hand(problem.path, force=True)
            elif problem is not None and self.damaged and problem.remedy is Remedy.BRING_INTACT:
                await damage.save_intact(self, problem.path)
            if self.has_no_file is bridge:
                damage.ended_without_file(self, in_order=problem is None and not bridge.dead)
            before, self.before_next = self.before_next, None
            if before is not None and not self.is_calm:
                await before(problem is None and not bridge.dead)
            pause_s = 1.0 if bridge.serves else min(2 * pause_s, _LONGEST_PAUSE_S)
            await self.timeline.sleep(
                self.rng.choice((0.0, 0.1, 2.0)) + (problem is not None and pause_s)
            )

    def _next_bridge(self) -> Bridge:
        target, self.target = self.target, None
        if target is not None and target.host == self.host:
            return target
        if target is not None:  # The guest has not come to it.
            self.sources.append(target)
            target.terminate()
        return self.start_bridge(self.host)

    def start_bridge(self, host: int) -> Bridge:
        """A bridge's process at that host."""
        bridge = Bridge(self, host)
        self.note("bridge starts", host=host)
        self._nursery.start_soon(bridge.run)
        return bridge

    def _give_up(self, path: str) -> None:
        """The operator decides for what another host wrote; the guest boots anew from that."""
        self.count("dirty data given up for another host's")
        came = [] if self.server is None else list(self.server.in_flight())
        self.reset_guest()
        drop(path, discard_dirty=True)
        self.oracle.host_lost(came, written_through=False)
        self.written_elsewhere = False

    def cache_files(self) -> list[str]:
        """Their paths."""
        names = sorted(os.listdir(self.directory))
        return [os.path.join(self.directory, name) for name in names if name.endswith(".cache")]

    async def flush_by_hand(self, path: str, *, force: bool) -> None:
        """An operator runs `nbd-bridge cache flush`."""
        self.count("cache flush by hand")
        await self.run_by_hand(CacheFlush(self, path, force=force))

    async def run_by_hand(self, process: Process) -> None:
        """An operator runs that, and waits for its end."""
        self.processes.append(process)
        self._nursery.start_soon(process.run)
        await process.gone.wait()
        self.processes.remove(process)

    def lose_what_is_under_way(self) -> None:
        """What the bridges have sent, and the server has not received, never comes there."""
        for sock in self.network.open_sockets():
            if sock.in_transit_bytes:
                sock.silent = True
                self.timeline.after(1, sock._disconnect_peer)

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

    def loss_noticed(self, bridge: Bridge) -> None:
        """It has been told that its connections are lost, and has left word of that."""
        if bridge is self.bridge and not bridge.dead:
            self._to_notice = 0

    def bridge_died(self, bridge: Bridge) -> None:
        """It was killed."""
        if bridge is not self.bridge or bridge.has_moved:
            return
        client = None if bridge.storage is None else bridge.storage.client
        noticing, self._to_notice = self._to_notice, 0
        if client is not None and client.link.generation == noticing:
            self.oracle.loss_unnoticed()  # before it could act on the end of the connection
        self._forget_with(bridge)
        if bridge.died_amid_copy and self.config.mode != OFF:
            self.oracle.interrupted(each.change for each in self.guest.asked if each.change)
        self._front_end_lost(killed=True)

    def _forget_with(self, bridge: Bridge) -> None:
        """It is gone. While it had no guest, there was no in-flight region for what it heard of,
        and a foreign server says it once (docs/durability.md)."""
        if not self.config.plugin:
            self.oracle.loss_unnoticed(bridge.alone_since)

    def _bridge_ended(self) -> None:
        """It has ended in order, or given up at its start."""
        assert self.bridge is not None
        self.note("bridge has ended")
        if not self.config.keeps_in_flight and self.can_flush:
            # No message tells the next process that there is to be no write cache.
            self.guest.toggles += 1
            self.guest.writes_are_durable = False
        if not self.bridge.guest_came:  # Else its end tells the operator.
            self._forget_with(self.bridge)
        problem = self.bridge.problem
        if problem is not None and not self.config.keeps_in_flight:
            self.oracle.loss_unnoticed()  # The operator was told, and no process can know.
        leaves_word = self.config.keeps_in_flight and self.config.plugin
        if "so it does not know" in str(problem):
            self.excuse("flush")  # The next process tells the guest.
        told = problem is not None and "since its last flush may not be durable" in str(problem)
        if (told and not leaves_word) or "so it does not know" in str(problem):
            # Lost then or later: no process can know.
            self.oracle.operator_told()
        self._front_end_lost(killed=False)

    def front_end_left(self, bridge: Bridge) -> None:
        """The front-end hung up, or was hung up on, and connects again."""
        if bridge is self.bridge and not bridge.has_moved:
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
        if self.server is not None and not self.config.plugin and self.config.mode == OFF:
            # The next bridge begins with a new guest: nothing tells it of writes that a dead one
            # has left at a server without sessions (docs/durability.md).
            self.server.forget_the_dead()
        self.write_cache_moves = False
        self.forget_region()

    def forget_region(self) -> None:
        """The front-end has no in-flight region any more."""
        if self.region is not None:
            os.close(self.region[0])
            self.region = None

    def guest_connects(self, device: BlkDevice) -> None:
        """A front-end talks to the device."""
        self.guest_sees_size(int.from_bytes(device.read_config(0, 8), "little"))
        if not self.can_flush:
            self.guest.writes_are_durable = True

    def guest_sees_size(self, sectors: int) -> None:
        """The device has that many sectors."""
        self.guest.sectors = min(sectors, len(self.oracle.sectors))
        if sectors > len(self.oracle.sectors):
            raise Violation(f"the guest is told of {sectors} sectors: more than there are")

    def all_stopped(self, bridge: Bridge) -> None:
        """The stop of the last ring was answered, which is a promise to the next host."""
        self.no_more_changes(bridge)
        if self.config.mode != OFF and not bridge.began_to_stop:
            self.oracle.judge_whole_image("the stop of the last ring was answered")

    def no_more_changes(self, bridge: Bridge) -> None:
        """The guest may go on elsewhere: but for what is under way, nothing of it is sent."""
        line = self.network.line
        bridge.quiet_from_s = trio.current_time() + _UNDER_WAY_S + 2 * line.most_s

    def change_comes(self, bridge: Bridge) -> None:
        """The server gets a change from a bridge."""
        if self.config.read_only:
            raise Violation("a change is sent of a disk that is read-only")
        if trio.current_time() > bridge.quiet_from_s:
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
        for kind in self.config.kinds:
            self.counts[kind] += 1
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self.timeline.run)
            nursery.start_soon(self.keep_bridge)
            self.start_server()
            for queue in self.guest.queues:
                queue.running = True
            self._start_bridge.set()
            await self.timeline.sleep(self.rng.choice((0, 1, 3)))
            steps = Steps(self)
            for number, name, own in self.script:
                rng = Random(own)
                self.note("step", number=number, name=name)
                await steps.take(name, rng)
                await self.timeline.sleep(rng.choice((0, 0, 0.001, 0.02, 0.5, 3)))
                if self.server is not None and self.bridge is not None and self.bridge.loop:
                    self._check_bounds(self.bridge)
            await Ending(self).settle()
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
        self.forget_region()
        shutil.rmtree(self._root, ignore_errors=True)

    def restart_ring(self, index: int) -> None:
        """The guest has it run again."""
        queue = self.guest.queues[index]
        queue.running = True
        bridge = self.bridge
        front_end = None if bridge is None else bridge.front_end
        if front_end is not None and front_end.connected:

            async def start() -> None:
                if index not in front_end.rings:
                    front_end.start(index)

            front_end.want(start)

    @property
    def can_flush(self) -> bool:
        """The guest has a flush."""
        return self.config.features_wanted == (1 << 64) - 1 and self.config.flushes


def _first(error: BaseException) -> BaseException:
    """The one error that matters of a group: a violation before everything else."""
    while isinstance(error, BaseExceptionGroup):
        ranked = sorted(error.exceptions, key=lambda each: not isinstance(_first(each), Violation))
        error = ranked[0]
    return error

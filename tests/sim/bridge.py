"""One bridge process: the whole `serve` command on a simulated loop, network, clock and front-end.

What is not the product's: the loop (`tests.sim.loop`), sockets, eventfds, threads, signals, the
control socket, and the vhost-user messages: a `FrontEnd` calls the device as a session does.
"""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from math import inf
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import trio

from bridge.api.actions import Actions
from bridge.api.http import HttpError
from bridge.app.cache_flush import flush_file
from bridge.app.serve import serve_disk
from bridge.app.storage import Storage
from bridge.errors import LeftBehind
from bridge.guest.device import BlkDevice
from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT, F_RING_PACKED
from tests.sim.loop import SimLoop
from tests.sim.process import CURRENT, Killed, Process
from tests.sim.timeline import Bell

if TYPE_CHECKING:
    from tests.sim.world import World


WRITEBACK_AT = 32
"""Of `writeback` in the configuration space."""


class CacheFlush(Process):
    """`nbd-bridge cache flush`, by an operator."""

    def __init__(self, world: World, path: str, *, force: bool, skip_damaged: bool = False) -> None:
        super().__init__(world)
        self._path = path
        self._force = force
        self._skip_damaged = skip_damaged

    async def main(self) -> None:
        await flush_file(
            self._path,
            None,
            moved=False,
            timeout_s=100,
            force=self._force,
            skip_damaged=self._skip_damaged,
        )


class Bridge(Process):
    """See the module's text."""

    def __init__(self, world: World, host: int = 0) -> None:
        super().__init__(world)
        self.directory = world.directory_of(host)
        self.host = host
        self.device: BlkDevice | None = None
        self.storage: Storage | None = None
        self.service: Service | None = None
        self.front_end: FrontEnd | None = None
        self.serves = False
        """A front-end may connect."""
        self.is_target = True
        """The guest is not here yet."""
        self.has_moved = False
        """The guest has gone on elsewhere."""
        self.alone_since: float = world.oracle.moment
        """No front-end is connected, since that moment of the oracle's; inf: one is."""
        self.guest_came = False
        """A front-end has connected."""
        self.over = trio.Event()
        """It has ended, or is not the guest's any more."""
        self.called_upon = Bell()
        """One of these has changed."""
        self.quiet_from_s = inf
        """No change comes from here to the server from then on, until a ring starts."""

    async def main(self) -> None:
        await serve_disk(self.world.uri, self.world.settings_of(self.host))

    def _gone(self) -> None:
        self.over.set()
        self.world.bridge_knows(self)

    def _died(self) -> None:
        self.world.bridge_died(self)

    def guest_comes(self) -> None:
        """It is the guest's."""
        self.is_target = False
        self.called_upon.ring()


def _current() -> Bridge:
    process = CURRENT.get()
    assert isinstance(process, Bridge)
    return process


# What the product asks of its host, answered for the bridge that asks.


def make_loop(**options: Any) -> SimLoop:
    """`bridge.app.serve.Loop`."""
    process = CURRENT.get()
    process.loop = SimLoop(process.world.network, process.world.engine)
    if isinstance(process, Bridge):
        process.loop.before_arming = process.world.publish_late
    return process.loop


class SimStorage(Storage):
    """One that says what it has been told of its connections."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._process = _current()

    def disconnected(self) -> None:
        super().disconnected()
        self._process.world.loss_noticed(self._process)

    def reconnected(self) -> None:
        super().reconnected()
        self._process.world.bridge_knows(self._process)


def make_storage(*args: Any, **options: Any) -> Storage:
    """`bridge.app.serve.Storage`."""
    storage = _current().storage = SimStorage(*args, **options)
    return storage


@contextmanager
def signals() -> Iterator[Any]:
    """`bridge.app.serve.ending_signals`: a channel of the signals that end the process."""

    class Signals:
        @staticmethod
        async def receive() -> Any:
            await CURRENT.get().terminated.wait()
            return signal.SIGTERM

    yield Signals()


@contextmanager
def no_listener(disk: object, received: object) -> Iterator[None]:
    """`bridge.app.serve.open_listener`."""
    yield None


async def no_service_manager(status: object) -> None:
    """`bridge.app.serve.service_manager.run`."""


class Service:
    """`bridge.app.serve.Service`: the operator's `resize` without a control socket."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._wanted = Bell()
        _current().service = self

    @classmethod
    def of(cls, live: Any, *args: object, **options: object) -> Service:
        return cls(live)

    def stopping(self) -> None:
        pass

    def resize(self) -> None:
        """Ask for it."""
        self._wanted.ring()

    async def run(self) -> None:
        world = _current().world
        actions: Any = Actions(SimpleNamespace(live=self._live, stopping=False), lambda: None)  # type: ignore[arg-type]
        while True:
            await self._wanted.wait()
            try:
                done = await actions.resize(20)
            except HttpError as error:
                world.note("resize is refused", reason=str(error))
            else:
                world.note("resized", done=done)
                world.count("resized by the operator" if done.changed else "resize asked for")


async def serve_front_ends(device: BlkDevice, listener: object, **options: object) -> None:
    """`bridge.app.serve.backend.serve`: one front-end after the other, until cancelled."""
    bridge = _current()
    bridge.device = device
    bridge.serves = True
    bridge.world.written_elsewhere = False
    while True:
        front_end = bridge.front_end = FrontEnd(bridge, device)
        try:
            await front_end.converse()
        except LeftBehind:
            bridge.world.note("front-end is hung up on")
        finally:
            bridge.front_end = None
            bridge.alone_since = bridge.world.oracle.now()
            with trio.CancelScope(shield=True):
                with suppress(LeftBehind):
                    await device.disconnected()
        bridge.world.front_end_left(bridge)


def signal_call(fd: int) -> bool:
    """`bridge.guest.ring._signal`: the device calls the driver."""
    bridge = CURRENT.get(None)
    if isinstance(bridge, Bridge) and not bridge.dead and bridge.front_end is not None:
        bridge.front_end.called(fd)
    return True


class FrontEnd:
    """What a vhost-user session asks of the device, for one guest."""

    def __init__(self, bridge: Bridge, device: BlkDevice) -> None:
        self.bridge = bridge
        self.world = bridge.world
        self.guest = bridge.world.guest
        self.device = device
        self.rings: dict[int, tuple[int, int]] = {}
        """Kick and call descriptor of each ring that runs."""
        self._todo: list[tuple[Callable[[], Awaitable[None]], trio.Event]] = []
        self._wanted = Bell()
        self.connected = False
        self.is_busy = False

    async def converse(self) -> None:
        """Connect, start what ran, then do what the world wants, one thing after the other."""
        world = self.world
        await world.timeline.sleep(world.rng.choice((0, 0, 0.05, 1)))
        while self.bridge.is_target or self.bridge.has_moved:
            await self.bridge.called_upon.wait()
        device, guest = self.device, self.guest
        features = device.offered_features()
        for yes, bit in (
            *((world.config.packed, F_RING_PACKED), (world.config.event_idx, F_EVENT_IDX)),
            (world.config.indirect, F_INDIRECT),
        ):
            features &= ~(bit if not yes else 0)
        features &= world.config.features_wanted
        device.set_features(features)
        guest.features = features
        device.listener = self
        await device.replace_memory([guest.region()])
        self._share_region()
        world.guest_connects(device)
        if world.write_cache_moves:
            # With the device's state, as the target's QEMU gets it.
            on = not guest.writes_are_durable
            device.write_config(WRITEBACK_AT, bytes([on]), migration=True)
        for queue in guest.queues:
            if queue.running:
                self.start(queue.index)
        self.connected = self.bridge.guest_came = True
        self.bridge.alone_since = inf
        world.note("front-end connected")
        while True:
            while self._todo:
                self.is_busy = True
                self.check_alive()
                what, done = self._todo.pop(0)
                try:
                    await what()
                finally:
                    done.set()
            self.is_busy = False
            await self._wanted.wait()

    def _share_region(self) -> None:
        world = self.world
        if not world.config.keeps_in_flight:
            return
        if world.region is None:
            fd, size = self.device.create_inflight(world.config.queues, 32)
            world.region = fd, size
        fd, size = world.region
        self.device.set_inflight(fd, 0, size, world.config.queues, 32)

    def config_changed(self) -> None:
        """The disk has another size."""
        capacity = int.from_bytes(self.device.read_config(0, 8), "little")
        self.world.guest_sees_size(capacity)

    def want(self, what: Callable[[], Awaitable[None]]) -> trio.Event:
        """Have `what` done; the event says when it is, or that the front-end has gone."""
        done = trio.Event()
        self.is_busy = True
        self._todo.append((what, done))
        self._wanted.ring()
        return done

    def start(self, index: int) -> None:
        """Start ring `index`."""
        network = self.world.network
        kick, call = network.new_fd(), network.new_fd()
        queue = self.guest.queues[index]
        self.rings[index] = kick, call
        self.bridge.quiet_from_s = inf
        self.device.start_ring(index, queue.setup(kick, call))
        self.guest.kick(index)

    async def stop(self, index: int) -> None:
        """GET_VRING_BASE. Raises LeftBehind: the stop is not answered with success."""
        base = await self.device.stop_ring(index)
        self.check_alive()
        self.guest.queues[index].base = base
        del self.rings[index]

    def check_alive(self) -> None:
        """After each wait: nothing that a dead process still does is a reply."""
        if self.bridge.dead:
            raise Killed

    def called(self, fd: int) -> None:
        """The device wrote to a call descriptor."""
        for index, (_, call) in self.rings.items():
            if call == fd:
                self.world.timeline.after(
                    self.world.rng.choice((0.0, 0.0, 0.00005)),
                    lambda index=index: self._look(index),
                )

    def _look(self, index: int) -> None:
        self.world.guest.look(index)

    def kick(self, index: int) -> None:
        """The driver kicks."""
        loop = self.bridge.loop
        if index in self.rings and loop is not None and not self.bridge.dead:
            loop.kick(self.rings[index][0])

"""The guest stops (pause, migration) while the server is slow, refuses, or is away.

An answered stop of the last ring says that nothing of the guest's is sent from here any more. All
of it here: device, disk, cache and client over a server in this process, on a virtual clock.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from errno import EIO
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from bridge.app.cache_names import cache_path
from bridge.app.serve import serve_disk
from bridge.app.settings import (
    CacheSettings,
    ControlSettings,
    DiskSettings,
    LimitSettings,
    ServeSettings,
)
from bridge.app.storage import Storage
from bridge.cache.cache_options import OFF, WRITEBACK, WRITETHROUGH
from bridge.cache.file.inspect import show
from bridge.cache.file.layout import HEADER_AREA_BYTES, FileHeader, parse_header_untrusted
from bridge.cache.file.opening import open_file
from bridge.cli.cache_show import text_of
from bridge.cli.wording import explain
from bridge.datapath.disk import Disk
from bridge.datapath.loop import Loop
from bridge.datapath.request import PREFETCH, Request
from bridge.errors import BridgeError, ConfigError, LeftBehind
from bridge.guest.virtio.blk_config import DiskGeometry
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri
from bridge.spec import nbd as p
from bridge.spec.virtio_blk import S_IOERR, S_OK, T_DISCARD, T_FLUSH, T_IN, T_OUT
from tests.guest.device_guest import DeviceGuest, GuestRing, PendingRequest
from tests.processes import short_directory, unix_uri
from tests.tools import told

SIZE_BYTES = 16 << 20
BLOCK = 4096
UNANSWERED = 0xEE
DRAIN_S = 30.0


@pytest.fixture(autouse=True)
def _files_are_closed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A virtual clock would not wait for the thread that closes a cache file."""

    async def run_here(
        call: Callable[..., object], *arguments: object, **options: object
    ) -> object:
        return call(*arguments)

    monkeypatch.setattr("bridge.app.storage.trio.to_thread.run_sync", run_here)


class GuestDisk(Disk):
    """A disk as `DeviceGuest` wants one."""

    data = bytes(SIZE_BYTES)

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.requests: list[None] = []

    def abandoned(self, requests: Any) -> None:
        raise AssertionError("the storage is told")


class Bridge:
    """All of a bridge but the vhost-user session, with its guest."""

    def __init__(
        self, directory: Path, *, mode: str, export: str = "", packed: bool, **options: Any
    ) -> None:
        self.loop = Loop(poll_us=0)
        self.uri = parse_uri(unix_uri(directory / "nbd", export))
        self.directory = directory
        self.storage = Storage(
            self.uri,
            self.loop,
            ClientOptions(reconnect_first_s=0.1, request_timeout_s=0, **options),
            CacheSettings(
                mode=mode, size_bytes=8 << 20, directory=str(directory), flush_interval_s=0
            ),
        )
        self.packed = packed
        self.mode = mode

    async def open(self) -> None:
        await self.storage.open()
        self.disk = GuestDisk(
            self.storage.target,
            turn=self.loop.turn,
            flush_interval_s=0,
            now=trio.current_time,
        )
        self.guest = DeviceGuest(
            self.loop,
            self.disk,  # type: ignore[arg-type]
            packed=self.packed,
            geometry=DiskGeometry(SIZE_BYTES, can_discard=True),
            hits=self.disk.hits,
            drain_timeout_s=DRAIN_S,
            on_abandoned=self.storage.departure.abandon,
            on_all_stopped=partial(
                self.storage.departure.hand_over, partial(self.disk.flush, quiet=True)
            ),
            on_left_behind=self.storage.departure.stop_sending,
            on_starting=self.storage.departure.starting,
            on_fresh_guest=self.storage.nothing_inherited,
        )
        self.device = self.guest.device
        await self.guest.connect()

    def track(self) -> None:
        """The front-end keeps an in-flight region."""
        fd, _ = self.device.create_inflight(2, 16)
        os.close(fd)

    def put(self, type_: int, sector: int = 0, index: int = 0, **options: Any) -> PendingRequest:
        self.guest.rings[index].driver.poll()
        pending = self.guest.put(type_, sector, index=index, **options)
        self.guest.rings[index].kick_device()
        return pending

    async def begin(self, *args: Any, **options: Any) -> PendingRequest:
        """A request that the server does not answer."""
        pending = self.put(*args, **options)
        await settled()
        assert pending.status == UNANSWERED
        return pending

    async def do(self, *args: Any, **options: Any) -> int:
        """A request and its status."""
        return (await self.ask(*args, **options)).status

    async def ask(self, *args: Any, **options: Any) -> PendingRequest:
        """A request that is answered."""
        pending = self.put(*args, **options)
        with trio.fail_after(60):
            while pending.status == UNANSWERED:
                await trio.sleep(0.1)
        return pending

    async def stop(self, index: int = 0) -> int:
        """GET_VRING_BASE."""
        ring = self.guest.rings[index]
        ring.base = await self.device.stop_ring(index)
        return ring.base

    def start(self, index: int = 0) -> GuestRing:
        ring = self.guest.rings.get(index) or self.guest.make_ring(index)
        return self.guest.start(index, base=ring.base)

    @property
    def cache_file(self) -> Path:
        return cache_path(self.uri, str(self.directory))

    @property
    def header(self) -> FileHeader:
        """As a process would find it that comes after a kill -9 of this one."""
        with self.cache_file.open("rb") as file:
            header = parse_header_untrusted(file.read(HEADER_AREA_BYTES))
        assert header is not None
        return header


class World:
    """A server, and bridges to it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.image = MemoryDisk(SIZE_BYTES)
        self.server = Server(dict.fromkeys(("", "vm", "vm@session=s"), self.image))
        self.server.commands = []
        self.faults = self.server.faults

    def counts(self, generation: int, written: int, **more: str) -> None:
        """New connections are told of these sessions, as by our plugin."""
        words = "".join(f" {key}={value}" for key, value in more.items())
        self.server.settings = replace(
            self.server.settings or ServerSettings(),
            description=f"nbd-bridge generation={generation} written={written}{words}",
        )

    def go_away(self) -> None:
        self.faults.refuse_connections = True
        self.server.cut()

    def come_back(self) -> None:
        self.faults.refuse_connections = False

    def changes(self) -> int:
        """How many changes the server was sent."""
        assert self.server.commands is not None
        changing = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)
        return sum(command.kind in changing for command in self.server.commands)

    @asynccontextmanager
    async def bridge(
        self,
        *,
        mode: str = WRITEBACK,
        directory: Path | None = None,
        packed: bool = False,
        close: bool = True,
        **options: Any,
    ) -> AsyncIterator[Bridge]:
        """A bridge that serves a guest, whose ring 0 runs."""
        bridge = Bridge(self.directory, mode=mode, packed=packed, **options)
        if directory is not None:
            bridge.storage._settings = replace(bridge.storage._settings, directory=str(directory))
            bridge.directory = directory
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bridge.loop.run)
            try:
                await bridge.open()
                nursery.start_soon(bridge.storage.run)
                bridge.start()
                yield bridge
            finally:
                with trio.CancelScope(shield=True):
                    if hasattr(bridge, "guest"):
                        bridge.device.hurry(0)
                        await bridge.device.disconnected()
                        bridge.guest.close()
                    await bridge.storage.close(1)
            nursery.cancel_scope.cancel()
        bridge.loop.close()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with short_directory() as directory:
        world = World(directory)
        async with trio.open_nursery() as nursery:
            await nursery.start(world.server.serve_unix, directory / "nbd")
            yield world
            nursery.cancel_scope.cancel()


async def settled() -> None:
    """Everybody did what there is to do without the clock."""
    await wait_all_tasks_blocked()


def block(letter: str) -> bytes:
    return letter.encode() * BLOCK


# With a cache: what is dirty.


@pytest.mark.parametrize("mode", [WRITEBACK, WRITETHROUGH])
async def test_stop_that_the_server_is_in_time_for_brings_everything_there(
    world: World, autojump_clock: MockClock, mode: str
) -> None:
    async with world.bridge(mode=mode) as bridge:
        world.faults.delay_s = 5
        for number in range(8):
            assert await bridge.do(T_OUT, number * 2048, out=block("n")) == S_OK
        began_s = trio.current_time()
        await bridge.stop()
        assert trio.current_time() - began_s < DRAIN_S
        assert not bridge.header.frozen
        assert all(world.image.data[n << 20] == ord("n") for n in range(8))
        sent = world.changes()
        await trio.sleep(300)
        assert world.changes() == sent


async def test_stop_is_not_answered_while_dirty_data_is_left_and_none_is_sent_afterwards(
    world: World,
    autojump_clock: MockClock,
) -> None:
    """The target of a migration writes meanwhile: nothing of the source's may go over it."""
    async with world.bridge() as bridge:
        for number in range(40):
            assert await bridge.do(T_OUT, number * 256, out=block("o")) == S_OK
        world.faults.delay_s = 40
        began_s = trio.current_time()
        with pytest.raises(LeftBehind, check=told("cache flush")):
            await bridge.stop()
        assert trio.current_time() - began_s == pytest.approx(DRAIN_S, abs=5)
        world.faults.delay_s = 0
        await trio.sleep(50)  # what the server had received already
        sent = world.changes()
        world.image.data[:] = b"t" * SIZE_BYTES
        await trio.sleep(600)
        assert world.changes() == sent
        assert world.image.data == b"t" * SIZE_BYTES
        assert bridge.header.frozen


async def test_stop_with_the_server_away_names_the_unsent_bytes_the_file_and_the_remedy(
    world: World, autojump_clock: MockClock, capsys: pytest.CaptureFixture[str]
) -> None:
    async with world.bridge() as bridge:
        await bridge.do(T_OUT, out=block("d"))
        world.go_away()
        with pytest.raises(LeftBehind) as caught:
            await bridge.stop()
        said = explain(caught.value)
        assert "4096 bytes" in said
        assert str(bridge.cache_file) in said
        assert "start the guest here again" in said
        assert capsys.readouterr().out.count("[error") == 1


async def test_stop_after_a_failing_flush_is_not_answered(
    world: World, autojump_clock: MockClock
) -> None:
    """The errno of the last flush: what the server had may be gone."""
    async with world.bridge() as bridge:
        await bridge.do(T_OUT, out=block("d"))
        world.faults.errors = dict.fromkeys((p.CMD_FLUSH, p.CMD_WRITE), EIO)
        with pytest.raises(LeftBehind, check=told("4096 bytes")):
            await bridge.stop()
        assert bridge.header.frozen


@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("counted", [True, False])
async def test_guest_that_comes_back_goes_on_and_nothing_is_lost(
    world: World, autojump_clock: MockClock, tracked: bool, counted: bool
) -> None:
    if counted:
        world.counts(5, 4)
    async with world.bridge() as bridge:
        if tracked:
            bridge.track()
            await bridge.stop()
            bridge.start()
        await bridge.do(T_OUT, out=block("d"))
        world.go_away()
        missing = await bridge.begin(T_IN, 2048, room=BLOCK)
        with pytest.raises(LeftBehind):
            await bridge.stop()
        await bridge.device.disconnected()
        assert bridge.header.frozen
        if counted:
            world.counts(6, 5)

        # QEMU connects again. A region would come back with it: here the device has forgotten it.
        await bridge.guest.connect()
        ring = bridge.guest.rings[0]
        ring.base = ring.driver.used_idx if tracked else 2
        bridge.start()
        late = bridge.put(T_OUT, 8, out=block("e"))
        await trio.sleep(100)
        assert late.status == UNANSWERED  # not before it is known whether another host wrote
        world.come_back()
        assert await bridge.do(T_FLUSH) == S_OK
        assert late.status == S_OK
        assert not bridge.header.frozen
        assert world.image.data[: 2 * BLOCK] == block("d") + block("e")
        assert missing.status == (S_OK if tracked else S_IOERR)
        await bridge.stop()


@pytest.mark.parametrize("now", [(7, 6), (3, 3)], ids=["wrote", "other volume"])
async def test_guest_that_comes_back_after_another_host_wrote_is_refused(
    world: World, autojump_clock: MockClock, now: tuple[int, int]
) -> None:
    world.counts(5, 4)
    with pytest.RaisesGroup(
        pytest.RaisesExc(BridgeError, check=told(r"cache flush --force.*cache drop")),
        flatten_subgroups=True,
    ):
        async with world.bridge() as bridge:
            await bridge.do(T_OUT, out=block("o"))
            world.go_away()
            with pytest.raises(LeftBehind):
                await bridge.stop()
            world.image.data[:] = b"t" * SIZE_BYTES
            world.counts(*now)
            world.come_back()
            bridge.start()
            await trio.sleep(100)
    assert world.image.data == b"t" * SIZE_BYTES
    assert world.changes() == 0
    file = open_file(str(bridge.cache_file))
    assert file.header.frozen
    file.close(clean=False)


async def test_guest_that_comes_back_to_an_image_that_looks_different_is_refused(
    world: World,
    autojump_clock: MockClock,
) -> None:
    """A server that does not count who wrote: clean cached blocks are compared."""
    with pytest.RaisesGroup(
        pytest.RaisesExc(BridgeError, check=told("cache flush --force")), flatten_subgroups=True
    ):
        async with world.bridge() as bridge:
            await bridge.do(T_IN, 4096, room=BLOCK)
            await bridge.do(T_OUT, out=block("o"))
            world.go_away()
            with pytest.raises(LeftBehind):
                await bridge.stop()
            world.image.data[:] = b"t" * SIZE_BYTES
            world.come_back()
            bridge.start()
            await trio.sleep(100)
    assert world.image.data == b"t" * SIZE_BYTES


@pytest.mark.parametrize("writer", ["", "us", "other"])
async def test_return_to_a_shared_session_depends_on_the_last_writer(
    world: World, autojump_clock: MockClock, writer: str
) -> None:
    """Source and target of a migration have one session, so one number."""
    world.counts(5, 4)

    async def come_and_go() -> None:
        async with world.bridge(export="vm@session=s") as bridge:
            await bridge.do(T_OUT, out=block("o"))
            world.go_away()
            with pytest.raises(LeftBehind):
                await bridge.stop()
            name = bridge.storage.client.client_id if writer == "us" else writer
            world.counts(5, 5, **({"writer": name} if writer else {}))
            world.come_back()
            bridge.start()
            assert await bridge.do(T_FLUSH) == S_OK

    if writer == "us":
        await come_and_go()
        assert world.image.data[:BLOCK] == block("o")
    else:
        with pytest.RaisesGroup(
            pytest.RaisesExc(BridgeError, check=told("cache flush --force")), flatten_subgroups=True
        ):
            await come_and_go()
        assert world.changes() == 0


@pytest.mark.parametrize("dirty", [True, False])
async def test_return_to_a_shared_session_after_a_flush_that_was_late_believes_nothing_clean(
    world: World, autojump_clock: MockClock, dirty: bool
) -> None:
    """The stop was answered: at the limit nothing was left here but the answer to come."""
    world.counts(5, 4)
    async with world.bridge(export="vm@session=s") as bridge:
        await bridge.do(T_IN, 4096, room=BLOCK)
        assert await bridge.do(T_FLUSH) == S_OK
        if dirty:  # As a write with FUA its answer is enough.
            await bridge.do(T_OUT, out=block("o"))
        else:
            segment = (2048).to_bytes(8, "little") + (128).to_bytes(4, "little") + bytes(4)
            await bridge.do(T_DISCARD, out=segment)
        world.faults.delay_s = DRAIN_S + 1
        await bridge.stop()
        assert bridge.storage.departure.is_away == dirty
        world.faults.delay_s = 0
        world.image.data[:] = b"t" * SIZE_BYTES
        bridge.start()
        assert (await bridge.ask(T_IN, 4096, room=BLOCK)).data == block("t")


async def test_what_was_fetched_while_the_guest_was_elsewhere_is_not_believed_in_a_shared_session(
    world: World, autojump_clock: MockClock
) -> None:
    """An operator warms the cache of a bridge whose guest runs at another host."""
    world.counts(5, 4)
    async with world.bridge(export="vm@session=s") as bridge:
        await bridge.stop()
        fetched: list[int] = []
        bridge.storage.target.submit(
            Request(PREFETCH, 0, BLOCK, [], lambda request: fetched.append(request.error))
        )
        bridge.loop.turn.want()
        await settled()
        assert fetched == [0]
        world.image.data[:] = b"t" * SIZE_BYTES
        bridge.start()
        assert (await bridge.ask(T_IN, 0, room=BLOCK)).data == block("t")


async def test_source_killed_after_the_freeze_leaves_data_that_the_next_start_finds(
    world: World, autojump_clock: MockClock, tmp_path: Path
) -> None:
    world.counts(5, 4)
    async with world.bridge() as bridge:
        await bridge.do(T_OUT, out=block("d"))
        world.go_away()
        with pytest.raises(LeftBehind):
            await bridge.stop()
        path = bridge.cache_file
        shutil.copy(path, tmp_path / "left")  # as the kernel has it when the process dies
        world.image.data[:] = bytes(SIZE_BYTES)
    shutil.copy(tmp_path / "left", path)
    world.come_back()
    world.counts(6, 5)
    async with world.bridge() as bridge:
        assert not bridge.header.frozen
        assert await bridge.do(T_FLUSH) == S_OK
    assert world.image.data[:BLOCK] == block("d")


@pytest.mark.parametrize("case", ["no counting", "shared", "was shared", "another host wrote"])
async def test_next_start_on_frozen_data_is_refused_where_others_may_have_written(
    world: World, autojump_clock: MockClock, case: str
) -> None:
    if case != "no counting":
        world.counts(5, 4)
    export = "vm@session=s" if case in ("shared", "was shared") else "vm"
    async with world.bridge(export=export) as bridge:
        await bridge.do(T_OUT, out=block("d"))
        world.go_away()
        with pytest.raises(LeftBehind):
            await bridge.stop()
    world.come_back()
    if case != "no counting":
        world.counts(7, 6 if case == "another host wrote" else 5)
    if case == "was shared":
        export = "vm"  # As `cache flush FILE` has it: a file does not name the session.
    with pytest.RaisesGroup(
        pytest.RaisesExc(ConfigError, check=told(r"cache flush --force.*cache drop")),
        flatten_subgroups=True,
    ):
        async with world.bridge(export=export):
            pass
    assert world.changes() == 0
    summary = show(str(bridge.cache_file))
    assert summary.frozen
    assert "frozen" in text_of(summary)


async def test_process_that_stops_while_data_is_frozen_sends_nothing_and_says_so(
    world: World,
    autojump_clock: MockClock,
) -> None:
    async with world.bridge() as bridge:
        await bridge.do(T_OUT, out=block("d"))
        world.go_away()
        with pytest.raises(LeftBehind):
            await bridge.stop()
        world.come_back()
        await trio.sleep(60)
        assert "cache flush" in explain(await bridge.storage.close(30))
        assert world.changes() == 0
        assert bridge.header.frozen
        assert bridge.header.clean


async def test_front_end_that_vanishes_leaves_nothing_frozen(
    world: World, autojump_clock: MockClock
) -> None:
    """The stop was never answered: dirty data goes to the server when it can be reached again."""
    async with world.bridge() as bridge:
        await bridge.do(T_OUT, out=block("d"))
        world.go_away()
        await bridge.device.disconnected()
        assert not bridge.header.frozen
        world.come_back()
        await trio.sleep(60)
        assert world.image.data[:BLOCK] == block("d")


async def test_discard_that_is_late_is_not_sent_after_the_stop(
    world: World, autojump_clock: MockClock
) -> None:
    """It waits in the cache for another one: it would be sent when that has ended."""
    async with world.bridge() as bridge:
        bridge.track()
        await bridge.stop()
        bridge.start()
        world.faults.stall = True
        segment = (0).to_bytes(8, "little") + (128).to_bytes(4, "little") + bytes(4)
        late = [await bridge.begin(T_DISCARD, out=segment) for _ in range(2)]
        assert world.changes() == 1
        world.faults.stall = False
        await bridge.stop()
        await trio.sleep(100)
        assert world.changes() == 1
        bridge.start()
        while UNANSWERED in [each.status for each in late]:
            await trio.sleep(1)
        assert [each.status for each in late] == [S_OK] * 2
        assert world.changes() == 3


@pytest.mark.parametrize("mode", [OFF, WRITEBACK])
@pytest.mark.parametrize("sent", [False, True])
async def test_discard_of_a_guest_that_is_gone_does_not_follow_it_when_the_server_is_back(
    world: World, autojump_clock: MockClock, mode: str, sent: bool
) -> None:
    """The next guest has read there what would be gone then."""
    async with world.bridge(mode=mode) as bridge:
        assert await bridge.do(T_OUT, out=block("d")) == S_OK
        assert await bridge.do(T_FLUSH) == S_OK
        before = world.changes()
        segment = bytes(8) + (8).to_bytes(4, "little") + bytes(4)
        if sent:
            world.faults.leave_writes_behind = world.faults.stall = True
            await bridge.begin(T_DISCARD, out=segment)
            world.faults.leave_writes_behind = world.faults.stall = False
            before += 1
        world.go_away()
        if not sent:
            await bridge.begin(T_DISCARD, out=segment)
        await bridge.device.disconnected()
        world.come_back()
        await trio.sleep(100)
        assert bridge.storage.client.connected
        assert world.changes() == before
        assert world.image.data[:BLOCK] == block("d")


async def test_discards_that_had_not_begun_when_the_guest_stopped_are_not_waited_for(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.datapath.lanes.IN_FLIGHT_BYTES", 40 << 20)
    async with world.bridge() as bridge:
        bridge.track()
        await bridge.stop()
        bridge.start()
        world.faults.stall = True
        segments = b"".join(
            (128 * n).to_bytes(8, "little") + (128).to_bytes(4, "little") + bytes(4)
            for n in range(32)
        )
        late = [await bridge.begin(T_DISCARD, out=segments) for _ in range(4)]
        await bridge.stop()
        world.faults.stall = False
        bridge.start()
        while UNANSWERED in [each.status for each in late]:
            await trio.sleep(1)
        assert [each.status for each in late] == [S_OK] * len(late)
        await bridge.stop()
        assert not bridge.storage.has_left


async def test_guest_that_stops_again_while_it_is_decided_whether_it_may_go_on_leaves_all_frozen(
    world: World, autojump_clock: MockClock
) -> None:
    """What is cached is being compared when the session is left for the second time."""
    async with world.bridge() as bridge:
        await bridge.do(T_IN, 4096, room=BLOCK)
        await bridge.do(T_OUT, out=block("a"))
        world.go_away()
        with pytest.raises(LeftBehind):
            await bridge.stop()
        world.come_back()
        world.faults.delay_s = 1
        bridge.start()
        while not bridge.storage.client.connected:
            await trio.sleep(0.1)
        with pytest.raises(LeftBehind):
            await bridge.stop()
        assert bridge.header.frozen
        world.faults.delay_s = 0
        bridge.start()
        assert await bridge.do(T_FLUSH) == S_OK
        assert world.image.data[:BLOCK] == block("a")


# Without a cache: what is in flight.


@pytest.fixture(params=[False, True], ids=["split", "packed"])
async def uncached(world: World, request: pytest.FixtureRequest) -> AsyncIterator[Bridge]:
    async with world.bridge(mode=OFF, packed=request.param) as bridge:
        yield bridge


async def test_pause_leaves_requests_in_the_region_and_the_resumed_ring_executes_them_in_order(
    world: World, autojump_clock: MockClock, uncached: Bridge
) -> None:
    await uncached.stop()
    uncached.track()
    ring = uncached.start()
    await uncached.do(T_OUT, 80, out=block("x"))
    world.faults.stall = True
    pending = [
        await uncached.begin(T_OUT, 0, out=block("1")),
        await uncached.begin(T_IN, 80, room=BLOCK),
        await uncached.begin(T_OUT, 0, out=block("2")),
    ]
    ring.driver.poll()
    await uncached.stop()
    assert [each.status for each in pending] == [UNANSWERED] * 3
    assert ring.driver.poll() == []
    world.server.cut()
    world.faults.stall = False
    uncached.start()
    assert await uncached.do(T_IN, room=512) == S_OK
    assert [each.status for each in pending] == [S_OK] * 3
    assert pending[1].data == block("x")
    assert world.image.data[:BLOCK] == block("2")


async def test_pause_of_an_outage_fails_nothing_and_keeps_the_connection(
    world: World, autojump_clock: MockClock, uncached: Bridge
) -> None:
    """All that the guest sees of it is that it takes long."""
    await uncached.stop()
    uncached.track()
    uncached.start()
    await uncached.do(T_OUT, 16, out=block("a"))
    world.faults.delay_s = 100
    pending = await uncached.begin(T_OUT, out=block("b"))
    await uncached.stop()
    world.faults.delay_s = 0
    await trio.sleep(200)
    uncached.start()
    assert await uncached.do(T_FLUSH) == S_OK
    assert pending.status == S_OK
    assert world.server.connections_total == 1


async def test_pause_while_the_server_is_gone_sends_nothing_before_the_guest_goes_on(
    world: World, autojump_clock: MockClock, uncached: Bridge
) -> None:
    await uncached.stop()
    uncached.track()
    uncached.start()
    world.go_away()
    pending = await uncached.begin(T_OUT, out=block("b"))
    await uncached.stop()
    world.come_back()
    await trio.sleep(100)
    assert uncached.storage.client.connected
    assert world.changes() == 0
    uncached.start()
    assert await uncached.do(T_FLUSH) == S_OK
    assert pending.status == S_OK
    assert world.image.data[:BLOCK] == block("b")


@pytest.mark.parametrize("tracked", [True, False])
async def test_one_ring_of_two_that_stops_costs_the_other_nothing(
    world: World, autojump_clock: MockClock, uncached: Bridge, tracked: bool
) -> None:
    await uncached.stop()
    if tracked:
        uncached.track()
    uncached.start(0)
    uncached.start(1)
    await uncached.do(T_OUT, 80, out=block("x"))
    world.faults.delay_s = 50
    theirs = await uncached.begin(T_IN, 80, room=BLOCK, index=1)
    ours = [
        await uncached.begin(T_OUT, out=block("b")),
        await uncached.begin(T_IN, 80, room=BLOCK),
        await uncached.begin(T_FLUSH),
    ]
    await uncached.stop(0)
    assert [each.status for each in ours] == [UNANSWERED if tracked else S_IOERR] * 3
    assert theirs.status == UNANSWERED
    memory = bytes(uncached.guest.memory[0x100000:])
    world.faults.delay_s = 0
    await trio.sleep(100)
    assert theirs.status == S_OK
    assert theirs.data == block("x")
    # Nothing else has changed in the guest's memory: the late answers went nowhere.
    after = bytearray(uncached.guest.memory[0x100000:])
    at = theirs.data_address - 0x100000
    after[at : at + BLOCK] = memory[at : at + BLOCK]
    after[theirs.status_address - 0x100000] = UNANSWERED
    assert after == memory
    assert await uncached.do(T_OUT, 160, out=block("y"), index=1) == S_OK
    assert await uncached.do(T_FLUSH, index=1) == S_OK
    assert world.server.connections_total == 1


async def test_stop_without_a_region_fails_unanswered_requests_and_never_sends_them_again(
    world: World, autojump_clock: MockClock, uncached: Bridge
) -> None:
    world.go_away()
    pending = await uncached.begin(T_OUT, out=block("b"))
    await uncached.stop()
    assert pending.status == S_IOERR
    world.come_back()
    await trio.sleep(100)
    assert world.changes() == 0


@pytest.mark.parametrize("errors", [True, False])
async def test_guest_that_migrates_is_not_let_go_without_its_requests(
    world: World, autojump_clock: MockClock, uncached: Bridge, errors: bool
) -> None:
    """An in-flight region does not migrate, and neither does the errno of a flush."""
    await uncached.stop()
    uncached.track()
    uncached.start()
    await uncached.do(T_OUT, out=block("b"))
    if errors:
        world.faults.errors = {p.CMD_FLUSH: EIO}
    else:
        fd = os.memfd_create("log")
        os.ftruncate(fd, 1024)
        uncached.device.set_log(fd, 0, 1024)
        os.close(fd)
        uncached.device.set_logging(True)
        world.faults.stall = True
        await uncached.begin(T_IN, 80, room=BLOCK)
    with pytest.raises(LeftBehind):
        await uncached.stop()


@pytest.mark.parametrize("migrates", [True, False])
async def test_guest_that_migrates_is_not_let_go_before_it_was_told_of_a_loss(
    world: World, autojump_clock: MockClock, uncached: Bridge, migrates: bool
) -> None:
    """The bridge that it goes to would vouch for what is gone."""
    uncached.device.remember_durability(unflushed_on=0, loss_unreported=True)
    if not migrates:
        await uncached.stop()
        return
    fd = os.memfd_create("log")
    os.ftruncate(fd, 1024)
    uncached.device.set_log(fd, 0, 1024)
    os.close(fd)
    uncached.device.set_logging(True)
    with pytest.raises(LeftBehind, check=told("lost")):
        await uncached.stop()


async def test_abandoned_flush_that_fails_is_told_with_the_next_one(
    world: World, autojump_clock: MockClock, uncached: Bridge
) -> None:
    """The storage behind a server says it once."""
    uncached.start(1)
    await uncached.do(T_OUT, out=block("b"), index=1)
    world.faults.errors = {p.CMD_FLUSH: EIO}
    world.faults.delay_s = 50
    await uncached.begin(T_FLUSH)
    await uncached.stop(0)
    await trio.sleep(100)
    world.faults.errors = {}
    world.faults.delay_s = 0
    assert await uncached.do(T_FLUSH, index=1) == S_IOERR
    assert await uncached.do(T_FLUSH, index=1) == S_OK


async def test_stop_of_the_process_shortens_a_drain_that_is_under_way(
    world: World, autojump_clock: MockClock, uncached: Bridge
) -> None:
    world.faults.stall = True
    await uncached.begin(T_IN, room=BLOCK)
    began_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(uncached.stop)
        await trio.sleep(1)
        uncached.device.hurry(2)
    assert trio.current_time() - began_s == pytest.approx(3, abs=0.5)


async def test_limit_of_the_guests_stop_is_no_part_of_the_processs(
    world: World, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--stop-timeout 0` is for the end of the process; a guest that pauses is no end."""
    seen: list[float] = []

    def device(*args: Any, drain_timeout_s: float, **options: Any) -> None:
        seen.append(drain_timeout_s)
        raise ConfigError("seen")

    monkeypatch.setattr("bridge.app.serve.BlkDevice", device)
    for options in ({}, {"drain_timeout_s": 7.0}):
        with pytest.RaisesGroup(ConfigError, flatten_subgroups=True):
            await serve_disk(
                unix_uri(world.directory / "nbd"),
                ServeSettings(
                    disk=DiskSettings(socket_path=str(world.directory / "vhost")),
                    cache=CacheSettings(mode=OFF),
                    limits=LimitSettings(stop_timeout_s=0, **options),
                    control=ControlSettings(socket=OFF),
                ),
            )
    assert seen == [30.0, 7.0]

"""The bridge's host: what its kernel keeps of the cache file, and the patches that make it one.

A kill keeps every store. A loss of power keeps what was synced, and of every page that was stored
to since either what it was then or what it is now.
"""

from __future__ import annotations

import logging
import os
import random
import secrets
from array import array
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from random import Random
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import structlog
import trio
import trio._core._run as trio_run
from trio._util import NoPublicConstructor

from bridge.cache.cache_options import Options
from bridge.cache.cold import attempt
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import (
    BITS,
    DIRTY_SHIFT,
    HEADER_AREA_BYTES,
    Geometry,
    parse_header_untrusted,
)
from bridge.datapath.turn import Outcome, Turn
from bridge.errors import ConfigError
from tests.sim import bridge, scheduler, timeline, volume
from tests.sim.medium import SECTOR, numbers_of
from tests.sim.network import SimSocket
from tests.sim.process import CURRENT, MAPS, observing

if TYPE_CHECKING:
    from tests.sim.world import World

_PAGE = 4096

world: World | None = None
"""Whose turn it is: one program at a time."""


def _here() -> World:
    assert world is not None
    return world


class _Os:
    """The `os` module of the cache file: what is synced is remembered."""

    def __getattr__(self, name: str) -> Any:
        return getattr(os, name)

    def fsync(self, fd: int) -> None:
        current = CURRENT.get(None)
        if current is None or not current.dead:
            size = os.fstat(fd).st_size
            _here().synced[os.fstat(fd).st_ino] = os.pread(fd, size, 0)

    fdatasync = fsync

    def pwrite(self, fd: int, data: Any, offset: int) -> int:
        _here().check_cache_disk()
        return os.pwrite(fd, data, offset)

    def pwritev(self, fd: int, data: Any, offset: int) -> int:
        _here().check_cache_disk()
        return os.pwritev(fd, data, offset)


class SimCold:
    """Cold reads that end some time later; see `bridge.cache.cold.Cold`."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn
        self.fd = _here().network.new_fd()
        self._closed = False
        self.outstanding = 0

    def run(self, job: Callable[[], None], outcome: Outcome) -> None:
        self.outstanding += 1
        _here().count("cold read")
        process = CURRENT.get()

        def end() -> None:
            if not self._closed and not process.dead:
                self.outstanding -= 1
                self._turn.finish(outcome, attempt(job))

        _here().timeline.after(_here().rng.choice((0.0, 0.001, 0.05)), end)

    def collect(self, events: int = 0) -> None:
        pass

    def close(self, limit_s: float = 1.0) -> None:
        self._closed = True


async def _run_here(call: Callable[..., Any], *args: Any, **options: Any) -> Any:
    await trio.lowlevel.checkpoint()
    return call(*args)


async def _receive(sock: SimSocket) -> bytes:
    return await sock.receive()


async def _send_all(sock: SimSocket, data: bytes) -> None:
    await sock.send_all(data)


async def _connect(uri: object) -> SimSocket:
    return await _here().network.connect(CURRENT.get())


def _geometry(*, disk_bytes: int, cache_bytes: int, min_block_bytes: int = 1) -> Geometry:
    config = _here().config
    slots = min(config.slots, -(-disk_bytes // config.granule))
    return Geometry(disk_bytes, config.block, config.granule, slots)


def _resident(self: object, at_bytes: int, length: int) -> bool:
    current = _here()
    return current.rng.random() >= current.config.cold_ratio


def _nothing(*_: object, **__: object) -> None:
    return None


def _zeroed(code: Any, count: int) -> memoryview:
    """As `bridge.cache.blocks.zeroed`, which saves memory where a cache is large."""
    return memoryview(bytearray(array(code).itemsize * max(1, count))).cast(code)[:count]


def _patches() -> list[Any]:
    patch = mock.patch
    quiet = ("keep_freed_pages", "report_bus_errors", "allow_all_descriptors")
    return [
        *volume.patches(),
        *(patch(f"bridge.app.serve.{name}", _nothing) for name in quiet),
        patch("bridge.app.serve.Loop", bridge.make_loop),
        patch("bridge.datapath.loop.perf_counter", timeline.now),
        patch("trio.current_time", timeline.now),
        patch("bridge.app.cache_flush.Loop", bridge.make_loop),
        patch("bridge.app.serve.Storage", bridge.make_storage),
        patch("bridge.app.serve.ending_signals", bridge.signals),
        patch("bridge.app.serve.open_listener", bridge.no_listener),
        patch("bridge.app.serve.service_manager.run", bridge.no_service_manager),
        patch("bridge.app.serve.Service", bridge.Service),
        patch("bridge.app.serve.backend.serve", bridge.serve_front_ends),
        patch("bridge.guest.ring._signal", bridge.signal_call),
        patch("bridge.server.connecting._connect", _connect),
        patch("bridge.server.connecting._receive", _receive),
        patch("bridge.server.connecting._send_all", _send_all),
        patch("bridge.app.open_cache.ThreadedCold", SimCold),
        patch("bridge.app.open_cache.geometry_for", _geometry),
        patch(
            "bridge.app.open_cache.Options",
            lambda **o: Options(**o, **_here().config.cache_options),
        ),
        patch("bridge.cache.file.cache_file.CacheFile.resident", _resident),
        patch("bridge.cache.file.cache_file.boot_id", lambda: _here().boot),
        patch("bridge.cache.file.opening.boot_id", lambda: _here().boot),
        *(
            patch(f"bridge.cache.{name}.zeroed", _zeroed)
            for name in ("awaited", "blocks", "dirty_ring", "eviction", "index")
        ),
        patch("bridge.cache.file.cache_file.os", _Os()),
        # Whoever has the lock is in this process, and does nothing meanwhile.
        patch("bridge.cache.file.locking.time", SimpleNamespace(sleep=_nothing)),
        patch("bridge.cache.file.cache_file.mmap", MAPS),
        patch("bridge.guest.virtio.memory.mmap", MAPS),
        patch("bridge.guest.virtio.inflight.mmap", MAPS),
        patch("bridge.app.cache_names.default_directory", lambda: _here().default_directory),
        patch("trio.to_thread.run_sync", _run_here),
        patch.object(
            secrets, "token_hex", lambda n=16: f"{_here().rng.getrandbits(8 * n):0{2 * n}x}"
        ),
        patch("bridge.server.link.Random", lambda: Random(_here().rng.getrandbits(32))),
        patch("trio._core._run.unrolled_run", scheduler.steps),
        patch("trio._core._run.current_time", timeline.now),
        patch("trio._core.reschedule", timeline.reschedule),
        *(
            patch.object(trio.CancelScope, name, ours)
            for name, ours in (
                ("__enter__", scheduler.enter),
                ("_close", scheduler.close),
                ("_might_change_registered_deadline", scheduler.registering),
            )
        ),
        patch.object(
            trio_run.Task, "_attempt_delivery_of_any_pending_cancel", scheduler.deliver_cancel
        ),
        patch.object(trio.Event, "wait", timeline.wait_for_event),
        # No class is one of trio's errors by registration: what an ABC looks for each time.
        patch.object(NoPublicConstructor, "__subclasscheck__", type.__subclasscheck__, create=True),
    ]


@contextmanager
def simulated(*, log: Callable[[str, dict[str, Any]], None] | None = None) -> Iterator[None]:
    """Programs can run within; `log` gets what the bridges log."""
    before = structlog.get_config()
    level = logging.CRITICAL if log is None else logging.DEBUG

    def tell(_: object, method: str, event: dict[str, Any]) -> Any:
        current = CURRENT.get(None)
        if log is not None and not (current is not None and current.dead):
            with observing():
                log(method, event)
        raise structlog.DropEvent

    with ExitStack() as stack:
        for each in _patches():
            stack.enter_context(each)
        structlog.configure(
            wrapper_class=structlog.make_filtering_bound_logger(level), processors=[tell]
        )
        try:
            yield
        finally:
            structlog.configure(**before)


@contextmanager
def running(of: World) -> Iterator[None]:
    """The program of `of` runs within."""
    global world
    world = of
    random.seed(of.seed.number)
    trio_run._r.seed(of.seed.number)
    try:
        yield
    finally:
        world = None


def lose_power(of: World) -> list[tuple[int, int]]:
    """The host goes down: its cache files are what a disk may have of them. Returns sector and
    number of what a file holds that was closed in order: that goes to the server later."""
    rng = of.rng
    kept: list[tuple[int, int]] = []
    for name in sorted(os.listdir(of.directory)):
        path = os.path.join(of.directory, name)
        if not name.endswith(".cache"):
            continue
        with open(path, "rb") as file:
            inode = os.fstat(file.fileno()).st_ino
            now = file.read()
        was = of.synced.pop(inode, b"")
        os.unlink(path)
        if not was and rng.random() < 0.5:
            continue
        was = was.ljust(len(now), b"\0")[: len(now)]
        pages = []
        for at in range(0, len(now), _PAGE):
            source = rng.choice((was, now))
            pages.append(source[at : at + _PAGE])
        data = b"".join(pages)
        with open(path, "wb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(data)
            of.synced[os.fstat(file.fileno()).st_ino] = data
        kept += _unsent(data)
    return kept


def _unsent(data: bytes) -> list[tuple[int, int]]:
    """Sector and number of what is dirty in a cache file that was closed in order."""
    try:
        header = parse_header_untrusted(data[:HEADER_AREA_BYTES])
    except ConfigError:
        return []
    if header is None or not header.clean:
        return []
    image = MappedImage(bytearray(data), header)
    geometry = header.geometry
    found = []
    for slot in range(1, geometry.slots + 1):
        dirty = image.state[slot] >> DIRTY_SHIFT & BITS
        for block in (each for each in range(16) if dirty >> each & 1):
            at = slot * geometry.granule_bytes + block * geometry.block_bytes
            start = image.granule_of[slot] * geometry.granule_bytes + block * geometry.block_bytes
            numbers = numbers_of(bytes(image.data[at : at + geometry.block_bytes]))
            found += enumerate(numbers, start // SECTOR)
    return found

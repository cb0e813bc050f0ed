"""`nbd-bridge serve`: connects to the server, then serves front-ends until a signal comes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import structlog
import trio

from bridge.app.bus_errors import report_bus_errors
from bridge.app.descriptors import allow_all_descriptors
from bridge.app.malloc_tuning import keep_freed_pages
from bridge.app.settings import DiskSettings, ServeSettings, client_options
from bridge.app.signals import ending_signals
from bridge.app.storage import Storage
from bridge.cache.cache_options import OFF
from bridge.datapath.disk import Disk
from bridge.datapath.loop import Loop
from bridge.errors import BridgeError, ConfigError, Remedy
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user import backend
from bridge.guest.vhost_user.listener import Listener
from bridge.guest.virtio.blk_config import DiskGeometry
from bridge.server.export import Export
from bridge.server.uri import NbdUri, parse_uri
from bridge.spec.virtio_blk import ID_BYTES
from bridge.units import SECTOR_BYTES

_log = structlog.get_logger(__name__)


_STOP_STEPS = 4
"""A stop drains the rings, flushes after the last ring has stopped, flushes once more for writes
that came without a ring, and closes the storage. Each step may take an equal share of
`stop_timeout_s`, the last one also what the others left. A flush that ran out of time stays in
flight, and the next step waits for the same flush."""


class _Stop:
    """The stop of one `serve`: its time limit, and the problem to report at the end."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadline_s: float | None = None
        self.on_begin: Callable[[], None] | None = None
        """Called once, when the time begins to run."""
        self.problem: BridgeError | None = None
        """What the stop left behind, for the operator; the exit status is then 1."""

    def begin(self) -> None:
        """Let the time begin to run, unless it already does."""
        if self._deadline_s is None:
            self._deadline_s = trio.current_time() + self._limit_s
            if self.on_begin is not None:
                self.on_begin()

    @property
    def step_s(self) -> float:
        """The time that every step has."""
        return self._limit_s / _STOP_STEPS

    @property
    def left_s(self) -> float:
        """The time that the last step has."""
        self.begin()
        assert self._deadline_s is not None
        return max(self.step_s, self._deadline_s - trio.current_time())


async def serve_disk(uri_text: str, settings: ServeSettings) -> None:
    """Serve the export at `uri_text` until SIGTERM, SIGINT, SIGQUIT or SIGHUP, then stop cleanly.

    Raises ConfigError, ConnectionLost or ProtocolError (possibly in a group), each with one line
    for the operator; BridgeError when the stop left something behind.
    """
    uri = parse_uri(uri_text)
    keep_freed_pages()
    report_bus_errors()
    allow_all_descriptors()
    loop = Loop(poll_us=settings.limits.poll_us)
    options = client_options(settings.server, settings.tls)
    options = replace(options, read_only=settings.disk.read_only)
    options = options.for_reading_and_writing(local=uri.socket_path is not None)
    storage = Storage(uri, loop, options, settings.cache)
    serving = trio.CancelScope()
    stop = _Stop(settings.limits.stop_timeout_s)
    with ending_signals() as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            nursery.start_soon(_cancel_at_signal, signals, serving, stop)
            try:
                with serving:
                    await _serve(uri, settings, loop, storage, stop, nursery)
            finally:
                with trio.CancelScope(shield=True):
                    left_behind = await storage.close(stop.left_s)
                    stop.problem = left_behind or stop.problem
            nursery.cancel_scope.cancel()
    loop.close()
    if stop.problem is not None:
        raise stop.problem
    _log.info("stopped")


async def _serve(
    uri: NbdUri,
    settings: ServeSettings,
    loop: Loop,
    storage: Storage,
    stop: _Stop,
    nursery: trio.Nursery,
) -> None:
    """Connect, then serve front-ends until cancelled; flush at the end."""
    export = await storage.open()
    nursery.start_soon(storage.run)
    # A cache has a flush timer of its own.
    interval_s = settings.cache.flush_interval_s if settings.cache.mode == OFF else 0
    disk = Disk(storage.backend, turn=loop.turn, flush_interval_s=interval_s, now=trio.current_time)
    nursery.start_soon(disk.run_flush_timer)
    geometry = disk_geometry(uri, export, settings.disk)

    def remember() -> None:
        """Store in the in-flight region what the next process has to know.

        If the server names no instance and is unreachable, the next process has nothing to compare:
        unflushed writes count as lost.
        """
        mark = storage.instance_mark
        unflushed = not disk.is_durable and not storage.has_cache
        device.remember_durability(
            unflushed_on=mark if unflushed else 0,
            loss_untold=disk.untold
            or storage.loss_untold
            or (unflushed and not mark and storage.is_away),
        )

    def inherited(unflushed_on: int, loss_untold: bool) -> None:
        if storage.inherit(unflushed_on) or loss_untold:
            _log.error(
                "writes that the previous process had not flushed may be lost: "
                "the guest's next flush will fail"
            )
            disk.tell(errno.EIO)
        if not (storage.has_cache or geometry.read_only):
            disk.flush_inherited()

    def nothing_inherited() -> None:
        storage.nothing_inherited()
        remember()

    async def all_stopped() -> None:
        try:
            await storage.hand_over(partial(disk.flush, quiet=True))
        finally:
            remember()

    device = BlkDevice(
        loop,
        disk,
        geometry,
        hits=disk.hits,
        serial=settings.disk.serial or default_serial(export),
        max_queues=settings.disk.num_queues,
        max_queue_size=settings.disk.queue_size,
        drain_timeout_s=settings.limits.drain_timeout_s,
        on_abandoned=storage.abandon,
        on_all_stopped=all_stopped,
        on_left_behind=storage.stop_sending,
        on_starting=storage.starting,
        on_recovered=storage.client.expect_stale_writes,
        on_inherited=inherited,
        on_fresh_guest=nothing_inherited,
        epoch=storage.epoch,
        withheld_features=settings.disk.withheld_features,
    )
    if not (storage.has_cache or geometry.read_only):
        disk.on_changed = remember
        storage.client.on_reconnect = remember
    stop.on_begin = lambda: device.hurry(stop.step_s)
    storage.on_resized = device.resize
    nursery.start_soon(device.run)
    with _listener(settings.disk) as listener:
        _log.info(
            "serving",
            uri=uri.text,
            socket=settings.disk.socket_path or f"fd {settings.disk.fd}",
            size_bytes=geometry.capacity_sectors * SECTOR_BYTES,
            read_only=geometry.read_only,
            cache=settings.cache.mode,
        )
        try:
            await backend.serve(device, listener)
        finally:
            stop.begin()
            error = 0
            with trio.move_on_after(stop.step_s, shield=True) as flushing:
                if not storage.has_left:
                    error = await disk.flush()
            # A cache keeps what could not be flushed, and tries again when it is closed.
            if not storage.has_cache and (flushing.cancelled_caught or error):
                why = os.strerror(error) if error else "it did not answer in time"
                stop.problem = BridgeError(
                    f"the server could not flush at the end ({why}): what the guest wrote since "
                    "its last flush may not be durable"
                )
            elif disk.untold or storage.loss_untold:
                stop.problem = BridgeError(
                    "the server may have lost writes of the guest's that it had not flushed, and "
                    "the guest has not flushed since, so it does not know: check its file systems"
                )


async def _cancel_at_signal(
    signals: trio.MemoryReceiveChannel[signal.Signals], serving: trio.CancelScope, stop: _Stop
) -> None:
    number = await signals.receive()  # The first is enough: all ask for the same.
    _log.info("stopping", signal=number.name)
    stop.begin()
    serving.cancel()


def _listener(disk: DiskSettings) -> Listener:
    if disk.socket_path is not None:
        return Listener.at_path(disk.socket_path)
    if disk.fd is None:
        raise ConfigError("neither a path nor a descriptor to listen on")
    return Listener.from_fd(disk.fd)


def disk_geometry(uri: NbdUri, export: Export, disk: DiskSettings) -> DiskGeometry:
    """The guest's view of `export`. Raises ConfigError if it is smaller than one block."""
    if export.usable_bytes < disk.block_size_bytes:
        raise ConfigError(
            f"{uri.text}: the export has {export.size_bytes} bytes, less than one block of "
            f"{disk.block_size_bytes}: there is no disk to serve"
        )
    if tail := export.size_bytes % disk.block_size_bytes:
        _log.warning(
            "the end of the export is not a whole block: the guest does not see it",
            size_bytes=export.size_bytes,
            hidden_bytes=tail,
        )
    if export.read_only and not disk.read_only:
        why = {"reason": export.volume.why_read_only} if export.volume.why_read_only else {}
        _log.warning(
            "the export is read-only, so the disk is", remedy=Remedy.EXPECT_READ_ONLY, **why
        )
    if not export.can_flush and not export.read_only:
        _log.warning(
            "the server cannot flush: the guest gets no write cache control, and only the server "
            "decides how durable a completed write is"
        )
    return DiskGeometry(
        size_bytes=export.usable_bytes,
        read_only=disk.read_only or export.read_only,
        can_flush=export.can_flush,
        can_discard=export.can_trim,
        block_size_bytes=disk.block_size_bytes,
        min_io_bytes=max(export.min_block_bytes, SECTOR_BYTES),
        optimal_io_bytes=export.preferred_block_bytes if export.has_block_sizes else 0,
    )


def default_serial(export: Export) -> str:
    """A serial number from the export's name: the name if it fits, else its hash."""
    name = export.name or "nbd"
    if len(name.encode()) <= ID_BYTES and name.isascii() and name.isprintable():
        return name
    return hashlib.sha256(name.encode()).hexdigest()[:ID_BYTES]

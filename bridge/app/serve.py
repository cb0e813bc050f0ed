"""`nbd-bridge serve`: connects to the server, then serves front-ends until a signal comes."""

from __future__ import annotations

import errno
import hashlib
import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NoReturn

import structlog
import trio

from bridge.api.live import Facts, Live
from bridge.api.service import Service
from bridge.api.view import one_line
from bridge.app import service_manager, upgrade
from bridge.app.bus_errors import report_bus_errors
from bridge.app.descriptors import allow_all_descriptors
from bridge.app.listening import gid_of, open_listener, socket_path_of
from bridge.app.malloc_tuning import keep_freed_pages
from bridge.app.service_manager import pid_file
from bridge.app.settings import DiskSettings, ServeSettings, client_options
from bridge.app.signals import ending_signals, send_late_signals
from bridge.app.storage import Storage
from bridge.app.upgrade import Parcel
from bridge.cache.cache_options import OFF
from bridge.datapath.disk import Disk
from bridge.datapath.engine import choose
from bridge.datapath.loop import Loop
from bridge.datapath.request import Request
from bridge.errors import BridgeError, ConfigError, LeftBehind, Remedy
from bridge.guest.above import Above
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user import backend
from bridge.guest.vhost_user.handover import Desk
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


_HANG_UP_S = 1.0
"""For what is in flight at the server when the program is replaced: the cache's own requests."""

_END_S = 15.0
"""For the end of a stop: closing the cache file has a limit of its own."""


class _Stop:
    """The stop of one `serve`: its time limit, and the problem to report at the end."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._deadline_s: float | None = None
        self.problem: BridgeError | None = None
        """What the stop left behind, for the operator; the exit status is then 1."""

    def begin(self) -> bool:
        """Let the time begin to run; False if it already did."""
        if self._deadline_s is not None:
            return False
        self._deadline_s = trio.current_time() + self._limit_s
        return True

    @property
    def has_begun(self) -> bool:
        """The time runs."""
        return self._deadline_s is not None

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


async def serve_disk(
    uri_text: str, settings: ServeSettings, received: Parcel | None = None
) -> Leaving | None:
    """Serve the export at `uri_text` until SIGTERM, SIGINT, SIGQUIT or SIGHUP, then stop cleanly.

    `received`: from the program before this one. Returns what is to be done if this program is to
    be replaced as well.

    Raises ConfigError, ConnectionLost or ProtocolError (possibly in a group), each with one line
    for the operator; BridgeError when the stop left something behind.
    """
    uri = parse_uri(uri_text)
    keep_freed_pages()
    report_bus_errors()
    allow_all_descriptors()
    loop = Loop(poll_us=settings.limits.poll_us, engine=choose(settings.limits.engine))
    serving = _Serving(uri, settings, loop, received)
    stop = serving.stop
    until = serving.until
    with ending_signals() as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            nursery.start_soon(_cancel_at_signal, signals, until, serving)
            try:
                with until:
                    await serving.run(nursery)
            finally:
                with trio.CancelScope(shield=True):
                    if serving.leaving is not None:
                        leaving = serving.leaving
                        leaving.stale_writes = await serving.storage.hand_over(_HANG_UP_S)
                        leaving.has_to_stop = stop.has_begun
                    else:
                        left_behind = await serving.storage.close(stop.left_s)
                        stop.problem = left_behind or stop.problem
            nursery.cancel_scope.cancel()
    loop.close()
    if serving.leaving is not None:
        return serving.leaving
    if stop.problem is not None:
        raise stop.problem
    _log.info("stopped")
    return None


@dataclass
class Leaving:
    """This program is to be replaced: call `go` when trio has ended."""

    parcel: Parcel
    stale_writes: bool = True
    has_to_stop: bool = False
    """A signal has asked for the end meanwhile: that is for the next program."""

    def go(self) -> NoReturn:
        """Replace the program. Raises BridgeError."""
        if self.has_to_stop:
            send_late_signals(signal.SIGTERM)
        try:
            upgrade.replace_program(self.parcel, stale_writes=self.stale_writes)
        except OSError as error:
            raise BridgeError(f"the new program cannot be run: {error.strerror}") from None


class _Serving:
    """One `serve`. The layer above the storage side, which exists before the guest's side does."""

    def __init__(
        self, uri: NbdUri, settings: ServeSettings, loop: Loop, received: Parcel | None
    ) -> None:
        options = client_options(settings.server, settings.tls)
        options = replace(options, read_only=settings.disk.read_only)
        options = options.for_reading_and_writing(local=uri.socket_path is not None)
        self.storage = Storage(uri, loop, options, settings.cache, above=self)
        self.stop = _Stop(settings.limits.stop_timeout_s)
        self._uri = uri
        self._settings = settings
        self._loop = loop
        self._guests: _GuestsSide | None = None
        self._service: Service | None = None
        self.until = trio.CancelScope()
        """Around what is served."""
        self._received = received
        self._desk = Desk(self._taken_over)
        self._listener: Listener | None = None
        self.leaving: Leaving | None = None
        """Another program is to take over from this one."""

    def resized(self, size_bytes: int) -> None:
        """See storage.Above."""
        if self._guests is not None:
            self._guests.device.resize(size_bytes)

    def reconnected(self) -> None:
        """See storage.Above."""
        if self._guests is not None:
            self._guests.durability_changed()

    def disconnected(self) -> None:
        """See storage.Above. A process that dies before the server is back must leave word: the
        server may name no instance that the next process could compare."""
        if self._guests is not None:
            self._guests.durability_changed()

    def begin_to_stop(self) -> None:
        """Let the time of the stop begin to run, and the device hurry."""
        if not self.stop.begin():
            return
        service_manager.stopping(self._settings.limits.stop_timeout_s + _END_S)
        if self._guests is not None:
            self._guests.device.hurry(self.stop.step_s)
        if self._service is not None:
            self._service.stopping()

    async def run(self, nursery: trio.Nursery) -> None:
        """Connect, then serve front-ends until cancelled; flush at the end."""
        disk = self._settings.disk
        socket_path, gid = socket_path_of(disk, self._received), gid_of(disk.socket_group)
        received = self._received
        export = await self.storage.open(
            # A guest that was taken over waits as it does for any reconnect.
            wait=self._settings.limits.wait_for_server or received is not None,
            no_stale_writes=received is not None and not received.stale_writes,
        )
        nursery.start_soon(self.storage.run)
        guests = _GuestsSide(self._uri, self._settings, export, self.storage, self._loop)
        self._guests = guests
        nursery.start_soon(guests.disk.run_flush_timer)
        nursery.start_soon(guests.device.run)
        facts = Facts(self._uri.text, socket_path, guests.serial)
        live = Live(facts, self._loop, self.storage, guests.disk, guests.device)
        self._service = self._open_service(live, gid)
        nursery.start_soon(self._service.run)
        with open_listener(disk, received) as listener, pid_file(self._settings.control.pid_file):
            self._listener = listener
            guests.log_start(socket_path or f"fd {disk.fd}")
            nursery.start_soon(service_manager.run, partial(one_line, live))
            first = None if received is None else received.front_end
            try:
                await backend.serve(guests.device, listener, desk=self._desk, first=first)
            finally:
                if self.leaving is None:
                    self.begin_to_stop()
                    self.stop.problem = await guests.flush_at_the_end(self.stop.step_s)

    def _open_service(self, live: Live, gid: int | None) -> Service:
        control = self._settings.control
        try:
            return Service.of(live, control, gid, replace_program=self._replace)
        except ConfigError as error:
            if self._received is None:
                raise
            # A guest waits: that must not fail for a name that another bridge has by now.
            _log.error("there is no control socket", problem=error)
            return Service.of(live, replace(control, name="", socket=OFF), gid)

    def _taken_over(self) -> None:
        assert self._received is not None
        waited_s = self._received.waited_s
        _log.info("took over from another program", guest_waited_s=round(waited_s, 3))
        if self._service is not None:
            self._service.took_over(waited_s)

    async def _replace(self) -> None:
        """Have another program take over. Raises BridgeError, and the disk is served as before."""
        assert self._guests is not None
        assert self._listener is not None
        await upgrade.try_program(self._uri)
        if self.storage.has_left:
            raise BridgeError("nothing is sent to the server at the moment: try again afterwards")
        try:
            parcel = await upgrade.pack(
                self._guests.device,
                self._desk,
                self._listener,
                may_go_on=lambda: not self.stop.has_begun,
            )
        except OSError as error:
            # The rings are closed. The front-end finds the next process.
            self.begin_to_stop()
            self.stop.problem = BridgeError(f"the program cannot be replaced: {error.strerror}")
            self.until.cancel()
            raise self.stop.problem from None
        # No await in between: from here on nothing is served.
        self.leaving = Leaving(parcel)
        self.until.cancel()
        _log.info("another program takes over")
        await trio.sleep_forever()  # until the end, which is also that of the control socket


class _GuestsSide(Above):
    """The guest's side of a storage that is open: the disk and the device."""

    def __init__(
        self, uri: NbdUri, settings: ServeSettings, export: Export, storage: Storage, loop: Loop
    ) -> None:
        self._uri = uri
        self._settings = settings
        self._storage = storage
        self._engine = loop.engine.name
        self._geometry = disk_geometry(uri, export, settings.disk)
        self.serial = settings.disk.serial or default_serial(export)
        # A cache has a flush timer of its own.
        interval_s = settings.cache.flush_interval_s if settings.cache.mode == OFF else 0
        self.disk = Disk(
            storage.target,
            turn=loop.turn,
            flush_interval_s=interval_s,
            now=trio.current_time,
            above=self,
        )
        self.device = BlkDevice(
            loop,
            self.disk,
            self._geometry,
            hits=self.disk.hits,
            usual=self.disk.usual,
            serial=self.serial,
            max_queues=settings.disk.num_queues,
            max_queue_size=settings.disk.queue_size,
            drain_timeout_s=settings.limits.drain_timeout_s,
            above=self,
            withheld_features=settings.disk.withheld_features,
        )

    @property
    def _loses_with_server(self) -> bool:
        """Unflushed writes are on the server only, and are lost if it loses them."""
        return not (self._storage.has_cache or self._geometry.read_only)

    def durability_changed(self) -> None:
        """See disk.Above. Also when a connection is lost, and after a reconnect."""
        if self._loses_with_server:
            self._remember()

    def _remember(self) -> None:
        """Store in the in-flight region what the next process has to know.

        If the server names no instance and is unreachable, the next process has nothing to compare:
        unflushed writes count as lost.
        """
        disk, storage = self.disk, self._storage
        mark = storage.instance_mark
        unflushed = not disk.is_durable and not storage.has_cache
        self.device.remember_durability(
            unflushed_on=mark if unflushed else 0,
            loss_unreported=disk.unreported
            or disk.is_telling
            or storage.loss_unreported
            or (unflushed and not mark and storage.is_away),
        )

    # See guest.above.Above.

    def inherited(self, unflushed_on: int, loss_unreported: bool) -> None:
        """Writes that the previous process left unflushed may be lost."""
        if self._storage.inherit(unflushed_on) or loss_unreported:
            _log.error(
                "writes that the previous process had not flushed may be lost: "
                "the guest's next flush will fail"
            )
            self.disk.tell(errno.EIO)
        if self._loses_with_server:
            self.disk.flush_inherited()

    def fresh_guest(self) -> None:
        """No promise to a former guest is left."""
        self._storage.nothing_inherited()
        self._remember()

    def starting(self, go: Callable[[], None]) -> bool:
        """The ring has to wait if the storage has left its session with the server."""
        return self._storage.departure.starting(go)

    def recovered(self) -> None:
        """The previous process may have sent the recovered requests."""
        self._storage.client.expect_stale_writes()

    def abandoned(self, requests: Sequence[Request]) -> None:
        """The storage does not send them any more."""
        self._storage.departure.abandon(requests)

    async def left_behind(self) -> LeftBehind | None:
        """Unsent data stays in the cache; without one it is lost."""
        return await self._storage.departure.stop_sending()

    def epoch(self) -> int:
        """The storage's epoch."""
        return self._storage.epoch()

    async def all_stopped(self) -> None:
        """Write everything to the server and flush it there."""
        try:
            await self._storage.departure.hand_over(partial(self.disk.flush, quiet=True))
        finally:
            self._remember()

    def log_start(self, socket: str) -> None:
        """Log that front-ends may connect."""
        _log.info(
            "serving",
            uri=self._uri.text,
            socket=socket,
            size_bytes=self._geometry.capacity_sectors * SECTOR_BYTES,
            read_only=self._geometry.read_only,
            cache=self._settings.cache.mode,
            engine=self._engine,
        )

    async def flush_at_the_end(self, limit_s: float) -> BridgeError | None:
        """Flush; return the problem to report to the operator, or None."""
        disk, storage = self.disk, self._storage
        error = 0
        with trio.move_on_after(limit_s, shield=True) as flushing:
            if not storage.has_left:
                error = await disk.flush()
        # A cache keeps what could not be flushed, and tries again when it is closed.
        if not storage.has_cache and (flushing.cancelled_caught or error):
            why = os.strerror(error) if error else "it did not answer in time"
            return BridgeError(
                f"the server could not flush at the end ({why}): what the guest wrote since "
                "its last flush may not be durable"
            )
        if disk.unreported or storage.loss_unreported:
            return BridgeError(
                "the server may have lost writes of the guest's that it had not flushed, and "
                "the guest has not flushed since, so it does not know: check its file systems"
            )
        return None


async def _cancel_at_signal(
    signals: trio.MemoryReceiveChannel[signal.Signals], until: trio.CancelScope, serving: _Serving
) -> None:
    number = await signals.receive()  # The first is enough: all ask for the same.
    _log.info("stopping", signal=number.name)
    serving.begin_to_stop()
    until.cancel()


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

"""What can be asked of a running bridge. Each action goes through the doors that signals, timers
and reconnects use; the data path does not know that it was asked.

Answers are dataclasses, errors HttpError: 409 if the disk's state does not allow it now, 502 if the
server refused, 504 if it takes too long (it goes on).
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from typing import Any, Final

import structlog
import trio

from bridge.api.http import HttpError
from bridge.api.live import Live
from bridge.api.view import Safety, Settings, View, Warming, guest_state, safety
from bridge.app import logs
from bridge.app.cache_ownership import is_shared
from bridge.cache.cache_options import WRITEBACK
from bridge.cache.warm import Warmer
from bridge.errors import BridgeError
from bridge.server.inspection import inspect
from bridge.units import SECTOR_BYTES, size_text

_log = structlog.get_logger(__name__)

_AT_ONCE: Final = 4
"""Actions at a time: the status can still be asked for meanwhile."""
_LOOK_S: Final = 0.02
"""How often to look: the data path does not report that the guest has got the new size."""
_QUIET_TRIES: Final = 20
_QUIET_PAUSE_S: Final = 0.1
_CLEAN_TRIES: Final = 5
_RENEW_S: Final = 10.0
"""For new connections, when another number of them is wanted."""
_OF_CLIENT: Final = ("connections", "request_timeout_s", "reconnect_timeout_s")
"""Settings that the client has."""


@dataclass(frozen=True)
class Flushed:
    """A flush has succeeded."""

    seconds: float
    dirty_bytes: int
    """What was written since it began."""


@dataclass(frozen=True)
class Dropped:
    """Clean blocks were forgotten."""

    dropped_bytes: int


@dataclass(frozen=True)
class Resized:
    """The server's size was looked at again."""

    changed: bool
    size_bytes: int
    """That the guest sees now."""


@dataclass(frozen=True)
class Stopping:
    """The process ends."""

    safe: bool
    answer: str


@dataclass(frozen=True)
class Upgrading:
    """Another program takes over."""


@dataclass
class Actions:
    """See the module's text; `end` ends the process as SIGTERM does."""

    view: View
    end: Callable[[], None]
    replace_program: Callable[[], Awaitable[None]] | None = None
    """Have another program take over; raises BridgeError if that is not possible now."""
    _at_once: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_AT_ONCE))
    _warmer: Warmer | None = None

    @property
    def live(self) -> Live:
        """The disk."""
        return self.view.live

    @contextmanager
    def _allowed(self) -> Iterator[None]:
        """Room for one more action. Raises HttpError 503."""
        if self.view.stopping:
            raise HttpError(HTTPStatus.SERVICE_UNAVAILABLE, "the bridge is stopping")
        try:
            self._at_once.acquire_on_behalf_of_nowait(token := object())
        except trio.WouldBlock:
            raise HttpError(
                HTTPStatus.SERVICE_UNAVAILABLE, "other actions are not done: try again later"
            ) from None
        try:
            yield
        finally:
            self._at_once.release_on_behalf_of(token)

    # To the server.

    async def flush(self, timeout_s: float) -> Flushed:
        """Bring everything to the server, durable. What is cached stays."""
        with self._allowed():
            flushed = await self._flush(timeout_s)
            if self.live.loss_unreported:
                # What is gone no flush brings back: the bridge's own succeed all the same.
                raise HttpError(
                    HTTPStatus.BAD_GATEWAY,
                    "the server may have lost writes, which the guest learns from its next flush",
                )
            return flushed

    async def _flush(self, timeout_s: float) -> Flushed:
        live = self.live
        if reason := live.left_reason:
            raise _conflict(f"nothing is sent to the server: {reason}")
        began_s = trio.current_time()
        error = 0
        with trio.move_on_after(timeout_s) as scope:
            error = await live.disk.flush(quiet=True)
        if scope.cancelled_caught:
            raise HttpError(
                HTTPStatus.GATEWAY_TIMEOUT,
                f"the flush is not done after {timeout_s:g} s, it goes on: "
                f"{size_text(live.dirty_bytes)} are not on the server",
                dirty_bytes=live.dirty_bytes,
            )
        if error:
            raise HttpError(
                HTTPStatus.BAD_GATEWAY, f"the server could not flush: {os.strerror(error)}"
            )
        return Flushed(trio.current_time() - began_s, live.dirty_bytes)

    async def detach(self, timeout_s: float) -> Safety:
        """Flush, and say whether the bridge may be stopped without leaving anything behind."""
        with self._allowed():
            return await self._make_safe(timeout_s)

    async def _make_safe(self, timeout_s: float) -> Safety:
        found = safety(self.live)
        for _ in range(_CLEAN_TRIES):
            if found.safe:
                break
            await self._flush(timeout_s)
            found = safety(self.live)
        if not found.safe:
            raise _conflict(f"not safe to stop: {', and '.join(found.reasons)}")
        return found

    async def stop(self, *, when_clean: bool, even_with_guest: bool, timeout_s: float) -> Stopping:
        """End the process, as SIGTERM does. `when_clean`: only if it leaves nothing behind."""
        with self._allowed():
            if guest_state(self.live) == "running" and not even_with_guest:
                raise _conflict(
                    "a guest uses the disk and would hang: shut it down first, or say that it is "
                    "to be stopped even with a guest"
                )
            found = await self._make_safe(timeout_s) if when_clean else safety(self.live)
        _log.info("stop asked for", when_clean=when_clean)
        return Stopping(found.safe, found.answer)

    async def upgrade(self) -> Upgrading:
        """Have the program that is installed by now take over; the guest waits for a moment.

        If it does, this program does not come to answer: the next one answers `/status`.
        """
        with self._allowed():
            if self.replace_program is None:
                raise _conflict("this bridge cannot replace its program")
            _log.info("upgrade asked for")
            try:
                await self.replace_program()
            except BridgeError as error:
                _log.warning("no other program takes over", reason=str(error))
                raise _conflict(f"the disk is served as before: {error}") from None
        return Upgrading()

    # The cache.

    async def drop_clean(self) -> Dropped:
        """Forget every clean block."""
        with self._allowed():
            live = self.live
            if live.cache is None:
                raise _conflict("there is no cache")
            before = live.valid_bytes
            live.cache.foreign.drop_clean()
            live.loop.turn.want()
            _log.info("clean blocks were dropped", bytes=before - live.valid_bytes)
            return Dropped(before - live.valid_bytes)

    async def warm(self, offset: int, length: int) -> Warming:
        """Begin to read a range into the cache; `length` 0: up to the end of the disk. The status
        shows how far it is."""
        with self._allowed():
            live = self.live
            cache = live.cache
            if cache is None:
                raise _conflict("there is no cache")
            if self._warmer is not None:
                raise _conflict("the cache is being warmed already: wait, or cancel that first")
            if not live.rings and is_shared(live.storage.client.uri.export_name):
                raise _conflict(
                    "the guest may be at another host and write in this session: its cache can be "
                    "warmed once it runs here"
                )
            if offset >= cache.size_bytes:
                raise HttpError(
                    HTTPStatus.BAD_REQUEST, f"offset: the disk has {cache.size_bytes} bytes"
                )
            length = min(length or cache.size_bytes, cache.size_bytes - offset)
            total = min(length, live.cache_bytes)
            # What comes after that would only push out what came first.
            warmer = Warmer(
                live.prefetch,
                [(offset, length)],
                limit_bytes=total,
                progress=lambda _: self._note_warming(warmer, total),
                done=lambda _: self._warmed(warmer, total),
            )
            self._warmer = warmer
            self._note_warming(warmer, total)
            warmer.start()
            live.loop.turn.want()
            assert self.view.warming is not None
            return self.view.warming

    async def cancel_warming(self) -> Warming:
        """Read nothing more into the cache for `warm`."""
        if self._warmer is None or self.view.warming is None:
            raise _conflict("the cache is not being warmed")
        self._warmer.stop()
        return self.view.warming

    def _note_warming(self, warmer: Warmer, total: int) -> None:
        self.view.warming = Warming(warmer.done_bytes, total, warmer.failed_bytes)

    def _warmed(self, warmer: Warmer, total: int) -> None:
        self._note_warming(warmer, total)
        self._warmer = None
        _log.info("the cache is warm", bytes=warmer.done_bytes, failed_bytes=warmer.failed_bytes)

    def stopping(self) -> None:
        """The process ends: begin nothing more."""
        self.view.stopping = True
        if self._warmer is not None:
            self._warmer.stop()

    # The size.

    async def resize(self, timeout_s: float) -> Resized:
        """Ask the server for the export's size, and take it over if it has grown.

        A server gives a new size only to a new connection, so the present ones are replaced then,
        once nothing acknowledged can be lost with them.
        """
        with self._allowed():
            try:
                with trio.fail_after(timeout_s):
                    return await self._look_again()
            except trio.TooSlowError:
                raise HttpError(
                    HTTPStatus.GATEWAY_TIMEOUT, f"not done after {timeout_s:g} s"
                ) from None
            except BridgeError as error:
                raise HttpError(HTTPStatus.BAD_GATEWAY, str(error)) from None

    async def _look_again(self) -> Resized:
        live = self.live
        client = live.storage.client
        if not client.connected:
            raise _conflict("the server is not connected: the size is looked at when it is again")
        if reason := live.left_reason:
            raise _conflict(f"the server is not used: {reason}")
        export = await inspect(client.uri, client.options)
        present = client.export.usable_bytes
        if export.usable_bytes < present:
            raise _conflict(
                f"the export has {export.usable_bytes} bytes, less than the {present} that the "
                "guest sees: a disk cannot shrink under a guest"
            )
        if export.usable_bytes == present:
            return Resized(False, live.capacity_bytes)
        generation = client.generation
        if not await _renewed(live):
            raise _conflict(
                "the guest writes all the time, and this server does not say who it is: a "
                "reconnect now would fail the guest's next flush; try again when it writes less"
            )
        wanted = export.usable_bytes // SECTOR_BYTES * SECTOR_BYTES
        while client.generation == generation or live.capacity_bytes < wanted:  # noqa: ASYNC110
            await trio.sleep(_LOOK_S)
        _log.info("the disk has grown", size_bytes=live.capacity_bytes)
        return Resized(True, live.capacity_bytes)


@dataclass
class Changes:
    """The settings that can be changed while the bridge runs."""

    view: View

    def now(self) -> Settings:
        """As they are."""
        live = self.view.live
        client = live.storage.client.options
        return Settings(
            cache_mode=live.mode,
            flush_interval_s=live.flush_interval_s,
            drain_timeout_s=live.drain_timeout_s,
            slow_ms=self.view.watch.slow_s * 1000,
            log_level=logs.level(),
            connections=client.connections,
            request_timeout_s=client.request_timeout_s,
            reconnect_timeout_s=client.reconnect_timeout_s,
        )

    async def change(self, wanted: dict[str, Any]) -> Settings:
        """Change those of `wanted` that are not None: all of them, or none and HttpError 409.

        Another number of connections is had at once, if they can be replaced without a risk;
        otherwise the next time that they are made.
        """
        live = self.view.live
        mode = wanted["cache_mode"]
        if mode is not None and live.cache is None:
            raise _conflict("there is no cache, so it has no mode: a cache is chosen at the start")
        if mode is not None:
            assert live.cache is not None
            live.cache.set_write_back(mode == WRITEBACK)
            live.loop.turn.want()
        if wanted["flush_interval_s"] is not None:
            live.set_flush_interval(wanted["flush_interval_s"])
        if wanted["drain_timeout_s"] is not None:
            live.set_drain_timeout(wanted["drain_timeout_s"])
        if wanted["slow_ms"] is not None:
            self.view.watch.slow_s = wanted["slow_ms"] / 1000
        if wanted["log_level"] is not None:
            logs.set_level(wanted["log_level"])
        said = {name: value for name, value in wanted.items() if value is not None}
        if said:
            _log.info("settings were changed", **said)
        client = live.storage.client
        before = client.options.connections
        given = {name: wanted[name] for name in _OF_CLIENT if wanted[name] is not None}
        client.use(replace(client.options, **given))
        if client.options.connections != before and client.connected:
            with trio.move_on_after(_RENEW_S):
                await _renewed(live)
        return self.now()


async def _renewed(live: Live) -> bool:
    """The connections are being replaced; False: nothing acknowledged may get lost, and the guest
    writes without a pause."""
    client = live.storage.client
    for _ in range(_QUIET_TRIES):
        if client.renew():
            return True
        await live.disk.flush(quiet=True)
        if client.renew():
            return True
        await trio.sleep(_QUIET_PAUSE_S)
    return False


def _conflict(text: str) -> HttpError:
    return HttpError(HTTPStatus.CONFLICT, text)

"""A guest of our own: writers on several queues, each of whose requests the oracle judges."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import inf
from random import Random

import trio

from bridge.errors import BridgeError, ConnectionLost, RequestError
from bridge.spec.virtio_blk import F_DISCARD, F_WRITE_ZEROES
from bridge.units import SECTOR_BYTES
from tests.sim.oracle import Change, Violation
from tests.torture.clients import Driver, MakeDriver
from tests.torture.content import numbers_of, sectors_of
from tests.torture.oracle import DiskOracle
from tests.torture.tally import Tally

WRITERS = 4
LARGEST_SECTORS = 256
_THINK_S = 0.02
_FLUSH_PAUSE_S = 0.7
_RETRY_S = 0.05
_HOT_SECTORS = 2048
"""Half of the requests go here: sectors that are written again and again."""


class Excuses:
    """Which requests may fail: those that were sent before some fault was over."""

    def __init__(self) -> None:
        self._until: dict[str, float] = {}

    def begin(self, *kinds: str) -> None:
        """From now on requests of these kinds may fail."""
        for kind in kinds:
            self._until[kind] = inf

    def end(self, moment: int) -> None:
        """No request that is sent after this moment may fail any more."""
        for kind, until in self._until.items():
            self._until[kind] = min(until, moment)

    def has(self, kind: str, since: int) -> bool:
        """A request of this kind that was sent at `since` may fail."""
        return since <= self._until.get(kind, -1)


@dataclass(eq=False)
class Under:
    """A request under way, or a start: for those who look for one that hangs."""

    kind: str
    began_tick: int


class Guest:
    """One disk's guest. `run` serves until cancelled; a Violation ends it."""

    def __init__(
        self,
        make_driver: MakeDriver,
        oracle: DiskOracle,
        rng: Random,
        tally: Tally,
        *,
        client: str,
        reconnects: bool,
        discards: bool,
    ) -> None:
        """`make_driver`: of the front-end, at each start of a guest; `client` is its name.
        `reconnects`: it goes on with another bridge."""
        self._make_driver = make_driver
        self._client = client
        self._reconnects = reconnects
        self.oracle = oracle
        self._rng = rng
        self._tally = tally
        self._discards = discards
        self.excuses = Excuses()
        self.tick = 0
        """Seconds of this process's own time: it stands still while the campaign is stopped."""
        self.under_way: set[Under] = set()
        self.flushes = 0
        self.boots = 0
        self._flush_done = trio.Event()
        self._unanswered: set[Change] = set()
        self._driver: Driver | None = None
        self._session: trio.CancelScope | None = None
        self._watch: trio.CancelScope | None = None
        self._last_flush_since = -1
        self._talking = trio.Lock()
        """One at a time uses the front-end's connection."""
        self._writes = trio.Event()
        self._writes.set()

    # Its life.

    async def run(self) -> None:
        """Be a guest, and another one after each reset."""
        while True:
            with trio.CancelScope() as self._session:
                with self._waiting("start of a guest"):
                    driver = await self._boot()
                try:
                    async with trio.open_nursery() as nursery:
                        nursery.start_soon(self._stay_connected, driver)
                        nursery.start_soon(self._flusher)
                        for _ in range(WRITERS):
                            nursery.start_soon(self._writer)
                finally:
                    self._driver = None
                    self.oracle.guest_forgets(self._unanswered)
                    self._unanswered.clear()
                    driver.close()

    async def _boot(self) -> Driver:
        while True:
            driver = self._make_driver()
            try:
                await driver.start()
            except BridgeError:
                driver.close()
                await trio.sleep(_RETRY_S)
                continue
            except BaseException:
                driver.close()
                raise
            self._driver = driver
            self.boots += 1
            return driver

    async def reset(self) -> None:
        """The guest is gone in this moment, and another one starts; return once it is gone."""
        if self._session is not None:
            self._session.cancel()
        while self._driver is not None:
            await trio.lowlevel.checkpoint()

    def bridge_begins(self) -> None:
        """A new bridge: a front-end that does not reconnect is replaced."""
        if not self._reconnects and self._session is not None:
            self._session.cancel()

    async def _stay_connected(self, driver: Driver) -> None:
        """As QEMU does with `reconnect`."""
        while True:
            with trio.CancelScope() as self._watch, suppress(ConnectionLost):
                await driver.config_changed()
                continue
            async with self._talking:
                if not self._watch.cancelled_caught:
                    await self._reconnect(driver)

    async def _reconnect(self, driver: Driver) -> None:
        while True:
            try:
                await driver.reconnect()
            except BridgeError:
                await trio.sleep(_RETRY_S)
            else:
                return

    # What others want of it.

    async def recovers(self) -> None:
        """Wait until a flush that is sent after now has succeeded; then nothing is excused."""
        before = self.oracle.now()
        while True:
            ended = self._flush_done
            await ended.wait()
            if self._last_flush_since > before:
                break
        self.excuses.end(self.oracle.now())

    def hold(self) -> None:
        """Nobody sends anything new until `release`."""
        self._writes = trio.Event()

    def release(self) -> None:
        """Go on."""
        self._writes.set()

    async def all_answered(self) -> None:
        """After `hold`: wait until nothing is under way."""
        while self.under_way:
            await trio.sleep(_RETRY_S)

    async def read_everything(self) -> None:
        """Judge the whole disk, as the guest sees it."""
        size = len(self.oracle.sectors)
        for first in range(0, size, LARGEST_SECTORS):
            await self._read(first, min(LARGEST_SECTORS, size - first))

    async def flush_once(self) -> None:
        """A flush, whatever comes of it."""
        await self._flush()

    # Its requests.

    async def _writer(self) -> None:
        rng = self._rng
        while True:
            await self._writes.wait()
            first, count = self._range()
            dice = rng.random()
            if dice < 0.5:
                await self._read(first, count)
            elif dice < 0.93:
                await self._change("write", first, count)
            elif dice < 0.96:
                await self._change("zeroes", first, count)
            elif dice < 0.98:
                if self._discards:
                    await self._change("discard", first, count)
            else:
                await self._flush()
            await trio.sleep(rng.random() * _THINK_S)

    async def _flusher(self) -> None:
        while True:
            await self._writes.wait()
            await self._flush()
            await trio.sleep(self._rng.random() * _FLUSH_PAUSE_S)

    def _range(self) -> tuple[int, int]:
        """First sector and count: pages as a rule, odd sectors now and then."""
        rng = self._rng
        end = _HOT_SECTORS if rng.random() < 0.4 else len(self.oracle.sectors)
        count = rng.choice((1, 3, 8, 8, 16, 64, 100, LARGEST_SECTORS))
        first = rng.randrange(end - count + 1)
        return (first, count) if count % 8 else (first & ~7, count)

    async def _read(self, first: int, count: int) -> None:
        driver = self._driver
        with self.oracle.since() as since:
            data = b""

            async def read() -> None:
                nonlocal data
                assert driver is not None
                data = await driver.read(first * SECTOR_BYTES, count * SECTOR_BYTES)

            if await self._done("read", since, read):
                numbers = numbers_of(self.oracle.disk, first, data)
                self.oracle.judge_read(first, numbers, since)

    async def _change(self, kind: str, first: int, count: int) -> None:
        driver = self._driver
        assert driver is not None
        wanted = {"discard": F_DISCARD, "zeroes": F_WRITE_ZEROES}.get(kind, 0)
        if wanted and not driver.features & wanted:
            return
        oracle = self.oracle
        change = oracle.begin(first, count, zeroes=kind == "zeroes", anything=kind == "discard")
        self._unanswered.add(change)
        start, length = first * SECTOR_BYTES, count * SECTOR_BYTES

        async def send() -> None:
            if kind == "write":
                data = sectors_of(oracle.disk, first, count, change.number)
                await driver.write(start, data)
            elif kind == "zeroes":
                await driver.write_zeroes([(start, length)], unmap=self._rng.random() < 0.5)
            else:
                await driver.discard([(start, length)])

        done = await self._done(kind, change.began, send)
        oracle.end(change, done=done)
        self._unanswered.discard(change)

    async def _flush(self) -> None:
        driver = self._driver
        assert driver is not None
        with self.oracle.since() as since:
            if await self._done("flush", since, driver.flush):
                await self.oracle.flush_succeeded(since)
                self._last_flush_since = max(self._last_flush_since, since)
                self.flushes += 1
                self._flush_done.set()
                self._flush_done = trio.Event()
            else:
                self.oracle.flush_failed()

    async def _done(self, kind: str, since: int, send: Callable[[], Awaitable[None]]) -> bool:
        """Send a request; whether it succeeded. Raises Violation if it fails without a reason."""
        try:
            with self._waiting(kind):
                await send()
        except RequestError as error:
            if not self.excuses.has(kind, since):
                raise Violation(
                    f"disk {self.oracle.disk}: a {kind} failed ({error}) and no fault explains it"
                ) from error
            self._tally.errors[kind] += 1
            return False
        self._tally.requests[kind] += 1
        self._tally.clients[self._client] += 1
        return True

    @contextmanager
    def _waiting(self, kind: str) -> Iterator[None]:
        """Whoever looks for what hangs knows of it."""
        under = Under(kind, self.tick)
        self.under_way.add(under)
        try:
            yield
        finally:
            self.under_way.discard(under)

    def oldest_age_ticks(self) -> tuple[int, str]:
        """Age of the request that has waited longest, and its kind."""
        began, kind = min(
            ((each.began_tick, each.kind) for each in self.under_way), default=(self.tick, "")
        )
        return self.tick - began, kind

    # Pauses.

    async def pause(self, paused: Callable[[], Awaitable[None]]) -> bool:
        """Stop every ring, do `paused()` and go on; False if the back-end did not answer well."""
        driver = self._driver
        if driver is None or self._watch is None:
            return False
        async with self._talking:
            self._watch.cancel()
            try:
                await driver.stop()
            except BridgeError:
                answered = False
            else:
                answered = True
                await paused()
            await self._reconnect(driver)
        return answered

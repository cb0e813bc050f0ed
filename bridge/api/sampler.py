"""Latency without a cost per request: now and then one request is timed, from pop to completion.

The sampler is a poller of the loop, behind the rings, but only while it is armed. Once a turn has
popped requests, it takes one of them at random and is disarmed for `PAUSE_S`. A request that was
served on the spot has been timed by then; of the others the `done` is replaced by one that looks at
the clock. So the data path pays for one comparison per turn while nothing comes, and for some 10
timed requests per second while much does.

A request's time begins with the turn in which it was popped (`Loop.now`), and ends when the turn
tells of its end; the used ring is published at the end of the same turn. In between are these
stages:

    take    until that turn ends: the chain was checked, the cache was asked, a command was sent
    server  if the server has a command for it by then: until the turn that brings the end
    held    else: it waits for room or other requests, for the cache's disk, for a connection
    reply   the rest: what the reply is copied to, and what it sets off

While the guest sends no requests, nothing here wakes the process.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from time import perf_counter
from typing import Any, Final

import structlog
import trio

from bridge.api.live import EndObserver, Live
from bridge.datapath.histogram import Histogram
from bridge.datapath.request import OP_NAMES, READ, WRITE, Request

_log = structlog.get_logger(__name__)

PAUSE_S: Final = 0.1
HIT = "cache"
MISS = "server"
SERVER: Final = "server"
HELD: Final = "held"


class _Timed(EndObserver):
    """The `done` of a request that is timed."""

    __slots__ = ("_ended", "at_server", "began_s", "taken_s")

    def __init__(
        self,
        done: Callable[[Any], None],
        began_s: float,
        ended: Callable[[Request, _Timed], None],
    ) -> None:
        super().__init__(done)
        self.began_s = began_s
        self.taken_s = 0.0
        """When the turn that popped it ended; 0: it has not."""
        self.at_server = False
        """Then."""
        self._ended = ended

    def __call__(self, request: Request) -> None:
        self._ended(request, self)
        request.done = self.then
        self.then(request)


class Sampler:
    """See the module's text."""

    def __init__(self, live: Live, *, random: Random | None = None) -> None:
        self._live = live
        self._loop = live.loop
        self._random = random or Random()
        self._popped = 0
        self._hits = (0, 0)
        self._rings: tuple[int, ...] = ()
        self._active = trio.Event()
        self.histograms: dict[tuple[str, ...], Histogram] = {}
        """By operation and by what served it: HIT, or MISS (all else, the server mostly)."""
        self.stages: dict[tuple[str, ...], Histogram] = {}
        """By operation and stage, of those that were not hits."""

    async def run(self) -> None:
        """Sample until cancelled."""
        try:
            while True:
                self._arm()
                await self._active.wait()
                self._loop.remove_poller(self)
                await trio.sleep(PAUSE_S)
        finally:
            self._loop.remove_poller(self)

    async def activity(self) -> None:
        """Return when requests have come; at once, if they did a moment ago."""
        await self._active.wait()

    def _arm(self) -> None:
        if self._active.is_set():  # Else a task may wait for it already.
            self._active = trio.Event()
        self._look()
        self._loop.add_poller(self)

    def _look(self) -> None:
        self._popped = self._live.requests_total
        self._hits = self._live.hits
        self._rings = self._live.ring_ids

    # The poller.

    def poll(self) -> bool:
        """See `loop.Poller`: has this turn popped anything?"""
        try:
            self._poll()
        except Exception as error:  # It would end the process.
            _log.error("internal error in the sampler", exc_info=error)
            self._loop.remove_poller(self)
        return False

    def _poll(self) -> None:
        live = self._live
        count = live.requests_total - self._popped
        if not count:
            return
        if live.ring_ids == self._rings and count > 0 and not self._active.is_set():
            self._sample(count)
        # Rings that are new are polled behind this: arming again puts it behind them.
        self._active.set()
        self._look()

    def arm(self) -> bool:
        """See `loop.Poller`."""
        return False

    def disarm(self) -> None:
        """See `loop.Poller`."""

    def _sample(self, count: int) -> None:
        """Time one of the `count` requests that this turn has popped."""
        reads, writes = (
            now - before for now, before in zip(self._live.hits, self._hits, strict=True)
        )
        chosen = self._random.randrange(count)
        began_s = self._loop.now
        if chosen < reads + writes:
            op = READ if chosen < reads else WRITE
            self._histogram(op, HIT).add(perf_counter() - began_s)
            return
        unanswered = self._live.unanswered()
        from_the_end = chosen - reads - writes + 1
        if from_the_end > len(unanswered):
            return  # A request that was refused.
        request = unanswered[-from_the_end]
        # An older one, if one of this turn's was refused, may be in other hands by now.
        if not isinstance(request.done, _Timed) and self._live.is_as_it_came(request):
            timed = _Timed(request.done, began_s, self._ended)
            request.done = timed
            self._loop.turn.at_end(lambda: self._taken(request, timed))

    def _taken(self, request: Request, timed: _Timed) -> None:
        """The turn that popped `request` ends."""
        if request.done is timed:  # Else it has ended, or was abandoned.
            timed.at_server = self._live.is_at_server(request)
            timed.taken_s = perf_counter()

    def _ended(self, request: Request, timed: _Timed) -> None:
        ended_s = perf_counter()
        self._histogram(request.op, MISS).add(ended_s - timed.began_s)
        taken_s = timed.taken_s or ended_s
        self._stage(request.op, "take").add(taken_s - timed.began_s)
        if timed.taken_s:
            # The end of a wait: the turn that brought it has begun since then.
            back_s = min(max(self._loop.now, taken_s), ended_s)
            self._stage(request.op, SERVER if timed.at_server else HELD).add(back_s - taken_s)
            self._stage(request.op, "reply").add(ended_s - back_s)

    def _stage(self, op: int, stage: str) -> Histogram:
        return self.stages.setdefault((OP_NAMES[op], stage), Histogram())

    def _histogram(self, op: int, served_by: str) -> Histogram:
        return self.histograms.setdefault((OP_NAMES[op], served_by), Histogram())
